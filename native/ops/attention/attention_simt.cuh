// Attention in f32 without tensor cores, forward and backward, for heads of any width: 64 rows by 64 columns
// of logits in the registers of 256 threads, everything else in stages of 64 rows by 64 elements that arrive
// while the one before is worked on.
#pragma once
#include "ops/attention/attention_tile.cuh"

namespace {

constexpr int kSide = kBoundsTile, kSimtThreads = 256, kStageBytes = kSide * kSide * 4;

// kForward and kQueries have queries as rows (q; q, do) and keys as columns (k, v); kKeys has k, v as rows
// and q, do as columns.
enum class Pass { kForward, kQueries, kKeys };

struct SimtCall {
  Rows<float> own[2], other[2];
  Mask mask;
  RowSums sums;
  int heads, own_length, other_length, d, blocks;
  float scale;
  FloatArray to[2];  // o; dq; dk, dv
  float* lse;        // what the forward pass writes
};

template <Pass kPass, int kOut>
struct SimtPlan {
  static constexpr int kDots = kPass == Pass::kForward ? 1 : 2, kSums = kPass == Pass::kKeys ? 2 : 1;
  static constexpr int kBlocks = kSums * kOut <= 128 ? 2 : 1;  // on one multiprocessor
  static constexpr size_t kShared = 5 * kStageBytes + 4 * kSide * sizeof(float);
};

// Thread (y, x) has rows y + 16 i and, of logits, columns x + 16 j.
__device__ __forceinline__ void DotStage(float (&s)[4][4], const unsigned char* rows,
                                         const unsigned char* columns, int y, int x) {
#pragma unroll 1
  for (int c = 0; c < kSide / 4; ++c) {
    float4 a[4], b[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = *reinterpret_cast<const float4*>(rows + ChunkAt<kSide>(y + 16 * i, c));
      b[i] = *reinterpret_cast<const float4*>(columns + ChunkAt<kSide>(x + 16 * i, c));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        s[i][j] = fmaf(a[i].x, b[j].x, s[i][j]);
        s[i][j] = fmaf(a[i].y, b[j].y, s[i][j]);
        s[i][j] = fmaf(a[i].z, b[j].z, s[i][j]);
        s[i][j] = fmaf(a[i].w, b[j].w, s[i][j]);
      }
  }
}
// acc[i][c] += weights of row y + 16 i times columns 4 x + c of the stage.
__device__ __forceinline__ void SumStage(float (&acc)[4][4], const unsigned char* weights,
                                         const unsigned char* stage, int y, int x) {
#pragma unroll 1
  for (int c = 0; c < kSide / 4; ++c) {
    float4 p[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      p[i] = *reinterpret_cast<const float4*>(weights + ChunkAt<kSide>(y + 16 * i, c));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float4 v = *reinterpret_cast<const float4*>(stage + ChunkAt<kSide>(4 * c + k, x));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float w = k == 0 ? p[i].x : k == 1 ? p[i].y : k == 2 ? p[i].z : p[i].w;
        acc[i][0] = fmaf(w, v.x, acc[i][0]);
        acc[i][1] = fmaf(w, v.y, acc[i][1]);
        acc[i][2] = fmaf(w, v.z, acc[i][2]);
        acc[i][3] = fmaf(w, v.w, acc[i][3]);
      }
    }
  }
}
__device__ __forceinline__ void StoreWeights(const float (&s)[4][4], unsigned char* weights, int y, int x) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = x + 16 * j;
      reinterpret_cast<float*>(weights + ChunkAt<kSide>(y + 16 * i, column / 4))[column % 4] = s[i][j];
    }
}
// Over the 16 threads of a row.
__device__ __forceinline__ float RowMax(float x) {
#pragma unroll
  for (int bits = 8; bits > 0; bits >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, bits));
  return x;
}

template <Pass kPass, int kOut>
__global__ void __launch_bounds__(kSimtThreads, SimtPlan<kPass, kOut>::kBlocks) SimtKernel(SimtCall call) {
  using Plan = SimtPlan<kPass, kOut>;
  constexpr bool kForward = kPass == Pass::kForward, kKeyRows = kPass == Pass::kKeys;
  constexpr int kDots = Plan::kDots, kSums = Plan::kSums, kColumns = kOut / kSide;
  PF_DYNAMIC_SHARED(shared);
  unsigned char* const weights = shared + 4 * kStageBytes;
  int32_t* const column_segment = reinterpret_cast<int32_t*>(weights + kStageBytes);
  int32_t* const column_order = column_segment + kSide;
  float* const column_lse = reinterpret_cast<float*>(column_order + kSide);
  float* const column_delta = column_lse + kSide;

  const int pair = blockIdx.x / call.blocks, batch = pair / call.heads, head = pair % call.heads;
  const int index = static_cast<int>(blockIdx.x % call.blocks);
  const int first = (kKeyRows ? index : call.blocks - 1 - index) * kSide;
  const int y = threadIdx.x / 16, x = threadIdx.x % 16;
  const int lq = kKeyRows ? call.other_length : call.own_length;
  const float* lse = call.sums.lse + static_cast<int64_t>(pair) * lq;
  const float* delta = call.sums.delta + static_cast<int64_t>(pair) * lq;
  const Mask mask = call.mask.Batch(batch);
  const float *own[kDots], *other[2];
#pragma unroll
  for (int i = 0; i < kDots; ++i) own[i] = call.own[i].Head(batch, head, call.own_length);
#pragma unroll
  for (int i = 0; i < 2; ++i) other[i] = call.other[i].Head(batch, head, call.other_length);

  // A tile's parts, one stage each: kDots products over `inner` stretches of 64 elements, then kSums sums
  // over `outer` stretches of the columns that this block writes.
  const int column0 = static_cast<int>(blockIdx.y) * kOut, chunks = (call.d + 3) / 4;
  const int inner = call.d > kSide ? (call.d + kSide - 1) / kSide : 1;
  const int outer_left = (call.d - column0 + kSide - 1) / kSide;
  const int outer = outer_left < 1 ? 1 : outer_left < kColumns ? outer_left : kColumns;
  const int parts = kDots * inner + kSums * outer;
  const auto copy_part = [&](int tile, int part, unsigned char* to) {
    if (part < kDots * inner) {
      const int which = part / inner, chunk0 = part % inner * (kSide / 4);
      const bool second = kDots == 2 && which == 1;
      CopyTile<kSide, kSide / 4, kSimtThreads>(to, second ? own[kDots - 1] : own[0],
                                               call.own[second ? 1 : 0].token, first, call.own_length, chunk0,
                                               chunks);
      CopyTile<kSide, kSide / 4, kSimtThreads>(to + kStageBytes, other[second ? 1 : 0],
                                               call.other[second ? 1 : 0].token, tile * kSide,
                                               call.other_length, chunk0, chunks);
    } else {
      const int sum = part - kDots * inner, which = kForward || (kKeyRows && sum < outer) ? 1 : 0;
      CopyTile<kSide, kSide / 4, kSimtThreads>(to, other[which], call.other[which].token, tile * kSide,
                                               call.other_length, (column0 + sum % outer * kSide) / 4,
                                               chunks);
    }
    if (part == 0) {
      if (mask.segment) {
        CopyWords<kSide, kSimtThreads>(column_segment, mask.segment, tile * kSide, call.other_length);
        CopyWords<kSide, kSimtThreads>(column_order, mask.order, tile * kSide, call.other_length);
      }
      if (kKeyRows) {
        CopyWords<kSide, kSimtThreads>(column_lse, lse, tile * kSide, lq);
        CopyWords<kSide, kSimtThreads>(column_delta, delta, tile * kSide, lq);
      }
    }
  };

  float top[4], sum[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) top[i] = -INFINITY;
  // Which logits are hidden, a bit for each; rows' mask values are read only where a tile is not seen as a
  // whole.
  const auto find_hidden = [&](int tile) {
    const int left = call.other_length - tile * kSide;
    if (left >= kSide &&
        (!mask.segment || SeeTile<!kKeyRows>(mask.bounds[first / kSide], mask.bounds[tile]) == kAll))
      return 0;
    int bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first + y + 16 * i, at = row < call.own_length ? row : call.own_length - 1;
      const int32_t segment = mask.segment ? mask.segment[at] : 0, order = mask.segment ? mask.order[at] : 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = x + 16 * j;
        const bool seen =
            column < left &&
            (!mask.segment || Seen<!kKeyRows>(segment, order, column_segment[column], column_order[column]));
        if (!seen) bits |= 1 << (4 * i + j);
      }
    }
    return bits;
  };

  float acc[kSums][kColumns][4][4] = {}, s[4][4], dp[4][4];
  auto walk = TileWalk<!kKeyRows, kSide, kSide>::Over(mask, first, call.other_length);
  int tile = walk.Next(), part = 0, stage = 0;
  if (tile < walk.count()) copy_part(tile, 0, shared);
  CopyAsyncCommit();
  while (tile < walk.count()) {
    const bool last = part == parts - 1;
    const int next_tile = last ? walk.Next() : tile, next_part = last ? 0 : part + 1;
    if (next_tile < walk.count()) copy_part(next_tile, next_part, shared + (stage ^ 1) * 2 * kStageBytes);
    CopyAsyncCommit();
    CopyAsyncWait<1>();
    __syncthreads();
    const unsigned char* at = shared + stage * 2 * kStageBytes;

    if (part < inner) {
      if (part == 0)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) s[i][j] = dp[i][j] = 0;
      DotStage(s, at, at + kStageBytes, y, x);
    } else if (kDots == 2 && part < 2 * inner) {
      DotStage(dp, at, at + kStageBytes, y, x);
    } else {
      const int of = part - kDots * inner;
#pragma unroll
      for (int k = 0; k < kSums; ++k)
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
          if (of == (kSums - 1 - k) * outer + c && c < outer) SumStage(acc[k][c], weights, at, y, x);
    }

    if (part == kDots * inner - 1) {
      const int hidden = find_hidden(tile);
      if (kForward) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float most = top[i];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            s[i][j] = hidden >> (4 * i + j) & 1 ? -INFINITY : s[i][j] * call.scale;
            most = fmaxf(most, s[i][j]);
          }
          most = RowMax(most);
          const float zero = most == -INFINITY ? 0 : most, shrink = expf(top[i] - zero);
          top[i] = most;
          sum[i] *= shrink;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            s[i][j] = expf(s[i][j] - zero);
            sum[i] += s[i][j];
          }
#pragma unroll
          for (int c = 0; c < kColumns; ++c)
#pragma unroll
            for (int j = 0; j < 4; ++j) acc[0][c][i][j] *= shrink;
        }
        StoreWeights(s, weights, y, x);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = first + y + 16 * i, of_row = row < call.own_length ? row : call.own_length - 1;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float l = kKeyRows ? column_lse[x + 16 * j] : lse[of_row];
            const float d = kKeyRows ? column_delta[x + 16 * j] : delta[of_row];
            s[i][j] = hidden >> (4 * i + j) & 1 ? 0 : expf(fmaf(s[i][j], call.scale, -l));
            dp[i][j] = s[i][j] * (dp[i][j] - d);
          }
        }
        StoreWeights(kKeyRows ? s : dp, weights, y, x);
      }
    }
    if (kKeyRows && part == kDots * inner + outer - 1) {
      __syncthreads();  // the sums with p are done
      StoreWeights(dp, weights, y, x);
    }
    __syncthreads();
    tile = next_tile;
    part = next_part;
    stage ^= 1;
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = first + y + 16 * i;
    float factor = call.scale;
    if (kForward) {
#pragma unroll
      for (int bits = 8; bits > 0; bits >>= 1) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], bits);
      factor = sum[i] == 0 ? 0 : 1 / sum[i];
    }
    if (row >= call.own_length) continue;
    if (kForward && call.lse && x == 0 && blockIdx.y == 0)
      call.lse[static_cast<int64_t>(pair) * call.own_length + row] =
          sum[i] == 0 ? -INFINITY : top[i] + logf(sum[i]);
    const int64_t to = ((static_cast<int64_t>(batch) * call.own_length + row) * call.heads + head) * call.d;
#pragma unroll
    for (int k = 0; k < kSums; ++k)
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int column = column0 + c * kSide + 4 * x + j;
          if (column < call.d) WriteOne(call.to[k], to + column, acc[k][c][i][j] * (k == 0 ? factor : 1));
        }
  }
}

template <Pass kPass, int kOut>
int32_t LaunchSimt(const PfArgs* a, const AttentionShape& s, SimtCall call) {
  call.blocks = static_cast<int>(CeilDiv(call.own_length, kSide));
  const int64_t grid = s.batch * s.heads * call.blocks, parts = s.d > kOut ? CeilDiv(s.d, kOut) : 1;
  if (grid == 0) return PF_OK;
  return Launch(a, &SimtKernel<kPass, kOut>, dim3(static_cast<unsigned>(grid), static_cast<unsigned>(parts)),
                kSimtThreads, SimtPlan<kPass, kOut>::kShared, call);
}
// Wider outputs than kMost are left to several blocks, which compute the same logits.
template <Pass kPass, int kMost>
int32_t LaunchSimtUpTo(const PfArgs* a, const AttentionShape& s, const SimtCall& call) {
  return s.d <= 64    ? LaunchSimt<kPass, 64>(a, s, call)
         : s.d <= 128 ? LaunchSimt<kPass, 128>(a, s, call)
                      : LaunchSimt<kPass, kMost>(a, s, call);
}

inline SimtCall MakeSimtCall(const PfArgs* a, const AttentionShape& s, const Mask& mask) {
  SimtCall call{};
  call.mask = mask;
  call.heads = static_cast<int>(s.heads);
  call.own_length = static_cast<int>(s.lq);
  call.other_length = static_cast<int>(s.lk);
  call.d = static_cast<int>(s.d);
  call.scale = static_cast<float>(PfParams<AttentionParams>(a).scale);
  call.to[0] = ArrayOf(a->out[0]);
  return call;
}

inline int32_t ForwardSimt(const PfArgs* a, const AttentionShape& s, const RowTurn* turns, const Mask& mask) {
  SimtCall call = MakeSimtCall(a, s, mask);
  PF_TRY(MakeRows(a, a->in[0], turns, &call.own[0]));
  PF_TRY(MakeRows(a, a->in[1], turns ? turns + 1 : nullptr, &call.other[0]));
  PF_TRY(MakeRows(a, a->in[2], nullptr, &call.other[1]));
  call.lse = PfData<float>(a->out[1]);
  return LaunchSimtUpTo<Pass::kForward, 512>(a, s, call);
}

inline int32_t BackwardSimt(const PfArgs* a, const AttentionShape& s, const Mask& mask) {
  SimtCall of_queries = MakeSimtCall(a, s, mask);
  PF_TRY(MakeSums(a, s, 1, &of_queries.sums));
  PF_TRY(MakeRows(a, a->in[0], nullptr, &of_queries.own[0]));
  PF_TRY(MakeRows(a, a->in[7], nullptr, &of_queries.own[1]));
  PF_TRY(MakeRows(a, a->in[1], nullptr, &of_queries.other[0]));
  PF_TRY(MakeRows(a, a->in[2], nullptr, &of_queries.other[1]));
  SimtCall of_keys = of_queries;
  for (int i = 0; i < 2; ++i) {
    of_keys.own[i] = of_queries.other[i];
    of_keys.other[i] = of_queries.own[i];
    of_keys.to[i] = ArrayOf(a->out[1 + i]);
  }
  of_keys.own_length = of_queries.other_length;
  of_keys.other_length = of_queries.own_length;
  PF_TRY((LaunchSimtUpTo<Pass::kQueries, 512>(a, s, of_queries)));
  return LaunchSimtUpTo<Pass::kKeys, 256>(a, s, of_keys);
}

}  // namespace
