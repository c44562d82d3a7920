// Operand layouts of the instructions in cuda/arch/, against plain products on the host.
#include <doctest/doctest.h>

#include "chela/cuda/arch/mma.cuh"
#include "chela/cuda/arch/numbers.cuh"
#include "chela/cuda/arch/shared.cuh"
#include "chela/cuda/arch/tensor_copy.cuh"
#include "chela/cuda/arch/warpgroup.cuh"
#include "chela/cuda/tensor_map.cuh"
#include "support/device.cuh"

using namespace chela;
using namespace chela::test;
using namespace chela::cuda;

namespace {

constexpr int panel = 64 * 128;  // bytes of 64 rows of 64 elements

/// Whether the device has what is compiled for sm_90a only.
bool has_warpgroups() {
  int major = 0;
  require_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  return major == 9;
}

/// c [m, n] = a [m, k] b [k, n] in double, from views that may be transposed.
template <class T>
Tensor<double, 2> product(TensorView<const T, 2> a, TensorView<const T, 2> b) {
  Tensor<double, 2> c(a.extents[0], b.extents[1]);
  for_each_index(c.view(), [&](auto i, auto j) {
    for (Index l = 0; l < a.extents[1]; ++l) c(i, j) += double(a(i, l)) * double(b(l, j));
  });
  return c;
}

/// Copies [64, 64 panels] from global into swizzled shared memory with ordinary stores. All threads.
template <class T>
__device__ void fill_tile(std::uint32_t tile, const T* from, int panels) {
  for (int i = int(threadIdx.x); i < 64 * 8 * panels; i += int(blockDim.x))
    arch::store_shared_unit(tile + unsigned(arch::swizzled<64>(i / (8 * panels), i % (8 * panels))),
                            reinterpret_cast<const uint4*>(from)[i]);
  arch::fence_copies();
  __syncthreads();
}

__device__ std::uint32_t aligned_tiles() {
  extern __shared__ char memory[];
  return (arch::shared_address(memory) + 1023u) & ~1023u;
}

/// d [16, 8] = a [16, 16] b^T, with b given as [8, 16]: a from rows, b from its transpose's rows and the other way.
template <class T>
__global__ void warp_product(const T* a, const T* b, float* d) {
  const std::uint32_t tile = aligned_tiles();
  fill_tile(tile, a, 1), fill_tile(tile + panel, b, 1);
  const int lane = int(threadIdx.x);
  std::uint32_t fa[4], fb[4], transposed_b[4];
  arch::load_matrices(fa, tile + unsigned(arch::swizzled<64>(lane % 16, lane / 16)));
  arch::load_matrices(fb, tile + panel + unsigned(arch::swizzled<64>(lane / 16 * 8 + lane % 8, lane / 8 % 2)));
  // Rows 16 to 31 of the second tile hold b transposed: [16 of the sum, 8].
  arch::load_matrices_transposed(transposed_b, tile + panel + unsigned(arch::swizzled<64>(16 + lane % 16, lane / 16)));
  float x[4] = {}, y[4] = {};
  arch::multiply_add<T>(x, fa, fb[0], fb[1]);
  arch::multiply_add<T>(y, fa, transposed_b[0], transposed_b[1]);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    d[row * 8 + column] = x[i], d[128 + row * 8 + column] = y[i];
  }
}

/// d [16, 16] = a a^T of floats, a [16, 32]: its registers serve as both operands.
__global__ void warp_product_of_floats(const float* a, float* d) {
  const std::uint32_t tile = aligned_tiles();
  fill_tile(tile, reinterpret_cast<const __half*>(a), 1);
  const int lane = int(threadIdx.x);
  float left[4] = {}, right[4] = {};
  for (int i = 0; i < 4; ++i) {
    std::uint32_t x[4];
    arch::load_matrices(x, tile + unsigned(arch::swizzled<64>(lane % 16, 2 * i + lane / 16)));
    arch::multiply_add_floats(left, x, x[0], x[2]);
    arch::multiply_add_floats(right, x, x[1], x[3]);
  }
  for (int i = 0; i < 4; ++i) {
    float* const row = d + 16 * (lane / 4 + i / 2 * 8) + lane % 4 * 2 + i % 2;
    row[0] = left[i], row[8] = right[i];
  }
}

__global__ void round_for_products(float* x) {
  x[threadIdx.x] = __uint_as_float(arch::rounded_for_products(x[threadIdx.x]));
}

/// Products [64, N] of 64 of the sum. `from_registers`: a is given to the product in registers.
template <class T, arch::Major A, arch::Major B, int Columns, bool FromRegisters>
__global__ void __launch_bounds__(128, 1) warpgroup_product(const T* a, const T* b, float* d) {
  if constexpr (arch::has_warpgroups) {
    const std::uint32_t tile = aligned_tiles();
    fill_tile(tile, a, 1);
    // b is [64 of the sum, N] for Major::side, else [N, 64 of the sum]: N / 64 panels beside or below one another.
    if constexpr (B == arch::Major::side) {
      fill_tile(tile + panel, b, Columns / 64);
    } else {
      fill_tile(tile + panel, b, 1);
    }
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    float x[Columns / 2];
    arch::fence_products();
    std::uint32_t fa[4][4];
    for (int i = 0; i < 4; ++i) {
      const std::uint64_t operand_b =
          arch::operand<B>(tile + panel + unsigned(B == arch::Major::sum ? 32 * i : 2048 * i));
      if constexpr (FromRegisters) {
        arch::load_matrices(fa[i], tile + unsigned(arch::swizzled<64>(16 * warp + lane % 16, 2 * i + lane / 16)));
        arch::fence_products();
        arch::start_product<T, B>(x, fa[i], operand_b, i > 0);
      } else {
        arch::start_product<T, A, B>(x, arch::operand<A>(tile + unsigned(A == arch::Major::sum ? 32 * i : 2048 * i)),
                                     operand_b, i > 0);
      }
      arch::commit_products();
      arch::wait_products<0>();
      arch::pin(x);
    }
    for (int i = 0; i < Columns / 2; ++i)
      d[(16 * warp + lane / 4 + i % 4 / 2 * 8) * Columns + 8 * (i / 4) + 2 * (lane % 4) + i % 2] = x[i];
  }
}

template <class T, arch::Major A, arch::Major B, int Columns, bool FromRegisters>
double warpgroup_error() {
  constexpr bool b_side = B == arch::Major::side;
  const auto a = random_tensor<T>(1, 64, 64);
  const auto b = random_tensor<T>(2, 64, std::max(Columns, 64));  // of whole panels
  const DeviceTensor<T, 2> device_a(a), device_b(b);
  const DeviceTensor<float, 2> d(nan_tensor<float>(64, Columns));
  const auto kernel = warpgroup_product<T, A, B, Columns, FromRegisters>;
  require_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 4 * panel));
  kernel<<<1, 128, 4 * panel>>>(device_a.view().data, device_b.view().data, d.view().data);
  require_cuda(cudaGetLastError());
  const auto ordered = [](TensorView<const T, 2> x, bool turn) { return turn ? transposed(x, 0, 1) : x; };
  const auto used = run(TensorView<const T, 2>(b), b_side ? 1 : 0, 0, Columns);
  return relative_error(d.host(), product(ordered(a, A == arch::Major::side), ordered(used, !b_side)));
}

/// A box through shared memory: in by the copy engine, out by ordinary loads and by the copy engine at other
/// coordinates.
__global__ void copy_box(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to, int token,
                         __nv_bfloat16* rows) {
  if constexpr (arch::has_warpgroups) {
    const std::uint32_t tile = aligned_tiles();
    __shared__ std::uint64_t barrier;
    if (threadIdx.x == 0) {
      arch::init_barrier(arch::shared_address(&barrier), 1);
      arch::fence_barriers();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      arch::arrive_expecting(arch::shared_address(&barrier), 2 * panel);
      arch::load_tensor(tile, &from, arch::shared_address(&barrier), 0, token, 0, 1, 1);
    }
    arch::wait_barrier(arch::shared_address(&barrier), 0);
    for (int i = int(threadIdx.x); i < 64 * 16; i += int(blockDim.x))
      reinterpret_cast<uint4*>(rows)[i] = arch::load_shared_unit(tile + unsigned(arch::swizzled<64>(i / 16, i % 16)));
    if (threadIdx.x == 0) {
      arch::store_tensor(&to, tile, 0, token, 0, 1, 1);
      arch::wait_stores_read();
      arch::wait_stores();
    }
  }
}

/// Registers into shared memory and back, as matrices and turned.
__global__ void store_and_load(std::uint32_t* wrong) {
  if constexpr (arch::has_warpgroups) {
    const std::uint32_t tile = aligned_tiles();
    const int lane = int(threadIdx.x);
    std::uint32_t in[4], out[4], turned[4];
    for (int i = 0; i < 4; ++i) in[i] = unsigned(100 * lane + i);
    const std::uint32_t address = tile + unsigned(arch::swizzled<64>(lane % 16, lane / 16));
    arch::store_matrices(address, in[0], in[1], in[2], in[3]);
    __syncwarp();
    arch::load_matrices(out, address);
    __syncwarp();
    arch::store_matrices_transposed(address, in[0], in[1], in[2], in[3]);
    __syncwarp();
    arch::load_matrices_transposed(turned, address);
    for (int i = 0; i < 4; ++i) atomicAdd(wrong, unsigned(out[i] != in[i]) + unsigned(turned[i] != in[i]));
  }
}

/// Rows copied 8 bytes at a time, zeros for every third; and matrices turned on the way out of shared memory and in
/// registers.
__global__ void copy_and_turn(const std::uint32_t* rows, std::uint32_t* copied, std::uint32_t* wrong) {
  const std::uint32_t tile = aligned_tiles();
  const int lane = int(threadIdx.x);
  for (int row = 0; row < 16; ++row)  // 16 rows of 128 bytes, of which a lane copies 8 bytes of every other
    if (row % 2 == lane / 16)
      arch::copy_async_8(tile + unsigned(128 * row + 8 * (lane % 16)), rows + 32 * row + 2 * (lane % 16), row % 3 != 0);
  arch::commit_copies();
  arch::wait_copies<0>();
  __syncwarp();
  for (int i = lane; i < 512; i += 32) copied[i] = arch::load_shared_word(tile + 4u * unsigned(i));
  std::uint32_t straight[4], turned[4];
  const std::uint32_t address = tile + unsigned(128 * (lane % 16) + 16 * (lane / 16));
  arch::load_matrices(straight, address);
  arch::load_matrices_transposed(turned, address);
  for (int i = 0; i < 4; ++i) atomicAdd(wrong, unsigned(arch::transpose_matrix(straight[i]) != turned[i]));
}

__global__ void round_trip(const float* x, float* bf16, float* half, float* powers) {
  const int i = int(threadIdx.x);
  const float2 a = arch::unpack<__nv_bfloat16>(arch::pack<__nv_bfloat16>(x[2 * i], x[2 * i + 1]));
  const float2 b = arch::unpack<__half>(arch::pack<__half>(x[2 * i], x[2 * i + 1]));
  bf16[2 * i] = a.x, bf16[2 * i + 1] = a.y, half[2 * i] = b.x, half[2 * i + 1] = b.y;
  powers[2 * i] = arch::exp2_flushed(-100 * fabsf(x[2 * i])), powers[2 * i + 1] = arch::exp2_flushed(-x[2 * i + 1]);
}

}  // namespace

TEST_CASE_TEMPLATE("a warp's product", T, __nv_bfloat16, __half) {
  auto a = random_tensor<T>(1, 64, 64), b = random_tensor<T>(2, 64, 64);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) b(16 + i, j) = b(j, i);
  const DeviceTensor<T, 2> device_a(a), device_b(b);
  const DeviceTensor<float, 3> d(nan_tensor<float>(2, 16, 8));
  warp_product<<<1, 32, 3 * panel>>>(device_a.view().data, device_b.view().data, d.view().data);
  require_cuda(cudaGetLastError());
  const TensorView<const T, 2> all_a = a, all_b = b;
  const auto want = product(run(run(all_a, 0, 0, 16), 1, 0, 16), transposed(run(run(all_b, 0, 0, 8), 1, 0, 16), 0, 1));
  const auto got = d.host();
  CHECK(relative_error(slice(got.view(), 0), want.view()) < 1e-5);
  CHECK(relative_error(slice(got.view(), 1), want.view()) < 1e-5);
}

TEST_CASE("a warp's product of floats") {
  const auto a = random_tensor<float>(1, 64, 32);  // of which 16 rows are used
  const DeviceTensor<float, 2> device_a(a), d(nan_tensor<float>(16, 16));
  warp_product_of_floats<<<1, 32, 2 * panel>>>(device_a.view().data, d.view().data);
  require_cuda(cudaGetLastError());
  const auto rows = run(TensorView<const float, 2>(a), 0, 0, 16);
  CHECK(relative_error(d.host(), product(rows, transposed(rows, 0, 1))) < 2e-3);
}

TEST_CASE("floats rounded for products") {
  auto x = random_tensor<float>(1, 256);
  x(0) = std::numeric_limits<float>::quiet_NaN();
  const DeviceTensor<float, 1> rounded(x);
  round_for_products<<<1, 256>>>(rounded.view().data);
  require_cuda(cudaGetLastError());
  const auto got = rounded.host();
  CHECK(std::isnan(got(0)));
  for (Index i = 1; i < 256; ++i) {
    const float scaled = std::ldexp(got(i), 10 - std::ilogb(x(i)));  // 10 bits behind the point of the first
    CHECK(scaled == std::nearbyint(scaled));
    CHECK(std::abs(got(i) - x(i)) <= std::ldexp(1.f, std::ilogb(x(i)) - 11));
  }
}

TEST_CASE_TEMPLATE("a warpgroup's products", T, __nv_bfloat16, __half) {
  if (!has_warpgroups()) return;
  using arch::Major;
  CHECK(warpgroup_error<T, Major::sum, Major::sum, 64, false>() < 1e-5);
  CHECK(warpgroup_error<T, Major::sum, Major::side, 64, false>() < 1e-5);
  CHECK(warpgroup_error<T, Major::side, Major::sum, 64, false>() < 1e-5);
  CHECK(warpgroup_error<T, Major::side, Major::side, 64, false>() < 1e-5);
  CHECK(warpgroup_error<T, Major::side, Major::side, 128, false>() < 1e-5);
  CHECK(warpgroup_error<T, Major::sum, Major::sum, 64, true>() < 1e-5);
  CHECK(warpgroup_error<T, Major::sum, Major::side, 64, true>() < 1e-5);
  CHECK(warpgroup_error<T, Major::sum, Major::side, 128, true>() < 1e-5);
  CHECK(warpgroup_error<T, Major::side, Major::sum, 16, false>() < 1e-5);
  CHECK(warpgroup_error<T, Major::sum, Major::sum, 16, true>() < 1e-5);
}

TEST_CASE("matrices in and out of shared memory") {
  if (!has_warpgroups()) return;
  const DeviceTensor<std::uint32_t, 1> wrong{Tensor<std::uint32_t, 1>(1)};
  store_and_load<<<1, 32, 2 * panel>>>(wrong.view().data);
  require_cuda(cudaGetLastError());
  CHECK(wrong.host()(0) == 0);
}

TEST_CASE("copies of 8 bytes, and matrices turned in registers") {
  Tensor<std::uint32_t, 1> rows(512);
  for (Index i = 0; i < 512; ++i) rows(i) = std::uint32_t(2654435761u * unsigned(i + 1));
  const DeviceTensor<std::uint32_t, 1> source(rows), copied(rows), wrong{Tensor<std::uint32_t, 1>(1)};
  copy_and_turn<<<1, 32, 4096>>>(source.view().data, copied.view().data, wrong.view().data);
  require_cuda(cudaGetLastError());
  const auto got = copied.host();
  int unequal = 0;
  for (Index i = 0; i < 512; ++i) unequal += got(i) != (i / 32 % 3 != 0 ? rows(i) : 0u);
  CHECK(unequal == 0);
  CHECK(wrong.host()(0) == 0);
}

TEST_CASE("the copy engine fills with zeros and clips") {
  if (!has_warpgroups()) return;
  const auto source = random_tensor<__nv_bfloat16>(1, 2, 100, 2, 128);
  const DeviceTensor<__nv_bfloat16, 4> from(source), to(nan_tensor<__nv_bfloat16>(2, 100, 2, 128));
  const DeviceTensor<__nv_bfloat16, 2> rows(nan_tensor<__nv_bfloat16>(64, 128));
  CUtensorMap source_map, target_map;
  REQUIRE(encode_tensor_map<__nv_bfloat16>(source_map, from, 2).ok());
  REQUIRE(encode_tensor_map<__nv_bfloat16>(target_map, to, 2).ok());
  copy_box<<<1, 128, 4 * panel>>>(source_map, target_map, 64, rows.view().data);
  require_cuda(cudaGetLastError());
  const auto got = rows.host();
  const auto stored = to.host();
  int wrong = 0;
  for (Index t = 0; t < 64; ++t)
    for (Index i = 0; i < 128; ++i) {
      wrong += float(got(t, i)) != (t < 36 ? float(source(1, 64 + t, 1, i)) : 0.f);
      wrong += t < 36 && float(stored(1, 64 + t, 1, i)) != float(source(1, 64 + t, 1, i));
    }
  CHECK(wrong == 0);
  CHECK(std::isnan(float(stored(1, 63, 1, 0))));
  CHECK(std::isnan(float(stored(0, 64, 1, 0))));
  CHECK(to.guards_intact());
}

TEST_CASE("pairs and powers") {
  const auto x = random_tensor<float>(1, 64);
  const DeviceTensor<float, 1> device_x(x), bf16(nan_tensor<float>(64)), half(nan_tensor<float>(64)),
      powers(nan_tensor<float>(64));
  round_trip<<<1, 32>>>(device_x.view().data, bf16.view().data, half.view().data, powers.view().data);
  require_cuda(cudaGetLastError());
  const auto got_bf16 = bf16.host(), got_half = half.host(), got_powers = powers.host();
  for (Index i = 0; i < 64; ++i) {
    CHECK(got_bf16(i) == float(__nv_bfloat16(x(i))));
    CHECK(got_half(i) == float(__half(x(i))));
    const double want = std::exp2(double(i % 2 ? -x(i) : -100 * std::abs(x(i))));
    CHECK(std::abs(got_powers(i) - want) <= 1e-6 * want);
  }
}
