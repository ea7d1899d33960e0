#include "ops/downsample/pairs_cuda.h"
#include "ops/renoise/renoise.h"

namespace {

struct RenoiseCall {
  FloatArray x, noise, y;
  PhiloxKey key;
  BlockCovariance covariance;
  float alpha, beta;
  int64_t n, w;  // 2x2 blocks in all, and of a row
};

// The CPU's operations in the CPU's order, none of them fused: the bits are the same.
__device__ __forceinline__ float Combine(const RenoiseCall& call, float signal, float z) {
  typedef ScalarLanes L;
  const float noise = L::Mul(call.beta, z);
  return call.x.data ? L::Add(L::Mul(call.alpha, signal), noise) : noise;
}

__device__ __forceinline__ void Correlate(const BlockCovariance& covariance, float* top, float* low) {
  const float mean =
      BlockMean<ScalarLanes>(ScalarLanes::Add(top[0], top[1]), ScalarLanes::Add(low[0], low[1]));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    top[i] = BlockNoise<ScalarLanes>(top[i], mean, covariance.spread, covariance.common);
    low[i] = BlockNoise<ScalarLanes>(low[i], mean, covariance.spread, covariance.common);
  }
}

// Two neighbouring blocks: each of their rows is the four numbers of one Philox block, drawn once. Needs an
// even w.
__global__ void __launch_bounds__(kElementThreads) RenoisePairs(RenoiseCall call) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x) * 2;
  if (at >= call.n) return;
  const int64_t top = BlockTop(at, call.w), low = top + 2 * call.w;
  float z[2][4], signal[2] = {};
  if (call.x.data) ReadPack<2>(call.x, at, signal);
  if (call.noise.data) {
    ReadPack<4>(call.noise, top, z[0]);
    ReadPack<4>(call.noise, low, z[1]);
  } else {
    PhiloxNormals(call.key, top / 4, z[0]);
    PhiloxNormals(call.key, low / 4, z[1]);
    Correlate(call.covariance, z[0], z[1]);
    Correlate(call.covariance, z[0] + 2, z[1] + 2);
  }
#pragma unroll
  for (int k = 0; k < 2; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) z[k][i] = Combine(call, signal[i / 2], z[k][i]);
  WritePack<4>(call.y, top, z[0]);
  WritePack<4>(call.y, low, z[1]);
}

// One block, of rows whose lengths or addresses fit no packs.
__global__ void __launch_bounds__(kElementThreads) RenoiseBlocks(RenoiseCall call) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  if (at >= call.n) return;
  const int64_t top = BlockTop(at, call.w), places[2] = {top, top + 2 * call.w};
  float z[2][2];
  const float signal = call.x.data ? ReadOne(call.x, at) : 0;
  for (int k = 0; k < 2; ++k)
    for (int i = 0; i < 2; ++i)
      z[k][i] =
          call.noise.data ? ReadOne(call.noise, places[k] + i) : PhiloxNormalAt(call.key, places[k] + i);
  if (!call.noise.data) Correlate(call.covariance, z[0], z[1]);
  for (int k = 0; k < 2; ++k)
    for (int i = 0; i < 2; ++i) WriteOne(call.y, places[k] + i, Combine(call, signal, z[k][i]));
}

}  // namespace

int32_t pf_cuda_renoise(const PfArgs* args) {
  PF_TRY(CheckRenoise(args));
  const PfView &x = args->in[0], &noise = args->in[1], &y = args->out[0];
  PF_TRY(NeedFloat(args, "renoise", "x", x));
  PF_TRY(NeedFloat(args, "renoise", "noise", noise));
  PF_TRY(NeedFloat(args, "renoise", "y", y));
  if (PfCount(y) == 0) return PF_OK;
  const RenoiseParams& p = PfParams<RenoiseParams>(args);
  const RenoiseCall call = {ArrayOf(x),
                            ArrayOf(noise),
                            ArrayOf(y),
                            MakePhiloxKey(&p.seed_lo),
                            MakeBlockCovariance(p.gamma),
                            static_cast<float>(p.alpha),
                            static_cast<float>(p.beta),
                            PfCount(y) / 4,
                            y.dims[y.rank - 1] / 2};
  if (call.w % 2 == 0 && Packs(call.x) && Packs(call.noise) && Packs(call.y))
    return Launch(args, &RenoisePairs, PairGrid(call.n, 2), kElementThreads, 0, call);
  return Launch(args, &RenoiseBlocks, PairGrid(call.n, 1), kElementThreads, 0, call);
}
