#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "backends/cuda/cublaslt.h"
#include "backends/cuda/memory.h"

namespace {

constexpr size_t kStaging = 4 << 20;  // pinned bytes of one buffer; two are filled and sent in turn
constexpr int kPace = 128;            // ops between two marks; at most two marks' worth is in flight

struct Device {
  cudaStream_t stream = nullptr;
  cudaMemPool_t pool = nullptr;  // where the device has one
  int32_t* faults = nullptr;
  char* staging[2] = {};
  cudaEvent_t sent[2] = {}, mark[2] = {};
  unsigned turn = 0;  // of the staging buffers
  int ops = 0, marks = 0;
};
// Every engine thread has a stream of its own; workers of one process share the device.
thread_local Device device;

int32_t Failed(cudaError_t status, const char* doing, char* error) {
  if (status == cudaSuccess) return PF_OK;
  snprintf(error, 256, "%s: %s (%s)", doing, cudaGetErrorString(status), cudaGetErrorName(status));
  cudaGetLastError();
  return status == cudaErrorMemoryAllocation ? PF_ERR_MEMORY : PF_ERR_DEVICE;
}

#define PF_CUDA(call, doing) \
  if (int32_t failed_ = Failed(call, doing, error)) return failed_

int32_t Begin(int32_t index, PfContext* context, char* error) {
  PF_CUDA(cudaSetDevice(index), "choosing the device");
  PF_CUDA(cudaStreamCreateWithFlags(&device.stream, cudaStreamNonBlocking), "making a stream");
  PF_CUDA(cudaHostAlloc(reinterpret_cast<void**>(&device.faults), sizeof(int32_t), cudaHostAllocMapped),
          "pinning memory");
  *device.faults = kFaultNone;
  for (int i = 0; i < 2; ++i) {
    PF_CUDA(cudaHostAlloc(reinterpret_cast<void**>(&device.staging[i]), kStaging, cudaHostAllocDefault),
            "pinning memory");
    PF_CUDA(cudaEventCreateWithFlags(&device.sent[i], cudaEventDisableTiming), "making an event");
    PF_CUDA(cudaEventCreateWithFlags(&device.mark[i], cudaEventDisableTiming), "making an event");
  }
  int pools = 0;
  cudaDeviceGetAttribute(&pools, cudaDevAttrMemoryPoolsSupported, index);
  if (pools) {
    PF_CUDA(cudaDeviceGetDefaultMemPool(&device.pool, index), "finding the memory pool");
    // Otherwise memory that is given back leaves the process at the next wait, and is mapped anew when it is
    // wanted again.
    uint64_t kept = UINT64_MAX;
    PF_CUDA(cudaMemPoolSetAttribute(device.pool, cudaMemPoolAttrReleaseThreshold, &kept),
            "setting the memory pool up");
  }
  context->stream = device.stream;
  void* on_device = nullptr;
  PF_CUDA(cudaHostGetDevicePointer(&on_device, device.faults, 0), "mapping memory");
  context->faults = on_device;
  return PF_OK;
}

void End() {
  if (!device.stream) return;
  cudaStreamSynchronize(device.stream);
  for (int i = 0; i < 2; ++i) {
    if (device.staging[i]) cudaFreeHost(device.staging[i]);
    if (device.sent[i]) cudaEventDestroy(device.sent[i]);
    if (device.mark[i]) cudaEventDestroy(device.mark[i]);
  }
  if (device.faults) cudaFreeHost(device.faults);
  cudaStreamDestroy(device.stream);
  cudaGetLastError();
  device = Device{};
}

void* Allocate(size_t bytes) {
  void* pointer = nullptr;
  cudaError_t status =
      device.pool ? cudaMallocAsync(&pointer, bytes, device.stream) : cudaMalloc(&pointer, bytes);
  if (status == cudaErrorMemoryAllocation && device.pool) {
    // What was given back counts as taken until the kernels before are done.
    cudaGetLastError();
    cudaStreamSynchronize(device.stream);
    cudaMemPoolTrimTo(device.pool, 0);
    status = cudaMallocAsync(&pointer, bytes, device.stream);
  }
  if (status == cudaSuccess) return pointer;
  cudaGetLastError();
  return nullptr;
}

void Release(void* pointer) {
  if (device.pool)
    cudaFreeAsync(pointer, device.stream);
  else
    cudaFree(pointer);
  cudaGetLastError();
}

int32_t Upload(void* to, const void* from, size_t bytes, char* error) {
  for (size_t at = 0; at < bytes; at += kStaging) {
    const size_t n = std::min(kStaging, bytes - at), i = device.turn++ & 1;
    PF_CUDA(cudaEventSynchronize(device.sent[i]), "upload");
    memcpy(device.staging[i], static_cast<const char*>(from) + at, n);
    PF_CUDA(cudaMemcpyAsync(static_cast<char*>(to) + at, device.staging[i], n, cudaMemcpyHostToDevice,
                            device.stream),
            "upload");
    PF_CUDA(cudaEventRecord(device.sent[i], device.stream), "upload");
  }
  return PF_OK;
}

int32_t Download(void* to, const void* from, size_t bytes, char* error) {
  const size_t parts = (bytes + kStaging - 1) / kStaging;
  for (size_t part = 0; part <= parts; ++part) {
    if (part < parts) {
      const size_t at = part * kStaging, n = std::min(kStaging, bytes - at), i = part & 1;
      PF_CUDA(cudaMemcpyAsync(device.staging[i], static_cast<const char*>(from) + at, n,
                              cudaMemcpyDeviceToHost, device.stream),
              "download");
      PF_CUDA(cudaEventRecord(device.sent[i], device.stream), "download");
    }
    if (part > 0) {  // while the next part is under way
      const size_t at = (part - 1) * kStaging, n = std::min(kStaging, bytes - at), i = (part - 1) & 1;
      PF_CUDA(cudaEventSynchronize(device.sent[i]), "download");
      memcpy(static_cast<char*>(to) + at, device.staging[i], n);
    }
  }
  return TakeFault(device.faults, error);
}

int32_t Synchronize(char* error) {
  PF_CUDA(cudaStreamSynchronize(device.stream), "waiting for the device");
  return TakeFault(device.faults, error);
}

int32_t Pace(char* error) {
  if (++device.ops < kPace) return PF_OK;
  device.ops = 0;
  const int i = device.marks++ & 1;
  if (device.marks > 2) PF_CUDA(cudaEventSynchronize(device.mark[i]), "waiting for the device");
  PF_CUDA(cudaEventRecord(device.mark[i], device.stream), "queueing");
  return PF_OK;
}

// Relaxed: what kernels ask of the runtime beside launching (attributes, heuristics) is harmless.
int32_t Capture(char* error) {
  PF_CUDA(cudaStreamBeginCapture(device.stream, cudaStreamCaptureModeRelaxed), "capturing");
  return PF_OK;
}

int32_t Captured(void** graph, char* error) {
  cudaGraph_t captured = nullptr;
  PF_CUDA(cudaStreamEndCapture(device.stream, &captured), "capturing");
  cudaGraphExec_t made = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&made, captured, 0);
  cudaGraphDestroy(captured);
  PF_CUDA(status, "making a graph");
  *graph = made;
  return PF_OK;
}

int32_t LaunchGraph(void* graph, char* error) {
  PF_CUDA(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), device.stream), "launching a graph");
  device.ops = kPace;  // it is as long as many ops
  return PF_OK;
}

// What is under way ends first: the runtime sees to that.
void Drop(void* graph) {
  cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph));
  cudaGetLastError();
}

}  // namespace

const PfMemory kDeviceMemory = {Begin,       End,  Allocate, Release,  Upload,      Download,
                                Synchronize, Pace, Capture,  Captured, LaunchGraph, Drop};

int32_t DeviceProbe(int32_t index, char* text) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    const bool driver = status == cudaErrorInsufficientDriver || status == cudaErrorNoDevice;
    snprintf(text, 256, "%s",
             !driver ? cudaGetErrorString(status)
             : status == cudaErrorNoDevice || count == 0
                 ? "there is no NVIDIA GPU"
                 : "the NVIDIA driver is missing or older than CUDA 13");
    cudaGetLastError();
    return PF_ERR_DEVICE;
  }
  if (index < 0 || index >= count) {
    snprintf(text, 256, "there is no device %d: expected 0 to %d", index, count - 1);
    return PF_ERR_DEVICE;
  }
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, index) != cudaSuccess) {
    snprintf(text, 256, "the device does not answer");
    cudaGetLastError();
    return PF_ERR_DEVICE;
  }
  if (properties.major < 8) {
    snprintf(text, 256, "%.80s has compute capability %d.%d: 8.0 (Ampere) or newer is needed",
             properties.name, properties.major, properties.minor);
    return PF_ERR_DEVICE;
  }
  snprintf(text, 256, "%.80s, %.1f GiB; matrix products: %.120s", properties.name,
           static_cast<double>(properties.totalGlobalMem) / (1 << 30), CublasLtState());
  return PF_OK;
}

void* CurrentStream() { return device.stream; }
