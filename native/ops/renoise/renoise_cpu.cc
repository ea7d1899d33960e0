#include "ops/downsample/pairs.h"
#include "ops/random/random_simd.h"
#include "ops/renoise/renoise.h"

namespace {

// Both rows of n blocks: z is replaced by n'. A pair sum is the same float in both of its lanes, so the block
// mean needs no gathering: it is computed where it is used.
void BlockNoiseRows(const BlockCovariance& covariance, int64_t n, float* top, float* low) {
  int64_t j = 0;
  for (; j + kLanes <= 2 * n; j += kLanes) {
    const Vf a = LoadF(top + j), b = LoadF(low + j);
    const Vf mean = BlockMean<VectorLanes>(a + SwapPairs(a), b + SwapPairs(b));
    StoreF(top + j, BlockNoise<VectorLanes>(a, mean, covariance.spread, covariance.common));
    StoreF(low + j, BlockNoise<VectorLanes>(b, mean, covariance.spread, covariance.common));
  }
  for (; j < 2 * n; j += 2) {
    const float mean = BlockMean<ScalarLanes>(top[j] + top[j + 1], low[j] + low[j + 1]);
    for (int k = 0; k < 2; ++k) {
      top[j + k] = BlockNoise<ScalarLanes>(top[j + k], mean, covariance.spread, covariance.common);
      low[j + k] = BlockNoise<ScalarLanes>(low[j + k], mean, covariance.spread, covariance.common);
    }
  }
}

// y = v twice + beta·noise, 2 kLanes values.
void PutOver(const float* noise, Vf v, float beta, float* y) {
  StorePair(y, TwiceLow(v) + beta * LoadF(noise), TwiceHigh(v) + beta * LoadF(noise + kLanes));
}
void PutOver(const Bf16* noise, Vf v, float beta, Bf16* y) {
  // Both values of a 32-bit unit get the same of v.
  Vu pairs;
  memcpy(&pairs, noise, sizeof(pairs));
  const Vf low = v + beta * (Vf)(pairs << 16), high = v + beta * (Vf)(pairs & 0xffff0000u);
  const Vu both = Bf16Pairs(low, high);
  memcpy(y, &both, sizeof(both));
}

// Noise that is given, everything of one type: nothing but memory to move.
template <class T>
void AddNoise(const T* x, const T* noise, float alpha, float beta, int64_t row_pairs, int64_t w, T* y) {
  ForRowPairs(row_pairs, w, [=](int64_t pair) {
    const T* from = x + pair * w;
    for (int64_t row = 2 * pair; row < 2 * pair + 2; ++row) {
      const T* n = noise + row * 2 * w;
      T* to = y + row * 2 * w;
      int64_t j = 0;
      for (; j + kLanes <= w; j += kLanes) PutOver(n + 2 * j, alpha * LoadF(from + j), beta, to + 2 * j);
      for (; j < w; ++j)
        for (int64_t k = 2 * j; k < 2 * j + 2; ++k)
          to[k] = FromFloat<T>(alpha * ToFloat(from[j]) + beta * ToFloat(n[k]));
    }
  });
}

}  // namespace

int32_t pf_cpu_renoise(const PfArgs* args) {
  PF_TRY(CheckRenoise(args));
  PF_TRY(NeedRenoiseTypes(args));
  const PfView &x = args->in[0], &noise = args->in[1], &y = args->out[0];
  if (PfCount(y) == 0) return PF_OK;
  const RenoiseParams& p = PfParams<RenoiseParams>(args);
  const PhiloxKey key = MakePhiloxKey(&p.seed_lo);
  const BlockCovariance covariance = MakeBlockCovariance(p.gamma);
  const float alpha = static_cast<float>(p.alpha), beta = static_cast<float>(p.beta);
  const int64_t w = y.dims[y.rank - 1] / 2, row_pairs = PfCount(y) / (4 * w);
  const bool has_x = PfPresent(x), has_noise = PfPresent(noise);
  if (has_x && has_noise && OneType(y, x, noise)) {
    PF_FLOAT_DISPATCH(y, T,
                      { AddNoise(PfData<T>(x), PfData<T>(noise), alpha, beta, row_pairs, w, PfData<T>(y)); });
    return PF_OK;
  }
  constexpr int64_t kBlocks = kBlock / 2;  // 2x2 blocks handled at once: two rows of kBlock values
  const int64_t group = w < kBlocks / 2 ? kBlocks / w : 1;
  ForTasks((row_pairs + group - 1) / group, PfCount(y), [&](int64_t task) {
    alignas(64) float z[2 * kBlock], signal[kBlock], in[kBlocks], out[kBlock];
    const int64_t first = task * group, rows = MinOf(group, row_pairs - first);
    // Short rows: the numbers of several row pairs are one run of the stream.
    const bool whole = w <= kBlocks && !has_noise;
    if (whole) FillRandom<NormalNumbers>(key, first * 4 * w, rows * 4 * w, z);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < w; c += kBlocks) {
        const int64_t n = MinOf(kBlocks, w - c), at = (first + r) * 4 * w + 2 * c;
        float* row[2] = {whole ? z + r * 4 * w : z, whole ? z + r * 4 * w + 2 * w : z + kBlock};
        if (!has_noise) {
          if (!whole)
            for (int k = 0; k < 2; ++k) FillRandom<NormalNumbers>(key, at + k * 2 * w, 2 * n, row[k]);
          BlockNoiseRows(covariance, n, row[0], row[1]);
        }
        if (has_x) DoubleRow(ReadBlock(x, (first + r) * w + c, n, in), n, alpha, signal);
        for (int k = 0; k < 2; ++k) {
          const int64_t to = at + k * 2 * w;
          float* result = BeginWrite(y, to, out);
          const float* source = has_noise ? ReadBlock(noise, to, 2 * n, row[k]) : row[k];
          if (has_x)
            Map(2 * n, source, signal, result, [=](Vf v, Vf s) { return s + beta * v; });
          else
            Map(2 * n, source, result, [=](Vf v) { return beta * v; });
          EndWrite(y, to, 2 * n, result);
        }
      }
    }
  });
  return PF_OK;
}
