#include "ops/copy/copy.h"
#include "ops/pointwise/blocks.h"

namespace {

template <class T>
void FillWith(const PfView& y, T value) {
  T* p = PfData<T>(y);
  ForBlocks(PfCount(y), [=](int64_t at, int64_t n) {
    for (int64_t i = at; i < at + n; ++i) p[i] = value;
  });
}

// y[j] = x[j * step]; the common steps are spelled out so that the compiler can load vectors and shuffle.
template <class T>
void Gather(const T* __restrict x, int64_t step, T* __restrict y, int64_t n) {
  switch (step) {
    case 2:
      for (int64_t j = 0; j < n; ++j) y[j] = x[j * 2];
      return;
    case 3:
      for (int64_t j = 0; j < n; ++j) y[j] = x[j * 3];
      return;
    case 4:
      for (int64_t j = 0; j < n; ++j) y[j] = x[j * 4];
      return;
    case 8:
      for (int64_t j = 0; j < n; ++j) y[j] = x[j * 8];
      return;
    default:
      for (int64_t j = 0; j < n; ++j) y[j] = x[j * step];
  }
}

// kSquare x kSquare elements: rows of x become columns of y, in registers where the element size has a form
// for it.
template <class T>
struct Square {
  static constexpr int64_t kSize = 4;
  static void Run(const T* x, int64_t xs, T* y, int64_t ys) {
    for (int64_t i = 0; i < kSize; ++i)
      for (int64_t j = 0; j < kSize; ++j) y[i * ys + j] = x[j * xs + i];
  }
};
#if defined(__x86_64__)
template <>
struct Square<uint32_t> {
  static constexpr int64_t kSize = 4;
  static void Run(const uint32_t* x, int64_t xs, uint32_t* y, int64_t ys) {
    __m128i r[4], t[4];
    for (int j = 0; j < 4; ++j) r[j] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + j * xs));
    t[0] = _mm_unpacklo_epi32(r[0], r[1]);
    t[1] = _mm_unpacklo_epi32(r[2], r[3]);
    t[2] = _mm_unpackhi_epi32(r[0], r[1]);
    t[3] = _mm_unpackhi_epi32(r[2], r[3]);
    r[0] = _mm_unpacklo_epi64(t[0], t[1]);
    r[1] = _mm_unpackhi_epi64(t[0], t[1]);
    r[2] = _mm_unpacklo_epi64(t[2], t[3]);
    r[3] = _mm_unpackhi_epi64(t[2], t[3]);
    for (int i = 0; i < 4; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i * ys), r[i]);
  }
};
template <>
struct Square<uint16_t> {
  static constexpr int64_t kSize = 8;
  static void Run(const uint16_t* x, int64_t xs, uint16_t* y, int64_t ys) {
    __m128i r[8], t[8];
    for (int j = 0; j < 8; ++j) r[j] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + j * xs));
    for (int j = 0; j < 4; ++j) {
      t[j] = _mm_unpacklo_epi16(r[2 * j], r[2 * j + 1]);      // columns 0..3 of rows 2j, 2j+1
      t[j + 4] = _mm_unpackhi_epi16(r[2 * j], r[2 * j + 1]);  // columns 4..7
    }
    for (int h = 0; h < 8; h += 4) {
      const __m128i a = _mm_unpacklo_epi32(t[h], t[h + 1]), b = _mm_unpacklo_epi32(t[h + 2], t[h + 3]);
      const __m128i c = _mm_unpackhi_epi32(t[h], t[h + 1]), d = _mm_unpackhi_epi32(t[h + 2], t[h + 3]);
      r[h] = _mm_unpacklo_epi64(a, b);
      r[h + 1] = _mm_unpackhi_epi64(a, b);
      r[h + 2] = _mm_unpacklo_epi64(c, d);
      r[h + 3] = _mm_unpackhi_epi64(c, d);
    }
    for (int i = 0; i < 8; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i * ys), r[i]);
  }
};
#endif

// A plane of N columns, N fixed: one pass over the N rows of x side by side.
template <int N, class T>
void Weave(const T* x, int64_t xs, T* y, int64_t ys, int64_t m) {
  for (int64_t i = 0; i < m; ++i) {
    T group[N];
    for (int j = 0; j < N; ++j) group[j] = x[j * xs + i];
    memcpy(y + i * ys, group, sizeof(group));
  }
}

// y[i * ys + j] = x[j * xs + i] for i < m, j < n.
template <class T>
void TransposeTile(const T* x, int64_t xs, T* y, int64_t ys, int64_t m, int64_t n) {
  constexpr int64_t kS = Square<T>::kSize, kLine = 64 / sizeof(T) < kS ? kS : 64 / sizeof(T);
  if (n == 2 && m >= kS) return Weave<2>(x, xs, y, ys, m);
  if (n == 3 && m >= kS) return Weave<3>(x, xs, y, ys, m);
  if (n == 4 && m >= kS && kS > 4) return Weave<4>(x, xs, y, ys, m);
  if (m < kS || n < kS) {
    for (int64_t i = 0; i < m; ++i) Gather(x + i, xs, y + i * ys, n);
    return;
  }
  // Strides of large powers of two put all rows of one side into one cache set. So that side, the one with
  // the larger stride, is walked a few rows at a time, in whole lines and along its memory.
  const int64_t m4 = m / kS * kS, n4 = n / kS * kS;
  if (xs > ys) {
    for (int64_t jb = 0; jb < n4; jb += kLine)
      for (int64_t ib = 0; ib < m4; ib += kLine)
        for (int64_t j = jb; j < MinOf(n4, jb + kLine); j += kS)
          for (int64_t i = ib; i < MinOf(m4, ib + kLine); i += kS)
            Square<T>::Run(x + j * xs + i, xs, y + i * ys + j, ys);
  } else {
    for (int64_t ib = 0; ib < m4; ib += kLine)
      for (int64_t jb = 0; jb < n4; jb += kLine)
        for (int64_t i = ib; i < MinOf(m4, ib + kLine); i += kS)
          for (int64_t j = jb; j < MinOf(n4, jb + kLine); j += kS)
            Square<T>::Run(x + j * xs + i, xs, y + i * ys + j, ys);
  }
  for (int64_t i = 0; i < m4; ++i)
    for (int64_t j = n4; j < n; ++j) y[i * ys + j] = x[j * xs + i];
  for (int64_t i = m4; i < m; ++i) Gather(x + i, xs, y + i * ys, n);
}

template <class T>
void CopyRows(const Layout& l, const T* x, T* y) {
  Layout outer = l;
  const int64_t n = l.rank ? l.dims[l.rank - 1] : 1;
  if (l.rank) Remove(outer, l.rank - 1);
  int64_t rows = 1;
  for (int j = 0; j < outer.rank; ++j) rows *= outer.dims[j];
  // One long row is cut up, many short ones are grouped, so that a task is always worth its start.
  const int64_t part = MinOf(n, 1 << 14), parts = (n + part - 1) / part;
  const int64_t group = n < 2048 ? 2048 / n : 1;
  ForTasks((rows + group - 1) / group * parts, rows * n, [&](int64_t task) {
    const int64_t first = task / parts * group, at = task % parts * part;
    const int64_t size = MinOf(part, n - at) * static_cast<int64_t>(sizeof(T));
    for (int64_t row = first; row < MinOf(rows, first + group); ++row) {
      const Offsets o = OffsetsOf(outer, row);
      memcpy(y + o.y + at, x + o.x + at, size);
    }
  });
}

template <class T>
void PermuteAs(const Layout& l, const T* x, T* y) {
  const int last = l.rank - 1;
  if (l.rank == 0 || l.x[last] == 1) return CopyRows(l, x, y);
  int inner = 0;  // y's dim that runs along x's memory: the plane (inner, last) is transposed in tiles
  while (l.x[inner] != 1) ++inner;
  const int64_t m = l.dims[inner], n = l.dims[last], xs = l.x[last], ys = l.y[inner];
  Layout outer = l;
  Remove(outer, last);
  Remove(outer, inner);
  int64_t planes = 1;
  for (int j = 0; j < outer.rank; ++j) planes *= outer.dims[j];
  // A tile has whole cache lines on both sides and is long where its rows are far apart.
  const int64_t tm = MinOf(m, n < 16 ? 1024 : xs > ys ? 512 : 64);
  const int64_t tn = MinOf(n, m < 16 ? 1024 : xs > ys ? 64 : 512);
  const int64_t tiles_m = (m + tm - 1) / tm, tiles_n = (n + tn - 1) / tn;
  ForTasks(planes * tiles_m * tiles_n, planes * m * n, [&](int64_t task) {
    const int64_t j = task % tiles_n * tn, i = task / tiles_n % tiles_m * tm;
    const Offsets o = OffsetsOf(outer, task / (tiles_n * tiles_m));
    TransposeTile(x + o.x + j * xs + i, xs, y + o.y + i * ys + j, ys, MinOf(tm, m - i), MinOf(tn, n - j));
  });
}

}  // namespace

int32_t pf_cpu_fill(const PfArgs* a) {
  const PfView& y = a->out[0];
  const double v = PfParams<FillParams>(a).value;
  const double whole = v != v ? 0 : v;
  switch (y.dtype) {
    case PF_F64: FillWith<double>(y, v); break;
    case PF_F32: FillWith<float>(y, static_cast<float>(v)); break;
    case PF_BF16: FillWith<uint16_t>(y, ToBf16(static_cast<float>(v)).bits); break;
    case PF_F16: FillWith<uint16_t>(y, FloatToHalf(static_cast<float>(v))); break;
    case PF_I32: FillWith<int32_t>(y, static_cast<int32_t>(fmin(fmax(whole, INT32_MIN), INT32_MAX))); break;
    case PF_I64: FillWith<int64_t>(y, static_cast<int64_t>(whole)); break;
    default: FillWith<uint8_t>(y, static_cast<uint8_t>(fmin(fmax(whole, 0), 255)));
  }
  return PF_OK;
}

int32_t pf_cpu_copy_region(const PfArgs* a) {
  CopyRegion r;
  PF_TRY(MakeCopyRegion(a, &r));
  const PfView &x = a->in[0], &y = a->out[0];
  bool raw;
  PF_TRY(CopiesBytes(a, r, &raw));
  const int64_t length = r.count * r.inner, size = PfSize(x.dtype);
  if (length == 0 || r.outer == 0) return PF_OK;
  const int64_t part = MinOf(length, raw ? 1 << 14 : kBlock), parts = (length + part - 1) / part;
  const int64_t group = length < 2048 ? 2048 / length : 1;
  ForTasks((r.outer + group - 1) / group * parts, r.outer * length, [&](int64_t task) {
    alignas(64) float bx[kBlock], by[kBlock];
    const int64_t first = task / parts * group, at = task % parts * part, n = MinOf(part, length - at);
    for (int64_t o = first; o < MinOf(r.outer, first + group); ++o) {
      const int64_t from = (o * r.x_axis + r.x_offset) * r.inner + at;
      const int64_t to = (o * r.y_axis + r.y_offset) * r.inner + at;
      if (raw) {
        memcpy(PfData<char>(y) + to * size, PfData<char>(x) + from * size, n * size);
        continue;
      }
      float* out = BeginWrite(y, to, by);
      const float* in = ReadBlock(x, from, n, bx);
      if (r.accumulate)
        Map(n, in, ReadBlock(y, to, n, by), out, [](Vf u, Vf v) { return u + v; });
      else if (in != out)
        memcpy(out, in, n * sizeof(float));
      EndWrite(y, to, n, out);
    }
  });
  return PF_OK;
}

int32_t pf_cpu_permute(const PfArgs* a) {
  int64_t strides[PF_MAX_RANK];
  PF_TRY(PermuteStrides(a, strides));
  const PfView &x = a->in[0], &y = a->out[0];
  if (PfCount(y) == 0) return PF_OK;
  const Layout l = Collapse(y, strides);
  switch (PfSize(x.dtype)) {
    case 8: PermuteAs(l, PfData<uint64_t>(x), PfData<uint64_t>(y)); break;
    case 4: PermuteAs(l, PfData<uint32_t>(x), PfData<uint32_t>(y)); break;
    case 2: PermuteAs(l, PfData<uint16_t>(x), PfData<uint16_t>(y)); break;
    default: PermuteAs(l, PfData<uint8_t>(x), PfData<uint8_t>(y));
  }
  return PF_OK;
}
