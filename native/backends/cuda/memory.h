// Memory and stream of the device, as the engine sees them: memory_cuda.cc through the CUDA runtime,
// memory_emulated.cc in the process's own memory for the emulator.
#pragma once
#include <stdio.h>

#include "core/op.h"

extern const PfMemory kDeviceMemory;
int32_t DeviceProbe(int32_t device, char* text);
// The stream of the calling engine thread.
void* CurrentStream();

// A kernel that meets a value it cannot work with (an index outside its table) writes here, once, and goes on
// with something harmless; the next wait for the device fails with the fault's text.
enum DeviceFault : int32_t { kFaultNone = 0, kFaultRows = 1, kFaultEmbedding = 2 };

// What a kernel could not work with, for the person who called; the operands are not known any more.
static inline const char* FaultText(int32_t fault) {
  switch (fault) {
    case kFaultRows: return "norm_modulate or gated_add: rows names an entry outside its table";
    case kFaultEmbedding: return "embedding: an index lies outside its table";
    default: return "a kernel met a value it cannot work with";
  }
}

// Takes the fault, so that it is told once.
static inline int32_t TakeFault(int32_t* faults, char* error) {
  const int32_t fault = *static_cast<volatile int32_t*>(faults);
  if (fault == kFaultNone) return PF_OK;
  *static_cast<volatile int32_t*>(faults) = kFaultNone;
  snprintf(error, 256, "%s", FaultText(fault));
  return PF_ERR_SHAPE;
}
