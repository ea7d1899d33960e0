#include "backends/cpu/rows.h"
#include "ops/norm/norm.h"

// One row: y = (x − mean)·rstd·(1 + scale) + shift.
template <class X, class Y>
static void ModulateRow(const X* x, int64_t d, float mean, float rstd, const float* scale, const float* shift,
                        Y* y) {
  WriteRow(y, d, [=](int64_t i, int64_t m) {
    Vf v = (LoadN(x + i, m) - mean) * rstd;
    if (scale) {
      const Vf s = LoadN(scale + i, m);
      v = Fma(v, s, v);
    }
    return shift ? v + LoadN(shift + i, m) : v;
  });
}

template <class X, class Y>
static void NormModulate(const PfArgs* a, const NormShape& s, const float* scale, const float* shift) {
  const float eps = static_cast<float>(PfParams<NormParams>(a).eps);
  const int32_t* rows = PfPresent(a->in[3]) ? PfData<int32_t>(a->in[3]) : nullptr;
  float *means = PfData<float>(a->out[1]), *rstds = PfData<float>(a->out[2]);
  const int64_t d = s.d;
#pragma omp parallel for schedule(static) if (s.rows * d > kParallelWork)
  for (int64_t n = 0; n < s.rows; ++n) {
    const X* x = PfData<X>(a->in[0]) + n * d;
    const Moments moments = MomentsOf(x, d);
    const float rstd = 1 / sqrtf(moments.variance + eps);
    const int64_t entry = (rows ? rows[n] : 0) * d;
    ModulateRow(x, d, moments.mean, rstd, scale ? scale + entry : nullptr, shift ? shift + entry : nullptr,
                PfData<Y>(a->out[0]) + n * d);
    if (means) means[n] = moments.mean;
    if (rstds) rstds[n] = rstd;
  }
}

int32_t pf_cpu_norm_modulate(const PfArgs* a) {
  const char* op = "norm_modulate";
  NormShape s;
  if (int32_t e = NormModulateCheck(a, &s)) return e;
  if (int32_t e = NormCheckRows(a, op, a->in[3], s)) return e;
  if (int32_t e = NormModulateDtypes(a)) return e;
  const float *shift, *scale;
  if (!AsFloats(a, a->in[1], &shift) || !AsFloats(a, a->in[2], &scale)) return NoMemory(a, op);
  PF_FLOAT_DISPATCH(a->in[0], X,
                    PF_FLOAT_DISPATCH(a->out[0], Y, { NormModulate<X, Y>(a, s, scale, shift); }););
  return PF_OK;
}

static constexpr int kColumns = 64;    // columns a task owns
static constexpr int kFlushRows = 64;  // rows summed before they join the total, to keep rounding small

// sum_dy[r] += Σ dy and sum_dyx[r] += Σ dy·(x − mean)·rstd over the rows of entry r. Columns are independent,
// so a task walks all rows of its columns in order: the same bits for any number of threads.
static void ColumnSums(const PfView& x, const PfView& dy, const float* mean, const float* rstd,
                       const int32_t* rows, const NormShape& s, float* sum_dy, float* sum_dyx) {
  const int64_t tasks = (s.d + kColumns - 1) / kColumns;
#pragma omp parallel for schedule(static) if (s.rows * s.d > kParallelWork)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t c = task * kColumns, width = s.d - c < kColumns ? s.d - c : kColumns;
    alignas(64) float acc_dy[kColumns] = {}, acc_dyx[kColumns] = {}, x_buffer[kColumns], dy_buffer[kColumns];
    for (int64_t n = 0; n < s.rows; ++n) {
      const float* px = ReadRow(x, n * s.d + c, width, x_buffer);
      const float* pdy = ReadRow(dy, n * s.d + c, width, dy_buffer);
      const float m0 = mean ? mean[n] : 0, r0 = rstd[n];
      ForLanes(width, [&](int64_t i, int64_t m) {
        const Vf g = LoadN(pdy + i, m);
        StoreF(acc_dy + i, LoadF(acc_dy + i) + g);
        StoreF(acc_dyx + i, LoadF(acc_dyx + i) + g * ((LoadN(px + i, m) - m0) * r0));
      });
      const bool last = n + 1 == s.rows;
      const int32_t entry = rows ? rows[n] : 0;
      if (!last && (n + 1) % kFlushRows && (!rows || rows[n + 1] == entry)) continue;
      for (int64_t i = 0; i < width; ++i) {
        if (sum_dy) sum_dy[entry * s.d + c + i] += acc_dy[i];
        if (sum_dyx) sum_dyx[entry * s.d + c + i] += acc_dyx[i];
        acc_dy[i] = acc_dyx[i] = 0;
      }
    }
  }
}

int32_t pf_cpu_norm_modulate_backward(const PfArgs* a) {
  const char* op = "norm_modulate_backward";
  NormShape s;
  if (int32_t e = NormModulateBackwardCheck(a, &s)) return e;
  if (int32_t e = NormCheckRows(a, op, a->in[4], s)) return e;
  if (int32_t e = NormModulateBackwardDtypes(a)) return e;
  const int64_t d = s.d, stride = RoundUp(d, 16);
  const float* scale;
  float* buffers = Scratch<float>(a, omp_get_max_threads() * 3 * stride);
  if (!buffers || !AsFloats(a, a->in[3], &scale)) return NoMemory(a, op);
  const int32_t* rows = PfPresent(a->in[4]) ? PfData<int32_t>(a->in[4]) : nullptr;
  const float *means = PfData<float>(a->in[1]), *rstds = PfData<float>(a->in[2]);

  float* sums[2] = {};
  for (int k = 0; k < 2; ++k) {
    const PfView& out = a->out[k + 1];
    if (!PfPresent(out)) continue;
    sums[k] = out.dtype == PF_F32 ? PfData<float>(out) : Scratch<float>(a, s.entries * d);
    if (!sums[k]) return NoMemory(a, op);
    memset(sums[k], 0, s.entries * d * sizeof(float));
  }
  if (sums[0] || sums[1]) ColumnSums(a->in[0], a->in[5], means, rstds, rows, s, sums[0], sums[1]);
  for (int k = 0; k < 2; ++k)
    if (sums[k]) CommitRow(a->out[k + 1], 0, s.entries * d, sums[k]);

#pragma omp parallel for schedule(static) if (s.rows * d > kParallelWork)
  for (int64_t n = 0; n < s.rows; ++n) {
    float* buffer = buffers + omp_get_thread_num() * 3 * stride;
    const float* x = ReadRow(a->in[0], n * d, d, buffer);
    const float* dy = ReadRow(a->in[5], n * d, d, buffer + stride);
    float* dx = OpenRow(a->out[0], n * d, buffer + 2 * stride);
    const float mean = means[n], rstd = rstds[n];
    const float* row_scale = scale ? scale + (rows ? rows[n] : 0) * d : nullptr;
    const auto gradient = [&](int64_t i, int64_t m) {
      const Vf g = LoadN(dy + i, m);
      return row_scale ? g * (1 + LoadN(row_scale + i, m)) : g;
    };
    const auto normal = [&](int64_t i, int64_t m) { return (LoadN(x + i, m, mean) - mean) * rstd; };
    const float sum_g = RowSum(d, gradient) / d;
    const float sum_gx = RowSum(d, [&](int64_t i, int64_t m) { return gradient(i, m) * normal(i, m); }) / d;
    ForLanes(d, [&](int64_t i, int64_t m) {
      StoreN(dx + i, rstd * (gradient(i, m) - sum_g - normal(i, m) * sum_gx), m);
    });
    CommitRow(a->out[0], n * d, d, dx);
  }
  return PF_OK;
}

template <class X, class Y>
static void RmsNorm(const PfArgs* a, const NormShape& s, const float* w) {
  const float eps = static_cast<float>(PfParams<NormParams>(a).eps);
  float* rstds = PfData<float>(a->out[1]);
  const int64_t d = s.d;
#pragma omp parallel for schedule(static) if (s.rows * d > kParallelWork)
  for (int64_t n = 0; n < s.rows; ++n) {
    const X* x = PfData<X>(a->in[0]) + n * d;
    const float rstd = 1 / sqrtf(SquareSum(x, d) / d + eps);
    WriteRow(PfData<Y>(a->out[0]) + n * d, d,
             [=](int64_t i, int64_t m) { return LoadN(x + i, m) * rstd * LoadN(w + i, m); });
    if (rstds) rstds[n] = rstd;
  }
}

int32_t pf_cpu_rms_norm(const PfArgs* a) {
  const char* op = "rms_norm";
  NormShape s;
  if (int32_t e = RmsNormCheck(a, &s)) return e;
  if (int32_t e = RmsNormDtypes(a)) return e;
  const float* w;
  if (!AsFloats(a, a->in[1], &w)) return NoMemory(a, op);
  PF_FLOAT_DISPATCH(a->in[0], X, PF_FLOAT_DISPATCH(a->out[0], Y, { RmsNorm<X, Y>(a, s, w); }););
  return PF_OK;
}

int32_t pf_cpu_rms_norm_backward(const PfArgs* a) {
  const char* op = "rms_norm_backward";
  NormShape s;
  if (int32_t e = RmsNormBackwardCheck(a, &s)) return e;
  if (int32_t e = RmsNormBackwardDtypes(a)) return e;
  const int64_t d = s.d, stride = RoundUp(d, 16);
  const float* w;
  float* buffers = Scratch<float>(a, omp_get_max_threads() * 3 * stride);
  if (!buffers || !AsFloats(a, a->in[1], &w)) return NoMemory(a, op);
  const float* rstds = PfData<float>(a->in[2]);
  if (PfPresent(a->out[1])) {
    float* dw = PfData<float>(a->out[1]);
    if (!PfParams<RmsNormBackwardParams>(a).accumulate) memset(dw, 0, d * sizeof(float));
    ColumnSums(a->in[0], a->in[3], nullptr, rstds, nullptr, s, nullptr, dw);
  }
#pragma omp parallel for schedule(static) if (s.rows * d > kParallelWork)
  for (int64_t n = 0; n < s.rows; ++n) {
    float* buffer = buffers + omp_get_thread_num() * 3 * stride;
    const float* x = ReadRow(a->in[0], n * d, d, buffer);
    const float* dy = ReadRow(a->in[3], n * d, d, buffer + stride);
    float* dx = OpenRow(a->out[0], n * d, buffer + 2 * stride);
    const float rstd = rstds[n];
    const auto gradient = [&](int64_t i, int64_t m) { return LoadN(dy + i, m) * LoadN(w + i, m); };
    const float dot =
        RowSum(d, [&](int64_t i, int64_t m) { return gradient(i, m) * (LoadN(x + i, m) * rstd); }) / d;
    ForLanes(d, [&](int64_t i, int64_t m) {
      StoreN(dx + i, rstd * (gradient(i, m) - (LoadN(x + i, m) * rstd) * dot), m);
    });
    CommitRow(a->out[0], n * d, d, dx);
  }
  return PF_OK;
}
