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
#include "kernels/device/matrix.cuh"
#include "kernels/device/ptx.cuh"

namespace tqkv_test {
uint64_t seed();  // seed.cpp
}

namespace {

using namespace tqkv::cuda;

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
    launch(kernel, 1, threads, 4096, nullptr, args...);
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

// What the block says of each thread's vote, one vote after the other.
__global__ void vote(int *said) {
  for (unsigned voter = 0; voter <= blockDim.x; ++voter) {
    said[voter * blockDim.x + threadIdx.x] = __syncthreads_or(threadIdx.x == voter ? 4 : 0) != 0;
  }
}

// ---- collectives

struct Shuffles {
  int indexed, segment, exchanged, up, down;
  unsigned ballot;
  int any, all, sum, most;
  unsigned bits;
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
               __all_sync(mask, lane != 5),
               __reduce_add_sync(mask, -value),
               __reduce_max_sync(mask, -value),
               __reduce_or_sync(mask, 1u << lane)};
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

TEST_CASE("a block votes at __syncthreads_or") {
  std::vector<int> said(65 * 64, -1);
  REQUIRE(launch(vote, 1, 64, 0, nullptr, said.data()) == cudaSuccess);
  for (unsigned i = 0; i < said.size(); ++i) CHECK(said[i] == (i < 64 * 64 ? 1 : 0));
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
      int last = 31, sum = 0;
      while ((mask >> last & 1) == 0) --last;
      for (int lane = 0; lane < 32; ++lane) sum -= (mask >> lane & 1) != 0 ? 100 + lane : 0;
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
        CHECK(s.sum == sum);
        CHECK(s.most == -100 - std::countr_zero(mask));
        CHECK(s.bits == mask);
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

// ---- barriers of groups of warps, rings of copies

namespace {

// Each half of the block reverses its words, as often as it likes.
__global__ void reverse_halves(uint32_t *words) {
  __shared__ uint32_t table[128];
  const unsigned half = threadIdx.x / 64, first = half * 64, i = threadIdx.x % 64;
  for (unsigned times = 0; times < 3 + 2 * half; ++times) {
    table[first + i] = words[first + i];
    group_barrier(1 + int(half), 64);
    words[first + i] = table[first + 63 - i];
    group_barrier(1 + int(half), 64);
  }
}

__global__ void part_of_a_group() {
  if (threadIdx.x % 2 == 0) group_barrier(3, 32);
}
__global__ void group_differs() {
  group_barrier(3, threadIdx.x < 16 ? 64 : 32);
}
__global__ void group_missing() {
  if (threadIdx.x < 32) group_barrier(3, 64);
}

enum Defect { kNone, kNoFence, kNoInit, kFewBytes, kManyBytes, kManyArrivals, kNoWaitForEmpty, kNoWaitForFull };

// Warp 0 copies parts of 96 words through a ring; the other three take a word a thread.
__global__ void pass_through_ring(const uint32_t *in, uint32_t *out, unsigned parts, Defect defect) {
  constexpr unsigned kStages = 3, kWords = 96;
  __shared__ uint64_t full[kStages], empty[kStages];
  auto *ring = static_cast<uint32_t *>(dynamic_shared());
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (unsigned i = 0; i < kStages && defect != kNoInit; ++i) {
      barrier_init(&full[i], 2);
      barrier_init(&empty[i], 3);
    }
    if (defect != kNoFence) barrier_init_fence();
  }
  __syncthreads();
  grid_dependency_wait();
  if (warp == 0) {
    for (unsigned i = 0; i < parts && lane == 0; ++i) {
      const unsigned stage = i % kStages, parity = i / kStages % 2;
      if (defect != kNoWaitForEmpty) barrier_wait(&empty[stage], parity ^ 1);
      barrier_expect(&full[stage], defect == kFewBytes ? 16 : defect == kManyBytes ? 400 : kWords * 4);
      barrier_arrive(&full[stage], defect == kManyArrivals ? 3 : 2);
      bulk_copy(ring + stage * kWords, in + i * kWords, 16, &full[stage]);
      bulk_copy(ring + stage * kWords + 4, in + i * kWords + 4, kWords * 4 - 16, &full[stage]);
    }
  } else {
    for (unsigned i = 0; i < parts; ++i) {
      const unsigned stage = i % kStages, parity = i / kStages % 2, at = threadIdx.x - 32;
      if (defect != kNoWaitForFull) barrier_wait(&full[stage], parity);
      out[i * kWords + at] = ring[stage * kWords + at];
      __syncwarp();
      if (lane == 0) barrier_arrive(&empty[stage]);
    }
  }
  grid_dependency_launch();
}

// Two words of what is in shared memory before the copy has ended, and after.
__global__ void copy(const uint32_t *in, uint32_t *out, unsigned shift, unsigned bytes, uint32_t *destination) {
  __shared__ uint64_t barrier;
  alignas(16) __shared__ uint32_t words[20];
  barrier_init(&barrier, 1);
  barrier_init_fence();
  barrier_arrive_expect(&barrier, bytes);
  bulk_copy(destination != nullptr ? destination : words + shift, in, bytes, &barrier);
  out[0] = words[shift];
  barrier_wait(&barrier, 0);
  out[1] = words[shift];
}

__global__ void arrive(unsigned count, unsigned first, unsigned second, uint32_t bytes) {
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) barrier_init(&barrier, count);
  __syncthreads();
  for (unsigned i = 0; i < (threadIdx.x == 0 ? first : second); ++i) barrier_arrive_expect(&barrier, bytes);
  if (threadIdx.x == 0) barrier_wait(&barrier, 0);
}

__global__ void wait_lapped() {
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) barrier_init(&barrier, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_wait(&barrier, 0);
  } else {
    barrier_arrive(&barrier);
    barrier_arrive(&barrier);
  }
}

__global__ void turns(uint32_t *order) {
  __shared__ uint32_t next;
  if (threadIdx.x == 0) next = 0;
  __syncthreads();
  while (atomicAdd(&next, 0) != threadIdx.x) __nanosleep(20);
  order[threadIdx.x] = atomicAdd(&next, 1);
}

}  // namespace

TEST_CASE("groups of warps meet at barriers of their own") {
  std::vector<uint32_t> words(128);
  for (unsigned i = 0; i < 128; ++i) words[i] = i;
  REQUIRE(launch(reverse_halves, 1, 128, 0, nullptr, words.data()) == cudaSuccess);
  for (unsigned i = 0; i < 128; ++i) CHECK(words[i] == (i ^ 63));
  mentions(message_of(part_of_a_group, 64), "group_barrier(3, 32) of lanes 55555555");
  mentions(message_of(group_differs, 64), "but others say");
  mentions(message_of(group_missing, 64), "at group_barrier(3, 64), which 32 threads came to");
}

TEST_CASE("a ring of copies in bulk") {
  constexpr unsigned kParts = 20;
  struct alignas(16) Part {
    uint32_t word[96];
  };
  std::vector<Part> in(kParts), out(kParts);
  uint32_t next = 0;
  for (Part &part : in) {
    for (uint32_t &word : part.word) word = ++next;
  }
  const auto pass = [&](Defect defect) {
    return launch_dependent(pass_through_ring, 2, 128, sizeof(Part) * 3, nullptr, in[0].word, out[0].word, kParts,
                            defect);
  };
  for (int times = 0; times < 2; ++times) {
    out.assign(kParts, Part{});
    REQUIRE(pass(kNone) == cudaSuccess);
    CHECK(std::memcmp(in.data(), out.data(), kParts * sizeof(Part)) == 0);
  }
  const auto message = [&](Defect defect, unsigned parts) {
    return message_of(pass_through_ring, 128, in[0].word, out[0].word, parts, defect);
  };
  mentions(message(kNoFence, kParts), "without barrier_init_fence");
  mentions(message(kNoInit, kParts), "is no barrier");
  mentions(message(kFewBytes, kParts), "counts 384 bytes where 16 are expected");
  mentions(message(kManyBytes, kParts), "2 of 2 arrivals, 384 of 400 bytes");
  mentions(message(kManyArrivals, kParts), "3 of 2 threads");
  mentions(message(kNoWaitForEmpty, kParts), "for which all 2 threads have arrived");
  mentions(message(kNoWaitForFull, 1), "nobody has waited for 384 bytes");
}

TEST_CASE("a copy in bulk is there when it was waited for, and takes aligned bytes to shared memory") {
  alignas(16) static uint32_t in[] = {1, 2, 3, 4, 5, 6, 7, 8};
  std::vector<uint32_t> out(2);
  uint32_t *const none = nullptr;
  REQUIRE(launch(copy, 1, 1, 0, nullptr, in, out.data(), 4, 32, none) == cudaSuccess);
  CHECK(out == std::vector<uint32_t>{0xffffffff, 1});
  mentions(message_of(copy, 1, in, out.data(), 1u, 16u, none), "not aligned");
  mentions(message_of(copy, 1, in + 1, out.data(), 4u, 16u, none), "not aligned");
  mentions(message_of(copy, 1, in, out.data(), 4u, 8u, none), "not aligned");
  alignas(16) uint32_t not_shared[4];
  mentions(message_of(copy, 1, in, out.data(), 4u, 16u, +not_shared), "not in shared memory");
}

TEST_CASE("barriers that count wrongly stop the program") {
  CHECK(message_of(arrive, 2, 3u, 1u, 2u, 0u).empty());
  mentions(message_of(arrive, 2, 0u, 1u, 1u, 0u), "a count of 0");
  mentions(message_of(arrive, 2, 2u, 1u, 2u, 16u), "for which all 2 threads have arrived");
  mentions(message_of(arrive, 2, 4u, 2u, 2u, 600000u), "counts 600000 + 600000 bytes");
  mentions(message_of(arrive, 2, 3u, 1u, 1u, 0u), "2 of 3 arrivals");
  mentions(message_of(wait_lapped, 2), "barrier 0");
}

TEST_CASE("a thread that sleeps lets others run") {
  std::vector<uint32_t> order(70);
  REQUIRE(launch(turns, 1, 70, 0, nullptr, order.data()) == cudaSuccess);
  for (unsigned i = 0; i < 70; ++i) CHECK(order[i] == i);
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
  CHECK(__dp4a(int(0xff0280f4u), int(0x7f0580f4u), -3) == -3 - 127 + 10 + 16384 + 144);
  CHECK(__dp2a_lo(0xffff0002u, 0x0a0bff03u, 1u) == 1 + 65535 * 255 + 6);
  CHECK(__dp2a_hi(0xffff0002u, 0x0a0bff03u, 1u) == 1 + 65535 * 10 + 22);
}

TEST_CASE("integers and floats are converted, halves unpacked, words shifted together") {
  CHECK((__float2int_rn(2.5f) == 2 && __float2int_rn(-3.5f) == -4 && __float2int_rn(1e20f) == INT32_MAX));
  CHECK((__float2int_rn(-INFINITY) == INT32_MIN && __float2int_rn(NAN) == 0));
  CHECK(__int2float_rn(0x1000001) == 0x1p24f);
  CHECK(__funnelshift_r(0x89abcdef, 0x01234567, 8) == 0x6789abcd);
  CHECK(__funnelshift_l(0x89abcdef, 0x01234567, 40) == 0x23456789);
  float low = 0, high = 0;
  f32_pair_from_f16(0xc0003e00, low, high);
  CHECK((low == 1.5f && high == -2));
  const float2 pair = __half22float2(__halves2half2(__ushort_as_half(0x3e00), __ushort_as_half(0xc000)));
  CHECK((pair.x == low && pair.y == high));
  CHECK((exp2_approx(3) == 8 && exp2_approx(-127) == 0 && exp2_approx(-INFINITY) == 0));
  CHECK((reciprocal_approx(4) == 0.25f && reciprocal_approx(0x1p127f) == 0 &&
         reciprocal_approx(-0x1p-127f) == -INFINITY));
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

// B [64, 96] of f16 by 8 rows, A's operands in the order of lanes, sums in that of lanes; rows of B from 32 on count
// negative.
template <bool kWarpgroup>
__global__ void multiply_shared(const uint32_t *a, const uint4 *b, float *d) {
  using Matrix = SharedMatrix<64, 96, kWarpgroup>;
  auto *matrix = static_cast<uint4 *>(dynamic_shared());
  for (unsigned i = threadIdx.x; i < 64 / 8 * 96; i += blockDim.x) Matrix::at(matrix, int(i / 96), int(i % 96)) = b[i];
  Matrix::written();
  __syncthreads();
  uint32_t x[4][4];
  for (unsigned s = 0; s < 4; ++s) {
    for (unsigned i = 0; i < 4; ++i) x[s][i] = a[(s * 4 + i) * 128 + threadIdx.x];
  }
  float first[32], rest[16];
  Matrix::begin();
  const Matrix product(matrix);
  product.template multiply<0, 32, 32>(first, x);
  product.template multiply<64, 16, 32>(rest, x);
  Matrix::template wait<1>(first);
  for (unsigned i = 0; i < 32; ++i) d[i * 128 + threadIdx.x] = first[i];
  Matrix::template wait<0>(rest);
  for (unsigned i = 0; i < 16; ++i) d[(32 + i) * 128 + threadIdx.x] = rest[i];
}

template <bool kWarpgroup>
void check_shared_product(std::mt19937_64 &random) {
  std::vector<int> x(64 * 64), y(64 * 96);  // A, in units of 2^-24, and B, in units of 2^-12
  for (int &value : x) value = int(random() % 4095) - 2047;
  for (int &value : y) value = int(random() % 3) - 1;
  const auto f16_of_x = [](int value) { return uint32_t(value < 0 ? 0x8000 | -value : value); };
  const auto f16_of_y = [](int value) { return uint32_t(value == 0 ? 0 : value < 0 ? 0x8c00 : 0x0c00); };
  std::vector<uint32_t> a(16 * 128);
  std::vector<uint4> b(8 * 96);
  for (unsigned thread = 0; thread < 128; ++thread) {
    for (unsigned s = 0; s < 4; ++s) {
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8, k = 16 * s + i / 2 * 8 + thread % 4 * 2;
        a[(s * 4 + i) * 128 + thread] = f16_of_x(x[row * 64 + k]) | f16_of_x(x[row * 64 + k + 1]) << 16;
      }
    }
  }
  for (unsigned k = 0; k < 64; k += 8) {
    for (unsigned column = 0; column < 96; ++column) {
      const auto pair = [&](unsigned i) {
        return f16_of_y(y[(k + i) * 96 + column]) | f16_of_y(y[(k + i + 1) * 96 + column]) << 16;
      };
      b[k / 8 * 96 + column] = make_uint4(pair(0), pair(2), pair(4), pair(6));
    }
  }
  std::vector<float> d(48 * 128);
  REQUIRE(launch(multiply_shared<kWarpgroup>, 1, 128, 64 / 8 * 96 * 16, nullptr, a.data(), b.data(), d.data()) ==
          cudaSuccess);
  for (unsigned row = 0; row < 64; ++row) {
    for (unsigned column = 0; column < 96; ++column) {
      int sum = 0;
      for (unsigned k = 0; k < 64; ++k) sum += (k < 32 ? 1 : -1) * x[row * 64 + k] * y[k * 96 + column];
      const unsigned thread = row / 16 * 32 + row % 8 * 4 + column % 8 / 2;
      const unsigned i = column / 8 * 4 + row % 16 / 8 * 2 + column % 2;
      CHECK(d[i * 128 + thread] == float(sum) * 0x1p-36f);
    }
  }
}

TEST_CASE("a matrix in shared memory is multiplied by wgmma and without it") {
  std::mt19937_64 random(tqkv_test::seed());
  INFO("repeat with TQKV_TEST_SEED=" << tqkv_test::seed());
  check_shared_product<true>(random);
  check_shared_product<false>(random);
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
