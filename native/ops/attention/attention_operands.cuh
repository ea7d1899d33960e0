// What attention needs before its tiles: operands in one dtype whose rows can be read 16 bytes at a time, the
// bounds of the mask values per 64 tokens, and the row sums of the backward pass.
#pragma once
#include "backends/cuda/elementwise.h"
#include "ops/attention/attention.h"

namespace {

constexpr int kBoundsTile = 64;
constexpr int kRowThreads = 256;

// The heads of all tokens. Rows are 16-byte aligned and hold zeros up to a whole 16 bytes.
template <class T>
struct Rows {
  const T* data;
  int64_t token;  // elements from one token to the next
  int head;       // and from one head to the next

  __device__ const T* Head(int batch, int which, int64_t length) const {
    return data + batch * length * token + static_cast<int64_t>(which) * head;
  }
};

// Of the keys' sequences, whose first tokens are the queries.
struct Mask {
  const int32_t *segment, *order;  // nullptr: everything is seen
  const MaskBounds* bounds;        // [B, tiles]
  int tiles, length;

  __device__ Mask Batch(int batch) const {
    if (!segment) return *this;
    const int64_t at = static_cast<int64_t>(batch) * length;
    return {segment + at, order + at, bounds + static_cast<int64_t>(batch) * tiles, tiles, length};
  }
};

// Norm and rotation of rows on their way.
struct RowTurn {
  FloatArray weight;  // [1 or 2, D]
  const float *cos, *sin;
  int64_t own, length;  // tokens of a sequence of x, which are the first of those that have angles
  int64_t split;        // those from here on take the second row of weights
  float eps;
};

// Sums over `lanes` neighbouring lanes, a power of two.
__device__ __forceinline__ float GroupSum(float x, int lanes) {
  for (int bits = lanes / 2; bits > 0; bits >>= 1) x += __shfl_xor_sync(0xffffffffu, x, bits);
  return x;
}

// N elements from column c on; where packs cannot be read, one by one as far as the row goes.
template <int N, bool kPacks>
__device__ __forceinline__ void ReadRow(const FloatArray& x, int64_t row, int c, int d, float* to) {
  if (kPacks) {
    ReadPack<N>(x, row + c, to);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = c + i < d ? ReadOne(x, row + c + i) : 0;
  }
}

// y[row, width] = x[row, d], turned, and zeros; `lanes` threads to a row.
template <class To, bool kPacks>
__global__ void __launch_bounds__(kRowThreads)
    RowsKernel(FloatArray x, RowTurn turn, int64_t rows, int heads, int d, int width, int lanes, To* y) {
  constexpr int N = kPacks ? 8 : 2;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) / lanes;
  const bool real = row < rows;  // all threads take part in the sums
  const int64_t token = real ? row / heads : 0, from = real ? row * d : 0;
  const int64_t place = turn.own ? token % turn.own : 0;
  const int first = threadIdx.x % lanes * N;
  float rstd = 1;
  int64_t weights = 0;
  if (turn.weight.data) {
    float square = 0;
    for (int c = first; c < d; c += lanes * N) {
      float v[N];
      ReadRow<N, kPacks>(x, from, c, d, v);
#pragma unroll
      for (int i = 0; i < N; ++i) square += v[i] * v[i];
    }
    rstd = 1 / sqrtf(GroupSum(square, lanes) / d + turn.eps);
    if (place >= turn.split) weights = d;
  }
  if (!real) return;
  for (int c = first; c < width; c += lanes * N) {
    float v[N] = {};
    if (c < d) {
      ReadRow<N, kPacks>(x, from, c, d, v);
      if (turn.weight.data) {
        float w[N];
        ReadRow<N, kPacks>(turn.weight, weights, c, d, w);
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] = v[i] * rstd * w[i];
      }
      if (turn.cos) {
        const int64_t angle = (token / turn.own * turn.length + place) * (d / 2) + c / 2;
#pragma unroll
        for (int i = 0; i < N; i += 2) {
          const float co = turn.cos[angle + i / 2], si = turn.sin[angle + i / 2];
          const float even = v[i], odd = v[i + 1];
          v[i] = even * co - odd * si;
          v[i + 1] = even * si + odd * co;
        }
      }
    }
    constexpr int kPart = 16 / sizeof(To) < N ? 16 / sizeof(To) : N;
#pragma unroll
    for (int i = 0; i < N; i += kPart)
      if (c + i < width) StorePack<To, kPart>(y + row * width + c + i, v + i);
  }
}

// delta[b, h, i] = do_i . o_i, and lse in the unit of the kernel that reads it; 0 for rows that see nothing,
// which have no weights to compute.
template <bool kPacks>
__global__ void __launch_bounds__(kRowThreads)
    DeltaKernel(FloatArray o, FloatArray dout, const float* lse, int64_t rows, int heads, int64_t length,
                int d, int lanes, float unit, float* scaled_lse, float* delta) {
  constexpr int N = kPacks ? 8 : 2;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) / lanes;
  const bool real = row < rows;
  float sum = 0;
  for (int c = threadIdx.x % lanes * N; real && c < d; c += lanes * N) {
    float x[N], y[N];
    ReadRow<N, kPacks>(o, row * d, c, d, x);
    ReadRow<N, kPacks>(dout, row * d, c, d, y);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += x[i] * y[i];
  }
  sum = GroupSum(sum, lanes);
  if (!real || threadIdx.x % lanes) return;
  const int64_t token = row / heads, h = row % heads;
  const int64_t at = (token / length * heads + h) * length + token % length;
  delta[at] = sum;
  scaled_lse[at] = lse[at] == -INFINITY ? 0 : lse[at] * unit;
}

__device__ __forceinline__ int32_t Least(int32_t a, int32_t b) { return a < b ? a : b; }
__device__ __forceinline__ int32_t Greatest(int32_t a, int32_t b) { return a > b ? a : b; }
__device__ __forceinline__ MaskBounds Union(const MaskBounds& a, const MaskBounds& b) {
  return {Least(a.segment_min, b.segment_min), Greatest(a.segment_max, b.segment_max),
          Least(a.order_min, b.order_min), Greatest(a.order_max, b.order_max)};
}
// Over the lanes that differ in bits of at least `from`.
__device__ __forceinline__ MaskBounds WarpUnion(MaskBounds x, int from) {
  for (int bits = 16; bits >= from; bits >>= 1) {
    const MaskBounds other = {
        __shfl_xor_sync(0xffffffffu, x.segment_min, bits), __shfl_xor_sync(0xffffffffu, x.segment_max, bits),
        __shfl_xor_sync(0xffffffffu, x.order_min, bits), __shfl_xor_sync(0xffffffffu, x.order_max, bits)};
    x = Union(x, other);
  }
  return x;
}

// One warp a tile.
__global__ void __launch_bounds__(kRowThreads)
    BoundsKernel(const int32_t* segment, const int32_t* order, int64_t length, int tiles, int64_t all_tiles,
                 MaskBounds* bounds) {
  const int64_t tile = (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) / 32;
  if (tile >= all_tiles) return;
  const int64_t batch = tile / tiles, first = tile % tiles * kBoundsTile;
  const int lane = threadIdx.x % 32;
  MaskBounds mine{};
  for (int half = 0; half < 2; ++half) {
    const int64_t i = first + lane + 32 * half;
    const int64_t at = batch * length + (i < length ? i : length - 1);
    const MaskBounds one = {segment[at], segment[at], order[at], order[at]};
    mine = half ? Union(mine, one) : one;
  }
  mine = WarpUnion(mine, 1);
  if (lane == 0) bounds[tile] = mine;
}

// How many threads share a row of d elements, N at a time.
inline int RowLanes(int64_t d, int N) {
  int lanes = 1;
  while (lanes < 32 && lanes * N < d) lanes *= 2;
  return lanes;
}
inline dim3 RowGrid(int64_t rows, int lanes) {
  return dim3(static_cast<unsigned>(CeilDiv(rows * lanes, kRowThreads)));
}

inline int32_t NoScratch(const PfArgs* a) {
  return Fail(a, PF_ERR_MEMORY, "attention: no scratch memory left");
}

// x [B, length, H, D] as rows of T: itself where it can be read so, otherwise a copy.
template <class T>
int32_t MakeRows(const PfArgs* a, const PfView& x, const RowTurn* turn, Rows<T>* rows) {
  constexpr int kChunk = 16 / sizeof(T);
  const int heads = static_cast<int>(x.dims[2]), d = static_cast<int>(x.dims[3]);
  const bool same = x.dtype == (sizeof(T) == 2 ? PF_BF16 : PF_F32);
  if (same && !turn && d % kChunk == 0 && Aligned(x.data, 16)) {
    *rows = {PfData<T>(x), static_cast<int64_t>(heads) * d, d};
    return PF_OK;
  }
  const int width = static_cast<int>(CeilDiv(d, kChunk)) * kChunk;
  const int64_t count = x.dims[0] * x.dims[1] * heads;
  T* copy = static_cast<T*>(DeviceScratch(a, static_cast<size_t>(count) * width * sizeof(T) + 16));
  if (!copy) return NoScratch(a);
  *rows = {copy, static_cast<int64_t>(heads) * width, width};
  if (count * width == 0) return PF_OK;
  const RowTurn turned = turn ? *turn : RowTurn{};
  const bool packs =
      d % 8 == 0 && Aligned(x.data, 16) && (!turned.weight.data || Aligned(turned.weight.data, 16));
  const int lanes = RowLanes(width, packs ? 8 : 2);
  return Launch(a, packs ? &RowsKernel<T, true> : &RowsKernel<T, false>, RowGrid(count, lanes), kRowThreads,
                0, ArrayOf(x), turned, count, heads, d, width, lanes, copy);
}

inline int32_t MakeMask(const PfArgs* a, const AttentionShape& s, Mask* mask) {
  *mask = {};
  const int64_t tiles = CeilDiv(s.lk, kBoundsTile), all = s.batch * tiles;
  if (!s.masked || all == 0) return PF_OK;
  auto* bounds = static_cast<MaskBounds*>(DeviceScratch(a, static_cast<size_t>(all) * sizeof(MaskBounds)));
  if (!bounds) return NoScratch(a);
  *mask = {PfData<int32_t>(a->in[3]), PfData<int32_t>(a->in[4]), bounds, static_cast<int>(tiles),
           static_cast<int>(s.lk)};
  return Launch(a, &BoundsKernel, RowGrid(all, 32), kRowThreads, 0, mask->segment, mask->order, s.lk,
                mask->tiles, all, bounds);
}

// Both [B, H, L]; `unit` is what lse is multiplied by.
struct RowSums {
  const float *lse, *delta;
};
inline int32_t MakeSums(const PfArgs* a, const AttentionShape& s, float unit, RowSums* sums) {
  const PfView &o = a->in[5], &lse = a->in[6], &dout = a->in[7];
  const int64_t rows = s.batch * s.lq * s.heads;
  float* to = static_cast<float*>(DeviceScratch(a, static_cast<size_t>(2 * rows + 1) * sizeof(float)));
  if (!to) return NoScratch(a);
  *sums = {to, to + rows};
  if (rows == 0) return PF_OK;
  const bool packs = s.d % 8 == 0 && Aligned(o.data, 16) && Aligned(dout.data, 16);
  const int lanes = RowLanes(s.d, packs ? 8 : 2);
  return Launch(a, packs ? &DeltaKernel<true> : &DeltaKernel<false>, RowGrid(rows, lanes), kRowThreads, 0,
                ArrayOf(o), ArrayOf(dout), PfData<float>(lse), rows, static_cast<int>(s.heads), s.lq,
                static_cast<int>(s.d), lanes, unit, to, to + rows);
}

}  // namespace
