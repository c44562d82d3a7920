#pragma once
// What the walks of dq and dk under a decay per key (key_gradient_pass.cuh) are given, where it lies in shared memory, and the
// copies in and out, of which every thread has its share.
#include "chela/cuda/attention/key_gradient_sums.cuh"
#include "chela/cuda/attention/key_gradient_values.cuh"

namespace chela::cuda::detail {

/// One walk. The roles of q, k and v are those of the pass of outputs; key_dim and value_dim likewise.
template <class T>
struct KeyGradientPass {
  TensorView<const T, 4> q, k, v;
  TensorView<const T, 4> primal;  ///< what the output is the gradient of: for dv, and for the log-decays' gradient
  TensorView<T, 4> o;             ///< absent when not wanted
  TensorView<T, 4> values = {};   ///< dv, likewise
  LinearPass pass;
  KeyDecayGradient<T> decay = {};
};

/// Values that an instance has room for.
constexpr int key_gradient_class(Index value_dim) { return value_dim <= 64 ? 64 : value_dim <= 128 ? 128 : 256; }

/// Sizes of one instance, for up to ReadClass values. Tiles of elements have 16 rows (arch::swizzled<16>), those of floats
/// rows with 16 bytes to spare, so that lanes that read down a column do not meet in a bank.
template <int ReadClass, int KeyTile, int Stages, bool Reversed, bool Values = false>
struct KeyGradientTiles {
  using OfValues = ValueGradientTiles<ReadClass, KeyTile, Values>;
  static constexpr int warps = KeyTile / 16, threads = 32 * warps, stages = Stages;
  static constexpr int read_units = ReadClass / 8, key_units = KeyTile / 8;
  static constexpr int read_tile = 16 * ReadClass * 2, key_tile = 16 * KeyTile * 2;
  static constexpr int float_row = (KeyTile + 4) * int(sizeof(float)), float_tile = 16 * float_row;
  static constexpr int writing = read_tile, written = 2 * read_tile, primal = written + key_tile,
                       queries = primal + key_tile;  ///< in a stage, behind what is read
  static constexpr int log_decays = written + (Reversed ? 3 : 1) * key_tile, stage = log_decays + float_tile;
  static constexpr int staged =
      (Reversed ? 1 : 2) * key_tile;  ///< the output, and in time what is left for the way back
  static constexpr int sums = Stages * stage + 2 * staged, windows = Reversed ? sum_tiles * float_tile : 0;
  static constexpr int anchors_begin = sums + windows, excess_begin = anchors_begin + KeyTile * int(sizeof(float)),
                       values_begin = excess_begin + (Reversed ? KeyTile * int(sizeof(float2)) : 0);
  static constexpr int bytes = values_begin + OfValues::bytes;

  std::uint32_t base;

  // Blocks are counted as the walk goes.
  __device__ std::uint32_t read(int step) const { return base + unsigned(step % Stages * stage); }
  __device__ std::uint32_t output(int step) const { return base + unsigned(Stages * stage + step % 2 * staged); }
  __device__ std::uint32_t terms(int step) const { return base + unsigned(sums + step % sum_tiles * float_tile); }
  __device__ std::uint32_t anchors() const { return base + unsigned(anchors_begin); }
  __device__ std::uint32_t excess() const { return base + unsigned(excess_begin); }
  __device__ std::uint32_t values() const { return base + unsigned(values_begin); }
};

/// Where a block of threads begins and ends, in blocks of tokens.
struct BlockRange {
  int first, count, tokens;

  __device__ explicit BlockRange(const Place& place) : tokens(place.tokens) {
    constexpr int blocks = chunk_len / 16;
    first = blocks * place.first_chunk;
    count = max(min(blocks * place.end_chunk, (place.tokens + 15) / 16) - first, 0);
  }
  template <bool Reversed>
  __device__ int token_at(int step) const {
    return 16 * (Reversed ? first + count - 1 - step : first + step);
  }
  /// The step after the last one in the window of this one.
  template <bool Reversed>
  __device__ int end_of_window(int step) const {
    constexpr int blocks = key_window / 16;
    const int block = token_at<Reversed>(step) / 16;
    return min(count, step + (Reversed ? block % blocks + 1 : blocks - block % blocks));
  }
  __device__ bool has_end() const { return count > 0 && 16 * (first + count) >= tokens; }
};

/// A thread's share of the tiles of one tensor, `Units` units of 16 bytes in a row: a pointer that walks along.
template <int Threads, int Units, class T>
class TileRows {
 public:
  __device__ TileRows(TensorView<T, 4> view, const Place& place, int head, int column, int first_token, int thread)
      : row_(thread / Units), unit_(thread % Units) {
    if (!view.present()) return;
    inside_ = column + 8 * unit_ < view.extents[3];
    at_ = &view(place.batch, place.first_token + first_token + row_, head, column + 8 * unit_);
  }
  __device__ bool present() const { return at_; }

  /// Calls f(offset in a tile, address, whether it is one of `left` tokens and there are such columns), and goes on to the
  /// next block, in `step` tokens.
  template <class F>
  __device__ void for_each(int left, Index token_stride, int step, F f) {
    constexpr int together = Threads / Units;
    static_assert(Threads % Units == 0 && 16 % together == 0);
#pragma unroll
    for (int i = 0; i < 16 / together; ++i)
      f(unsigned(arch::swizzled<16>(row_ + i * together, unit_)), at_ + i * together * token_stride,
        inside_ && row_ + i * together < left);
    at_ += step * token_stride;
  }

 private:
  T* at_ = nullptr;
  int row_, unit_;
  bool inside_ = false;
};

/// The same for log-decays: a tile of floats, two at a time.
template <class Tiles>
class LogDecayRows {
 public:
  __device__ LogDecayRows(const LinearPass& pass, const Place& place, int first_token, int thread)
      : row_(thread / pairs), pair_(thread % pairs), inside_(place.value_begin + 2 * pair_ < pass.value_dim) {
    const GateSource source = gates_of(pass, place);
    at_ = source.data + place.value_begin + 2 * pair_ + (first_token + row_) * source.token_stride;
  }
  __device__ void load(std::uint32_t tile, int left, Index token_stride, int step) {
    constexpr int together = Tiles::threads / pairs;
#pragma unroll
    for (int i = 0; i < 16 / together; ++i)
      arch::copy_async_8(tile + unsigned((row_ + i * together) * Tiles::float_row + 8 * pair_),
                         at_ + i * together * token_stride, inside_ && row_ + i * together < left);
    at_ += step * token_stride;
  }

 private:
  static constexpr int pairs = 4 * Tiles::key_units;
  const float* at_;
  int row_, pair_;
  bool inside_;
};

/// The copies of a walk's blocks of tokens, with zeros past the end and past the last column. Every thread has one.
template <class T, class Tiles, bool Reversed>
class BlockLoads {
 public:
  __device__ BlockLoads(const KeyGradientPass<T>& args, const Place& place, const BlockRange& blocks, int thread)
      : args_(args),
        left_(blocks.count),
        tokens_left_(place.tokens - blocks.token_at<Reversed>(0)),
        q_(args.q, place, place.query_head, 0, blocks.token_at<Reversed>(0), thread),
        k_(args.k, place, place.key_head, 0, blocks.token_at<Reversed>(0), thread),
        v_(args.v, place, place.value_head, place.value_begin, blocks.token_at<Reversed>(0), thread),
        primal_(Reversed ? args.primal : TensorView<const T, 4>{}, place,
                place.head / args.pass.heads.outputs_per_primal, place.value_begin, blocks.token_at<Reversed>(0),
                thread),
        queries_(Reversed ? TensorView<const T, 4>(args.decay.queries) : TensorView<const T, 4>{}, place, place.head,
                 place.value_begin, blocks.token_at<Reversed>(0), thread),
        log_decays_(args.pass, place, blocks.token_at<Reversed>(0), thread) {}

  /// The next block, into this stage; none if there is none. One group of copies in any case.
  __device__ void load_next(std::uint32_t stage) {
    if (left_ > 0) {
      load(stage, q_, args_.q), load(stage + Tiles::writing, k_, args_.k), load(stage + Tiles::written, v_, args_.v);
      if (Reversed && primal_.present()) load(stage + Tiles::primal, primal_, args_.primal);
      if (Reversed && queries_.present()) load(stage + Tiles::queries, queries_, args_.decay.queries);
      log_decays_.load(stage + Tiles::log_decays, tokens_left_, args_.pass.log_decay.strides[1], forward);
      --left_, tokens_left_ -= forward;
    }
    arch::commit_copies();
  }

 private:
  static constexpr int forward = Reversed ? -16 : 16;
  template <class Rows>
  __device__ void load(std::uint32_t tile, Rows& rows, const TensorView<const T, 4>& view) const {
    rows.for_each(tokens_left_, view.strides[1], forward,
                  [&](unsigned offset, const T* from, bool valid) { arch::copy_async_16(tile + offset, from, valid); });
  }

  const KeyGradientPass<T>& args_;
  int left_, tokens_left_;
  TileRows<Tiles::threads, Tiles::read_units, const T> q_, k_;
  TileRows<Tiles::threads, Tiles::key_units, const T> v_, primal_, queries_;
  LogDecayRows<Tiles> log_decays_;
};

/// What a walk's blocks of tokens leave in shared memory, on its way out.
template <class T, class Tiles, bool Reversed, bool Values>
class BlockStores {
 public:
  __device__ BlockStores(const KeyGradientPass<T>& args, const Place& place, const BlockRange& blocks, int thread)
      : args_(args),
        tokens_left_(place.tokens - blocks.token_at<Reversed>(0)),
        outputs_(args.o, place, place.head, place.value_begin, blocks.token_at<Reversed>(0), thread),
        queries_(Reversed ? TensorView<T, 4>{} : args.decay.queries, place, place.head, place.value_begin,
                 blocks.token_at<Reversed>(0), thread),
        values_(Values ? args.values : TensorView<T, 4>{}, place, place.head, 0, blocks.token_at<Reversed>(0), thread) {
  }

  __device__ void store_next(const Tiles& tiles, int step) {
    store(tiles.output(step), outputs_, args_.o);
    store(tiles.output(step) + Tiles::key_tile, queries_, args_.decay.queries);
    store(tiles.values() + Tiles::OfValues::output, values_, args_.values);
    tokens_left_ -= forward;
  }

 private:
  static constexpr int forward = Reversed ? -16 : 16;
  template <class Rows>
  __device__ void store(std::uint32_t tile, Rows& rows, const TensorView<T, 4>& view) const {
    if (!rows.present()) return;
    rows.for_each(tokens_left_, view.strides[1], forward, [&](unsigned offset, T* to, bool valid) {
      if (valid) *reinterpret_cast<uint4*>(to) = arch::load_shared_unit(tile + offset);
    });
  }

  const KeyGradientPass<T>& args_;
  int tokens_left_;
  TileRows<Tiles::threads, Tiles::key_units, T> outputs_, queries_;
  TileRows<Tiles::threads, Tiles::read_units, T> values_;
};

}  // namespace chela::cuda::detail
