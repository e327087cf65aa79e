// SPDX-License-Identifier: Apache-2.0
// What the emulation itself promises: collectives, the refusals of what CUDA leaves undefined, and the arithmetic of
// the instructions, against plain formulas.
#include <cuda_fp16.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cfenv>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "catch.hpp"
#include "kernels/device/launch.cuh"
#include "kernels/device/ptx.cuh"

namespace tqkv_test {
uint64_t seed();  // seed.cpp
}

namespace {

using namespace tqkv::cuda;

constexpr unsigned kAll = 0xffffffff;

// What a launch says on stderr: the message with which it stops the program, or nothing.
template <class... P, class... A>
std::string message_of(void (*kernel)(P...), unsigned threads, A... args) {
  int pipe_ends[2];
  REQUIRE(pipe(pipe_ends) == 0);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    std::signal(SIGABRT, SIG_DFL);  // not the test framework's
    dup2(pipe_ends[1], STDERR_FILENO);
    launch(kernel, 1, threads, 0, nullptr, args...);
    _exit(0);
  }
  close(pipe_ends[1]);
  std::string text;
  char part[4096];
  for (ssize_t n; (n = read(pipe_ends[0], part, sizeof part)) > 0;) text.append(part, size_t(n));
  close(pipe_ends[0]);
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  const bool aborted = WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
  CHECK(aborted == (text.find("CUDA emulation: ") != std::string::npos));
  return text;
}

void mentions(const std::string &message, const char *part) {
  INFO("message: " << message);
  CHECK(message.find(part) != std::string::npos);
}

// ---- where a thread is

__global__ void write_places(uint32_t *places, dim3 block, dim3 grid) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned at = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const bool right = blockDim.x == block.x && blockDim.y == block.y && blockDim.z == block.z && gridDim.x == grid.x &&
                     gridDim.y == grid.y && gridDim.z == grid.z;
  if (right) places[at * blockDim.x * blockDim.y * blockDim.z + thread] += at * 1024 + thread;
}

// Words reversed through shared memory, static and given at the launch.
__global__ void reverse(uint32_t *words) {
  __shared__ uint32_t table[256];
  auto *given = static_cast<uint32_t *>(dynamic_shared());
  const unsigned i = threadIdx.x;
  table[i] = words[blockIdx.x * 256 + i];
  __syncthreads();
  given[i] = table[255 - i];
  __syncthreads();
  const uint32_t at = shared_address(given) + i * 4;
  uint32_t word = 0;
  for (unsigned k = 0; k < 4; ++k) word |= load_shared_byte(at + k) << (8 * k);
  words[blockIdx.x * 256 + i] = word;
}

// ---- collectives

struct Shuffles {
  int indexed, segment, exchanged, up, down;
  unsigned ballot;
  int any, all;
};

__global__ void shuffle(Shuffles *out, unsigned mask, int width) {
  const int lane = int(threadIdx.x);
  if ((mask >> lane & 1) == 0) return;
  const int value = 100 + lane;
  out[lane] = {__shfl_sync(kAll & mask, value, 31 - __clz(int(mask))),
               __shfl_sync(mask, value, lane + (width == 32 ? 0 : 1), width),
               __shfl_xor_sync(mask, value, width == 32 ? 0 : 1, width),
               __shfl_up_sync(mask, value, width == 32 ? 0 : 1, width),
               __shfl_down_sync(mask, value, width == 32 ? 0 : 1, width),
               __ballot_sync(mask, lane % 3 == 0),
               __any_sync(mask, lane == 5),
               __all_sync(mask, lane != 5)};
}

// Each half of a warp meets on its own, as often as it likes.
__global__ void halves(int *out) {
  const int lane = int(threadIdx.x);
  const unsigned mask = lane < 16 ? 0xffff : 0xffff0000;
  int sum = lane;
  for (int times = 0; times < (lane < 16 ? 3 : 4); ++times) {
    for (int bit = 1; bit < 16; bit *= 2) sum += __shfl_xor_sync(mask, sum, bit);
  }
  __syncwarp();
  out[lane] = sum;
}

__global__ void lane_returns() {
  if (threadIdx.x == 7) return;
  __syncwarp();
}
__global__ void lanes_part() {
  if (threadIdx.x % 2 == 0) {
    __syncwarp();
  } else {
    __shfl_xor_sync(kAll, 1, 1);
  }
}
__global__ void masks_differ() {
  __any_sync(threadIdx.x < 4 ? 0xf : 0x1f, true);
}
__global__ void not_named() {
  __syncwarp(0xfffffffe);
}
__global__ void source_missing() {
  if (threadIdx.x < 16) __shfl_sync(0xffff, 1, 16);
}
__global__ void thread_skips_barrier() {
  if (threadIdx.x != 40) __syncthreads();
}
__global__ void barrier_in_branch() {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}
__global__ void warp_skips_barrier() {
  if (threadIdx.x < 32) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}
__global__ void part_of_a_warp() {
  __syncwarp();
}

}  // namespace

TEST_CASE("every thread of a grid runs once and knows where it is") {
  const dim3 block(5, 3, 2), grid(3, 2, 4);
  std::vector<uint32_t> places(30 * 24, 1);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  REQUIRE(cudaLaunchKernelEx(&config, write_places, places.data(), block, grid) == cudaSuccess);
  for (unsigned i = 0; i < places.size(); ++i) CHECK(places[i] == 1 + i / 30 * 1024 + i % 30);
}

TEST_CASE("a launch with an impossible shape is refused") {
  uint32_t word = 0;
  CHECK(launch(reverse, 1, 1025, 0, nullptr, &word) == cudaErrorInvalidConfiguration);
  CHECK(launch(reverse, 0, 32, 0, nullptr, &word) == cudaErrorInvalidConfiguration);
  CHECK(launch(reverse, dim3(1, 65536), 32, 0, nullptr, &word) == cudaErrorInvalidConfiguration);
  CHECK(launch(reverse, 1, 32, size_t{228} << 10, nullptr, &word) == cudaErrorInvalidConfiguration);
}

TEST_CASE("a captured launch runs when its graph does, with the arguments of its time") {
  std::vector<uint32_t> words(256);
  for (unsigned i = 0; i < 256; ++i) words[i] = i;
  int stream = 0, other = 0;
  emulation::begin_capture(&stream);
  CHECK(launch(reverse, 1, 256, 1024, &other, words.data()) == cudaErrorStreamCaptureUnsupported);
  CHECK(launch(reverse, 1, 256, 1024, &stream, words.data()) == cudaSuccess);
  void *memory = nullptr;
  CHECK(cudaMalloc(&memory, 1) == cudaErrorStreamCaptureUnsupported);
  const emulation::Graph graph = emulation::end_capture();
  CHECK(words[0] == 0);
  for (const auto &work : graph) work();
  CHECK(words[0] == 255);
}

TEST_CASE("threads of a block meet at __syncthreads and share memory") {
  std::vector<uint32_t> words(3 * 256);
  for (int times = 1; times <= 4; ++times) {
    for (unsigned i = 0; i < words.size(); ++i) words[i] = i;
    REQUIRE(launch(reverse, 3, 256, 1024, nullptr, words.data()) == cudaSuccess);
    for (unsigned i = 0; i < words.size(); ++i) CHECK(words[i] == i / 256 * 256 + 255 - i % 256);
  }
}

TEST_CASE("shuffles and votes of whole and partial warps") {
  for (const unsigned mask : {0xffffffffu, 0x00000fffu, 0x0f0ff0f0u, 0x80000000u}) {
    for (const int width : {32, 8, 2}) {
      if (mask == 0x80000000u && width != 32) continue;  // neighbours take no part
      if (mask != kAll && width == 8) continue;
      INFO("mask " << mask << " width " << width);
      std::vector<Shuffles> got(32);
      REQUIRE(launch(shuffle, 1, 32, 0, nullptr, got.data(), mask, width) == cudaSuccess);
      unsigned ballot = 0;
      for (int lane = 0; lane < 32; ++lane) ballot |= unsigned(lane % 3 == 0) << lane;
      int last = 31;
      while ((mask >> last & 1) == 0) --last;
      for (int lane = 0; lane < 32; ++lane) {
        if ((mask >> lane & 1) == 0) continue;
        const Shuffles &s = got[size_t(lane)];
        const int first = lane / width * width, delta = width == 32 ? 0 : 1;
        CHECK(s.indexed == 100 + last);
        CHECK(s.segment == 100 + first + (lane + delta) % width);
        CHECK(s.exchanged == 100 + (lane ^ delta));
        CHECK(s.up == 100 + (lane - delta < first ? lane : lane - delta));
        CHECK(s.down == 100 + (lane + delta >= first + width ? lane : lane + delta));
        CHECK(s.ballot == (ballot & mask));
        CHECK((s.any != 0) == ((mask >> 5 & 1) != 0));
        CHECK((s.all != 0) == ((mask >> 5 & 1) == 0));
      }
    }
  }
}

TEST_CASE("parts of a warp meet independently") {
  std::vector<int> got(32);
  REQUIRE(launch(halves, 1, 32, 0, nullptr, got.data()) == cudaSuccess);
  for (int lane = 0; lane < 32; ++lane) {
    // The first round sums the 16 lanes, each further one multiplies by 16.
    const int sum = lane < 16 ? 120 * 256 : (120 + 256) * 4096;
    CHECK(got[size_t(lane)] == sum);
  }
}

TEST_CASE("what CUDA leaves undefined stops the program and says why") {
  mentions(message_of(lane_returns, 32), "return");
  mentions(message_of(lanes_part, 32), "__shfl_xor_sync");
  mentions(message_of(masks_differ, 32), "__any_sync(0000001f)");
  mentions(message_of(not_named, 32), "does not name its own lane");
  mentions(message_of(source_missing, 32), "shuffles from lane 16, which takes no part");
  mentions(message_of(thread_skips_barrier, 64), "__syncthreads");
  mentions(message_of(barrier_in_branch, 32), "__syncthreads");
  mentions(message_of(warp_skips_barrier, 64), "__syncthreads");
  mentions(message_of(part_of_a_warp, 20), "there are no lanes fff00000");
  CHECK(message_of(part_of_a_warp, 64).empty());
}

namespace {

__global__ void read_neighbours(int *out) {
  __shared__ int words[32];
  const int lane = int(threadIdx.x);
  words[lane] = lane;
  __shfl_xor_sync(kAll, lane, 1);  // all have written, but this orders no memory
  out[lane] = words[lane ^ 1];
}

}  // namespace

TEST_CASE("a race: ThreadSanitizer must report it", "[.][race]") {
  std::vector<int> out(32);
  CHECK(launch(read_neighbours, 1, 32, 0, nullptr, out.data()) == cudaSuccess);
}

// ---- arithmetic

TEST_CASE("products and sums rounded towards zero are what the processor makes of them") {
  std::mt19937_64 random(tqkv_test::seed());
  INFO("repeat with TQKV_TEST_SEED=" << tqkv_test::seed());
  const auto processor = [](float a, float b, float c) {
    std::fesetround(FE_TOWARDZERO);
    volatile double x = a, y = b, z = c;
    volatile float sum = float(x * y + z);  // product and sum are exact
    std::fesetround(FE_TONEAREST);
    return float(sum);
  };
  for (int i = 0; i < 100000; ++i) {
    const float a = float(int(random() % 131072) - 65536) * 0x1p-36f;
    const float b = ldexpf(float(random() % 0x1000000), -137), c = __uint_as_float(uint32_t(random() % 0x40000));
    const float want = processor(a, b, c), got = __fmaf_rz(a, b, c);
    INFO(a << " * " << b << " + " << c << " is " << want << ", not " << got);
    CHECK(__float_as_uint(want) == __float_as_uint(got));
  }
}

TEST_CASE("products of bytes are added") {
  CHECK(__dp4a(0xff020304u, 0xff050607u, 1u) == 1 + 255 * 255 + 10 + 18 + 28);
  CHECK(__dp2a_lo(0xffff0002u, 0x0a0bff03u, 1u) == 1 + 65535 * 255 + 6);
  CHECK(__dp2a_hi(0xffff0002u, 0x0a0bff03u, 1u) == 1 + 65535 * 10 + 22);
}

TEST_CASE("bytes are permuted, and their signs repeated") {
  CHECK(__byte_perm(0x33221100, 0x77665544, 0x6240) == 0x66224400);
  CHECK(__byte_perm(0x33221100, 0x77665544, 0x7531) == 0x77553311);
  CHECK(permute_bytes(0x33221100, 0x77665544, 0x7531) == 0x77553311);
  CHECK(permute_bytes(0x80ff7f00, 0x01, 0xba98) == 0xffff0000);
  CHECK(permute_bytes(0x80ff7f00, 0x81, 0xc3b2) == 0xff80ffff);
  CHECK(sign_masks(0x7f80ff01) == 0x00ffff00);
}

TEST_CASE("16-bit floats: all values come back, and midpoints round to even") {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float half = __half2float(__ushort_as_half(uint16_t(bits))), bfloat = __uint_as_float(bits << 16);
    if ((bits & 0x7fff) <= 0x7c00) CHECK((pack_f16(half, 0) == bits && pack_f16(0, half) == bits << 16));
    if ((bits & 0x7fff) <= 0x7f80) CHECK((pack_bf16(bfloat, 0) == bits && pack_bf16(0, bfloat) == bits << 16));
    if ((bits & 0x7fff) < 0x7bff) {
      const float next = __half2float(__ushort_as_half(uint16_t(bits + 1))), middle = (half + next) / 2;
      CHECK(pack_f16(middle, 0) == bits + (bits & 1));
      CHECK(pack_f16(nextafterf(middle, half), 0) == bits);
      CHECK(pack_f16(nextafterf(middle, next), 0) == bits + 1);
    }
    if ((bits & 0x7fff) < 0x7f7f && (bits & 0x7fff) >= 0x0080) {
      const float middle = __uint_as_float(bits << 16 | 0x8000);
      CHECK(pack_bf16(middle, 0) == bits + (bits & 1));
    }
  }
  CHECK(__half2float(__ushort_as_half(0x3c00)) == 1);
  CHECK(__half2float(__ushort_as_half(0x0001)) == 0x1p-24f);
  CHECK(__half2float(__ushort_as_half(0xfbff)) == -65504);
  CHECK(pack_f16(65519.996f, 65520) == 0x7c007bff);
  CHECK(pack_f16(0x1p-25f, -0x1.000002p-25f) == 0x80010000);
  CHECK(pack_f16(NAN, 1) == 0x3c007fff);
  CHECK(pack_bf16(NAN, 1) == 0x3f807fff);
  CHECK(pack_bf16(0x1.fffffep127f, -INFINITY) == 0xff807f80);
}

// ---- matrix products

namespace {

// Row-major operands, as a kernel would load them: A [16, 32], B^T [8, 32], C and D [16, 8].
template <class A, class B>
__global__ void multiply(const A *a, const B *b, const int32_t *c, int32_t *d) {
  const int lane = int(threadIdx.x), group = lane >> 2, in_group = lane & 3;
  const auto word = [](const auto *bytes) {
    uint32_t packed;
    std::memcpy(&packed, bytes, 4);
    return packed;
  };
  const uint32_t x[4] = {word(a + group * 32 + in_group * 4), word(a + (group + 8) * 32 + in_group * 4),
                         word(a + group * 32 + in_group * 4 + 16), word(a + (group + 8) * 32 + in_group * 4 + 16)};
  const uint32_t y[2] = {word(b + group * 32 + in_group * 4), word(b + group * 32 + in_group * 4 + 16)};
  const int at[4] = {group * 8 + in_group * 2, group * 8 + in_group * 2 + 1, (group + 8) * 8 + in_group * 2,
                     (group + 8) * 8 + in_group * 2 + 1};
  int32_t sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[at[i]];
  mma_m16n8k32<A, B>(sum, x, y, sum);
  for (int i = 0; i < 4; ++i) d[at[i]] = sum[i];
}

template <class A, class B>
void check_product(std::mt19937_64 &random) {
  std::vector<A> a(16 * 32);
  std::vector<B> b(8 * 32);
  std::vector<int32_t> c(16 * 8), d(16 * 8);
  for (A &x : a) x = A(random());
  for (B &x : b) x = B(random());
  for (int32_t &x : c) x = int32_t(random() % 2000001) - 1000000;
  REQUIRE(launch(multiply<A, B>, 1, 32, 0, nullptr, a.data(), b.data(), c.data(), d.data()) == cudaSuccess);
  for (size_t row = 0; row < 16; ++row) {
    for (size_t column = 0; column < 8; ++column) {
      int64_t sum = c[row * 8 + column];
      for (size_t k = 0; k < 32; ++k) sum += int64_t{a[row * 32 + k]} * b[column * 32 + k];
      CHECK(d[row * 8 + column] == sum);
    }
  }
}

__global__ void multiply_halves(const uint16_t *a, const uint16_t *b, const float *c, float *d) {
  const unsigned group = threadIdx.x / 4, in_group = threadIdx.x % 4;
  const auto pair = [](const uint16_t *from) { return uint32_t{from[1]} << 16 | from[0]; };
  uint32_t x[4], y[2];
  for (unsigned i = 0; i < 4; ++i) x[i] = pair(a + (group + i % 2 * 8) * 16 + i / 2 * 8 + 2 * in_group);
  for (unsigned i = 0; i < 2; ++i) y[i] = pair(b + group * 16 + i * 8 + 2 * in_group);
  float sum[4];
  for (unsigned i = 0; i < 4; ++i) sum[i] = c[(group + i / 2 * 8) * 8 + 2 * in_group + i % 2];
  mma_m16n8k16(sum, x, y, sum);
  for (unsigned i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + 2 * in_group + i % 2] = sum[i];
}

}  // namespace

TEST_CASE("a warp's product of matrices of halves is the matrices' product") {
  std::mt19937_64 random(tqkv_test::seed());
  INFO("repeat with TQKV_TEST_SEED=" << tqkv_test::seed());
  std::vector<uint16_t> a(16 * 16), b(8 * 16);  // integers times f16's least number, and -1, 0 or 1/4096
  std::vector<float> c(16 * 8), d(16 * 8);
  const auto integer = [](uint16_t bits) { return int(bits & 0x7fff) * ((bits & 0x8000) != 0 ? -1 : 1); };
  for (uint16_t &x : a) x = uint16_t(random() % 2048 | (random() % 2) << 15);
  for (uint16_t &x : b) x = uint16_t(std::array{0x0c00, 0, 0x8c00}[random() % 3]);
  for (float &x : c) x = float(int(random() % 2001) - 1000) * 0x1p-36f;
  REQUIRE(launch(multiply_halves, 1, 32, 0, nullptr, a.data(), b.data(), c.data(), d.data()) == cudaSuccess);
  for (size_t row = 0; row < 16; ++row) {
    for (size_t column = 0; column < 8; ++column) {
      int sum = int(c[row * 8 + column] * 0x1p36f);
      for (size_t k = 0; k < 16; ++k) sum += integer(a[row * 16 + k]) * (integer(b[column * 16 + k]) / 0x0c00);
      CHECK(d[row * 8 + column] == float(sum) * 0x1p-36f);
    }
  }
}

TEST_CASE("a warp's matrix product is the matrices' product") {
  std::mt19937_64 random(tqkv_test::seed());
  INFO("repeat with TQKV_TEST_SEED=" << tqkv_test::seed());
  for (int times = 0; times < 5; ++times) {
    check_product<uint8_t, uint8_t>(random);
    check_product<uint8_t, int8_t>(random);
    check_product<int8_t, uint8_t>(random);
    check_product<int8_t, int8_t>(random);
  }
}
