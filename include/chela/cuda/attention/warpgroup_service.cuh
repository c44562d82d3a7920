#pragma once
// The warp beside the warpgroups of a pass. It starts the copies of chunks to come and the stores of outputs, and makes
// decay weights, far enough ahead: all that need not be on the way from one chunk's state to the next's.
#include "chela/cuda/attention/warpgroup_tiles.cuh"

namespace chela::cuda::detail {

template <class T, class D, class W, int ValueGroups, class Tiles>
class ChunkService {
 public:
  __device__ ChunkService(const WarpgroupPass<T>& args, const Tiles& tiles, WarpgroupBarriers& barriers,
                          const Place& place, int lane)
      : args_(args),
        tiles_(tiles),
        barriers_(barriers),
        place_(place),
        lane_(lane),
        count_(place.end_chunk - place.first_chunk) {}

  __device__ void run() {
    ChunkLoader<T, Tiles, W::reversed> loader(args_, tiles_, barriers_, place_, lane_ == 0);
    for (int i = 0; i < tiles_.stages; ++i) loader.load_next();
    if (sums_rows() && lane_ == 0)
      for (int i = 0; i < 3; ++i) load_primal(i, i);
    GateSource source;
    if constexpr (D::decays) source = gates_of(args_.pass, place_);
    [[maybe_unused]] auto gates = [&] {
      if constexpr (D::decays)
        return GateRing(tiles_.gate_ring(0), source, place_.first_chunk, place_.end_chunk, lane_, W::reversed);
      else
        return 0;
    }();
    if constexpr (D::decays)
      for (int i = 0; i < min(tiles_.stages, count_); ++i) write_gates(gates.take(), i);

    const int shared = shared_chunk(args_.pass, place_);
    RingPosition at, staged;
    for (int step = 0; step < count_; ++step) {
      arch::wait_barrier(arch::shared_address(&barriers_.released[at.place]), at.parity);
      loader.load_next();
#pragma unroll
      for (int group = 0; group < ValueGroups; ++group)
        arch::wait_barrier(arch::shared_address(&barriers_.staged[group][staged.place]), staged.parity);
      if (lane_ == 0) pass_on(step, staged.place, chunk_of(step) == shared);
      if (sums_rows()) store_row_sums(chunk_of(step), staged.place);
      if constexpr (D::decays)
        if (step + tiles_.stages < count_) write_gates(gates.take(), at.place);
      at.advance(tiles_.stages);
      staged.advance(Tiles::staging);
    }
    if (lane_ == 0) arch::wait_stores();
  }

 private:
  __device__ bool sums_rows() const { return W::may_sum && args_.pass.sums.rows; }
  __device__ int chunk_of(int step) const {
    return W::reversed ? place_.end_chunk - 1 - step : place_.first_chunk + step;
  }

  __device__ void write_gates(const ChunkGates& gates, int place) const {
    tiles_.gates(place).write(gates, lane_, W::reversed);
    tiles_.score_weights(place).write(gates, lane_, W::reversed);
    arch::arrive(arch::shared_address(&barriers_.gated[place]));
  }

  /// What the output of a step is the gradient of, into the place of that output.
  __device__ void load_primal(int step, int staged) const {
    if (step >= count_) return;
    const int head = place_.head / args_.pass.heads.outputs_per_primal;
    for (int group = 0; group < ValueGroups; ++group) {
      const std::uint32_t loaded = arch::shared_address(&barriers_.primal[group][staged]);
      arch::arrive_expecting(loaded, Tiles::panel);
      arch::load_tensor(tiles_.output(group, staged), &args_.primal, loaded, 0,
                        place_.first_token + chunk_of(step) * chunk_len, place_.value_begin / 64 + group, head,
                        place_.batch);
    }
  }

  /// Starts the stores of a step's outputs, which warpgroups have stored themselves where the chunk is shared. Those of
  /// the step before have been read by now: their place is free.
  __device__ void pass_on(int step, int staged, bool shared) const {
    arch::wait_stores_read();
    const int before = staged == 0 ? Tiles::staging - 1 : staged - 1;
    for (int group = 0; group < ValueGroups; ++group) {
      if (step > 0) arch::arrive(arch::shared_address(&barriers_.cleared[group][before]));
      if (args_.output.present() && !shared)
        arch::store_tensor(&args_.o, tiles_.output(group, staged), 0, place_.first_token + chunk_of(step) * chunk_len,
                           place_.value_begin / 64 + group, place_.head, place_.batch);
    }
    if (step > 0 && sums_rows()) load_primal(step + 2, before);
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

  const WarpgroupPass<T>& args_;
  const Tiles& tiles_;
  WarpgroupBarriers& barriers_;
  const Place& place_;
  int lane_, count_;
};

}  // namespace chela::cuda::detail
