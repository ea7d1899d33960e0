#include "backends/cuda/elementwise.h"
#include "ops/embedding/embedding.h"

namespace {

// N divides d, so that no pack leaves its row.
template <int N>
__global__ void __launch_bounds__(kElementThreads)
    LookUp(FloatArray table, const int32_t* index, FloatArray y, EmbeddingShape s, int32_t* faults) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x) * N;
  if (at >= s.rows * s.d) return;
  const int64_t row = index[at / s.d];
  float values[N] = {};
  if (row >= 0 && row < s.vocabulary)
    ReadPack<N>(table, row * s.d + at % s.d, values);
  else
    *faults = kFaultEmbedding;
  WritePack<N>(y, at, values);
}

// The block of the first of equal indices adds all of them, in order of n; the others have nothing to do.
__global__ void __launch_bounds__(kElementThreads)
    Gather(const int32_t* index, FloatArray dy, float* table, EmbeddingShape s, int32_t* faults) {
  const int64_t n = blockIdx.x;
  const int32_t row = index[n];
  int seen = 0;
  for (int64_t m = threadIdx.x; m < n; m += kElementThreads) seen |= index[m] == row;
  if (__syncthreads_or(seen)) return;
  if (row < 0 || row >= s.vocabulary) {
    *faults = kFaultEmbedding;
    return;
  }
  for (int64_t i = threadIdx.x; i < s.d; i += kElementThreads) {
    float sum = table[row * s.d + i];
    for (int64_t m = n; m < s.rows; ++m)
      if (index[m] == row) sum += ReadOne(dy, m * s.d + i);
    table[row * s.d + i] = sum;
  }
}

}  // namespace

int32_t pf_cuda_embedding(const PfArgs* a) {
  EmbeddingShape s;
  PF_TRY(EmbeddingCheck(a, &s));
  const PfView &table = a->in[0], &y = a->out[0];
  PF_TRY(NeedFloat(a, "embedding", "table", table));
  PF_TRY(NeedFloat(a, "embedding", "y", y));
  if (s.rows * s.d == 0) return PF_OK;
  const FloatArray from = ArrayOf(table), to = ArrayOf(y);
  const bool packs = s.d % 8 == 0 && Packs(from) && Packs(to);
  const int64_t per_block = static_cast<int64_t>(kElementThreads) * (packs ? 8 : 1);
  return Launch(a, packs ? &LookUp<8> : &LookUp<1>,
                dim3(static_cast<unsigned>(CeilDiv(s.rows * s.d, per_block))), kElementThreads, 0, from,
                PfData<int32_t>(a->in[1]), to, s, Faults(a));
}

int32_t pf_cuda_embedding_backward(const PfArgs* a) {
  EmbeddingShape s;
  PF_TRY(EmbeddingBackwardCheck(a, &s));
  PF_TRY(NeedFloat(a, "embedding_backward", "dy", a->in[1]));
  if (a->out[0].dtype != PF_F32) return Fail(a, PF_ERR_DTYPE, "embedding_backward: expected dtable as f32");
  float* const table = PfData<float>(a->out[0]);
  if (!PfParams<EmbeddingBackwardParams>(a).accumulate)
    PF_TRY(DeviceZero(a, table, s.vocabulary * s.d * sizeof(float)));
  if (s.rows * s.d == 0) return PF_OK;
  return Launch(a, &Gather, dim3(static_cast<unsigned>(s.rows)), kElementThreads, 0,
                PfData<int32_t>(a->in[0]), ArrayOf(a->in[1]), table, s, Faults(a));
}
