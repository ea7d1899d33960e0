#include <type_traits>

#include "backends/cpu/rows.h"
#include "ops/rope/rope.h"

namespace {

// cos and sin of one row spread over the pairs, the sine with the sign of the rotation: y = t·c + swap(t)·s.
void SpreadAngles(const float* cos, const float* sin, int64_t half, float* c, float* s) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vf u = LoadF(cos + i), v = LoadF(sin + i);
    StorePair(c + 2 * i, TwiceLow(u), TwiceHigh(u));
    StorePair(s + 2 * i, kAlternate * TwiceLow(v), kAlternate * TwiceHigh(v));
  }
  for (; i < half; ++i) {
    c[2 * i] = c[2 * i + 1] = cos[i];
    s[2 * i] = -sin[i];
    s[2 * i + 1] = sin[i];
  }
}

// bf16 in and out, with angles: a unit of 32 bits is a pair that is turned. Its halves are floats but for a
// shift, and nothing has to be swapped.
template <class X, class Y>
constexpr bool kByPairs = std::is_same_v<X, Bf16>&& std::is_same_v<Y, Bf16>;
constexpr int64_t kPairValues = 2 * kLanes;

// Of every kPairValues values first those at even places, then the others.
void EvenFirst(float* p, int64_t d) {
  for (int64_t i = 0; i < d; i += kPairValues) {
    const Vf low = LoadF(p + i), high = LoadF(p + i + kLanes);
    StoreF(p + i, __builtin_shuffle(low, high, 2 * kLaneIndex));
    StoreF(p + i + kLanes, __builtin_shuffle(low, high, 2 * kLaneIndex + 1));
  }
}
// The next row is on its way, to be read and to be written, while this one is computed.
template <class X, class Y>
void AskNext(const X* x, const Y* y, int64_t row, int64_t d) {
  for (int64_t i = 0; i < d; i += 64 / sizeof(X)) __builtin_prefetch(x + row + i, 0);
  for (int64_t i = 0; i < d; i += 64 / sizeof(Y)) __builtin_prefetch(y + row + i, 1);
}

// kPairValues values, with two vectors each of c and s as EvenFirst leaves them.
inline void TurnUnits(const Bf16* x, const Vf (&c)[2], const Vf (&s)[2], float r, Bf16* y) {
  Vu pairs;
  memcpy(&pairs, x, sizeof(pairs));
  const Vf even = (Vf)(pairs << 16), odd = (Vf)(pairs & 0xffff0000u);
  const Vu both = Bf16Pairs(Fma(odd, s[0], even * c[0]) * r, Fma(even, s[1], odd * c[1]) * r);
  memcpy(y, &both, sizeof(both));
}
// One head.
void TurnPairs(const Bf16* x, const float* c, const float* s, int64_t d, float r, Bf16* y) {
  for (int64_t i = 0; i < d; i += kPairValues) {
    const Vf cosine[2] = {LoadF(c + i), LoadF(c + i + kLanes)},
             sine[2] = {LoadF(s + i), LoadF(s + i + kLanes)};
    TurnUnits(x + i, cosine, sine, r, y + i);
  }
}

#if defined(__AVX512BF16__)
// All heads of a row, each of kVectors * kPairValues values: c and s stay in registers.
template <int kVectors>
void TurnHeads(const Bf16* x, const float* c, const float* s, int64_t heads, const float* rstd, Bf16* y) {
  constexpr int64_t d = kVectors * kPairValues;
  Vf cosine[kVectors][2], sine[kVectors][2];
  for (int i = 0; i < 2 * kVectors; ++i) {
    cosine[i / 2][i % 2] = LoadF(c + i * kLanes);
    sine[i / 2][i % 2] = LoadF(s + i * kLanes);
  }
  for (int64_t h = 0; h < heads; ++h, x += d, y += d) {
    const float r = rstd[h];
    AskNext(x, y, heads * d, d);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i)
      TurnUnits(x + i * kPairValues, cosine[i], sine[i], r, y + i * kPairValues);
  }
}
#endif

// 1 / root mean square of every head of a row; 1 without a norm.
template <class X>
void HeadScales(const X* x, int64_t heads, int64_t d, bool norm, float eps, float* rstd) {
  if (!norm) {
    for (int64_t h = 0; h < heads; ++h) rstd[h] = 1;
    return;
  }
  SquareSums(x, heads, d, rstd);
  ForLanes(heads, [=](int64_t h, int64_t m) {
    StoreN(rstd + h, 1 / Sqrt(LoadN(rstd + h, m, 1) / static_cast<float>(d) + eps), m);
  });
}

// Every head of the rows: y = rstd·(x·c + swap(x)·s), where c and s hold weight and angles of all heads.
template <class X, class Y>
void Forward(const PfArgs* a, const RopeShape& shape, const float* w, float* buffers, int64_t stride) {
  const int64_t d = shape.d, heads = shape.heads, angles = RoundUp(d, 16);
  const float *cos = PfData<float>(a->in[2]), *sin = PfData<float>(a->in[3]);
  float* rstds = PfData<float>(a->out[1]);
  const float eps = static_cast<float>(PfParams<RopeParams>(a).eps);
  const bool by_pairs = kByPairs<X, Y> && cos && d % kPairValues == 0;
#pragma omp parallel for schedule(static) if (shape.rows * heads * d > kParallelWork)
  for (int64_t n = 0; n < shape.rows; ++n) {
    float *c = buffers + omp_get_thread_num() * stride, *s = c + angles, *rstd = s + angles;
    if (cos) SpreadAngles(cos + n * (d / 2), sin + n * (d / 2), d / 2, c, s);
    if (w)
      ForLanes(d, [=](int64_t i, int64_t m) {
        const Vf v = LoadN(w + i, m);
        StoreN(c + i, cos ? v * LoadN(c + i, m) : v, m);
        if (cos) StoreN(s + i, SwapPairs(v) * LoadN(s + i, m), m);
      });
    if (by_pairs) {
      EvenFirst(c, d);
      EvenFirst(s, d);
    }
    const X* x = PfData<X>(a->in[0]) + n * heads * d;
    Y* y = PfData<Y>(a->out[0]) + n * heads * d;
    HeadScales(x, heads, d, w != nullptr, eps, rstd);
    if (rstds) memcpy(rstds + n * heads, rstd, heads * sizeof(float));
#if defined(__AVX512BF16__)
    if constexpr (kByPairs<X, Y>)
      if (by_pairs && (d == 2 * kPairValues || d == 4 * kPairValues)) {
        d == 2 * kPairValues ? TurnHeads<2>(x, c, s, heads, rstd, y) : TurnHeads<4>(x, c, s, heads, rstd, y);
        continue;
      }
#endif
    for (int64_t h = 0; h < heads; ++h) {
      const X* from = x + h * d;
      AskNext(from, y + h * d, heads * d, d);
      const float r = rstd[h];
      if constexpr (kByPairs<X, Y>)
        if (by_pairs) {
          TurnPairs(from, c, s, d, r, y + h * d);
          continue;
        }
      WriteRow(y + h * d, d, [=](int64_t i, int64_t m) {
        const Vf v = LoadN(from + i, m);
        Vf t = v;
        if (w || cos) t = t * LoadN(c + i, m);
        if (cos) t = Fma(SwapPairs(v), LoadN(s + i, m), t);
        return t * r;
      });
    }
  }
}

constexpr int64_t kRowsPerChunk = 32;  // rows whose part of dw one task sums

}  // namespace

int32_t pf_cpu_rope(const PfArgs* a) {
  const char* op = "rope";
  RopeShape shape;
  if (int32_t e = RopeCheck(a, &shape)) return e;
  if (int32_t e = RopeDtypes(a)) return e;
  const int64_t stride = 2 * RoundUp(shape.d, 16) + RoundUp(shape.heads, 16);
  const float* w;
  float* buffers = Scratch<float>(a, omp_get_max_threads() * stride);
  if (!buffers || !AsFloats(a, a->in[1], &w)) return NoMemory(a, op);
  PF_FLOAT_DISPATCH(a->in[0], X,
                    PF_FLOAT_DISPATCH(a->out[0], Y, { Forward<X, Y>(a, shape, w, buffers, stride); }););
  return PF_OK;
}

int32_t pf_cpu_rope_backward(const PfArgs* a) {
  const char* op = "rope_backward";
  RopeShape shape;
  if (int32_t e = RopeBackwardCheck(a, &shape)) return e;
  if (int32_t e = RopeBackwardDtypes(a)) return e;
  const int64_t d = shape.d, row = shape.heads * d, angles = RoundUp(d, 16),
                stride = 3 * (angles + RoundUp(row, 16));
  const int64_t chunks = (shape.rows + kRowsPerChunk - 1) / kRowsPerChunk;
  const float* w;
  float* dw_out = PfData<float>(a->out[1]);
  float* buffers = Scratch<float>(a, omp_get_max_threads() * stride);
  float* partial = dw_out ? Scratch<float>(a, chunks * angles) : nullptr;
  if (!buffers || (dw_out && !partial) || !AsFloats(a, a->in[1], &w)) return NoMemory(a, op);
  const float *cos = PfData<float>(a->in[2]), *sin = PfData<float>(a->in[3]),
              *rstds = PfData<float>(a->in[4]);
#pragma omp parallel for schedule(static) if (shape.rows * row > kParallelWork)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    float *c = buffers + omp_get_thread_num() * stride, *s = c + angles, *g = s + angles,
          *x_buffer = g + angles;
    float* dw = dw_out ? partial + chunk * angles : nullptr;
    if (dw) memset(dw, 0, angles * sizeof(float));
    const int64_t end = (chunk + 1) * kRowsPerChunk < shape.rows ? (chunk + 1) * kRowsPerChunk : shape.rows;
    for (int64_t n = chunk * kRowsPerChunk; n < end; ++n) {
      if (cos) SpreadAngles(cos + n * (d / 2), sin + n * (d / 2), d / 2, c, s);
      const float* x_row = w ? ReadRow(a->in[0], n * row, row, x_buffer) : nullptr;
      const float* dy_row = ReadRow(a->in[5], n * row, row, x_buffer + RoundUp(row, 16));
      float* dx_row = OpenRow(a->out[0], n * row, x_buffer + 2 * RoundUp(row, 16));
      for (int64_t h = 0; h < shape.heads; ++h) {
        const float *x = x_row + h * d, *dy = dy_row + h * d;
        float* dx = dx_row + h * d;
        // The transpose of the rotation turns back: the swapped term changes sign.
        const auto unrotated = [&](int64_t i, int64_t m) {
          const Vf v = LoadN(dy + i, m);
          return cos ? v * LoadN(c + i, m) - SwapPairs(v) * LoadN(s + i, m) : v;
        };
        if (!w) {
          ForLanes(d, [&](int64_t i, int64_t m) { StoreN(dx + i, unrotated(i, m), m); });
          continue;
        }
        const float rstd = rstds[n * shape.heads + h];
        const float dot = RowSum(d,
                                 [&](int64_t i, int64_t m) {
                                   const Vf dt = unrotated(i, m), normal = LoadN(x + i, m) * rstd;
                                   const Vf gradient = dt * LoadN(w + i, m);
                                   if (dw) StoreN(dw + i, LoadN(dw + i, m) + dt * normal, m);
                                   StoreN(g + i, gradient, m);
                                   return gradient * normal;
                                 }) /
                          d;
        ForLanes(d, [&](int64_t i, int64_t m) {
          StoreN(dx + i, rstd * (LoadN(g + i, m) - LoadN(x + i, m) * rstd * dot), m);
        });
      }
      CommitRow(a->out[0], n * row, row, dx_row);
    }
  }
  if (!dw_out) return PF_OK;
  const bool accumulate = PfParams<RopeBackwardParams>(a).accumulate != 0;
  for (int64_t i = 0; i < d; ++i) {
    double sum = accumulate ? dw_out[i] : 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * angles + i];
    dw_out[i] = static_cast<float>(sum);
  }
  return PF_OK;
}
