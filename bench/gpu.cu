// SPDX-License-Identifier: Apache-2.0
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <utility>

#include "gpu.cuh"

namespace tqkv_bench {
namespace {

constexpr int kBulkBytes = 192 << 10;  // of shared memory a multiprocessor: 12 stages of 16 KiB

__global__ void fill_kernel(uint16_t *data, int64_t count, uint64_t first, float factor) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    uint64_t z = (first + uint64_t(i)) * 0x9e3779b97f4a7c15ull + 1;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    z ^= z >> 31;
    const float u = (uint32_t(z) + 0.5f) * 0x1p-32f, v = uint32_t(z >> 32) * 0x1p-32f;
    data[i] = uint16_t(__float_as_uint(factor * (sqrtf(-2 * logf(u)) * cosf(6.2831853f * v))) >> 16);
  }
}

__device__ uint64_t nanoseconds_now() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

__global__ void wait_kernel(uint64_t nanoseconds) {
  const uint64_t begin = nanoseconds_now();
  while (nanoseconds_now() - begin < nanoseconds) {
  }
}

// Cycles and nanoseconds that passed in the same time.
__global__ void clock_kernel(uint64_t *result) {
  const uint64_t begin = nanoseconds_now();
  const long long first = clock64();
  while (clock64() - first < 20'000'000) {
  }
  result[0] = uint64_t(clock64() - first);
  result[1] = nanoseconds_now() - begin;
}

constexpr int kPoison = 0xa5;

__global__ void count_poison_kernel(const uint4 *data, int64_t chunks, unsigned long long *count) {
  constexpr uint32_t kWord = kPoison * 0x01010101u;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < chunks; i += int64_t{gridDim.x} * blockDim.x) {
    const uint4 v = data[i];
    if (v.x == kWord && v.y == kWord && v.z == kWord && v.w == kWord) atomicAdd(count, 1ull);
  }
}

// By loads and stores of 16 bytes: each team of threads takes `per_team` groups at a time and has kInFlight loads a
// thread under way.
template <int kInFlight, bool kStreaming>
__global__ void __launch_bounds__(512) plain_kernel(const Moves moves, int per_team, int team) {
  const int lane = int(threadIdx.x) % team, teams = int(blockDim.x) / team;
  const int read_chunks = moves.read_bytes / 16, write_chunks = moves.write_bytes / 16;
  const int64_t parts = (moves.groups + per_team - 1) / per_team;
  for (int64_t part = int64_t{blockIdx.x} * teams + int(threadIdx.x) / team; part < parts;
       part += int64_t{gridDim.x} * teams) {
    const int64_t first_group = part * per_team;
    const int count = int(min(int64_t{per_team}, moves.groups - first_group));
    const uint4 *from = reinterpret_cast<const uint4 *>(moves.from) + first_group * read_chunks;
    uint4 *to = reinterpret_cast<uint4 *>(moves.to) + first_group * write_chunks;
    const int reads = count * read_chunks, writes = count * write_chunks;
    uint4 sum = make_uint4(1, 2, 3, 4);
    for (int first = lane; first < reads; first += team * kInFlight) {
      uint4 v[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        v[i] = first + team * i < reads ? __ldcs(from + first + team * i) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) sum.x ^= v[i].x, sum.y ^= v[i].y, sum.z ^= v[i].z, sum.w ^= v[i].w;
    }
    for (int i = lane; i < writes; i += team) {
      if (kStreaming) {
        __stcs(to + i, sum);
      } else {
        to[i] = sum;
      }
    }
    // Never so, which the compiler does not know: every thread's loads stay, also of those that store nothing.
    if (sum.x == 0x12345678 && sum.y == 0x87654321 && sum.z == 0x13572468) to[0] = sum;
  }
}

constexpr int kMaxStages = 16;

// By bulk copies through shared memory, from one thread a block: a ring of stages, each holding `per_stage` groups.
__global__ void __launch_bounds__(32) bulk_kernel(const Moves moves, int per_stage, int stages, uint32_t stage_bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t buffer[];
  __shared__ __align__(8) uint64_t full[kMaxStages];
  const uint32_t first_stage = uint32_t(__cvta_generic_to_shared(buffer));
  const uint32_t first_barrier = uint32_t(__cvta_generic_to_shared(full));
  const int64_t parts = (moves.groups + per_stage - 1) / per_stage;
  const int64_t own = int64_t{blockIdx.x} < parts ? (parts - blockIdx.x + gridDim.x - 1) / gridDim.x : 0;
  const auto group_of = [&](int64_t i) { return (blockIdx.x + i * gridDim.x) * per_stage; };
  const auto count_at = [&](int64_t group) { return uint32_t(min(int64_t{per_stage}, moves.groups - group)); };
  const auto load = [&](int64_t i) {
    const int64_t group = group_of(i);
    const uint32_t bytes = count_at(group) * uint32_t(moves.read_bytes), stage = uint32_t(i % stages);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(first_barrier + 8 * stage), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     first_stage + stage * stage_bytes),
                 "l"(moves.from + group * moves.read_bytes), "r"(bytes), "r"(first_barrier + 8 * stage)
                 : "memory");
  };
  if (moves.clear) {
    for (uint32_t i = 0; i < stages * stage_bytes / 16; ++i)
      reinterpret_cast<uint4 *>(buffer)[i] = make_uint4(0, 0, 0, 0);
  }
  for (int stage = 0; stage < stages; ++stage) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(first_barrier + 8 * stage) : "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the copies see the barriers and what was cleared
  for (int64_t i = 0; i < own && i < stages; ++i) load(i);
  for (int64_t i = 0; i < own; ++i) {
    const uint32_t stage = uint32_t(i % stages), parity = uint32_t(i / stages & 1);
    uint32_t done = 0;
    while (done == 0) {
      asm volatile(
          "{\n\t.reg .pred p;\n\t"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
          "selp.u32 %0, 1, 0, p;\n\t}"
          : "=r"(done)
          : "r"(first_barrier + 8 * stage), "r"(parity)
          : "memory");
    }
    if (moves.write_bytes == 0) {
      if (i + stages < own) load(i + stages);
      continue;
    }
    const int64_t group = group_of(i);
    asm volatile(
        "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(moves.to + group * moves.write_bytes),
        "r"(first_stage + stage * stage_bytes), "r"(count_at(group) * uint32_t(moves.write_bytes))
        : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    // All but the newest write have read their stages: the one before it is free.
    asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
    if (i > 0 && i - 1 + stages < own) load(i - 1 + stages);
  }
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
}

struct Stream {
  cudaStream_t handle = nullptr;
  Stream() { expect(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking), "making a stream"); }
  ~Stream() { cudaStreamDestroy(handle); }
  Stream(const Stream &) = delete;
  Stream &operator=(const Stream &) = delete;
};

struct Event {
  cudaEvent_t handle = nullptr;
  Event() { expect(cudaEventCreate(&handle), "making an event"); }
  ~Event() { cudaEventDestroy(handle); }
  Event(const Event &) = delete;
  Event &operator=(const Event &) = delete;
};

struct Graph {
  cudaGraphExec_t executable = nullptr;
  Graph(const Call &call, int calls, cudaStream_t stream) {
    cudaGraph_t graph = nullptr;
    expect(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "beginning a capture");
    for (int i = 0; i < calls; ++i) call(i, stream);
    expect(cudaStreamEndCapture(stream, &graph), "ending a capture");
    const cudaError_t error = cudaGraphInstantiate(&executable, graph, 0);
    cudaGraphDestroy(graph);
    expect(error, "instantiating a graph");
  }
  ~Graph() { cudaGraphExecDestroy(executable); }
  Graph(const Graph &) = delete;
  Graph &operator=(const Graph &) = delete;
};

// The release of the driver's package, or nothing where its management library is missing.
std::string driver_version() {
  void *library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return "";
  const auto init = reinterpret_cast<int (*)()>(dlsym(library, "nvmlInit_v2"));
  const auto get = reinterpret_cast<int (*)(char *, unsigned)>(dlsym(library, "nvmlSystemGetDriverVersion"));
  const auto shutdown = reinterpret_cast<int (*)()>(dlsym(library, "nvmlShutdown"));
  char text[96] = "";
  if (init != nullptr && get != nullptr && shutdown != nullptr && init() == 0) {
    if (get(text, sizeof text) != 0) text[0] = 0;
    shutdown();
  }
  dlclose(library);
  return text;
}

// A ceiling that skips bytes would be a wrong one.
void check_writes(const std::string &name, const std::function<void(const Moves &, cudaStream_t)> &launch,
                  const Moves &moves, int64_t bytes) {
  const Buffer count(8);
  expect(cudaMemset(count.data, 0, 8), name.c_str());
  expect(cudaMemset(moves.to, kPoison, size_t(bytes)), name.c_str());
  Moves checked = moves;
  checked.clear = true;
  launch(checked, nullptr);
  expect(cudaGetLastError(), name.c_str());
  count_poison_kernel<<<1024, 256>>>(reinterpret_cast<const uint4 *>(moves.to), bytes / 16,
                                     reinterpret_cast<unsigned long long *>(count.data));
  expect(cudaGetLastError(), name.c_str());
  unsigned long long left = 0;
  expect(cudaMemcpy(&left, count.data, 8, cudaMemcpyDeviceToHost), name.c_str());
  if (left != 0) throw std::runtime_error(name + " left " + std::to_string(left) + " chunks unwritten");
}

}  // namespace

void expect(cudaError_t error, const char *what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

void expect(tq_status status) {
  if (status != TQ_OK) throw std::runtime_error(std::string(tq_status_string(status)) + ": " + tq_last_error());
}

void fill_normals(uint8_t *data, int64_t count, uint64_t first, float factor) {
  fill_kernel<<<4096, 256>>>(reinterpret_cast<uint16_t *>(data), count, first, factor);
  expect(cudaGetLastError(), "filling an array");
}

Timing time_of(const Call &call, int calls, int replays) {
  constexpr int kWarmUp = 2;
  constexpr uint64_t kLaunchNanoseconds = 200'000;
  const Stream stream;
  const Graph graph(call, calls, stream.handle);
  const Event begin, end;
  std::vector<double> times;
  for (int i = 0; i < replays + kWarmUp; ++i) {
    // The device is busy while the host launches the graph, whose time does not count.
    wait_kernel<<<1, 1, 0, stream.handle>>>(kLaunchNanoseconds);
    expect(cudaGetLastError(), "waiting");
    expect(cudaEventRecord(begin.handle, stream.handle), "recording an event");
    expect(cudaGraphLaunch(graph.executable, stream.handle), "launching a graph");
    expect(cudaEventRecord(end.handle, stream.handle), "recording an event");
    expect(cudaStreamSynchronize(stream.handle), "running a graph");
    float milliseconds = 0;
    expect(cudaEventElapsedTime(&milliseconds, begin.handle, end.handle), "reading an event");
    if (i >= kWarmUp) times.push_back(double(milliseconds) * 1e-3 / calls);
  }
  std::sort(times.begin(), times.end());
  const size_t n = times.size();
  return {times[n / 2], times.front(), times[(9 * n + 9) / 10 - 1]};
}

Gpu::Gpu(bool quick) : quick_(quick) {
  int32_t devices = 0;
  const char *reason = "";
  expect(tq_device_count(TQ_DEVICE_CUDA, &devices, &reason));
  if (devices == 0) throw std::runtime_error(reason);
  expect(cudaSetDevice(0), "choosing device 0");
  auto info = sized<tq_device_info>();
  expect(tq_device_get_info(TQ_DEVICE_CUDA, 0, &info));
  machine_.device = info.name;
  machine_.compute_capability = info.compute_capability;
  machine_.multiprocessors = info.processors;
  const auto version = [](int v) { return std::to_string(v / 1000) + '.' + std::to_string(v % 1000 / 10); };
  int driver = 0, runtime = 0;
  expect(cudaDriverGetVersion(&driver), "asking the driver's version");
  expect(cudaRuntimeGetVersion(&runtime), "asking the runtime's version");
  machine_.cuda_driver = version(driver);
  machine_.cuda_runtime = version(runtime);
  machine_.driver = driver_version();
  cudaFuncAttributes attributes;
  expect(cudaFuncGetAttributes(&attributes, bulk_kernel), "loading the bulk kernel");
  has_bulk_ = attributes.ptxVersion >= 90;  // compiled without, it would do nothing
  if (has_bulk_) {
    expect(cudaFuncSetAttribute(bulk_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBulkBytes),
           "giving the bulk kernel its shared memory");
    expect(cudaFuncSetAttribute(bulk_kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                cudaSharedmemCarveoutMaxShared),
           "giving the bulk kernel its shared memory");
  }
}

void Gpu::measure(const Buffer &from, int64_t bytes, const Buffer &to) {
  constexpr int kGroupBytes = 4096;
  machine_.read_bytes = bytes;
  const Moves moves{from.data, to.data, bytes / kGroupBytes, kGroupBytes, 0};
  machine_.plain_read = best_plain(moves, {1, 4});
  if (has_bulk_) machine_.bulk_read = best_bulk(moves, {1, 4}, {16});

  const Buffer counts(16);
  clock_kernel<<<1, 1>>>(reinterpret_cast<uint64_t *>(counts.data));
  expect(cudaGetLastError(), "measuring the clock");
  uint64_t host[2] = {};
  expect(cudaMemcpy(host, counts.data, sizeof host, cudaMemcpyDeviceToHost), "measuring the clock");
  machine_.clock_mhz = double(host[0]) / double(host[1]) * 1e3;
}

Ceiling Gpu::ceiling(const Moves &moves, const Rotation &rotation, const std::vector<int> &stage_kib) const {
  const Ceiling plain = best_plain(moves, rotation);
  if (!has_bulk_) return plain;
  const Ceiling bulk = best_bulk(moves, rotation, stage_kib);
  return !bulk.kernel.empty() && bulk.seconds < plain.seconds ? bulk : plain;
}

// Measures one way to make the moves; `best` keeps the fastest.
void Gpu::consider(const std::string &name, const Launch &launch, const Moves &moves, const Rotation &rotation,
                   Ceiling *best) const {
  const int64_t write_bytes = moves.groups * moves.write_bytes;
  if (write_bytes > 0) check_writes(name, launch, moves, write_bytes);
  const Timing time = time_of(
      [&](int i, cudaStream_t stream) {
        Moves set = moves;
        set.from += i % rotation.sets * moves.groups * moves.read_bytes;
        set.to += i % rotation.sets * write_bytes;
        launch(set, stream);
        expect(cudaGetLastError(), name.c_str());
      },
      rotation.calls, quick_ ? 5 : 9);
  if (best->seconds == 0 || time.median < best->seconds) *best = {time.median, name};
}

template <int kInFlight, bool kStreaming>
void Gpu::consider_plain(const Moves &moves, const Rotation &rotation, Ceiling *best) const {
  for (int threads : {256, 512}) {
    for (int team : {32, threads}) {
      // As many groups as the loads in flight cover, at least one.
      const int per_team = int(std::clamp<int64_t>(int64_t{16} * kInFlight * team / moves.read_bytes, 1, 64));
      const int64_t parts = (moves.groups + per_team - 1) / per_team;
      const int64_t all = (parts + threads / team - 1) / (threads / team);
      int fitting = 0;
      expect(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fitting, plain_kernel<kInFlight, kStreaming>, threads, 0),
             "asking for the occupancy");
      const int64_t resident = int64_t{fitting} * machine_.multiprocessors;
      // One block after the other, or as many as fit at once or half of them, which go on to further groups.
      std::vector<std::pair<const char *, int64_t>> grids = {{"all blocks", all}};
      if (all > resident) grids.push_back({"resident blocks", resident});
      if (all > resident / 2) grids.push_back({"half the resident blocks", std::max<int64_t>(1, resident / 2)});
      for (const auto &[grid_name, grid] : grids) {
        if (grid > INT32_MAX) continue;
        char name[160];
        std::snprintf(name, sizeof name, "plain, %d loads a thread, %d threads, teams of %d, %s%s", kInFlight, threads,
                      team, grid_name, kStreaming ? ", streaming stores" : "");
        consider(
            name,
            [&, blocks = unsigned(grid)](const Moves &set, cudaStream_t stream) {
              plain_kernel<kInFlight, kStreaming><<<blocks, threads, 0, stream>>>(set, per_team, team);
            },
            moves, rotation, best);
      }
    }
  }
}

Ceiling Gpu::best_plain(const Moves &moves, const Rotation &rotation) const {
  Ceiling best;
  consider_plain<1, false>(moves, rotation, &best);
  consider_plain<2, false>(moves, rotation, &best);
  consider_plain<4, false>(moves, rotation, &best);
  consider_plain<8, false>(moves, rotation, &best);
  if (moves.write_bytes > 0) {
    consider_plain<2, true>(moves, rotation, &best);
    consider_plain<4, true>(moves, rotation, &best);
    consider_plain<8, true>(moves, rotation, &best);
  }
  return best;
}

// Stages of up to so many KiB of what goes in or out, whichever is more; 1, 2 or 4 blocks share the memory for them.
Ceiling Gpu::best_bulk(const Moves &moves, const Rotation &rotation, const std::vector<int> &stage_kib) const {
  Ceiling best;
  const int largest = std::max(moves.read_bytes, moves.write_bytes);
  for (int kib : stage_kib) {
    const int per_stage = (kib << 10) / largest;
    if (per_stage == 0) continue;
    const int stage_bytes = (per_stage * largest + 127) / 128 * 128;
    for (int blocks : {1, 2, 4}) {
      // Each block also has a kilobyte of the system's and its barriers.
      const int stages = std::min(kMaxStages, kBulkBytes / blocks / stage_bytes);
      if (stages < 2) continue;
      const int64_t parts = (moves.groups + per_stage - 1) / per_stage;
      const int64_t grid = std::min<int64_t>(parts, int64_t{blocks} * machine_.multiprocessors);
      char name[160];
      std::snprintf(name, sizeof name, "bulk copies, stages of %d bytes, %d a block, %d blocks a multiprocessor",
                    per_stage * largest, stages, blocks);
      consider(
          name,
          [&, count = unsigned(grid)](const Moves &set, cudaStream_t stream) {
            bulk_kernel<<<count, 1, size_t(stages) * size_t(stage_bytes), stream>>>(set, per_stage, stages,
                                                                                    uint32_t(stage_bytes));
          },
          moves, rotation, &best);
    }
  }
  return best;
}

}  // namespace tqkv_bench
