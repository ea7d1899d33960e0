// Sums of [outer, count, inner] over count, in double and in a fixed order: chunks of rows first, their
// partial sums then. Sizes of chunks depend on the shape alone.
#pragma once
#include "backends/cuda/elementwise.h"

constexpr int kSumThreads = 256;

struct SumShape {
  int64_t outer, count, inner;
  int64_t chunk;   // rows that a block adds
  int64_t chunks;  // of each outer
  int columns;     // neighbouring columns that a block takes; its other threads take other rows
  int64_t tiles;   // of columns
};
static inline SumShape MakeSumShape(int64_t outer, int64_t count, int64_t inner, bool whole) {
  SumShape s = {outer, count, inner, count, 1, 0, 0};
  s.columns = static_cast<int>(inner < kSumThreads ? inner : kSumThreads);
  s.tiles = CeilDiv(inner, s.columns);
  if (!whole) s.chunk = kSumThreads / s.columns * int64_t{32};
  s.chunks = count > s.chunk ? CeilDiv(count, s.chunk) : 1;
  return s;
}

// term(outer, row, column) is a double; put(flat index of [outer, chunks, inner], sum).
template <class Term, class Put>
__global__ void __launch_bounds__(kSumThreads) SumKernel(SumShape s, Term term, Put put) {
  __shared__ double partial[kSumThreads];
  int64_t rest = blockIdx.x;
  const int64_t tile = rest % s.tiles;
  rest /= s.tiles;
  const int64_t part = rest % s.chunks, outer = rest / s.chunks;
  const int lanes = kSumThreads / s.columns, lane = threadIdx.x / s.columns;
  const int64_t column = tile * s.columns + threadIdx.x % s.columns;
  const int64_t end = s.count < (part + 1) * s.chunk ? s.count : (part + 1) * s.chunk;
  double sum = 0;
  if (lane < lanes && column < s.inner) {
#pragma unroll 8
    for (int64_t row = part * s.chunk + lane; row < end; row += lanes) sum += term(outer, row, column);
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (lane != 0 || column >= s.inner) return;
  for (int k = 1; k < lanes; ++k) sum += partial[k * s.columns + threadIdx.x];
  put((outer * s.chunks + part) * s.inner + column, sum);
}

struct StoredTerm {
  const double* from;
  int64_t count, inner;
  __device__ double operator()(int64_t outer, int64_t row, int64_t column) const {
    return from[(outer * count + row) * inner + column];
  }
};
struct StorePartial {
  double* to;
  __device__ void operator()(int64_t i, double sum) const { to[i] = sum; }
};

// put(flat index of [outer, inner], sum) for every sum.
template <class Term, class Put>
int32_t Sums(const PfArgs* a, int64_t outer, int64_t count, int64_t inner, Term term, Put put) {
  if (outer * inner == 0) return PF_OK;
  const auto run = [&](const SumShape& s, auto terms, auto puts) {
    return Launch(a, &SumKernel<decltype(terms), decltype(puts)>,
                  dim3(static_cast<unsigned>(s.outer * s.chunks * s.tiles)), kSumThreads, 0, s, terms, puts);
  };
  const SumShape first = MakeSumShape(outer, count, inner, false);
  if (first.chunks == 1) return run(first, term, put);
  auto* const partial = static_cast<double*>(DeviceScratch(a, outer * first.chunks * inner * sizeof(double)));
  if (!partial) return Fail(a, PF_ERR_MEMORY, "no scratch memory for a sum of %lld rows", (long long)count);
  PF_TRY(run(first, term, StorePartial{partial}));
  return run(MakeSumShape(outer, first.chunks, inner, true), StoredTerm{partial, first.chunks, inner}, put);
}
