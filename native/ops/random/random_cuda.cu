#include "backends/cuda/elementwise.h"
#include "ops/random/random.h"

namespace {

struct NormalNumbers {
  float mean, deviation;
  __device__ void operator()(const PhiloxKey& key, int64_t block, float* y) const {
    PhiloxNormals(key, block, y);
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = ScalarLanes::Add(mean, ScalarLanes::Mul(deviation, y[i]));
  }
};

struct UniformNumbers {
  float low, range, limit;
  __device__ void operator()(const PhiloxKey& key, int64_t block, float* y) const {
    uint32_t words[4];
    PhiloxWords(key, block, words);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float u = ScalarLanes::Add(low, ScalarLanes::Mul(range, UnitUniform<ScalarLanes>(words[i])));
      y[i] = u < limit ? u : limit;
    }
  }
};

// A thread draws one Philox block: four numbers.
template <class Numbers>
__global__ void __launch_bounds__(kElementThreads)
    RandomKernel(FloatArray y, int64_t n, bool packs, PhiloxKey key, Numbers numbers) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x, at = 4 * block;
  if (at >= n) return;
  float values[4];
  numbers(key, block, values);
  if (packs && at + 4 <= n) {
    WritePack<4>(y, at, values);
    return;
  }
  for (int i = 0; i < 4 && at + i < n; ++i) WriteOne(y, at + i, values[i]);
}

template <class Numbers>
int32_t Draw(const PfArgs* a, const char* op, const Numbers& numbers) {
  const PfView& y = a->out[0];
  PF_TRY(NeedFloat(a, op, "y", y));
  const int64_t n = PfCount(y);
  if (n == 0) return PF_OK;
  const PhiloxKey key = MakePhiloxKey(&PfParams<RandomParams>(a).seed_lo);
  const dim3 grid(static_cast<unsigned>(CeilDiv(n, 4 * kElementThreads)));
  return Launch(a, &RandomKernel<Numbers>, grid, kElementThreads, 0, ArrayOf(y), n, Packs(ArrayOf(y)), key,
                numbers);
}

}  // namespace

int32_t pf_cuda_random_normal(const PfArgs* a) {
  const RandomParams& p = PfParams<RandomParams>(a);
  return Draw(a, "random_normal", NormalNumbers{static_cast<float>(p.first), static_cast<float>(p.second)});
}

int32_t pf_cuda_random_uniform(const PfArgs* a) {
  const RandomParams& p = PfParams<RandomParams>(a);
  const float low = static_cast<float>(p.first), high = static_cast<float>(p.second);
  return Draw(a, "random_uniform", UniformNumbers{low, high - low, UniformLimit(low, high)});
}
