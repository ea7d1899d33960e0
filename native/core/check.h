// How a kernel refuses a call: a status for the engine and one sentence for the person who made it.
#pragma once
#include <stdarg.h>
#include <stdio.h>

#include "core/op.h"

__attribute__((format(printf, 3, 4))) static inline int32_t Fail(const PfArgs* a, int32_t status,
                                                                 const char* format, ...) {
  va_list list;
  va_start(list, format);
  vsnprintf(a->context->error, sizeof(a->context->error), format, list);
  va_end(list);
  return status;
}

static inline bool PfIsFloat(const PfView& v) { return v.dtype == PF_F32 || v.dtype == PF_BF16; }

// All operands that are there f32 or bf16, those in the masks f32; `others` are inputs of no concern here.
// The reference also takes f64, so only the other backends ask this.
static inline int32_t NeedFloats(const PfArgs* a, const char* op, unsigned f32_inputs, unsigned f32_outputs,
                                 unsigned others = 0) {
  for (int side = 0; side < 2; ++side) {
    const unsigned f32 = side ? f32_outputs : f32_inputs;
    for (int i = 0; i < (side ? a->n_out : a->n_in); ++i) {
      const PfView& v = side ? a->out[i] : a->in[i];
      if (!PfPresent(v) || (!side && others >> i & 1)) continue;
      if (!PfIsFloat(v) || (f32 >> i & 1 && v.dtype != PF_F32))
        return Fail(a, PF_ERR_DTYPE, "%s: expected %s %d to be %s, received dtype %d", op,
                    side ? "output" : "input", i, f32 >> i & 1 ? "f32" : "f32 or bf16", v.dtype);
    }
  }
  return PF_OK;
}

static inline bool PfSameDims(const PfView& a, const PfView& b) {
  if (a.rank != b.rank) return false;
  for (int i = 0; i < a.rank; ++i)
    if (a.dims[i] != b.dims[i]) return false;
  return true;
}

// Product of dims[from, to): how ops fold shapes of any rank into the few lengths they loop over.
static inline int64_t PfProduct(const PfView& v, int from, int to) {
  int64_t n = 1;
  for (int i = from; i < to; ++i) n *= v.dims[i];
  return n;
}

template <class T>
static inline T* PfData(const PfView& v) {
  return static_cast<T*>(v.data);
}

template <class Params>
static inline const Params& PfParams(const PfArgs* a) {
  return *reinterpret_cast<const Params*>(a->scalars);
}
