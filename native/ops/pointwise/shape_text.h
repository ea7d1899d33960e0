// Shapes as people read them, for error messages: "[2, 16, 48, 80]".
#pragma once
#include "core/check.h"

struct ShapeText {
  char text[128];
  explicit ShapeText(const PfView& v) {
    int used = snprintf(text, sizeof(text), v.rank < 0 ? "nothing" : "[");
    for (int i = 0; i < v.rank; ++i)
      used += snprintf(text + used, sizeof(text) - used, i ? ", %lld" : "%lld",
                       static_cast<long long>(v.dims[i]));
    if (v.rank >= 0) snprintf(text + used, sizeof(text) - used, "]");
  }
};

// The two refusals that almost every op needs, worded alike.
static inline int32_t NeedSameDims(const PfArgs* a, const char* op, const char* name, const PfView& expected,
                                   const PfView& received) {
  if (PfSameDims(expected, received)) return PF_OK;
  return Fail(a, PF_ERR_SHAPE, "%s: expected %s %s, received %s", op, name, ShapeText(expected).text,
              ShapeText(received).text);
}
// The reference also takes f64, so only the other backends ask this.
static inline int32_t NeedFloat(const PfArgs* a, const char* op, const char* name, const PfView& v) {
  if (!PfPresent(v) || PfIsFloat(v) || PfCount(v) == 0) return PF_OK;
  return Fail(a, PF_ERR_DTYPE, "%s: expected %s to be f32 or bf16, received dtype %d", op, name, v.dtype);
}
#define PF_TRY(check)                         \
  do {                                        \
    const int32_t pf_status = (check);        \
    if (pf_status != PF_OK) return pf_status; \
  } while (0)
