// Moving elements.
//   fill         [] -> [y]     y = value, any dtype
//   copy_region  [x] -> [+y]   x viewed as [outer, x_axis, inner], y as [outer, y_axis, inner]:
//                              y[o, y_offset + i, :] (= or +=) x[o, x_offset + i, :] for i < count;
//                              float to float of any dtype, other dtypes only to themselves
//   permute      [x] -> [y]    dim j of y is dim p_j of x, rank <= 6, any dtype
#pragma once
#include "core/half.h"  // PF_HD
#include "ops/pointwise/shape_text.h"

struct FillParams {
  double value;
};
struct CopyRegionParams {
  double outer, count, inner, x_axis, x_offset, y_axis, y_offset, accumulate;
};
struct PermuteParams {
  double p[PF_MAX_RANK];
};

struct CopyRegion {
  int64_t outer, count, inner, x_axis, x_offset, y_axis, y_offset;
  bool accumulate;
};

static inline int32_t MakeCopyRegion(const PfArgs* a, CopyRegion* r) {
  const CopyRegionParams& p = PfParams<CopyRegionParams>(a);
  *r = {static_cast<int64_t>(p.outer),    static_cast<int64_t>(p.count),
        static_cast<int64_t>(p.inner),    static_cast<int64_t>(p.x_axis),
        static_cast<int64_t>(p.x_offset), static_cast<int64_t>(p.y_axis),
        static_cast<int64_t>(p.y_offset), p.accumulate != 0};
  if (r->outer * r->x_axis * r->inner != PfCount(a->in[0]) ||
      r->outer * r->y_axis * r->inner != PfCount(a->out[0]))
    return Fail(a, PF_ERR_SHAPE,
                "copy_region: expected x [%lld, %lld, %lld] and y [.., %lld, ..], received %s and %s",
                static_cast<long long>(r->outer), static_cast<long long>(r->x_axis),
                static_cast<long long>(r->inner), static_cast<long long>(r->y_axis), ShapeText(a->in[0]).text,
                ShapeText(a->out[0]).text);
  if (r->count < 0 || r->x_offset < 0 || r->y_offset < 0 || r->x_offset + r->count > r->x_axis ||
      r->y_offset + r->count > r->y_axis)
    return Fail(a, PF_ERR_SHAPE, "copy_region: %lld entries do not fit x [%lld of %lld] and y [%lld of %lld]",
                static_cast<long long>(r->count), static_cast<long long>(r->x_offset),
                static_cast<long long>(r->x_axis), static_cast<long long>(r->y_offset),
                static_cast<long long>(r->y_axis));
  return PF_OK;
}

// The strides in x of y's dims.
static inline int32_t PermuteStrides(const PfArgs* a, int64_t* strides) {
  const PfView &x = a->in[0], &y = a->out[0];
  int64_t x_strides[PF_MAX_RANK], stride = 1;
  for (int i = x.rank - 1; i >= 0; --i) x_strides[i] = stride, stride *= x.dims[i];
  unsigned seen = 0;
  bool fits = y.rank == x.rank && x.rank >= 0;
  for (int j = 0; fits && j < x.rank; ++j) {
    const int p = static_cast<int>(PfParams<PermuteParams>(a).p[j]);
    fits = p >= 0 && p < x.rank && !(seen >> p & 1) && y.dims[j] == x.dims[p];
    if (fits) seen |= 1u << p, strides[j] = x_strides[p];
  }
  if (!fits)
    return Fail(a, PF_ERR_SHAPE,
                "permute: expected y to hold the dims of x %s in the order asked for, received %s",
                ShapeText(x).text, ShapeText(y).text);
  if (PfSize(x.dtype) != PfSize(y.dtype))
    return Fail(a, PF_ERR_DTYPE, "permute: expected x and y of one dtype");
  return PF_OK;
}

// y's dims after neighbours that are also neighbours in x are joined and dims of one are dropped.
struct Layout {
  int rank = 0;
  int64_t dims[PF_MAX_RANK], x[PF_MAX_RANK], y[PF_MAX_RANK];  // strides in elements
};

static inline Layout Collapse(const PfView& y, const int64_t* strides) {
  Layout l;
  for (int j = 0; j < y.rank; ++j) {
    if (y.dims[j] == 1) continue;
    if (l.rank && l.x[l.rank - 1] == strides[j] * y.dims[j]) {
      l.dims[l.rank - 1] *= y.dims[j];
      l.x[l.rank - 1] = strides[j];
      continue;
    }
    l.dims[l.rank] = y.dims[j];
    l.x[l.rank++] = strides[j];
  }
  int64_t stride = 1;
  for (int j = l.rank - 1; j >= 0; --j) l.y[j] = stride, stride *= l.dims[j];
  return l;
}

struct Offsets {
  int64_t x, y;
};
PF_HD static inline Offsets OffsetsOf(const Layout& l, int64_t index) {
  Offsets o{0, 0};
  for (int j = l.rank - 1; j >= 0; --j) {
    const int64_t i = index % l.dims[j];
    index /= l.dims[j];
    o.x += i * l.x[j];
    o.y += i * l.y[j];
  }
  return o;
}
static inline void Remove(Layout& l, int j) {
  for (--l.rank; j < l.rank; ++j) l.dims[j] = l.dims[j + 1], l.x[j] = l.x[j + 1], l.y[j] = l.y[j + 1];
}

// Whether elements may be moved as they are; the reference also adds and converts what is refused here.
static inline int32_t CopiesBytes(const PfArgs* a, const CopyRegion& r, bool* bytes) {
  const PfView &x = a->in[0], &y = a->out[0];
  *bytes = x.dtype == y.dtype && !r.accumulate;
  if (*bytes || (PfIsFloat(x) && PfIsFloat(y))) return PF_OK;
  return Fail(a, PF_ERR_DTYPE,
              "copy_region: expected x and y of one dtype, or f32 and bf16, received %d and %d", x.dtype,
              y.dtype);
}
