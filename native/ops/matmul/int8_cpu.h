// Products in eight bits on the CPU: whole numbers by oneDNN, scales and everything else here.
#pragma once
#include "ops/matmul/int8_layout.h"
#include "ops/matmul/product_cpu.h"
#include "ops/pointwise/shape_text.h"

namespace {

// Rows of q are padded to a multiple, as zeros: tiles then have one of two heights, for which every packed
// layout has fast kernels.
constexpr int64_t kInt8Rows = 64;
constexpr int64_t kInt8RowsAtOnce = 16;

// Whole numbers show in the low bits after 1.5 * 2^23 was added, as rounding to nearest even gives them.
constexpr float kWhole = 12582912.0f;

// The lanes that a step of the rotation subtracts.
template <int kRun>
inline Vu Minus() {
  Vu mask = (Vu)(kLaneIndex & kRun);
  return mask != 0 ? Vu{} + 0x80000000u : Vu{};
}
template <int kRun>
inline Vf RotateLanes(Vf v) {
  return __builtin_shuffle(v, kLaneIndex ^ kRun) + (Vf)((Vu)v ^ Minus<kRun>());
}

// As Int8Rotate: the steps inside vectors first, then those between them.
template <class T>
inline void RotateBlock(const T* x, float* v) {
  constexpr int kVectors = kInt8Block / kLanes;
  Vf r[kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) {
    r[i] = RotateLanes<1>(LoadF(x + i * kLanes) * 0.125f);
    r[i] = RotateLanes<2>(r[i]);
    if constexpr (kLanes > 4) r[i] = RotateLanes<4>(r[i]);
    if constexpr (kLanes > 8) r[i] = RotateLanes<8>(r[i]);
  }
#pragma GCC unroll 4
  for (int run = 1; run < kVectors; run *= 2)
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
      if (i & run) continue;
      const Vf a = r[i], b = r[i + run];
      r[i] = a + b;
      r[i + run] = a - b;
    }
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) StoreF(v + i * kLanes, r[i]);
}

// The low bytes of the first n lanes.
inline void StoreLow(int8_t* p, Vu v, int64_t n) {
#if defined(__AVX512F__)
  if (n == kLanes) {
    const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v);
    memcpy(p, &bytes, sizeof(bytes));
    return;
  }
#endif
  for (int64_t i = 0; i < n; ++i) p[i] = static_cast<int8_t>(v[i]);
}

// A group of n values to whole numbers; returns its scale.
template <class T>
float QuantiseGroup(const T* x, int64_t n, int8_t* q) {
  alignas(64) float v[kInt8Longest];
  int64_t i = 0;
  for (; i + kInt8Block <= n; i += kInt8Block) RotateBlock(x + i, v + i);
  for (; i < n; i += kLanes) StoreF(v + i, LoadN(x + i, n - i));  // zeros behind the last
  Vu top{};
  for (i = 0; i < n; i += kLanes) {
    const Vu bits = (Vu)LoadF(v + i) & 0x7fffffff;  // in order, and NaN above all
    top = bits > top ? bits : top;
  }
  uint32_t most = 0;
  for (int lane = 0; lane < kLanes; ++lane) most = top[lane] > most ? top[lane] : most;
  float largest;
  memcpy(&largest, &most, 4);
  const Int8Scale s = Int8ScaleOf(largest);
  // The next row lies behind this one.
  for (i = 0; i < n; i += 64) __builtin_prefetch(q + n + i, 1);
  for (i = 0; i < n; i += kLanes)
    StoreLow(q + i, (Vu)(LoadF(v + i) * s.inverse + kWhole), n - i < kLanes ? n - i : kLanes);
  return s.scale;
}

// x [rows, K] of f32 or bf16 to whole numbers, group after group of all rows together (an array of `all`
// rows: what is beyond those of x becomes zeros), and scales [groups, all].
template <class T>
void QuantiseRow(const T* x, int64_t i, int64_t k, const Int8Groups& groups, int64_t all, int8_t* q,
                 float* scales) {
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t n = groups.Length(g, k), at = g * groups.size;
    scales[g * all + i] = QuantiseGroup(x + i * k + at, n, q + at * all + i * n);
  }
}
int32_t Quantise(const PfArgs* args, const PfView& x, int64_t rows, int64_t k, int64_t all, int8_t* q,
                 float* scales) {
  const Int8Groups groups = Int8GroupsOf(k);
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t n = groups.Length(g, k);
    memset(q + g * groups.size * all + rows * n, 0, (all - rows) * n);
  }
  const int64_t chunks = (rows + kInt8RowsAtOnce - 1) / kInt8RowsAtOnce;
  return ForTiles(args, chunks, rows * k * 16, [&](int64_t chunk, int, char*) {
    const int64_t end = (chunk + 1) * kInt8RowsAtOnce < rows ? (chunk + 1) * kInt8RowsAtOnce : rows;
    for (int64_t i = chunk * kInt8RowsAtOnce; i < end; ++i)
      PF_FLOAT_DISPATCH(x, T, QuantiseRow(PfData<T>(x), i, k, groups, all, q, scales););
    return static_cast<int32_t>(PF_OK);
  });
}

int32_t PackInt8(const PfArgs* args, const PfView& w, const PfView& blob) {
  const int64_t n = w.dims[0], k = w.dims[1];
  Int8Layout l;
  if (!Int8LayoutOf(n, k, &l, args->context->error)) return PF_ERR_DEVICE;
  char* bytes = PfData<char>(blob);
  const Int8Header header = {kInt8Magic, l};
  memcpy(bytes, &header, sizeof(header));
  auto* q = static_cast<int8_t*>(Scratch(args, n * k));
  if (!q) return NoMemory(args, "matmul_pack");
  float* scales = reinterpret_cast<float*>(bytes + l.scales);
  const int32_t status = Quantise(args, w, n, k, n, q, scales);
  if (status != PF_OK) return status;
  return ForTiles(args, l.columns * l.groups.count, n * k * 16, [&](int64_t tile, int, char* error) {
    const int64_t column = tile / l.groups.count, g = tile % l.groups.count;
    const int64_t count = column == l.columns - 1 ? l.last_columns : kOnednnPackColumns;
    const int64_t length = l.groups.Length(g, k);
    const int8_t* from = q + g * l.groups.size * n + column * kOnednnPackColumns * length;
    return OnednnPackTile(from, 1, length, count, length, PF_I8, bytes + l.TileAt(column, g), error);
  });
}

bool Int8IsPacked(const PfView& blob) {
  Int8Header header;
  if (PfCount(blob) < static_cast<int64_t>(sizeof(header))) return false;
  memcpy(&header, blob.data, sizeof(header));
  return header.magic == kInt8Magic;
}

// sum = or += c, whole numbers [m, n], times scale_x [m] times scale_w [n].
template <bool kFirst>
void AddGroup(const int32_t* c, const float* scale_x, const float* scale_w, int64_t m, int64_t n,
              float* sum) {
  for (int64_t i = 0; i < m; ++i, c += n, sum += n) {
    const float x = scale_x[i];
    for (int64_t j = 0; j < n; j += kLanes) {
      const int64_t left = n - j;
      Vi whole;
      memcpy(&whole, c + j, sizeof(whole));  // tiles end with room for a vector
      Vf v = __builtin_convertvector(whole, Vf) * (LoadN(scale_w + j, left) * x);
      if (!kFirst) v = LoadN(sum + j, left) + v;
      StoreN(sum + j, v, left);
    }
  }
}

// What the tiles of a product need: by whether a tile has the last rows, outputs, and group of the sum.
class Int8Kernels {
 public:
  ~Int8Kernels() {
    for (auto& a : kernels_)
      for (auto& b : a)
        for (OnednnKernel* kernel : b) OnednnRelease(kernel);
  }
  // For rows of tiles that are tile_m high, `all` in sum.
  int32_t Get(const Int8Layout& l, int64_t all, int64_t tile_m, char* error) {
    const int64_t rows = (all + tile_m - 1) / tile_m, groups = l.groups.count;
    for (int last_m = rows == 1; last_m < 2; ++last_m)
      for (int last_n = l.columns == 1; last_n < 2; ++last_n)
        for (int last_g = groups == 1; last_g < 2; ++last_g) {
          const int64_t m = last_m ? all - (rows - 1) * tile_m : tile_m;
          const int64_t n = last_n ? l.last_columns : kOnednnPackColumns;
          const int64_t k = last_g ? l.groups.Length(groups - 1, l.k) : l.groups.size;
          OnednnKernel* kernel = OnednnGetGemm({m, n, k, k, 1, 0, 0, n, PF_I8, 1}, error);
          if (!kernel) return PF_ERR_DEVICE;
          kernels_[last_m][last_n][last_g] = kernel;
          const size_t scratch = RoundUp(OnednnScratchBytes(kernel), 64);
          if (scratch > scratch_) scratch_ = scratch;
        }
    return PF_OK;
  }
  const OnednnKernel* At(bool last_m, bool last_n, bool last_g) const {
    return kernels_[last_m][last_n][last_g];
  }
  size_t scratch() const { return scratch_; }

 private:
  OnednnKernel* kernels_[2][2][2] = {};
  size_t scratch_ = 0;
};

// The layout of a blob that matmul_pack made, and operands that fit it.
int32_t OpenInt8(const PfArgs* args, Int8Layout* l) {
  const PfView &x = args->in[0], &blob = args->in[1];
  Int8Header header;
  memcpy(&header, blob.data, sizeof(header));
  *l = header.layout;
  if (!OnednnHasInt8() || PfCount(blob) != l->total)
    return Fail(args, PF_ERR_OPTION,
                "matmul_packed: the packed weight was not made by matmul_pack on this machine and level");
  const double n = PfParams<MatmulPackedParams>(args).n;
  if (x.rank >= 1 && x.dims[x.rank - 1] == l->k && l->n == n) return PF_OK;
  return Fail(args, PF_ERR_SHAPE,
              "matmul_packed: the weight is [%lld, %lld], received x [..., %lld] and n = %g", (long long)l->n,
              (long long)l->k, (long long)(x.rank < 1 ? 0 : x.dims[x.rank - 1]), n);
}

int32_t ProductInt8(const PfArgs* args) {
  const PfView &x = args->in[0], &blob = args->in[1], &bias = args->in[2], &residual = args->in[3],
               &y = args->out[0];
  const MatmulPackedParams& params = PfParams<MatmulPackedParams>(args);
  Int8Layout l;
  PF_TRY(OpenInt8(args, &l));
  const int64_t n = l.n, k = l.k, m = PfCount(x) / k, groups = l.groups.count;
  PF_TRY(CheckPackedResult(args, m, n));
  if (m == 0) return PF_OK;

  const int64_t padded = RoundUp(m, kInt8Rows);
  const int64_t tile_m = RoundUp(ChooseTile(1, padded, n, k, true).m, kInt8Rows);
  const int64_t rows = (padded + tile_m - 1) / tile_m;
  Int8Kernels kernels;
  PF_TRY(kernels.Get(l, padded, tile_m, args->context->error));
  // A vector more, so that the last row may be read in whole ones.
  const size_t tile_bytes = RoundUp((tile_m * kOnednnPackColumns + kLanes) * 4, 64);
  const size_t per_thread = kernels.scratch() + 2 * tile_bytes;
  auto* q = static_cast<int8_t*>(Scratch(args, padded * k));
  auto* scale_x = static_cast<float*>(Scratch(args, padded * groups * sizeof(float)));
  auto* memory = static_cast<char*>(Scratch(args, per_thread * omp_get_max_threads()));
  const float* added = PfPresent(bias) ? static_cast<const float*>(As(args, bias, PF_F32)) : nullptr;
  if (!q || !scale_x || !memory || (PfPresent(bias) && !added)) return NoMemory(args, "matmul_packed");
  PF_TRY(Quantise(args, x, m, k, padded, q, scale_x));

  const Epilogue end = {added,
                        residual.data,
                        PfPresent(residual) ? residual.dtype : PF_F32,
                        y.dtype,
                        static_cast<int>(params.activation),
                        false};
  const int64_t y_row = y.dims[y.rank - 1];
  char* to = static_cast<char*>(y.data) + static_cast<int64_t>(params.column) * PfSize(y.dtype);
  const char* packed = static_cast<const char*>(blob.data);
  const float* scale_w = reinterpret_cast<const float*>(packed + l.scales);
  return ForTiles(args, rows * l.columns, m * n * k, [&](int64_t tile, int thread, char* error) {
    const int64_t row = tile % rows, column = tile / rows;
    const int64_t m0 = row * tile_m, n0 = column * kOnednnPackColumns;
    const bool last_m = row == rows - 1, last_n = column == l.columns - 1;
    const int64_t height = last_m ? m - m0 : tile_m, width = last_n ? l.last_columns : kOnednnPackColumns;
    char* mine = memory + thread * per_thread;
    auto* whole = reinterpret_cast<int32_t*>(mine + kernels.scratch());
    auto* sum = reinterpret_cast<float*>(mine + kernels.scratch() + tile_bytes);
    for (int64_t g = 0; g < groups; ++g) {
      const int8_t* from = q + g * l.groups.size * padded + m0 * l.groups.Length(g, k);
      PF_TRY(OnednnRunGemm(kernels.At(last_m, last_n, g == groups - 1), from, packed + l.TileAt(column, g),
                           whole, mine, error));
      const auto add = g ? AddGroup<false> : AddGroup<true>;
      add(whole, scale_x + g * padded + m0, scale_w + g * n + n0, height, width, sum);
    }
    StoreTile(end, sum, height, width, y_row, n0, m0 * y_row + n0, to);
    return static_cast<int32_t>(PF_OK);
  });
}

}  // namespace
