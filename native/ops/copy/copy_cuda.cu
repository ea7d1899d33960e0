#include "backends/cuda/elementwise.h"
#include "core/element.h"
#include "ops/copy/copy.h"

namespace {

constexpr int kTile = 32;

template <class T>
__global__ void __launch_bounds__(kElementThreads) FillKernel(T* y, T value, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  if (i < n) y[i] = value;
}

struct FloatRegion {
  FloatArray x, y;
  CopyRegion r;
};

// N neighbours inside a run of count x inner elements; N divides the run and both places it begins at.
template <int N>
__global__ void __launch_bounds__(kElementThreads) RegionKernel(FloatRegion call, int64_t n) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x) * N;
  if (at >= n) return;
  const CopyRegion& r = call.r;
  const int64_t length = r.count * r.inner, o = at / length, i = at % length;
  const int64_t to = (o * r.y_axis + r.y_offset) * r.inner + i;
  float x[N], y[N];
  ReadPack<N>(call.x, (o * r.x_axis + r.x_offset) * r.inner + i, x);
  if (r.accumulate) {
    ReadPack<N>(call.y, to, y);
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] += y[k];
  }
  WritePack<N>(call.y, to, x);
}

// Where item `at` of n is: its row's beginnings, and its place in a row of `length` items.
__device__ __forceinline__ int64_t PlaceOf(const Layout& rows, int64_t length, int64_t at, int64_t n,
                                           Offsets* o) {
  if (n > INT32_MAX) {
    *o = OffsetsOf(rows, at / length);
    return at % length;
  }
  // Divisions of 64 bits would take longer than the copy.
  uint32_t rest = static_cast<uint32_t>(at) / static_cast<uint32_t>(length);
  const int64_t i = static_cast<uint32_t>(at) - rest * static_cast<uint32_t>(length);
  *o = {0, 0};
  for (int j = rows.rank - 1; j >= 0; --j) {
    const uint32_t next = rest / static_cast<uint32_t>(rows.dims[j]);
    const int64_t k = rest - next * static_cast<uint32_t>(rows.dims[j]);
    o->x += k * rows.x[j];
    o->y += k * rows.y[j];
    rest = next;
  }
  return i;
}

// Rows that are contiguous on both sides, in units of sizeof(T): y's row `i` begins at i-th place of the
// layout.
template <class T>
__global__ void __launch_bounds__(kElementThreads)
    RowsKernel(const T* x, T* y, const __grid_constant__ Layout rows, int64_t length, int64_t n) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  if (at >= n) return;
  Offsets o;
  const int64_t i = PlaceOf(rows, length, at, n, &o);
  y[o.y + i] = x[o.x + i];
}

// Few neighbours of x, M of kSize bytes, that part in y, as in the pixel shuffle: a thread reads so many runs
// of M as fill 16 bytes of each of M rows of y. A tile (below) would be nearly empty.
template <int kSize, int M>
__global__ void __launch_bounds__(kElementThreads)
    PartKernel(const unsigned char* x, unsigned char* y, const __grid_constant__ Layout outer, int64_t packs,
               int64_t n, int64_t xs, int64_t ys) {
  constexpr int kEach = 16 / kSize, kPerWord = 4 / kSize, kWords = M / kPerWord;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  if (at >= n) return;
  Offsets o;
  const int64_t first = PlaceOf(outer, packs, at, n, &o) * kEach;
  uint32_t runs[kEach][kWords];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const auto* from = reinterpret_cast<const uint32_t*>(x + (o.x + (first + j) * xs) * kSize);
#pragma unroll
    for (int w = 0; w < kWords; ++w) runs[j][w] = from[w];
  }
#pragma unroll
  for (int i = 0; i < M; ++i) {
    uint32_t to[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if constexpr (kPerWord == 1) {
        to[w] = runs[w][i];
      } else {
        const int shift = i % 2 * 16;
        to[w] = (runs[2 * w][i / 2] >> shift & 0xffff) | runs[2 * w + 1][i / 2] >> shift << 16;
      }
    }
    *reinterpret_cast<uint4*>(y + (o.y + i * ys + first) * kSize) = uint4{to[0], to[1], to[2], to[3]};
  }
}

// The plane of x's innermost dim (m long) and y's (n long), through a tile: both sides are read and written
// along their memory. The extra column parts the banks.
template <class T>
__global__ void __launch_bounds__(kElementThreads)
    TransposeKernel(const T* x, T* y, const __grid_constant__ Layout outer, int64_t m, int64_t n, int64_t xs,
                    int64_t ys, int64_t tiles_m, int64_t tiles_n) {
  __shared__ T tile[kTile][kTile + 1];
  const int64_t plane = blockIdx.x / (tiles_m * tiles_n), within = blockIdx.x % (tiles_m * tiles_n);
  const int64_t i0 = within / tiles_n * kTile, j0 = within % tiles_n * kTile;
  const Offsets o = OffsetsOf(outer, plane);
  const int column = threadIdx.x % kTile;
  for (int row = threadIdx.x / kTile; row < kTile; row += kElementThreads / kTile)
    if (j0 + row < n && i0 + column < m) tile[row][column] = x[o.x + (j0 + row) * xs + i0 + column];
  __syncthreads();
  for (int row = threadIdx.x / kTile; row < kTile; row += kElementThreads / kTile)
    if (i0 + row < m && j0 + column < n) y[o.y + (i0 + row) * ys + j0 + column] = tile[column][row];
}

template <class T>
int32_t CopyRows(const PfArgs* a, const void* x, void* y, Layout rows, int64_t length, int64_t count,
                 int64_t unit) {
  for (int j = 0; j < rows.rank; ++j) rows.x[j] /= unit, rows.y[j] /= unit;
  const int64_t n = count / unit;
  return Launch(a, &RowsKernel<T>, dim3(static_cast<unsigned>(CeilDiv(n, kElementThreads))), kElementThreads,
                0, static_cast<const T*>(x), static_cast<T*>(y), rows, length / unit, n);
}

// In the widest unit that every row and every beginning is a multiple of. Lengths in elements of `size`
// bytes.
int32_t CopyRowsWide(const PfArgs* a, const void* x, void* y, const Layout& rows, int64_t length,
                     int64_t count, int64_t size) {
  int64_t all = length * size;
  for (int j = 0; j < rows.rank; ++j) all |= rows.x[j] * size | rows.y[j] * size;
  all |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(y));
  if (all % 16 == 0) return CopyRows<uint4>(a, x, y, rows, length, count, 16 / size);
  if (all % 8 == 0) return CopyRows<uint2>(a, x, y, rows, length, count, 8 / size);
  if (all % 4 == 0 && size <= 4) return CopyRows<uint32_t>(a, x, y, rows, length, count, 4 / size);
  if (size == 8) return CopyRows<uint64_t>(a, x, y, rows, length, count, 1);
  if (all % 2 == 0 && size <= 2) return CopyRows<uint16_t>(a, x, y, rows, length, count, 2 / size);
  if (size == 4) return CopyRows<uint32_t>(a, x, y, rows, length, count, 1);
  if (size == 2) return CopyRows<uint16_t>(a, x, y, rows, length, count, 1);
  return CopyRows<uint8_t>(a, x, y, rows, length, count, 1);
}

template <int kSize, int M>
int32_t Part(const PfArgs* a, const Layout& outer, int64_t planes, int64_t n, int64_t xs, int64_t ys) {
  const int64_t packs = n * kSize / 16, all = planes * packs;
  return Launch(a, &PartKernel<kSize, M>, dim3(static_cast<unsigned>(CeilDiv(all, kElementThreads))),
                kElementThreads, 0, PfData<const unsigned char>(a->in[0]), PfData<unsigned char>(a->out[0]),
                outer, packs, all, xs, ys);
}
// False where the memory is not such that PartKernel could read and write whole words.
bool TryPart(const PfArgs* a, const Layout& outer, int64_t size, int64_t planes, int64_t m, int64_t n,
             int64_t xs, int64_t ys, int32_t* status) {
  const int64_t each = 16 / size;
  if ((size != 2 && size != 4) || (m != 2 && m != 4)) return false;
  int64_t x_steps = xs | m, y_steps = ys | n;
  for (int j = 0; j < outer.rank; ++j) x_steps |= outer.x[j], y_steps |= outer.y[j];
  if (x_steps * size % 4 || y_steps % each || !Aligned(a->in[0].data, 4) || !Aligned(a->out[0].data, 16))
    return false;
  const auto part = size == 2 ? (m == 2 ? &Part<2, 2> : &Part<2, 4>) : (m == 2 ? &Part<4, 2> : &Part<4, 4>);
  *status = part(a, outer, planes, n, xs, ys);
  return true;
}

template <class T>
int32_t Transpose(const PfArgs* a, const Layout& l) {
  const int last = l.rank - 1;
  int inner = 0;  // y's dim that runs along x's memory
  while (l.x[inner] != 1) ++inner;
  const int64_t m = l.dims[inner], n = l.dims[last], xs = l.x[last], ys = l.y[inner];
  Layout outer = l;
  Remove(outer, last);
  Remove(outer, inner);
  int64_t planes = 1;
  for (int j = 0; j < outer.rank; ++j) planes *= outer.dims[j];
  int32_t status;
  if (TryPart(a, outer, sizeof(T), planes, m, n, xs, ys, &status)) return status;
  const int64_t tiles_m = CeilDiv(m, kTile), tiles_n = CeilDiv(n, kTile);
  return Launch(a, &TransposeKernel<T>, dim3(static_cast<unsigned>(planes * tiles_m * tiles_n)),
                kElementThreads, 0, PfData<const T>(a->in[0]), PfData<T>(a->out[0]), outer, m, n, xs, ys,
                tiles_m, tiles_n);
}

template <class T>
int32_t Fill(const PfArgs* a, const void* bits) {
  T value;
  memcpy(&value, bits, sizeof(value));
  const int64_t n = PfCount(a->out[0]);
  return Launch(a, &FillKernel<T>, dim3(static_cast<unsigned>(CeilDiv(n, kElementThreads))), kElementThreads,
                0, PfData<T>(a->out[0]), value, n);
}

}  // namespace

int32_t pf_cuda_fill(const PfArgs* a) {
  const PfView& y = a->out[0];
  if (PfCount(y) == 0) return PF_OK;
  const int64_t zero = 0;
  int64_t bits = 0;
  Set(PfView{&bits, y.dtype, 0, {}}, 0, PfParams<FillParams>(a).value);
  const size_t size = PfSize(y.dtype);
  if (memcmp(&bits, &zero, size) == 0) return DeviceZero(a, y.data, PfCount(y) * size);
  switch (size) {
    case 8: return Fill<uint64_t>(a, &bits);
    case 4: return Fill<uint32_t>(a, &bits);
    case 2: return Fill<uint16_t>(a, &bits);
    default: return Fill<uint8_t>(a, &bits);
  }
}

int32_t pf_cuda_copy_region(const PfArgs* a) {
  CopyRegion r;
  PF_TRY(MakeCopyRegion(a, &r));
  const PfView &x = a->in[0], &y = a->out[0];
  bool raw;
  PF_TRY(CopiesBytes(a, r, &raw));
  const int64_t length = r.count * r.inner, n = r.outer * length;
  if (n == 0) return PF_OK;
  if (raw) {
    const int64_t size = PfSize(x.dtype);
    Layout rows;
    rows.rank = r.outer > 1 ? 1 : 0;
    rows.dims[0] = r.outer;
    rows.x[0] = r.x_axis * r.inner;
    rows.y[0] = r.y_axis * r.inner;
    return CopyRowsWide(a, PfData<char>(x) + r.x_offset * r.inner * size,
                        PfData<char>(y) + r.y_offset * r.inner * size, rows, length, n, size);
  }
  const FloatRegion call = {ArrayOf(x), ArrayOf(y), r};
  const bool packs = r.inner % 8 == 0 && Packs(call.x) && Packs(call.y);
  const dim3 grid(static_cast<unsigned>(CeilDiv(n, static_cast<int64_t>(kElementThreads) * (packs ? 8 : 1))));
  return Launch(a, packs ? &RegionKernel<8> : &RegionKernel<1>, grid, kElementThreads, 0, call, n);
}

int32_t pf_cuda_permute(const PfArgs* a) {
  int64_t strides[PF_MAX_RANK];
  PF_TRY(PermuteStrides(a, strides));
  const PfView &x = a->in[0], &y = a->out[0];
  const int64_t n = PfCount(y), size = PfSize(x.dtype);
  if (n == 0) return PF_OK;
  const Layout l = Collapse(y, strides);
  const int last = l.rank - 1;
  if (l.rank == 0 || l.x[last] == 1) {
    Layout rows = l;
    if (l.rank) Remove(rows, last);
    return CopyRowsWide(a, x.data, y.data, rows, l.rank ? l.dims[last] : 1, n, size);
  }
  switch (size) {
    case 8: return Transpose<uint64_t>(a, l);
    case 4: return Transpose<uint32_t>(a, l);
    case 2: return Transpose<uint16_t>(a, l);
    default: return Transpose<uint8_t>(a, l);
  }
}
