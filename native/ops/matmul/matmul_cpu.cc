#include "ops/matmul/int8_cpu.h"
#include "ops/matmul/product_cpu.h"

namespace {

// One product after all batch and dtype questions are answered.
struct Problem {
  int64_t batch, m, n, k;
  const char *a, *b;                 // of dtype; b plain, or the first packed tile
  int64_t a_batch, a_row, a_column;  // element strides
  int64_t b_batch, b_row, b_column;
  int64_t dtype, packed_tile_bytes;  // packed_tile_bytes > 0: b is packed
  char* y;
  int64_t y_row;
  Epilogue end;
};

// For the few shapes oneDNN only has its reference loops for: one dot product at a time, in f32.
template <class T>
void PlainTile(const OnednnGemm& g, const T* a, const T* b, float* c) {
  for (int64_t i = 0; i < g.m; ++i)
    for (int64_t j = 0; j < g.n; ++j) {
      float sum = 0;
      for (int64_t q = 0; q < g.k; ++q)
        sum += ToFloat(a[i * g.a_row + q * g.a_column]) * ToFloat(b[q * g.b_row + j * g.b_column]);
      c[i * g.c_row + j] = sum;
    }
}

int32_t Run(const PfArgs* args, const char* op, const Problem& p) {
  const auto [tile_m, tile_n] = ChooseTile(p.batch, p.m, p.n, p.k, p.packed_tile_bytes > 0);
  const int64_t rows = (p.m + tile_m - 1) / tile_m, columns = (p.n + tile_n - 1) / tile_n;
  const bool dense_rows = p.a_column == 1 && p.a_row == p.k;
  const int64_t last_rows = p.m - (rows - 1) * tile_m;
  const int64_t padded_rows = dense_rows ? RoundUp(last_rows, kWholeRows) : last_rows;
  const bool padded = padded_rows > last_rows;
  // oneDNN's best kernels want a dense result, so tiles are computed aside unless the detour costs more than
  // they save (a short inner sum).
  const bool direct =
      p.end.Trivial() && !padded && p.y_row == p.n && (columns == 1 || (!p.packed_tile_bytes && p.k < 256));

  OnednnGemm gemms[2][2];
  OnednnKernel* kernels[2][2] = {};
  size_t scratch = 0;
  int32_t status = PF_OK;
  for (int last_m = 0; last_m < 2; ++last_m)
    for (int last_n = 0; last_n < 2; ++last_n) {
      const int64_t m = last_m ? padded_rows : tile_m;
      const int64_t n = last_n ? p.n - (columns - 1) * tile_n : tile_n;
      OnednnGemm& g = gemms[last_m][last_n];
      g = {m,          n,
           p.k,        p.a_row,
           p.a_column, p.b_row,
           p.b_column, direct ? p.n : n,
           p.dtype,    p.packed_tile_bytes > 0};
      if ((!last_m && rows == 1) || (!last_n && columns == 1)) continue;
      OnednnKernel* kernel = OnednnGetGemm(g, args->context->error);
      kernels[last_m][last_n] = kernel;
      if (!kernel) status = PF_ERR_DEVICE;
      if (kernel && OnednnScratchBytes(kernel) > scratch) scratch = OnednnScratchBytes(kernel);
    }
  scratch = RoundUp(scratch, 64);
  const size_t size = PfSize(static_cast<int32_t>(p.dtype));
  const size_t result_bytes = direct ? 0 : RoundUp((rows > 1 ? tile_m : padded_rows) * tile_n * 4, 64);
  const size_t rows_bytes = padded ? RoundUp(padded_rows * p.k * size, 64) : 0;
  const size_t per_thread = scratch + result_bytes + rows_bytes;
  char* memory = nullptr;
  if (status == PF_OK) {
    memory = static_cast<char*>(Scratch(args, per_thread * omp_get_max_threads()));
    if (!memory) status = NoMemory(args, op);
  }
  if (status == PF_OK) {
    status = ForTiles(
        args, p.batch * rows * columns, p.batch * p.m * p.n * p.k,
        [&](int64_t tile, int thread, char* error) {
          const int64_t row = tile % rows, column = tile / rows % columns, entry = tile / (rows * columns);
          const int64_t m0 = row * tile_m, n0 = column * tile_n;
          const int last_m = row == rows - 1, last_n = column == columns - 1;
          const OnednnGemm& g = gemms[last_m][last_n];
          const OnednnKernel* kernel = kernels[last_m][last_n];
          char* mine = memory + thread * per_thread;
          const int64_t at = (entry * p.m + m0) * p.y_row + n0;
          float* c = direct ? reinterpret_cast<float*>(p.y) + at : reinterpret_cast<float*>(mine + scratch);
          const char* a = p.a + (entry * p.a_batch + m0 * p.a_row) * size;
          const char* b = p.packed_tile_bytes ? p.b + column * p.packed_tile_bytes
                                              : p.b + (entry * p.b_batch + n0 * p.b_column) * size;
          if (padded && last_m) {
            char* copy = mine + scratch + result_bytes;
            memcpy(copy, a, last_rows * p.k * size);
            memset(copy + last_rows * p.k * size, 0, (padded_rows - last_rows) * p.k * size);
            a = copy;
          }
          if (OnednnGetRank(kernel) != kRankReference || g.packed) {
            const int32_t status = OnednnRunGemm(kernel, a, b, c, mine, error);
            if (status != PF_OK) return status;
          } else if (p.dtype == PF_BF16) {
            PlainTile(g, reinterpret_cast<const Bf16*>(a), reinterpret_cast<const Bf16*>(b), c);
          } else {
            PlainTile(g, reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(b), c);
          }
          if (!direct) StoreTile(p.end, c, last_m ? last_rows : g.m, g.n, p.y_row, n0, at, p.y);
          return static_cast<int32_t>(PF_OK);
        });
  }
  for (auto& pair : kernels)
    for (OnednnKernel* kernel : pair) OnednnRelease(kernel);
  return status;
}

// Whether a tile of a packed b has more than reference loops for these rows of a.
bool PackedRuns(const Problem& p, char* error) {
  const int64_t m = p.m < kTallPacked ? p.m : kTallPacked,
                n = p.n < kOnednnPackColumns ? p.n : kOnednnPackColumns;
  OnednnKernel* kernel = OnednnGetGemm({m, n, p.k, p.a_row, p.a_column, 0, 0, n, p.dtype, 1}, error);
  const bool runs = kernel && OnednnGetRank(kernel) != kRankReference;
  OnednnRelease(kernel);
  return runs;
}

// Many rows pay for packing b first, which oneDNN else does again for every tile of them, as long as packed
// columns and rows fit the second-level cache together. In f32 nothing is gained (docs/kernels.md).
constexpr int64_t kManyRows = 512, kShortSum = 2560;

int32_t PackFor(const PfArgs* args, const char* op, Problem* p) {
  char* error = args->context->error;
  const bool worth =
      p->dtype == PF_BF16 && p->batch == 1 && p->m >= kManyRows && p->k >= 256 && p->k <= kShortSum;
  if (!worth || !PackedRuns(*p, error)) return PF_OK;
  const int64_t full = p->n < kOnednnPackColumns ? p->n : kOnednnPackColumns;
  const int64_t tiles = (p->n + full - 1) / full, size = PfSize(static_cast<int32_t>(p->dtype));
  const int64_t bytes = OnednnPackTileBytes(full, p->k, p->dtype, error);
  if (!bytes) return PF_ERR_DEVICE;
  char* packed = static_cast<char*>(Scratch(args, tiles * bytes));
  if (!packed) return NoMemory(args, op);
  const int32_t status = ForTiles(args, tiles, p->m * p->n * p->k, [&](int64_t tile, int, char* error) {
    const int64_t n0 = tile * full, n = p->n - n0 < full ? p->n - n0 : full;
    return OnednnPackTile(p->b + n0 * p->b_column * size, p->b_row, p->b_column, n, p->k, p->dtype,
                          packed + tile * bytes, error);
  });
  p->b = packed;
  p->packed_tile_bytes = bytes;
  return status;
}

}  // namespace

int32_t pf_cpu_matmul(const PfArgs* args) {
  MatmulShape s{};
  int32_t status = GetMatmulShape(args, &s);
  if (status != PF_OK) return status;
  status = CheckMatmulFloats(args, "matmul", false);
  if (status != PF_OK) return status;
  const PfView &a = args->in[0], &b = args->in[1], &bias = args->in[2], &residual = args->in[3],
               &y = args->out[0];
  if (s.batch * s.m * s.n == 0) return PF_OK;
  const MatmulParams& params = PfParams<MatmulParams>(args);
  Problem p{};
  p.batch = s.batch;
  p.m = s.m;
  p.n = s.n;
  p.k = s.k;
  p.dtype = a.dtype == PF_BF16 && b.dtype == PF_BF16 && OnednnHasBf16() ? PF_BF16 : PF_F32;
  p.a = static_cast<const char*>(As(args, a, p.dtype));
  p.b = static_cast<const char*>(As(args, b, p.dtype));
  p.a_batch = s.a_batch;
  p.a_row = s.trans_a ? 1 : s.k;
  p.a_column = s.trans_a ? s.m : 1;
  p.b_batch = s.b_batch;
  p.b_row = s.trans_b ? 1 : s.n;
  p.b_column = s.trans_b ? s.k : 1;
  p.y = static_cast<char*>(y.data);
  p.y_row = s.n;
  p.end = {PfPresent(bias) ? static_cast<const float*>(As(args, bias, PF_F32)) : nullptr,
           residual.data,
           PfPresent(residual) ? residual.dtype : PF_F32,
           y.dtype,
           static_cast<int>(params.activation),
           params.accumulate != 0};
  if (!p.a || !p.b || (PfPresent(bias) && !p.end.bias)) return NoMemory(args, "matmul");
  status = PackFor(args, "matmul", &p);
  return status == PF_OK ? Run(args, "matmul", p) : status;
}

int32_t pf_cpu_matmul_pack(const PfArgs* args) {
  const PfView &w = args->in[0], &blob = args->out[0];
  if (w.rank != 2 || PfCount(w) == 0)
    return Fail(args, PF_ERR_SHAPE, "matmul_pack: expected w [N, K], received rank %d", w.rank);
  if (!PfIsFloat(w))
    return Fail(args, PF_ERR_DTYPE, "matmul_pack: w is f32 or bf16, received dtype %d", w.dtype);
  const auto form = static_cast<int32_t>(PfParams<MatmulPackParams>(args).form);
  const size_t bytes = form == PF_PACK_INT8 ? Int8PackBytes(w.dims[0], w.dims[1])
                                            : OnednnPackBytes(w.dims[0], w.dims[1], w.dtype);
  if (blob.dtype != PF_U8 || static_cast<size_t>(PfCount(blob)) != bytes)
    return Fail(args, PF_ERR_SHAPE, "matmul_pack: expected a u8 blob of %zu bytes, received %lld", bytes,
                (long long)PfCount(blob));
  if (form == PF_PACK_INT8) return PackInt8(args, w, blob);
  const int32_t stored = OnednnPackDType(w.dtype);
  const void* plain = As(args, w, stored);
  if (!plain) return NoMemory(args, "matmul_pack");
  return OnednnPack(plain, w.dims[0], w.dims[1], stored, blob.data, args->context->error);
}

int32_t pf_cpu_matmul_packed(const PfArgs* args) {
  const PfView &x = args->in[0], &blob = args->in[1], &bias = args->in[2], &residual = args->in[3],
               &y = args->out[0];
  const MatmulPackedParams& params = PfParams<MatmulPackedParams>(args);
  int32_t status = CheckMatmulFloats(args, "matmul_packed", true);
  if (status != PF_OK) return status;
  if (Int8IsPacked(blob)) return ProductInt8(args);
  OnednnPacked w;
  status = OnednnOpenPacked(blob.data, PfCount(blob), &w, args->context->error);
  if (status != PF_OK) return status;
  const int64_t k = x.rank >= 1 ? x.dims[x.rank - 1] : 0;
  if (k != w.k || w.n != params.n)
    return Fail(args, PF_ERR_SHAPE,
                "matmul_packed: the weight is [%lld, %lld], received x [..., %lld] and n = %g",
                (long long)w.n, (long long)w.k, (long long)k, params.n);
  const int64_t m = PfCount(x) / k;
  status = CheckPackedResult(args, m, w.n);
  if (status != PF_OK) return status;
  if (m == 0) return PF_OK;

  Problem p{};
  p.batch = 1;
  p.m = m;
  p.n = w.n;
  p.k = k;
  p.dtype = w.dtype;
  p.b = w.data;
  p.packed_tile_bytes = w.tile_bytes ? w.tile_bytes : 1;
  p.a_row = k;
  p.a_column = 1;
  // Never round an f32 input to meet a bf16 weight. A height this layout has no vector kernel for: go back to
  // the plain weight.
  const bool plain = (x.dtype == PF_F32 && w.dtype == PF_BF16) || !PackedRuns(p, args->context->error);
  if (plain) {
    void* weight = Scratch(args, w.n * k * PfSize(static_cast<int32_t>(w.dtype)));
    if (!weight) return NoMemory(args, "matmul_packed");
    status = OnednnUnpack(w, weight, args->context->error);
    if (status != PF_OK) return status;
    p.dtype = x.dtype == PF_BF16 && w.dtype == PF_BF16 ? PF_BF16 : PF_F32;
    const PfView view{weight, static_cast<int32_t>(w.dtype), 2, {w.n, k}};
    p.b = static_cast<const char*>(As(args, view, p.dtype));
    p.packed_tile_bytes = 0;
    p.b_row = 1;
    p.b_column = k;
  }
  p.a = static_cast<const char*>(As(args, x, p.dtype));
  p.y = static_cast<char*>(y.data) + static_cast<int64_t>(params.column) * PfSize(y.dtype);
  p.y_row = y.dims[y.rank - 1];
  p.end = {PfPresent(bias) ? static_cast<const float*>(As(args, bias, PF_F32)) : nullptr,
           residual.data,
           PfPresent(residual) ? residual.dtype : PF_F32,
           y.dtype,
           static_cast<int>(params.activation),
           false};
  if (!p.a || !p.b || (PfPresent(bias) && !p.end.bias)) return NoMemory(args, "matmul_packed");
  return Run(args, "matmul_packed", p);
}
