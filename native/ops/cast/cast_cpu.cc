#include "ops/cast/cast.h"
#include "ops/pointwise/blocks.h"

namespace {

// The branch-free forms of HalfToFloat and FloatToHalf, which the compiler turns into vectors.
void HalvesToFloats(const uint16_t* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) {
    // Multiplying by 2^112 moves the exponent's bias and makes subnormal halves normal, exactly.
    const uint32_t h = x[i], u = (h & 0x7fff) << 13;
    float f;
    memcpy(&f, &u, 4);
    f *= 0x1p112f;
    uint32_t v;
    memcpy(&v, &f, 4);
    v |= (u >= 0x0f800000u ? 0x7f800000u : 0u) | (h & 0x8000) << 16;
    memcpy(y + i, &v, 4);
  }
}
void FloatsToHalves(const float* x, int64_t n, uint16_t* y) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t u;
    memcpy(&u, x + i, 4);
    const uint32_t sign = u >> 16 & 0x8000;
    u &= 0x7fffffffu;
    float f;
    memcpy(&f, &u, 4);
    f += 0.5f;  // for subnormal halves the float adder does the rounding
    uint32_t small;
    memcpy(&small, &f, 4);
    small -= 0x3f000000u;
    const uint32_t normal = (u - 0x38000000u + 0xfff + (u >> 13 & 1)) >> 13;
    uint32_t h = u < 0x38800000u ? small : normal;
    h = u >= 0x477ff000u ? 0x7c00 : h;
    h = u > 0x7f800000u ? 0x7e00 : h;
    y[i] = static_cast<uint16_t>(h | sign);
  }
}

bool ThroughFloat(int32_t dtype) { return dtype == PF_F32 || dtype == PF_BF16 || dtype == PF_F16; }

const float* Floats(const PfView& x, int64_t at, int64_t n, float* buffer) {
  if (x.dtype == PF_U8) {
    const uint8_t* p = PfData<uint8_t>(x) + at;
    for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
    return buffer;
  }
  if (x.dtype != PF_F16) return ReadBlock(x, at, n, buffer);
  HalvesToFloats(PfData<uint16_t>(x) + at, n, buffer);
  return buffer;
}

template <class T>
void ToDoubles(const PfView& x, int64_t at, int64_t n, double* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = static_cast<double>(PfData<T>(x)[at + i]);
}
// T from doubles that are clamped to what T can hold first.
template <class T>
void FromDoubles(const double* x, int64_t n, const PfView& y, int64_t at, double low, double high) {
  T* p = PfData<T>(y) + at;
  for (int64_t i = 0; i < n; ++i) {
    const double v = x[i] != x[i] ? 0 : x[i];
    p[i] = static_cast<T>(v < low ? low : v > high ? high : v);
  }
}

void Doubles(const PfView& x, int64_t at, int64_t n, double* y) {
  switch (x.dtype) {
    case PF_F64: return ToDoubles<double>(x, at, n, y);
    case PF_I32: return ToDoubles<int32_t>(x, at, n, y);
    case PF_I64: return ToDoubles<int64_t>(x, at, n, y);
    case PF_U8: return ToDoubles<uint8_t>(x, at, n, y);
    default: {
      alignas(64) float buffer[kBlock];
      const float* f = Floats(x, at, n, buffer);
      for (int64_t i = 0; i < n; ++i) y[i] = f[i];
    }
  }
}

void StoreFloats(const PfView& y, int64_t at, int64_t n, const float* f) {
  if (y.dtype == PF_F16) return FloatsToHalves(f, n, PfData<uint16_t>(y) + at);
  if (y.dtype == PF_F32) memcpy(PfData<float>(y) + at, f, n * sizeof(float));
  EndWrite(y, at, n, f);
}

void StoreDoubles(const PfView& y, int64_t at, int64_t n, const double* d) {
  switch (y.dtype) {
    case PF_F64: memcpy(PfData<double>(y) + at, d, n * sizeof(double)); return;
    case PF_I32: return FromDoubles<int32_t>(d, n, y, at, INT32_MIN, INT32_MAX);
    case PF_U8: return FromDoubles<uint8_t>(d, n, y, at, 0, 255);
    case PF_I64:
      FromDoubles<int64_t>(d, n, y, at, -0x1p63, 0x1.fffffffffffffp62);
      for (int64_t i = 0; i < n; ++i)
        if (d[i] >= 0x1p63) PfData<int64_t>(y)[at + i] = INT64_MAX;
      return;
    default: {
      alignas(64) float f[kBlock];
      for (int64_t i = 0; i < n; ++i) f[i] = static_cast<float>(d[i]);
      StoreFloats(y, at, n, f);
    }
  }
}

}  // namespace

int32_t pf_cpu_cast(const PfArgs* a) {
  PF_TRY(CheckCast(a));
  const PfView &x = a->in[0], &y = a->out[0];
  const int64_t size = PfSize(x.dtype);
  ForBlocks(PfCount(x), [&](int64_t at, int64_t n) {
    if (x.dtype == y.dtype) {
      memcpy(PfData<char>(y) + at * size, PfData<char>(x) + at * size, n * size);
    } else if ((ThroughFloat(x.dtype) || x.dtype == PF_U8) && ThroughFloat(y.dtype)) {
      alignas(64) float buffer[kBlock];
      StoreFloats(y, at, n, Floats(x, at, n, buffer));
    } else {
      alignas(64) double buffer[kBlock];
      Doubles(x, at, n, buffer);
      StoreDoubles(y, at, n, buffer);
    }
  });
  return PF_OK;
}
