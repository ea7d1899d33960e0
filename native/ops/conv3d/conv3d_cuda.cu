#include "ops/conv3d/conv3d.h"
#include "ops/conv3d/conv3d_gather.cuh"

namespace {

// Which taps of a kernel a product takes (every step-th of each axis, from first on), and where its weight
// [Cout, Cin, kt, kh, kw] has them.
struct Taps {
  int count[3], first[3], step[3], kernel[3];
  int64_t All() const { return static_cast<int64_t>(count[0]) * count[1] * count[2]; }
};

// to [n, taps, channels], channels padded with zeros, from w[n n_stride + channel c_stride + tap].
template <class T>
__global__ void __launch_bounds__(kElementThreads)
    RelayKernel(FloatArray w, int channels, int64_t n_stride, int64_t c_stride, Taps taps, FastDiv by_taps,
                FastDiv by_rows, FastDiv by_columns, FastDiv by_chunks, int total, T* to) {
  int n = blockIdx.x * kElementThreads + threadIdx.x;
  if (n >= total) return;
  int at = by_taps.Split(&n);  // neighbouring threads read neighbouring taps
  const int tap = at, chunk = by_chunks.Split(&n), channel = chunk * kChunk<T>;
  const int column = by_columns.Split(&at), row = by_rows.Split(&at);
  const int64_t in_kernel = (static_cast<int64_t>(taps.first[0] + at * taps.step[0]) * taps.kernel[1] +
                             taps.first[1] + row * taps.step[1]) *
                                taps.kernel[2] +
                            taps.first[2] + column * taps.step[2];
  float v[kChunk<T>];
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i)
    v[i] = channel + i < channels ? ReadOne(w, n * n_stride + (channel + i) * c_stride + in_kernel) : 0;
  const int64_t line = static_cast<int64_t>(n) * by_taps.divisor + tap;
  StorePack<T, kChunk<T>>(to + (line * by_chunks.divisor + chunk) * kChunk<T>, v);
}

// dw [Cout, Cin, taps] (=|+=) the sum of the parts [Cout, taps, channels], in order.
__global__ void __launch_bounds__(kElementThreads)
    WeightsKernel(const float* parts, int splits, int64_t part, FastDiv by_channels, FastDiv by_taps,
                  int c_in, bool accumulate, float* dw) {
  const int64_t from = static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  if (from >= part) return;
  int o = static_cast<int>(from);
  const int channel = by_channels.Split(&o), tap = by_taps.Split(&o);
  if (channel >= c_in) return;
  float sum = 0;
  for (int p = 0; p < splits; ++p) sum += parts[p * part + from];
  float* const to = dw + (static_cast<int64_t>(o) * c_in + channel) * by_taps.divisor + tap;
  *to = accumulate ? *to + sum : sum;
}

constexpr int kSumRows = 8;  // warps of a block, each summing every 8th row of its part

// parts [blockIdx.y, columns] = sums over this part's rows; a thread has N columns.
template <int N>
__global__ void __launch_bounds__(32 * kSumRows)
    ColumnSumsKernel(FloatArray x, int rows, int columns, int per_part, float* parts) {
  __shared__ float of_warp[kSumRows][32 * N];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = (blockIdx.x * 32 + lane) * N;
  const int begin = blockIdx.y * per_part, end = begin + per_part < rows ? begin + per_part : rows;
  float sum[N] = {};
  if (column < columns)
#pragma unroll 4
    for (int row = begin + warp; row < end; row += kSumRows) {
      float v[N];
      ReadPack<N>(x, static_cast<int64_t>(row) * columns + column, v);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += v[i];
    }
#pragma unroll
  for (int i = 0; i < N; ++i) of_warp[warp][i * 32 + lane] = sum[i];
  __syncthreads();
  if (warp != 0 || column >= columns) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    for (int w = 1; w < kSumRows; ++w) sum[i] += of_warp[w][i * 32 + lane];
    parts[static_cast<int64_t>(blockIdx.y) * columns + column + i] = sum[i];
  }
}
__global__ void __launch_bounds__(kElementThreads)
    AddPartsKernel(const float* parts, int count, int columns, bool accumulate, float* to) {
  const int column = blockIdx.x * kElementThreads + threadIdx.x;
  if (column >= columns) return;
  float sum = 0;
  for (int p = 0; p < count; ++p) sum += parts[static_cast<int64_t>(p) * columns + column];
  to[column] = accumulate ? to[column] + sum : sum;
}

int32_t NoMemory(const PfArgs* args, const char* op) {
  return Fail(args, PF_ERR_MEMORY, "%s: no memory for intermediate values", op);
}
int64_t Product(const int64_t* lengths) { return lengths[0] * lengths[1] * lengths[2]; }

// A kernel of one tap that skips nothing is a plain matrix product.
bool Pointwise(const Conv3dShape& s) { return Product(s.kernel) == 1 && Product(s.stride) == 1; }

Positions PositionsOf(const int64_t* lengths) {
  return {FastDiv(lengths[0]), FastDiv(lengths[1]), FastDiv(lengths[2])};
}

int32_t CheckSize(const PfArgs* args, const char* op, const Conv3dShape& s) {
  constexpr int64_t kMost = 1 << 30;
  const int64_t taps = Product(s.kernel);
  if (s.batch * Product(s.in) < kMost && s.batch * Product(s.out) < kMost && s.c_in * s.c_out * taps < kMost)
    return PF_OK;
  return Fail(args, PF_ERR_SHAPE, "%s: this device takes fewer than 2^30 positions and weights", op);
}

template <class T>
Geometry<T> GeometryOf(const Prepared<T>& source, const int64_t* lengths, const int64_t* result,
                       const Taps& taps) {
  Geometry<T> g{};
  g.data = source.data;
  g.channels = static_cast<int>(source.line);
  for (int i = 0; i < 3; ++i) g.source[i] = static_cast<int>(lengths[i]);
  g.positions = PositionsOf(result);
  g.by_channels = FastDiv(source.line);
  g.by_rows = FastDiv(taps.count[1]);
  g.by_columns = FastDiv(taps.count[2]);
  return g;
}

// The part of y (or, data, of dx) whose positions have these remainders by the strides: it sees the taps of
// one remainder only. Forward there is just one part.
template <class T>
int32_t MapPart(const PfArgs* args, const char* op, const Conv3dShape& s, bool data,
                const Prepared<T>& source, const int64_t (&part)[3], T* weights, const PfView& w,
                const FloatArray& bias, const PfView& result) {
  Taps taps{};
  int64_t lengths[3], shift[3];
  bool scattered = false;
  for (int i = 0; i < 3; ++i) {
    const int64_t first = data ? (part[i] + s.pad[i]) % s.stride[i] : 0, step = data ? s.stride[i] : 1;
    taps.kernel[i] = static_cast<int>(s.kernel[i]);
    taps.first[i] = static_cast<int>(first);
    taps.step[i] = static_cast<int>(step);
    taps.count[i] = first < s.kernel[i] ? static_cast<int>((s.kernel[i] - 1 - first) / step + 1) : 0;
    lengths[i] = data ? CeilDiv(s.in[i] - part[i], s.stride[i]) : s.out[i];
    shift[i] = data ? (part[i] + s.pad[i] - first) / s.stride[i] : -s.pad[i];
    scattered |= step > 1;
    if (lengths[i] <= 0) return PF_OK;
  }
  const int64_t n = data ? s.c_in : s.c_out, channels = data ? s.c_out : s.c_in;
  const int64_t chunks = source.line / kChunk<T>, total = n * taps.All() * chunks;
  const bool any = total > 0;  // else this part is zero
  if (!any)
    for (int& count : taps.count) count = 1;  // to divide by
  if (any)
    PF_TRY(Launch(args, &RelayKernel<T>, dim3(static_cast<unsigned>(CeilDiv(total, kElementThreads))),
                  kElementThreads, 0, ArrayOf(w), static_cast<int>(channels),
                  Product(s.kernel) * (data ? 1 : s.c_in), Product(s.kernel) * (data ? s.c_in : 1), taps,
                  FastDiv(taps.All()), FastDiv(taps.count[1]), FastDiv(taps.count[2]), FastDiv(chunks),
                  static_cast<int>(total), weights));

  GemmArgs<ConvSource<T, true>, MatrixSource<T, true>, ScatteredRows> g{};
  g.m = static_cast<int>(s.batch * Product(lengths));
  g.n = static_cast<int>(n);
  g.k = any ? static_cast<int>(taps.All() * source.line) : 0;
  g.a.geometry = GeometryOf(source, data ? s.out : s.in, lengths, taps);
  g.a.geometry.step = data ? -1 : 1;
  g.rows.positions = g.a.geometry.positions;
  g.rows.scattered = scattered;
  for (int i = 0; i < 3; ++i) {
    g.a.geometry.scale[i] = static_cast<int>(data ? 1 : s.stride[i]);
    g.a.geometry.shift[i] = static_cast<int>(shift[i]);
    g.rows.length[i] = static_cast<int>(s.in[i]);
    g.rows.scale[i] = static_cast<int>(s.stride[i]);
    g.rows.first[i] = static_cast<int>(part[i]);
  }
  g.a.rows = g.m;
  g.a.k = g.k;
  g.b = {weights, g.k, 0, g.n, g.k};
  g.end = EpilogueTo(ArrayOf(result), n, bias);
  return RunGemm<T>(args, op, g, 1);
}

template <class T>
int32_t MapAs(const PfArgs* args, const char* op, const Conv3dShape& s, bool data, const PfView& source,
              const PfView& w, const FloatArray& bias, const PfView& result) {
  Prepared<T> from;
  PF_TRY(Prepare(args, op, source, s.batch * Product(data ? s.out : s.in), data ? s.c_out : s.c_in, &from));
  T* const weights = static_cast<T*>(
      DeviceScratch(args, (data ? s.c_in : s.c_out) * Product(s.kernel) * from.line * sizeof(T)));
  if (weights == nullptr) return NoMemory(args, op);
  const int64_t parts[3] = {data ? s.stride[0] : 1, data ? s.stride[1] : 1, data ? s.stride[2] : 1};
  for (int64_t t = 0; t < parts[0]; ++t)
    for (int64_t h = 0; h < parts[1]; ++h)
      for (int64_t w_at = 0; w_at < parts[2]; ++w_at)
        PF_TRY(MapPart(args, op, s, data, from, {t, h, w_at}, weights, w, bias, result));
  return PF_OK;
}

// y from x (forward) or dx from dy (data): both read a source through a weight.
int32_t Map(const PfArgs* args, const char* op, const Conv3dShape& s, bool data, const PfView& source,
            const PfView& w, const PfView& bias, const PfView& result) {
  PF_TRY(CheckSize(args, op, s));
  if (s.batch == 0) return PF_OK;
  if (Pointwise(s)) {
    GemmProblem p{};
    p.batch = 1;
    p.m = s.batch * Product(s.in);
    p.n = data ? s.c_in : s.c_out;
    p.k = data ? s.c_out : s.c_in;
    p.trans_b = !data;
    p.a = source;
    p.b = w;
    p.bias = bias;
    p.residual = {nullptr, PF_F32, -1, {}};
    p.y = result;
    return Gemm(args, op, p);
  }
  return source.dtype == PF_BF16 && w.dtype == PF_BF16
             ? MapAs<Bf16>(args, op, s, data, source, w, ArrayOf(bias), result)
             : MapAs<float>(args, op, s, data, source, w, ArrayOf(bias), result);
}

// Every tap's gradient is a product of dy, turned on its side, and the inputs that the tap sees.
template <class T>
int32_t WeightsAs(const PfArgs* args, const char* op, const Conv3dShape& s, const PfView& x, const PfView& dy,
                  const PfView& dw, bool accumulate) {
  const int64_t positions = s.batch * Product(s.out), taps = Product(s.kernel);
  Prepared<T> from, grad;
  PF_TRY(Prepare(args, op, x, s.batch * Product(s.in), s.c_in, &from));
  PF_TRY(Prepare(args, op, dy, positions, s.c_out, &grad));
  Taps all{};
  for (int i = 0; i < 3; ++i) all.count[i] = static_cast<int>(s.kernel[i]);
  GemmArgs<MatrixSource<T, false>, ConvSource<T, false>, SameRows> g{};
  g.m = static_cast<int>(s.c_out);
  g.n = static_cast<int>(taps * from.line);
  g.k = static_cast<int>(positions);
  g.a = {grad.data, grad.line, 0, g.m, g.k};
  g.b.geometry = GeometryOf(from, s.in, s.out, all);
  g.b.geometry.step = 1;
  for (int i = 0; i < 3; ++i) {
    g.b.geometry.scale[i] = static_cast<int>(s.stride[i]);
    g.b.geometry.shift[i] = static_cast<int>(-s.pad[i]);
  }
  g.b.rows = g.n;
  g.b.k = g.k;
  const GemmPlan plan = PlanGemm<T>(g.m, g.n, g.k, 1);
  const int64_t part = static_cast<int64_t>(g.m) * g.n;
  float* const parts = static_cast<float*>(DeviceScratch(args, part * plan.splits * sizeof(float)));
  if (parts == nullptr) return NoMemory(args, op);
  g.end = EpilogueTo({parts, PF_F32}, g.n);
  PF_TRY(LaunchGemm<T>(args, g, plan, 1));
  return Launch(args, &WeightsKernel, dim3(static_cast<unsigned>(CeilDiv(part, kElementThreads))),
                kElementThreads, 0, parts, plan.splits, part, FastDiv(from.line), FastDiv(taps),
                static_cast<int>(s.c_in), accumulate, PfData<float>(dw));
}

int32_t BiasGradient(const PfArgs* args, const char* op, const PfView& dy, int64_t rows, int64_t columns,
                     bool accumulate, float* to) {
  const int64_t wanted = CeilDiv(rows, 256), per_part = CeilDiv(rows, wanted < 256 ? wanted : 256);
  const int64_t count = CeilDiv(rows, per_part);
  float* const parts = static_cast<float*>(DeviceScratch(args, count * columns * sizeof(float)));
  if (parts == nullptr) return NoMemory(args, op);
  const bool packs = columns % 8 == 0 && Aligned(dy.data, 16);
  const dim3 grid(static_cast<unsigned>(CeilDiv(columns, packs ? 256 : 32)), static_cast<unsigned>(count));
  PF_TRY(Launch(args, packs ? &ColumnSumsKernel<8> : &ColumnSumsKernel<1>, grid, 32 * kSumRows, 0,
                ArrayOf(dy), static_cast<int>(rows), static_cast<int>(columns), static_cast<int>(per_part),
                parts));
  return Launch(args, &AddPartsKernel, dim3(static_cast<unsigned>(CeilDiv(columns, kElementThreads))),
                kElementThreads, 0, parts, static_cast<int>(count), static_cast<int>(columns), accumulate,
                to);
}

}  // namespace

int32_t pf_cuda_conv3d(const PfArgs* args) {
  const char* const op = "conv3d";
  const PfView &x = args->in[0], &w = args->in[1], &bias = args->in[2], &y = args->out[0];
  Conv3dShape s{};
  PF_TRY(GetConv3dShape(args, op, x, w, y, &bias, &s));
  PF_TRY(CheckConv3dFloats(args, op, x, y));
  PF_TRY(CheckConv3dFloats(args, op, w, PfPresent(bias) ? bias : w));
  return Map(args, op, s, false, x, w, bias, y);
}

int32_t pf_cuda_conv3d_backward_data(const PfArgs* args) {
  const char* const op = "conv3d_backward_data";
  const PfView &dy = args->in[0], &w = args->in[1], &dx = args->out[0];
  Conv3dShape s{};
  PF_TRY(GetConv3dShape(args, op, dx, w, dy, nullptr, &s));
  PF_TRY(CheckConv3dFloats(args, op, dx, dy));
  PF_TRY(CheckConv3dFloats(args, op, w, w));
  return Map(args, op, s, true, dy, w, {nullptr, PF_F32, -1, {}}, dx);
}

int32_t pf_cuda_conv3d_backward_weights(const PfArgs* args) {
  const char* const op = "conv3d_backward_weights";
  const PfView &x = args->in[0], &dy = args->in[1], &dw = args->out[0], &dbias = args->out[1];
  Conv3dShape s{};
  PF_TRY(GetConv3dShape(args, op, x, dw, dy, &dbias, &s));
  PF_TRY(CheckConv3dFloats(args, op, x, dy));
  PF_TRY(CheckConv3dGradients(args, op, dw, dbias));
  PF_TRY(CheckSize(args, op, s));
  const bool accumulate = PfParams<Conv3dParams>(args).accumulate != 0;
  const int64_t positions = s.batch * Product(s.out);
  if (positions == 0) {
    if (accumulate) return PF_OK;
    if (PfPresent(dbias)) PF_TRY(DeviceZero(args, dbias.data, s.c_out * sizeof(float)));
    return DeviceZero(args, dw.data, PfCount(dw) * sizeof(float));
  }
  if (PfPresent(dbias))
    PF_TRY(BiasGradient(args, op, dy, positions, s.c_out, accumulate, PfData<float>(dbias)));
  if (Pointwise(s)) {
    GemmProblem p{};
    p.batch = 1;
    p.m = s.c_out;
    p.n = s.c_in;
    p.k = positions;
    p.trans_a = true;
    p.a = dy;
    p.b = x;
    p.bias = p.residual = {nullptr, PF_F32, -1, {}};
    p.y = dw;
    p.accumulate = accumulate;
    return Gemm(args, op, p);
  }
  return x.dtype == PF_BF16 && dy.dtype == PF_BF16 ? WeightsAs<Bf16>(args, op, s, x, dy, dw, accumulate)
                                                   : WeightsAs<float>(args, op, s, x, dy, dw, accumulate);
}
