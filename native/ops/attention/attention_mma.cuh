// Attention of bf16 operands on tensor cores (mma.sync), in the manner of FlashAttention-2: a block keeps
// some rows and walks over tiles of the other operand; logits never leave the registers, whose layout as a
// result is their layout as the left operand of the next product.
#pragma once
#include "ops/attention/attention_tile.cuh"

namespace {

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

// ldmatrix reads blocks of 16 x 16: lane i names row i % 16 and chunk i / 16. Blocks begin at multiples of 8
// rows, so that only the chunk is exchanged differently from one block of a panel to the next.
__device__ __forceinline__ int LaneAt() {
  const int lane = threadIdx.x % 32;
  return ChunkAt<0>(lane % 16, lane / 16);
}
template <int kRows>
__device__ __forceinline__ int BlockAt(int lane_at, int row, int column16) {
  return column16 / 4 * (kRows * 128) + row * 128 + (lane_at ^ (column16 % 4 << 5));
}

// acc += A B^T over kK16 * 16 columns, with A given as fragments by a(m, k16, fragment) and B the kN16 * 16
// rows from `row` on of a tile of kRows.
template <int kK16, int kN16, int kRows, int kM, class A>
__device__ __forceinline__ void MultiplyRows(float (&acc)[kM][2 * kN16][4], A a, const unsigned char* b,
                                             int row, int lane_at) {
#pragma unroll 1  // over panels: unrolled, it takes more registers than there are
  for (int k0 = 0; k0 < kK16; k0 += 4)
#pragma unroll
    for (int k = k0; k < k0 + 4; ++k) {
      uint32_t left[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) a(m, k, left[m]);
#pragma unroll
      for (int n = 0; n < kN16; ++n) {
        uint32_t r[4];
        LdMatrix(r, b + BlockAt<kRows>(lane_at, row + 16 * n, k));
        const uint32_t even[2] = {r[0], r[2]}, odd[2] = {r[1], r[3]};
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          MmaBf16(acc[m][2 * n], left[m], even);
          MmaBf16(acc[m][2 * n + 1], left[m], odd);
        }
      }
    }
}

// acc += p B: p as it left a product, rounded to bf16; B the kK16 * 16 rows from `row` on and the columns
// from column16 * 16 on of a tile.
template <int kK16, int kN16, int kRows, int kM>
__device__ __forceinline__ void MultiplyColumns(float (&acc)[kM][2 * kN16][4],
                                                const float (&p)[kM][2 * kK16][4], const unsigned char* b,
                                                int row, int column16, int lane_at) {
#pragma unroll
  for (int k = 0; k < kK16; ++k) {
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        left[m][i] = PackBf16(p[m][2 * k + i / 2][i % 2 * 2], p[m][2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
    for (int n = 0; n < kN16; ++n) {
      uint32_t r[4];
      LdMatrixTransposed(r, b + BlockAt<kRows>(lane_at, row + 16 * k, column16 + n));
      const uint32_t even[2] = {r[0], r[1]}, odd[2] = {r[2], r[3]};
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        MmaBf16(acc[m][2 * n], left[m], even);
        MmaBf16(acc[m][2 * n + 1], left[m], odd);
      }
    }
  }
}

template <int kM, int kN>
__device__ __forceinline__ void Clear(float (&acc)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] = 0;
}

// What a warp's rows, 16 kM from `first` on, meet. Their mask values are read where they are needed: tiles
// that are neither hidden nor seen as a whole are few, and registers are not.
template <int kM, bool kRowsAreQueries>
struct WarpMask {
  Mask mask;
  int first, length, columns;  // rows and columns that exist
  MaskBounds* bounds;          // of the rows, in shared memory

  // By every lane, and before a barrier.
  __device__ void FindBounds() const {
    if (!mask.segment) return;
    const int lane = threadIdx.x % 32;
    MaskBounds mine{};
    for (int i = lane % 16; i < 16 * kM; i += 16) {
      const int at = first + i < length ? first + i : length - 1;
      const MaskBounds one = {mask.segment[at], mask.segment[at], mask.order[at], mask.order[at]};
      mine = i < 16 ? one : Union(mine, one);
    }
    mine = WarpUnion(mine, 1);
    if (lane == 0) *bounds = mine;
  }
  // At columns [from, from + count), which lie in one tile of bounds.
  __device__ Visibility Look(int from, int count) const {
    const Visibility see =
        mask.segment ? SeeTile<kRowsAreQueries>(*bounds, mask.bounds[from / kBoundsTile]) : kAll;
    return see == kAll && from + count > columns ? kSome : see;
  }
  // Puts `value` where a row does not meet a column; the columns' mask values lie in shared memory, `left`
  // columns exist.
  template <int kN>
  __device__ void Hide(float (&acc)[kM][kN][4], float value, const int32_t* column_segment,
                       const int32_t* column_order, int left) const {
    const int lane = threadIdx.x % 32;
    int32_t segment[kM][2] = {}, order[kM][2] = {};
    if (mask.segment)
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = first + 16 * m + 8 * h + lane / 4, at = row < length ? row : length - 1;
          segment[m][h] = mask.segment[at];
          order[m][h] = mask.order[at];
        }
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = 8 * n + 2 * (lane % 4) + c;
        const int32_t s = mask.segment ? column_segment[column] : 0;
        const int32_t o = mask.segment ? column_order[column] : 0;
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            if (column >= left || !Seen<kRowsAreQueries>(segment[m][h], order[m][h], s, o))
              acc[m][n][2 * h + c] = value;
      }
  }
};

// Where a kernel's rows go: [B, length, H, D] of either dtype.
struct OutRows {
  FloatArray to;
  int64_t token;
  int d;
  bool packs;  // bf16 that may be written 16 bytes at a time
};
inline OutRows MakeOutRows(const PfView& v) {
  const bool packs = v.dtype == PF_BF16 && v.dims[3] % 8 == 0 && Aligned(v.data, 16);
  return {ArrayOf(v), v.dims[2] * v.dims[3], static_cast<int>(v.dims[3]), packs};
}

// Writes factor(m, h) * acc as rows [row, row + 16 kM) of the block whose first row begins at element `at`;
// `left` rows of the block exist. The same rows of `stage`, a tile of kRows, belong to this warp.
template <int kRows, int kM, int kN, class Factor>
__device__ __forceinline__ void StoreRows(const float (&acc)[kM][kN][4], unsigned char* stage, int row,
                                          int left, int column, const OutRows& out, int64_t at,
                                          Factor factor) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float f = factor(m, h);
      const int r = row + 16 * m + 8 * h + g;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const float x = acc[m][n][2 * h] * f, y = acc[m][n][2 * h + 1] * f;
        if (out.packs) {
          *reinterpret_cast<uint32_t*>(stage + ChunkAt<kRows>(r, column / 8 + n) + 4 * t) = PackBf16(x, y);
        } else if (r < left) {
          const int c = column + 8 * n + 2 * t;
          if (c < out.d) WriteOne(out.to, at + r * out.token + c, x);
          if (c + 1 < out.d) WriteOne(out.to, at + r * out.token + c + 1, y);
        }
      }
    }
  if (!out.packs) return;
  __syncwarp();
#pragma unroll 4
  for (int i = lane; i < 16 * kM * kN; i += 32) {
    const int r = row + i / kN, chunk = column / 8 + i % kN;
    if (r < left && chunk * 8 < out.d)
      *reinterpret_cast<uint4*>(static_cast<Bf16*>(out.to.data) + at + r * out.token + chunk * 8) =
          *reinterpret_cast<const uint4*>(stage + ChunkAt<kRows>(r, chunk));
  }
}

// Turns the logits of a warp's 16 rows into weights exp(unit' s - top), unit' in powers of two, and takes
// them into the rows' greatest logits and sums; what was summed before shrinks by `shrink`. Whether any did.
template <int kN>
__device__ __forceinline__ bool Weigh(float (&s)[kN][4], float unit, float (&top)[2], float (&sum)[2],
                                      float (&shrink)[2]) {
  bool grows = false;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float most = top[h];
#pragma unroll
    for (int n = 0; n < kN; ++n) most = fmaxf(most, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
    const float zero = most == -INFINITY ? 0 : most * unit;
    shrink[h] = Exp2(top[h] * unit - zero);
    grows |= most > top[h];
    top[h] = most;
    float add = 0;
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& p = s[n][2 * h + c];
        p = Exp2(fmaf(p, unit, -zero));
        add += p;
      }
    sum[h] = sum[h] * shrink[h] + add;
  }
  return grows;
}

// A warp has 16 kM queries and one of kSplit parts of the output's columns: warps that differ in the part
// compute the same logits, which costs less than rows of 512 sums per thread would.
template <int D, int M, int Keys, int Split>
struct ForwardPlan {
  static constexpr int kD = D, kM = M, kKeys = Keys, kSplit = Split;
  static constexpr int kRowWarps = 4, kThreads = 32 * kRowWarps * kSplit, kRows = 16 * kM * kRowWarps;
  static constexpr int kChunks = kD / 8, kOut = kD / kSplit;
  static constexpr int kQueryBytes = kRows * kD * 2, kKeyBytes = kKeys * kD * 2;
  static constexpr size_t kShared =
      kQueryBytes + 2 * kKeyBytes + 4 * kKeys * sizeof(int32_t) + kThreads / 32 * sizeof(MaskBounds);
  static constexpr bool kHold = kD == 64;  // the queries' fragments stay in registers
};

struct ForwardCall {
  Rows<Bf16> q, k, v;
  Mask mask;
  int heads, lq, lk, chunks, blocks;
  float unit;   // |scale| log2(e): weights are powers of two
  bool negate;  // scale < 0
  OutRows o;
  float* lse;
};

template <class Plan>
__global__ void __launch_bounds__(Plan::kThreads) ForwardMmaKernel(ForwardCall call) {
  constexpr int kM = Plan::kM, kKeys = Plan::kKeys, kRows = Plan::kRows, kK16 = Plan::kD / 16;
  constexpr int kThreads = Plan::kThreads, kChunks = Plan::kChunks, kN = kKeys / 8, kOutN = Plan::kOut / 8;
  PF_DYNAMIC_SHARED(shared);
  unsigned char *q_tile = shared, *k_tile = q_tile + Plan::kQueryBytes, *v_tile = k_tile + Plan::kKeyBytes;
  int32_t* mask_words = reinterpret_cast<int32_t*>(v_tile + Plan::kKeyBytes);  // of two tiles in turn

  const int pair = blockIdx.x / call.blocks, batch = pair / call.heads, head = pair % call.heads;
  // Later queries tend to see more keys: they come first.
  const int first = (call.blocks - 1 - static_cast<int>(blockIdx.x % call.blocks)) * kRows;
  const Bf16* q = call.q.Head(batch, head, call.lq);
  const Bf16* k = call.k.Head(batch, head, call.lk);
  const Bf16* v = call.v.Head(batch, head, call.lk);
  const Mask mask = call.mask.Batch(batch);
  const int warp = threadIdx.x / 32, row = warp % Plan::kRowWarps * 16 * kM, part = warp / Plan::kRowWarps;
  const int lane_at = LaneAt();
  const WarpMask<kM, true> own = {mask, first + row, call.lq, call.lk,
                                  reinterpret_cast<MaskBounds*>(mask_words + 4 * kKeys) + warp};
  own.FindBounds();

  const auto copy_keys = [&](int tile, int turn) {
    CopyTile<kKeys, kChunks, kThreads>(k_tile, k, call.k.token, tile * kKeys, call.lk, 0, call.chunks);
    if (mask.segment) {
      int32_t* words = mask_words + turn * 2 * kKeys;
      CopyWords<kKeys, kThreads>(words, mask.segment, tile * kKeys, call.lk);
      CopyWords<kKeys, kThreads>(words + kKeys, mask.order, tile * kKeys, call.lk);
    }
    CopyAsyncCommit();
  };

  auto walk = TileWalk<true, kRows, kKeys>::Over(mask, first, call.lk);
  int tile = walk.Next(), turn = 0;
  CopyTile<kRows, kChunks, kThreads>(q_tile, q, call.q.token, first, call.lq, 0, call.chunks);
  if (tile < walk.count()) copy_keys(tile, turn);
  CopyAsyncCommit();
  CopyAsyncWait<0>();
  __syncthreads();

  uint32_t held[kM][Plan::kHold ? kK16 : 1][4];
  if constexpr (Plan::kHold)
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int i = 0; i < kK16; ++i) LdMatrix(held[m][i], q_tile + BlockAt<kRows>(lane_at, row + 16 * m, i));
  const auto queries = [&](int m, int k16, uint32_t(&r)[4]) {
    if constexpr (Plan::kHold) {
#pragma unroll
      for (int i = 0; i < 4; ++i) r[i] = held[m][k16][i];
    } else {
      LdMatrix(r, q_tile + BlockAt<kRows>(lane_at, row + 16 * m, k16));
    }
  };

  float o[kM][kOutN][4], top[kM][2], sum[kM][2];
  Clear(o);
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) top[m][h] = -INFINITY, sum[m][h] = 0;

  // Keys and values have one buffer each: values arrive while logits are computed, the next keys while the
  // values are summed.
  while (tile < walk.count()) {
    const int next = walk.Next();
    CopyTile<kKeys, kChunks, kThreads>(v_tile, v, call.v.token, tile * kKeys, call.lk, 0, call.chunks);
    CopyAsyncCommit();
    const Visibility see = own.Look(tile * kKeys, kKeys);
    float s[kM][kN][4];
    if (see != kNothing) {
      Clear(s);
      MultiplyRows<kK16, kKeys / 16, kKeys>(s, queries, k_tile, 0, lane_at);
    }
    CopyAsyncWait<0>();
    __syncthreads();
    const int32_t* words = mask_words + turn * 2 * kKeys;
    if (next < walk.count()) copy_keys(next, turn ^ 1);
    if (see != kNothing) {
      if (call.negate)
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) s[m][n][i] = -s[m][n][i];
      if (see == kSome) own.Hide(s, -INFINITY, words, words + kKeys, call.lk - tile * kKeys);
      bool grows = false;
      float shrink[kM][2];
#pragma unroll
      for (int m = 0; m < kM; ++m) grows |= Weigh(s[m], call.unit, top[m], sum[m], shrink[m]);
      if (__any_sync(0xffffffffu, grows))
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int n = 0; n < kOutN; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) o[m][n][i] *= shrink[m][i / 2];
      MultiplyColumns<kKeys / 16, kOutN / 2, kKeys>(o, s, v_tile, 0, part * (Plan::kOut / 16), lane_at);
    }
    CopyAsyncWait<0>();
    __syncthreads();
    tile = next;
    turn ^= 1;
  }

#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[m][h] += __shfl_xor_sync(0xffffffffu, sum[m][h], 1);
      sum[m][h] += __shfl_xor_sync(0xffffffffu, sum[m][h], 2);
      const int i = first + row + 16 * m + 8 * h + static_cast<int>(threadIdx.x % 32 / 4);
      if (call.lse && part == 0 && threadIdx.x % 4 == 0 && i < call.lq)
        call.lse[static_cast<int64_t>(pair) * call.lq + i] =
            sum[m][h] == 0 ? -INFINITY : top[m][h] * call.unit * kLn2 + logf(sum[m][h]);
    }
  const int64_t at =
      (static_cast<int64_t>(batch) * call.lq + first) * call.o.token + static_cast<int64_t>(head) * call.o.d;
  // Warps of one row wrote their own columns only and read the queries before the last barrier.
  StoreRows<kRows>(o, q_tile, row, call.lq - first, part * Plan::kOut, call.o, at,
                   [&](int m, int h) { return sum[m][h] == 0 ? 0 : 1 / sum[m][h]; });
}

template <class Plan>
int32_t LaunchForwardMma(const PfArgs* a, const AttentionShape& s, ForwardCall call) {
  call.blocks = static_cast<int>(CeilDiv(s.lq, Plan::kRows));
  const int64_t grid = s.batch * s.heads * call.blocks;
  if (grid == 0) return PF_OK;
  return Launch(a, &ForwardMmaKernel<Plan>, dim3(static_cast<unsigned>(grid)), Plan::kThreads, Plan::kShared,
                call);
}

constexpr int kMostForwardMma = 512;

inline int32_t MakeForwardCall(const PfArgs* a, const AttentionShape& s, const RowTurn* turns,
                               const Mask& mask, ForwardCall* call) {
  PF_TRY(MakeRows(a, a->in[0], turns, &call->q));
  PF_TRY(MakeRows(a, a->in[1], turns ? turns + 1 : nullptr, &call->k));
  PF_TRY(MakeRows(a, a->in[2], nullptr, &call->v));
  const float scale = static_cast<float>(PfParams<AttentionParams>(a).scale);
  call->mask = mask;
  call->heads = static_cast<int>(s.heads);
  call->lq = static_cast<int>(s.lq);
  call->lk = static_cast<int>(s.lk);
  call->chunks = static_cast<int>(CeilDiv(s.d, 8));
  call->unit = fmaxf(fabsf(scale) * kLog2E, 1e-30f);  // hidden logits stay -inf at scale 0
  call->negate = scale < 0;
  call->o = MakeOutRows(a->out[0]);
  call->lse = PfData<float>(a->out[1]);
  return PF_OK;
}

inline int32_t ForwardMma(const PfArgs* a, const AttentionShape& s, const ForwardCall& call) {
  if (s.d <= 64) return LaunchForwardMma<ForwardPlan<64, 2, 64, 1>>(a, s, call);
  if (s.d <= 128) return LaunchForwardMma<ForwardPlan<128, 2, 32, 1>>(a, s, call);
  typedef ForwardPlan<512, 1, 32, 2> Wide;
  if (Wide::kShared <= MostShared()) return LaunchForwardMma<Wide>(a, s, call);
  return LaunchForwardMma<ForwardPlan<512, 1, 16, 2>>(a, s, call);
}

}  // namespace
