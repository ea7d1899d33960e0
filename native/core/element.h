// Any dtype through double, one element at a time: for the reference kernels and for files being loaded.
#pragma once
#include "core/half.h"
#include "core/op.h"

PF_HD static inline double Get(const PfView& v, int64_t i) {
  const char* p = static_cast<const char*>(v.data) + i * PfSize(v.dtype);
  switch (v.dtype) {
    case PF_F64: {
      double x;
      memcpy(&x, p, 8);
      return x;
    }
    case PF_F32: {
      float x;
      memcpy(&x, p, 4);
      return x;
    }
    case PF_BF16: {
      Bf16 x;
      memcpy(&x, p, 2);
      return ToFloat(x);
    }
    case PF_F16: {
      uint16_t x;
      memcpy(&x, p, 2);
      return HalfToFloat(x);
    }
    case PF_I32: {
      int32_t x;
      memcpy(&x, p, 4);
      return x;
    }
    case PF_I64: {
      int64_t x;
      memcpy(&x, p, 8);
      return static_cast<double>(x);
    }
    default: return *reinterpret_cast<const uint8_t*>(p);
  }
}

// Integers truncate and saturate, NaN becomes 0: what the cast op promises.
PF_HD static inline void Set(const PfView& v, int64_t i, double x) {
  char* p = static_cast<char*>(v.data) + i * PfSize(v.dtype);
  switch (v.dtype) {
    case PF_F64: memcpy(p, &x, 8); break;
    case PF_F32: {
      float y = static_cast<float>(x);
      memcpy(p, &y, 4);
      break;
    }
    case PF_BF16: {
      Bf16 y = ToBf16(static_cast<float>(x));
      memcpy(p, &y, 2);
      break;
    }
    case PF_F16: {
      uint16_t y = FloatToHalf(static_cast<float>(x));
      memcpy(p, &y, 2);
      break;
    }
    case PF_I32: {
      int32_t y = x != x               ? 0
                  : x <= -2147483648.0 ? INT32_MIN
                  : x >= 2147483647.0  ? INT32_MAX
                                       : static_cast<int32_t>(x);
      memcpy(p, &y, 4);
      break;
    }
    case PF_I64: {
      int64_t y = x != x ? 0 : x <= -0x1p63 ? INT64_MIN : x >= 0x1p63 ? INT64_MAX : static_cast<int64_t>(x);
      memcpy(p, &y, 8);
      break;
    }
    default: *reinterpret_cast<uint8_t*>(p) = x > 0 ? static_cast<uint8_t>(x < 255 ? x : 255) : 0; break;
  }
}
