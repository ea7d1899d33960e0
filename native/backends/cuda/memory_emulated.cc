#include <stdlib.h>
#include <string.h>

#include "backends/cuda/emulator.h"
#include "backends/cuda/memory.h"

namespace {

int32_t faults = 0;

int32_t Begin(int32_t, PfContext* context, char*) {
  context->stream = nullptr;
  context->faults = &faults;
  return PF_OK;
}
void End() {}
void* Allocate(size_t bytes) { return aligned_alloc(256, (bytes + 255) / 256 * 256); }
int32_t Upload(void* to, const void* from, size_t bytes, char*) {
  memcpy(to, from, bytes);
  return PF_OK;
}
int32_t Download(void* to, const void* from, size_t bytes, char* error) {
  memcpy(to, from, bytes);
  return TakeFault(&faults, error);
}
int32_t Synchronize(char* error) { return TakeFault(&faults, error); }
int32_t Pace(char*) { return PF_OK; }

int32_t Capture(char*) {
  emulator::noted = new emulator::Launches;
  return PF_OK;
}
int32_t Captured(void** graph, char*) {
  *graph = emulator::noted;
  emulator::noted = nullptr;
  return PF_OK;
}
int32_t LaunchGraph(void* graph, char* error) {
  for (const auto& launch : *static_cast<emulator::Launches*>(graph))
    if (!launch()) {
      snprintf(error, 256, "%s", emulator::Error());
      return PF_ERR_DEVICE;
    }
  return PF_OK;
}
void Drop(void* graph) { delete static_cast<emulator::Launches*>(graph); }

}  // namespace

const PfMemory kDeviceMemory = {Begin,       End,  Allocate, free,     Upload,      Download,
                                Synchronize, Pace, Capture,  Captured, LaunchGraph, Drop};
int32_t DeviceProbe(int32_t, char* text) {
  snprintf(text, 256, "kernels run by the host, for tests");
  return PF_OK;
}
void* CurrentStream() { return nullptr; }
