// SPDX-License-Identifier: Apache-2.0
// A CUDA device through the driver's interface, opened at run time: the tests build and run without CUDA.
#include <dlfcn.h>

#include <stdexcept>

#include "device.hpp"

namespace {

struct Driver {
  int (*init)(unsigned);
  int (*device_get)(int *, int);
  int (*context_retain)(void **, int);
  int (*context_set)(void *);
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
  void *stream = nullptr;
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
    int device = 0;
    void *context = nullptr;
    if (!complete || init(0) != 0 || device_get(&device, 0) != 0 || context_retain(&context, device) != 0) return;
    constexpr unsigned kNonBlocking = 1;
    usable = context_set(context) == 0 && stream_create(&stream, kNonBlocking) == 0;
  }
};

Driver &driver() {
  static Driver opened;
  return opened;
}

void expect(int error, const char *what) {
  if (error != 0) throw std::runtime_error(std::string(what) + " failed with CUDA error " + std::to_string(error));
}

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(bool captured) : captured_(captured) {}
  int32_t kind() const override { return TQ_DEVICE_CUDA; }
  int32_t ordinal() const override { return 0; }
  void *allocate(size_t bytes) override {
    uint64_t pointer = 0;
    expect(driver().allocate(&pointer, bytes), "allocating");
    return reinterpret_cast<void *>(pointer);
  }
  void release(void *pointer) override { driver().release(reinterpret_cast<uint64_t>(pointer)); }
  void upload(void *to, const void *host, size_t bytes) override {
    expect(driver().upload(reinterpret_cast<uint64_t>(to), host, bytes), "uploading");
  }
  void download(void *host, const void *from, size_t bytes) override {
    expect(driver().synchronize(), "the queued work");
    expect(driver().download(host, reinterpret_cast<uint64_t>(from), bytes), "downloading");
  }
  tq_status call(const std::function<tq_status(void *)> &body) override {
    expect(driver().synchronize(), "the work before the call");
    if (!captured_) return body(driver().stream);
    constexpr int kGlobal = 0;  // anything that is not allowed during a capture fails
    expect(driver().begin_capture(driver().stream, kGlobal), "beginning a capture");
    const tq_status status = body(driver().stream);
    void *graph = nullptr, *executable = nullptr;
    expect(driver().end_capture(driver().stream, &graph), "ending a capture");
    if (status == TQ_OK) {
      expect(driver().instantiate(&executable, graph, 0), "instantiating a graph");
      expect(driver().launch(executable, driver().stream), "launching a graph");
      expect(driver().synchronize(), "the graph");
      expect(driver().executable_destroy(executable), "destroying a graph");
    }
    expect(driver().graph_destroy(graph), "destroying a graph");
    return status;
  }

 private:
  bool captured_;
};

}  // namespace

Device *cuda_device(bool captured) {
  if (!driver().usable) return nullptr;
  static CudaDevice direct(false), by_graph(true);
  return captured ? &by_graph : &direct;
}
