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
