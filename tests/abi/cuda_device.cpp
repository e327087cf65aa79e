// SPDX-License-Identifier: Apache-2.0
// A CUDA device through the driver's interface, opened at run time: the tests build and run without CUDA.
#include <dlfcn.h>

#include <map>
#include <memory>
#include <stdexcept>

#include "device.hpp"

namespace {

struct Driver {
  int (*init)(unsigned);
  int (*device_get)(int *, int);
  int (*context_retain)(void **, int);
  int (*context_set)(void *);
  int (*context_get)(void **);
  int (*context_device)(int *);
  int (*synchronize)();
  int (*allocate)(uint64_t *, size_t);
  int (*release)(uint64_t);
  int (*upload)(uint64_t, const void *, size_t);
  int (*download)(void *, uint64_t, size_t);
  int (*stream_create)(void **, unsigned);
  int (*begin_capture)(void *, int);
  int (*end_capture)(void *, void **);
  int (*instantiate)(void **, void *, unsigned long long);
  int (*launch)(void *, void *);
  int (*executable_destroy)(void *);
  int (*graph_destroy)(void *);
  bool usable = false;

  Driver() {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return;
    bool complete = true;
    const auto load = [&](auto &function, const char *name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
      complete = complete && function != nullptr;
    };
    load(init, "cuInit");
    load(device_get, "cuDeviceGet");
    load(context_retain, "cuDevicePrimaryCtxRetain");
    load(context_set, "cuCtxSetCurrent");
    load(context_get, "cuCtxGetCurrent");
    load(context_device, "cuCtxGetDevice");
    load(synchronize, "cuCtxSynchronize");
    load(allocate, "cuMemAlloc_v2");
    load(release, "cuMemFree_v2");
    load(upload, "cuMemcpyHtoD_v2");
    load(download, "cuMemcpyDtoH_v2");
    load(stream_create, "cuStreamCreate");
    load(begin_capture, "cuStreamBeginCapture_v2");
    load(end_capture, "cuStreamEndCapture");
    load(instantiate, "cuGraphInstantiateWithFlags");
    load(launch, "cuGraphLaunch");
    load(executable_destroy, "cuGraphExecDestroy");
    load(graph_destroy, "cuGraphDestroy");
    usable = complete && init(0) == 0;
  }
};

Driver &driver() {
  static Driver opened;
  return opened;
}

void expect(int error, const char *what) {
  if (error != 0) throw std::runtime_error(std::string(what) + " failed with CUDA error " + std::to_string(error));
}

// Makes a context current for a while.
class ContextScope {
 public:
  explicit ContextScope(void *context) {
    expect(driver().context_get(&previous_), "asking for the current context");
    expect(driver().context_set(context), "changing the current context");
  }
  ~ContextScope() { driver().context_set(previous_); }
  ContextScope(const ContextScope &) = delete;
  ContextScope &operator=(const ContextScope &) = delete;

 private:
  void *previous_ = nullptr;
};

void *new_stream(void *context) {
  const ContextScope scope(context);
  void *stream = nullptr;
  constexpr unsigned kNonBlocking = 1;
  expect(driver().stream_create(&stream, kNonBlocking), "making a stream");
  return stream;
}

class CudaDevice final : public Device {
 public:
  CudaDevice(int ordinal, void *context, void *stream, bool captured)
      : ordinal_(ordinal), context_(context), stream_(stream), captured_(captured) {}
  int32_t kind() const override { return TQ_DEVICE_CUDA; }
  int32_t ordinal() const override { return ordinal_; }
  void *context() const { return context_; }
  void *allocate(size_t bytes) override {
    const ContextScope scope(context_);
    uint64_t pointer = 0;
    expect(driver().allocate(&pointer, bytes), "allocating");
    return reinterpret_cast<void *>(pointer);
  }
  void release(void *pointer) override {
    const ContextScope scope(context_);
    driver().release(reinterpret_cast<uint64_t>(pointer));
  }
  void upload(void *to, const void *host, size_t bytes) override {
    const ContextScope scope(context_);
    expect(driver().upload(reinterpret_cast<uint64_t>(to), host, bytes), "uploading");
  }
  void download(void *host, const void *from, size_t bytes) override {
    const ContextScope scope(context_);
    expect(driver().synchronize(), "the queued work");
    expect(driver().download(host, reinterpret_cast<uint64_t>(from), bytes), "downloading");
  }
  // The body sees the caller's current device, which need not be this one.
  std::function<tq_status()> repeatable(std::function<tq_status(void *)> body) override {
    if (!captured_) {
      return [this, body] {
        begin();
        return body(stream_);
      };
    }
    begin();
    const tq_status status = body(stream_);
    return [this, status, graph = end_capture(status)] {
      if (status == TQ_OK) launch(graph.get());
      return status;
    };
  }

 private:
  void begin() {
    const ContextScope scope(context_);
    expect(driver().synchronize(), "the work before the call");
    constexpr int kGlobal = 0;  // anything that is not allowed during a capture fails
    if (captured_) expect(driver().begin_capture(stream_, kGlobal), "beginning a capture");
  }
  // An executable graph, if the call was made.
  std::shared_ptr<void> end_capture(tq_status status) {
    const ContextScope scope(context_);
    void *graph = nullptr, *executable = nullptr;
    expect(driver().end_capture(stream_, &graph), "ending a capture");
    if (status == TQ_OK) expect(driver().instantiate(&executable, graph, 0), "instantiating a graph");
    expect(driver().graph_destroy(graph), "destroying a graph");
    return {executable, [context = context_](void *made) {
              if (made == nullptr) return;
              const ContextScope scope(context);
              driver().executable_destroy(made);
            }};
  }
  void launch(void *executable) {
    const ContextScope scope(context_);
    expect(driver().launch(executable, stream_), "launching a graph");
    expect(driver().synchronize(), "the graph");
  }

  int ordinal_;
  void *context_, *stream_;
  bool captured_;
};

struct Opened {
  CudaDevice direct, by_graph;
};

// Null where there is no such device. Asked from one thread.
Opened *open_device(int ordinal) {
  static std::map<int, std::unique_ptr<Opened>> all;
  const auto [found, fresh] = all.try_emplace(ordinal);
  int device = 0;
  void *context = nullptr;
  if (!fresh || !driver().usable || driver().device_get(&device, ordinal) != 0 ||
      driver().context_retain(&context, device) != 0) {
    return found->second.get();
  }
  if (ordinal == 0) expect(driver().context_set(context), "making device 0 current");
  void *stream = new_stream(context);
  found->second.reset(new Opened{{ordinal, context, stream, false}, {ordinal, context, stream, true}});
  return found->second.get();
}

}  // namespace

Device *cuda_device(bool captured, int ordinal) {
  Opened *opened = open_device(ordinal);
  if (opened == nullptr) return nullptr;
  return captured ? &opened->by_graph : &opened->direct;
}

int cuda_current_device() {
  int device = -1;
  expect(driver().context_device(&device), "asking for the current device");
  return device;
}

void *cuda_new_stream(int ordinal) {
  return new_stream(open_device(ordinal)->direct.context());
}
