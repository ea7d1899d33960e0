// The backward pass of bf16 operands: one kernel whose rows are queries gives dq, one whose rows are keys
// gives dk and dv. Both compute the logits again, so no sum is shared between blocks and the order of all
// additions is fixed.
#pragma once
#include "ops/attention/attention_mma.cuh"

namespace {

// With queries as rows: rows q, do; columns k, v. With keys as rows: rows k, v; columns q, do.
template <int D, int M, int Warps, int Step, bool KeyRows>
struct BackwardPlan {
  static constexpr int kD = D, kM = M, kStep = Step;
  static constexpr bool kKeyRows = KeyRows;
  static constexpr int kThreads = 32 * Warps, kRows = 16 * kM * Warps, kTile = 64, kChunks = kD / 8;
  static constexpr int kOwnBytes = kRows * kD * 2, kTileBytes = kTile * kD * 2;
  static constexpr int kWords = 4 * kTile;  // segment, order, lse and delta of the columns
  static constexpr int kStageBytes = 2 * kTileBytes + kWords * 4;
  static constexpr size_t kShared = 2 * kOwnBytes + 2 * kStageBytes + Warps * sizeof(MaskBounds);
};

struct BackwardCall {
  Rows<Bf16> own[2], other[2];
  Mask mask;
  RowSums sums;  // lse times log2(e)
  int heads, own_length, other_length, chunks, blocks;
  float unit, scale;  // scale log2(e), scale
  OutRows to[2];      // dq; dk, dv
};

template <class Plan>
__global__ void __launch_bounds__(Plan::kThreads) BackwardMmaKernel(BackwardCall call) {
  constexpr bool kKeyRows = Plan::kKeyRows;
  constexpr int kM = Plan::kM, kRows = Plan::kRows, kTile = Plan::kTile, kStep = Plan::kStep;
  constexpr int kThreads = Plan::kThreads, kChunks = Plan::kChunks, kK16 = Plan::kD / 16;
  constexpr int kN = kStep / 8, kOutN = Plan::kD / 8;
  PF_DYNAMIC_SHARED(shared);
  unsigned char* const stages = shared + 2 * Plan::kOwnBytes;

  const int pair = blockIdx.x / call.blocks, batch = pair / call.heads, head = pair % call.heads;
  const int index = static_cast<int>(blockIdx.x % call.blocks);
  // Blocks that tend to meet most come first: late queries, early keys.
  const int first = (kKeyRows ? index : call.blocks - 1 - index) * kRows;
  const Bf16* other[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) other[i] = call.other[i].Head(batch, head, call.other_length);
  const int lq = kKeyRows ? call.other_length : call.own_length;
  const float* lse = call.sums.lse + static_cast<int64_t>(pair) * lq;
  const float* delta = call.sums.delta + static_cast<int64_t>(pair) * lq;
  const Mask mask = call.mask.Batch(batch);
  const int row = threadIdx.x / 32 * 16 * kM, lane_at = LaneAt(), t = threadIdx.x % 4;
  const WarpMask<kM, !kKeyRows> own = {
      mask, first + row, call.own_length, call.other_length,
      reinterpret_cast<MaskBounds*>(stages + 2 * Plan::kStageBytes) + threadIdx.x / 32};
  own.FindBounds();

  const auto copy_stage = [&](int tile, int stage) {
    unsigned char* to = stages + stage * Plan::kStageBytes;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      CopyTile<kTile, kChunks, kThreads>(to + i * Plan::kTileBytes, other[i], call.other[i].token,
                                         tile * kTile, call.other_length, 0, call.chunks);
    int32_t* words = reinterpret_cast<int32_t*>(to + 2 * Plan::kTileBytes);
    if (mask.segment) {
      CopyWords<kTile, kThreads>(words, mask.segment, tile * kTile, call.other_length);
      CopyWords<kTile, kThreads>(words + kTile, mask.order, tile * kTile, call.other_length);
    }
    if (kKeyRows) {
      CopyWords<kTile, kThreads>(reinterpret_cast<float*>(words + 2 * kTile), lse, tile * kTile, lq);
      CopyWords<kTile, kThreads>(reinterpret_cast<float*>(words + 3 * kTile), delta, tile * kTile, lq);
    }
  };

  float row_lse[kM][2], row_delta[kM][2];
  if (!kKeyRows)
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = first + row + 16 * m + 8 * h + static_cast<int>(threadIdx.x % 32 / 4);
        row_lse[m][h] = i < lq ? lse[i] : 0;
        row_delta[m][h] = i < lq ? delta[i] : 0;
      }

  auto walk = TileWalk<!kKeyRows, kRows, kTile>::Over(mask, first, call.other_length);
  int tile = walk.Next(), stage = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i)
    CopyTile<kRows, kChunks, kThreads>(shared + i * Plan::kOwnBytes,
                                       call.own[i].Head(batch, head, call.own_length), call.own[i].token,
                                       first, call.own_length, 0, call.chunks);
  if (tile < walk.count()) copy_stage(tile, 0);
  CopyAsyncCommit();

  const auto rows_of = [&](int which) {
    return [&, which](int m, int k16, uint32_t(&r)[4]) {
      LdMatrix(r, shared + which * Plan::kOwnBytes + BlockAt<kRows>(lane_at, row + 16 * m, k16));
    };
  };
  constexpr int kOuts = kKeyRows ? 2 : 1;
  float acc[kOuts][kM][kOutN][4];
#pragma unroll
  for (int i = 0; i < kOuts; ++i) Clear(acc[i]);

  while (tile < walk.count()) {
    const int next = walk.Next();
    if (next < walk.count()) copy_stage(next, stage ^ 1);
    CopyAsyncCommit();
    CopyAsyncWait<1>();
    __syncthreads();
    const unsigned char *b0 = stages + stage * Plan::kStageBytes, *b1 = b0 + Plan::kTileBytes;
    const int32_t* words = reinterpret_cast<const int32_t*>(b1 + Plan::kTileBytes);
    const float* column_lse = reinterpret_cast<const float*>(words + 2 * kTile);
    const float* column_delta = column_lse + kTile;
    const Visibility see = own.Look(tile * kTile, kTile);
    // A loop, not unrolled: it is long enough.
#pragma unroll 1
    for (int step = 0; see != kNothing && step < kTile; step += kStep) {
      float s[kM][kN][4];
      Clear(s);
      MultiplyRows<kK16, kStep / 16, kTile>(s, rows_of(0), b0, step, lane_at);
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float of_column = kKeyRows ? column_lse[step + 8 * n + 2 * t + c] : 0;
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              float& p = s[m][n][2 * h + c];
              p = Exp2(fmaf(p, call.unit, -(kKeyRows ? of_column : row_lse[m][h])));
            }
        }
      if (see == kSome)
        own.Hide(s, 0, words + step, words + kTile + step, call.other_length - tile * kTile - step);
      if constexpr (kKeyRows) MultiplyColumns<kStep / 16, kOutN / 2, kTile>(acc[1], s, b1, step, 0, lane_at);
      float dp[kM][kN][4];
      Clear(dp);
      MultiplyRows<kK16, kStep / 16, kTile>(dp, rows_of(1), b1, step, lane_at);
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float of_column = kKeyRows ? column_delta[step + 8 * n + 2 * t + c] : 0;
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h)
              s[m][n][2 * h + c] *= dp[m][n][2 * h + c] - (kKeyRows ? of_column : row_delta[m][h]);
        }
      MultiplyColumns<kStep / 16, kOutN / 2, kTile>(acc[0], s, b0, step, 0, lane_at);
    }
    __syncthreads();
    tile = next;
    stage ^= 1;
  }
  CopyAsyncWait<0>();  // without a tile nobody has waited for the rows yet
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kOuts; ++i) {
    const int64_t at = (static_cast<int64_t>(batch) * call.own_length + first) * call.to[i].token +
                       static_cast<int64_t>(head) * call.to[i].d;
    StoreRows<kRows>(acc[i], shared + i * Plan::kOwnBytes, row, call.own_length - first, 0, call.to[i], at,
                     [&](int, int) { return i == 0 ? call.scale : 1.0f; });
  }
}

template <class Plan>
int32_t LaunchBackwardMma(const PfArgs* a, const AttentionShape& s, BackwardCall call) {
  call.blocks = static_cast<int>(CeilDiv(call.own_length, Plan::kRows));
  const int64_t grid = s.batch * s.heads * call.blocks;
  if (grid == 0) return PF_OK;
  return Launch(a, &BackwardMmaKernel<Plan>, dim3(static_cast<unsigned>(grid)), Plan::kThreads, Plan::kShared,
                call);
}

constexpr int kMostBackwardMma = 128;

struct BackwardCalls {
  BackwardCall of_queries, of_keys;
};
inline int32_t MakeBackwardCalls(const PfArgs* a, const AttentionShape& s, const Mask& mask,
                                 BackwardCalls* calls) {
  Rows<Bf16> q, k, v, dout;
  PF_TRY(MakeRows(a, a->in[0], nullptr, &q));
  PF_TRY(MakeRows(a, a->in[1], nullptr, &k));
  PF_TRY(MakeRows(a, a->in[2], nullptr, &v));
  PF_TRY(MakeRows(a, a->in[7], nullptr, &dout));
  BackwardCall &of_queries = calls->of_queries, &of_keys = calls->of_keys;
  of_queries.mask = mask;
  PF_TRY(MakeSums(a, s, kLog2E, &of_queries.sums));
  of_queries.heads = static_cast<int>(s.heads);
  of_queries.chunks = static_cast<int>(CeilDiv(s.d, 8));
  of_queries.scale = static_cast<float>(PfParams<AttentionParams>(a).scale);
  of_queries.unit = of_queries.scale * kLog2E;
  of_keys = of_queries;
  of_queries.own[0] = of_keys.other[0] = q;
  of_queries.own[1] = of_keys.other[1] = dout;
  of_queries.other[0] = of_keys.own[0] = k;
  of_queries.other[1] = of_keys.own[1] = v;
  of_queries.own_length = of_keys.other_length = static_cast<int>(s.lq);
  of_queries.other_length = of_keys.own_length = static_cast<int>(s.lk);
  of_queries.to[0] = MakeOutRows(a->out[0]);
  of_keys.to[0] = MakeOutRows(a->out[1]);
  of_keys.to[1] = MakeOutRows(a->out[2]);
  return PF_OK;
}

template <class OfQueries, class OfKeys>
int32_t LaunchBackwardMma(const PfArgs* a, const AttentionShape& s, const BackwardCalls& calls) {
  PF_TRY(LaunchBackwardMma<OfQueries>(a, s, calls.of_queries));
  return LaunchBackwardMma<OfKeys>(a, s, calls.of_keys);
}

inline int32_t BackwardMma(const PfArgs* a, const AttentionShape& s, const BackwardCalls& calls) {
  if (s.d <= 64)
    return LaunchBackwardMma<BackwardPlan<64, 2, 4, 32, false>, BackwardPlan<64, 2, 4, 32, true>>(a, s,
                                                                                                  calls);
  typedef BackwardPlan<128, 1, 8, 64, false> Wide;
  if (Wide::kShared <= MostShared())
    return LaunchBackwardMma<Wide, BackwardPlan<128, 1, 8, 32, true>>(a, s, calls);
  return LaunchBackwardMma<BackwardPlan<128, 1, 4, 64, false>, BackwardPlan<128, 1, 4, 32, true>>(a, s,
                                                                                                  calls);
}

}  // namespace
