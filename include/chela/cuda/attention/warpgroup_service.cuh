#pragma once
// The warps beside the warpgroups of a pass: one starts the copies of chunks to come, one makes decay weights, one starts the
// stores of outputs. Each takes some hundred cycles for a chunk, which here are not on the way from one chunk's state to
// the next's.
#include "chela/cuda/attention/warpgroup_tiles.cuh"

namespace chela::cuda::detail {

/// A step's chunk.
template <class W>
__device__ int chunk_of(const Place& place, int step) {
  return W::reversed ? place.end_chunk - 1 - step : place.first_chunk + step;
}

/// One thread: fills each place of the ring as soon as it is free.
template <class T, class W, class Tiles>
__device__ void load_chunks(const WarpgroupPass<T>& args, const Tiles& tiles, WarpgroupBarriers& barriers,
                            const Place& place) {
  ChunkLoader<T, Tiles, W::reversed> loader(args, tiles, barriers, place, true);
  RingPosition at;
  for (int step = 0; step < place.end_chunk - place.first_chunk; ++step) {
    arch::wait_barrier(arch::shared_address(&barriers.released[at.place]), at.parity ^ 1);
    loader.load_next();
    at.advance(tiles.stages);
  }
}

/// One warp: the decay weights of each chunk, beside its place of the ring.
template <class T, class W, class Tiles>
__device__ void weigh_chunks(const WarpgroupPass<T>& args, const Tiles& tiles, WarpgroupBarriers& barriers,
                             const Place& place, int lane) {
  GateRing ring(tiles.gate_ring(0), gates_of(args.pass, place), place.first_chunk, place.end_chunk, lane, W::reversed);
  RingPosition at;
  for (int step = 0; step < place.end_chunk - place.first_chunk; ++step) {
    const ChunkGates gates = ring.take();
    arch::wait_barrier(arch::shared_address(&barriers.released[at.place]), at.parity ^ 1);
    tiles.gates(at.place).write(gates, lane, W::reversed);
    tiles.score_weights(at.place).write(gates, lane, W::reversed);
    arch::arrive(arch::shared_address(&barriers.gated[at.place]));
    at.advance(tiles.stages);
  }
}

/// One warp: passes on the outputs that the warpgroups have staged.
template <class T, class W, int ValueGroups, class Tiles>
class OutputStores {
 public:
  __device__ OutputStores(const WarpgroupPass<T>& args, const Tiles& tiles, WarpgroupBarriers& barriers,
                          const Place& place, int lane)
      : args_(args),
        tiles_(tiles),
        barriers_(barriers),
        place_(place),
        lane_(lane),
        count_(place.end_chunk - place.first_chunk),
        sums_(W::may_sum && args.pass.sums.rows),
        loads_beside_(W::joins || sums_) {}

  __device__ void run() const {
    if (loads_beside_ && lane_ == 0)
      for (int i = 0; i < 3; ++i) load_beside(i, i);
    const int shared = shared_chunk(args_.pass, place_);
    RingPosition staged;
    for (int step = 0; step < count_; ++step) {
      const int chunk = chunk_of<W>(place_, step);
#pragma unroll
      for (int group = 0; group < ValueGroups; ++group)
        arch::wait_barrier(arch::shared_address(&barriers_.staged[group][staged.place]), staged.parity);
      if (lane_ == 0) store(step, staged.place, chunk == shared);
      if (sums_) store_row_sums(chunk, staged.place);
      __syncwarp();
      staged.advance(Tiles::staging);
    }
    if (lane_ == 0) arch::wait_stores();
  }

 private:
  /// What belongs beside the output of a step, into the place of that output.
  __device__ void load_beside(int step, int staged) const {
    if (step >= count_) return;
    const int head = place_.head / args_.pass.heads.outputs_per_primal;
    for (int group = 0; group < ValueGroups; ++group) {
      const std::uint32_t loaded = arch::shared_address(&barriers_.beside[group][staged]);
      arch::arrive_expecting(loaded, Tiles::panel);
      arch::load_tensor(tiles_.output(group, staged), &args_.beside, loaded, 0, token_of(step),
                        place_.value_begin / 64 + group, head, place_.batch);
    }
  }

  /// Starts the stores of a step's outputs, which the warpgroups have stored themselves where the chunk is shared. Those
  /// of the step before have been read by now: their place is free.
  __device__ void store(int step, int staged, bool shared) const {
    arch::wait_stores_read();
    const int before = staged == 0 ? Tiles::staging - 1 : staged - 1;
    for (int group = 0; group < ValueGroups; ++group) {
      if (step > 0) arch::arrive(arch::shared_address(&barriers_.cleared[group][before]));
      if (args_.output.present() && !shared)
        arch::store_tensor(&args_.o, tiles_.output(group, staged), 0, token_of(step), place_.value_begin / 64 + group,
                           place_.head, place_.batch);
    }
    if (step > 0 && loads_beside_) load_beside(step + 2, before);
  }

  /// Over the warps of each warpgroup.
  __device__ void store_row_sums(int chunk, int staged) const {
#pragma unroll
    for (int group = 0; group < ValueGroups; ++group) {
      float* const to = row_sums(args_.pass, place_, place_.value_begin / 64 + group);
      for (int token = lane_; token < min(chunk_len, place_.tokens - chunk * chunk_len); token += 32) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sum += arch::load_shared_float(tiles_.row_sums(group, staged, i) + 4u * unsigned(token));
        to[chunk * chunk_len + token] = sum;
      }
    }
  }

  __device__ int token_of(int step) const { return place_.first_token + chunk_of<W>(place_, step) * chunk_len; }

  const WarpgroupPass<T>& args_;
  const Tiles& tiles_;
  WarpgroupBarriers& barriers_;
  const Place& place_;
  int lane_, count_;
  bool sums_, loads_beside_;
};

/// The three of them; `warp` counts the warps of a warpgroup.
template <class T, class D, class W, int ValueGroups, class Tiles>
__device__ void serve_chunks(const WarpgroupPass<T>& args, const Tiles& tiles, WarpgroupBarriers& barriers,
                             const Place& place, int warp, int lane) {
  if (warp == 0 && lane == 0) load_chunks<T, W>(args, tiles, barriers, place);
  if constexpr (D::decays) {
    if (warp == 1) weigh_chunks<T, W>(args, tiles, barriers, place, lane);
  }
  if (warp == 2) OutputStores<T, W, ValueGroups, Tiles>(args, tiles, barriers, place, lane).run();
}

}  // namespace chela::cuda::detail
