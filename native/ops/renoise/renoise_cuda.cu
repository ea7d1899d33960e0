#include "backends/cuda/elementwise.h"
#include "ops/renoise/renoise.h"

namespace {

constexpr int kThreads = 256;

struct Renoise {
  FloatArray x, noise, y;
  int64_t count, w;  // 2x2 blocks of all, and of a row of them
  float alpha, beta;
  PhiloxKey key;
  BlockCovariance covariance;
  bool packs;
};

// Elements [at, at + N) of one row, at even: with N = 4 and at a multiple of 4 they are one Philox block,
// with N = 2 a half.
template <int N>
__device__ __forceinline__ void RowNormals(const PhiloxKey& key, int64_t at, float* z) {
  uint32_t words[4];
  PhiloxWords(key, static_cast<uint64_t>(at) / 4, words);
  if (N == 4) {
    NormalPair<ScalarLanes>(words[0], words[1], z, z + 1);
    NormalPair<ScalarLanes>(words[2], words[3], z + 2, z + 3);
  } else {
    const bool second = at % 4 != 0;
    NormalPair<ScalarLanes>(second ? words[2] : words[0], second ? words[3] : words[1], z, z + 1);
  }
}

template <int N>
__device__ __forceinline__ void ReadRow(const FloatArray& v, int64_t at, bool packs, float* to) {
  if (packs) return ReadPack<N>(v, at, to);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = ReadOne(v, at + i);
}

// N blocks that lie side by side; N = 2 needs an even w. No operation may be contracted: the noise has the
// bits of every other backend.
template <int N, bool kDraw>
__global__ void __launch_bounds__(kThreads) RenoiseKernel(Renoise p) {
  typedef ScalarLanes L;
  const int64_t block = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (block >= p.count) return;
  const int64_t top = 2 * (block + p.w * (block / p.w));
  const bool packs = N > 1 && p.packs;
  float x[N], n[2][2 * N];
  ReadRow<N>(p.x, block, packs, x);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int64_t at = top + k * 2 * p.w;
    if (kDraw)
      RowNormals<2 * N>(p.key, at, n[k]);
    else
      ReadRow<2 * N>(p.noise, at, packs, n[k]);
  }
  if (kDraw) {
#pragma unroll
    for (int i = 0; i < 2 * N; i += 2) {
      const float mean = BlockMean<L>(L::Add(n[0][i], n[0][i + 1]), L::Add(n[1][i], n[1][i + 1]));
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float& z = n[k / 2][i + k % 2];
        z = BlockNoise<L>(z, mean, p.covariance.spread, p.covariance.common);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int64_t at = top + k * 2 * p.w;
    float y[2 * N];
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) {
      y[i] = L::Mul(p.beta, n[k][i]);
      if (p.x.data != nullptr) y[i] = L::Add(L::Mul(p.alpha, x[i / 2]), y[i]);
    }
    if (packs) {
      WritePack<2 * N>(p.y, at, y);
    } else {
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) WriteOne(p.y, at + i, y[i]);
    }
  }
}

template <int N>
int32_t LaunchRenoise(const PfArgs* args, const Renoise& p) {
  const unsigned grid = static_cast<unsigned>(CeilDiv(p.count, N * kThreads));
  return p.noise.data == nullptr ? Launch(args, &RenoiseKernel<N, true>, grid, kThreads, 0, p)
                                 : Launch(args, &RenoiseKernel<N, false>, grid, kThreads, 0, p);
}

}  // namespace

int32_t pf_cuda_renoise(const PfArgs* args) {
  PF_TRY(CheckRenoise(args));
  PF_TRY(NeedRenoiseTypes(args));
  const PfView &x = args->in[0], &noise = args->in[1], &y = args->out[0];
  if (PfCount(y) == 0) return PF_OK;
  const RenoiseParams& params = PfParams<RenoiseParams>(args);
  Renoise p{};
  p.x = ArrayOf(x);
  p.noise = ArrayOf(noise);
  p.y = ArrayOf(y);
  p.count = PfCount(y) / 4;
  p.w = y.dims[y.rank - 1] / 2;
  p.alpha = static_cast<float>(params.alpha);
  p.beta = static_cast<float>(params.beta);
  p.key = MakePhiloxKey(&params.seed_lo);
  p.covariance = MakeBlockCovariance(params.gamma);
  p.packs = Packs(p.x) && Packs(p.noise) && Packs(p.y);
  return p.w % 2 == 0 ? LaunchRenoise<2>(args, p) : LaunchRenoise<1>(args, p);
}
