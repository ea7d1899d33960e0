// The backward pass for compute capability 9.0, in two kernels like attention_mma_backward.cuh: rows are
// queries for dq, keys for dk and dv. Weights and their gradients never leave the registers: they are left
// operands of the sums as they came out of the products before. While a tile's weights are computed, the
// tile before is summed, where there are registers for that: sums of 128 elements for keys and values take
// too many.
#pragma once
#include "ops/attention/attention_hopper.cuh"
#include "ops/attention/attention_mma_backward.cuh"

namespace {

template <int D, int Tile, int Stages, bool KeyRows>
struct HopperBackwardPlan {
  static constexpr int kD = D, kTile = Tile, kStages = Stages, kPanels = D / 64;
  static constexpr bool kKeyRows = KeyRows;
  static constexpr int kOuts = KeyRows ? 2 : 1;
  static constexpr bool kLater = kOuts * D <= 128;  // sums of a tile wait for the next one's products
  static constexpr int kOwnBytes = kGroupRows * D * 2, kTileBytes = kTile * D * 2, kWords = 4 * kTile;
  static constexpr int kStagesAt = 2 * kHopperGroups * kOwnBytes;
  static constexpr int kBarriersAt = kStagesAt + 2 * kStages * kTileBytes;
  static constexpr int kWordsAt = kBarriersAt + 16 * (kStages + 1);
  static constexpr size_t kShared = kWordsAt + kStages * kWords * sizeof(int32_t);
};

struct HopperBackwardCall {
  TensorMap own[2], other[2];
  BackwardCall backward;
};

#if PF_HOPPER

// Shared memory of a block. A tile lies in panels as ChunkAt has them.
template <class Plan>
struct HopperBackwardShared {
  unsigned char* base;

  __device__ unsigned char* Own(int which, int group) const {
    return base + (which * kHopperGroups + group) * Plan::kOwnBytes;
  }
  __device__ unsigned char* Other(int which, int stage) const {
    return base + Plan::kStagesAt + (2 * stage + which) * Plan::kTileBytes;
  }
  // Segments, orders, and, where the columns are queries, lse and delta of a stage's columns.
  __device__ int32_t* Words(int stage) const {
    return reinterpret_cast<int32_t*>(base + Plan::kWordsAt) + stage * Plan::kWords;
  }
  __device__ uint64_t* Barrier(int i) const {
    return reinterpret_cast<uint64_t*>(base + Plan::kBarriersAt) + i;
  }
  __device__ uint64_t* OwnFull() const { return Barrier(0); }
  __device__ uint64_t* Full(int stage) const { return Barrier(2 + 2 * stage); }
  __device__ uint64_t* Empty(int stage) const { return Barrier(3 + 2 * stage); }

  __device__ void MakeBarriers() const {
    MBarrierInit(OwnFull(), 1);
    for (int i = 0; i < Plan::kStages; ++i) {
      MBarrierInit(Full(i), 1 + 32);  // who starts the copies, and every lane that brings words
      MBarrierInit(Empty(i), 4 * kHopperGroups);
    }
    MBarrierInitFence();
  }
};

// What a block works on.
struct BackwardPlace {
  int first, head, batch;
  Mask mask;
  const float *lse, *delta;  // of the head's queries
};

// By one warp. The groups await every copy, as in the forward pass.
template <class Plan>
__device__ __forceinline__ void BringBackwardTiles(const HopperBackwardCall& call,
                                                   const HopperBackwardShared<Plan>& shared,
                                                   const BackwardPlace& place) {
  constexpr int kTile = Plan::kTile, kPanels = Plan::kPanels;
  const int lane = threadIdx.x % 32, columns = call.backward.other_length;
  const Mask& mask = place.mask;
  if (lane == 0) {
    MBarrierArriveExpecting(shared.OwnFull(), 2 * kHopperGroups * Plan::kOwnBytes);
    for (int which = 0; which < 2; ++which)
      for (int group = 0; group < kHopperGroups; ++group)
        CopyPanels<kPanels, kGroupRows>(shared.Own(which, group), call.own[which], place.head,
                                        place.first + group * kGroupRows, place.batch, shared.OwnFull());
  }
  RingPlace<Plan::kStages> at;
  auto walk = TileWalk<!Plan::kKeyRows, kHopperRows, kTile>::Over(mask, place.first, columns);
  for (int tile = walk.Next(); tile < walk.count(); tile = walk.Next(), at.Advance()) {
    uint64_t* const full = shared.Full(at.stage);
    MBarrierWait(shared.Empty(at.stage), at.parity ^ 1);  // at first they count as empty
    if (lane == 0) {
      MBarrierArriveExpecting(full, 2 * Plan::kTileBytes);
      for (int which = 0; which < 2; ++which)
        CopyPanels<kPanels, kTile>(shared.Other(which, at.stage), call.other[which], place.head, tile * kTile,
                                   place.batch, full);
    }
    int32_t* const words = shared.Words(at.stage);
    float* const sums = reinterpret_cast<float*>(words + 2 * kTile);
#pragma unroll
    for (int i = lane; i < kTile; i += 32) {
      const int column = tile * kTile + i < columns ? tile * kTile + i : columns - 1;
      if (mask.segment) {
        words[i] = mask.segment[column];
        words[kTile + i] = mask.order[column];
      }
      if (Plan::kKeyRows) {
        sums[i] = place.lse[column];
        sums[kTile + i] = place.delta[column];
      }
    }
    MBarrierArrive(full);
  }
}

// The gradients of a warpgroup's 64 rows.
template <class Plan>
class HopperGradients {
 public:
  __device__ __forceinline__ HopperGradients(const BackwardCall& call,
                                             const HopperBackwardShared<Plan>& shared,
                                             const BackwardPlace& place, int group)
      : call_(call),
        shared_(shared),
        mask_(place.mask),
        walk_(TileWalk<!kKeyRows, kHopperRows, kTile>::Over(place.mask, place.first, call.other_length)),
        group_(group),
        row_(place.first + group * kGroupRows) {
    if constexpr (!kKeyRows)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = row_ + WarpRow() + 8 * h + static_cast<int>(threadIdx.x % 32 / 4);
        lse_[h] = i < call.own_length ? place.lse[i] : 0;
        delta_[h] = i < call.own_length ? place.delta[i] : 0;
      }
  }

  // Runs of tiles that this group sees; a run ends with the sums of its last tile, as in the forward pass.
  __device__ __forceinline__ void Run() {
#pragma unroll
    for (int i = 0; i < Plan::kOuts; ++i) Clear(acc_[i]);
    tile_ = walk_.Next();
    MBarrierWait(shared_.OwnFull(), 0);
    while (tile_ < walk_.count()) {
      see_ = Look();
      if (see_ == kNothing) {
        Skip();
        continue;
      }
      if constexpr (!Plan::kLater) {
        StepAtOnce();
      } else {
        StepAndHold<false>();
        while (tile_ < walk_.count() && (see_ = Look()) != kNothing) StepAndHold<true>();
        StartSums(held_.stage);
        AwaitSums(held_.stage);
      }
    }
  }

  __device__ __forceinline__ void Store(int head, int batch) {
    // The group's own rows make room, once all of its warps are done with them.
    NamedBarrierSync(1 + group_, 128);
#pragma unroll
    for (int i = 0; i < Plan::kOuts; ++i) {
      const OutRows& to = call_.to[i];
      const int64_t at = (static_cast<int64_t>(batch) * call_.own_length + row_) * to.token +
                         static_cast<int64_t>(head) * to.d;
      StoreRows<kGroupRows>(acc_[i], shared_.Own(i, group_), WarpRow(), call_.own_length - row_, 0, to, at,
                            [&](int, int) { return i == 0 ? call_.scale : 1.0f; });
    }
  }

 private:
  static constexpr int kTile = Plan::kTile, kN = Plan::kTile / 8;
  static constexpr bool kKeyRows = Plan::kKeyRows;

  __device__ __forceinline__ Visibility Look() const {
    return LookAt<!kKeyRows, kTile>(mask_, row_, call_.own_length, tile_, call_.other_length);
  }
  // A tile that only the other group sees. It is freed after it came, so that no phase is counted twice.
  __device__ __forceinline__ void Skip() {
    MBarrierWait(shared_.Full(at_.stage), at_.parity);
    Release(shared_.Empty(at_.stage));
    at_.Advance();
    tile_ = walk_.Next();
  }
  __device__ __forceinline__ void HoldSum(int which) {
    HoldRegisters(acc_[which][0]);
    HoldRegisters(left_[which]);
  }
  __device__ __forceinline__ void HoldSums() {
#pragma unroll
    for (int i = 0; i < Plan::kOuts; ++i) HoldSum(i);
  }
  // Starts the product of own rows and the columns of the tile at hand: logits, or the weights' gradients.
  __device__ __forceinline__ void StartProduct(float (&d)[kN][4], int which) {
    StartRows<Plan::kD, kTile>(d, PanelDescriptor<kGroupRows>(shared_.Own(which, group_), false),
                               PanelDescriptor<kTile>(shared_.Other(which, at_.stage), false));
    WgmmaCommit();
  }
  // Starts a sum over the columns of a tile: 0 gradients of the logits times keys or queries, 1 (where rows
  // are keys) weights times the outputs' gradients.
  __device__ __forceinline__ void StartSum(int which, int stage) {
    StartColumns(acc_[which][0], left_[which], PanelDescriptor<kTile>(shared_.Other(which, stage), true));
  }
  __device__ __forceinline__ void StartSums(int stage) {
    HoldSums();
    WgmmaFence();
#pragma unroll
    for (int i = 0; i < Plan::kOuts; ++i) StartSum(i, stage);
    WgmmaCommit();
  }
  __device__ __forceinline__ void AwaitSums(int stage) {
    WgmmaWait<0>();
    HoldSums();
    Release(shared_.Empty(stage));
  }
  __device__ __forceinline__ const float* Sums() const {
    return reinterpret_cast<const float*>(shared_.Words(at_.stage) + 2 * kTile);
  }
  __device__ __forceinline__ float Lse(int n, int i) const {
    return kKeyRows ? Sums()[8 * n + threadIdx.x % 4 * 2 + i % 2] : lse_[i / 2];
  }
  __device__ __forceinline__ float Delta(int n, int i) const {
    return kKeyRows ? Sums()[kTile + 8 * n + threadIdx.x % 4 * 2 + i % 2] : delta_[i / 2];
  }

  // p: logits become weights.
  __device__ __forceinline__ void Weigh() {
    const int32_t* const words = shared_.Words(at_.stage);
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) p_[0][n][i] = Exp2(fmaf(p_[0][n][i], call_.unit, -Lse(n, i)));
    if (see_ == kSome) {
      const WarpMask<1, !kKeyRows> own = {mask_, row_ + WarpRow(), call_.own_length, call_.other_length,
                                          nullptr};
      own.Hide(p_, 0, words, words + kTile, call_.other_length - tile_ * kTile);
    }
  }
  // d: gradients of the weights become those of the logits.
  __device__ __forceinline__ void Derive() {
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) d_[0][n][i] = p_[0][n][i] * (d_[0][n][i] - Delta(n, i));
  }

  // Products of the tile at hand, and then the sums of the tile before (kHeld). Nothing but waiting comes
  // between the start of products and the wait for them, as in the forward pass.
  template <bool kHeld>
  __device__ __forceinline__ void StepAndHold() {
    MBarrierWait(shared_.Full(at_.stage), at_.parity);
    if constexpr (kHeld) HoldSums();
    WgmmaFence();
    StartProduct(p_[0], 0);
    StartProduct(d_[0], 1);
    if constexpr (kHeld) StartSums(held_.stage);
    WgmmaWait<kHeld ? 2 : 1>();
    HoldRegisters(p_[0]);
    Weigh();
    WgmmaWait<kHeld ? 1 : 0>();
    HoldRegisters(d_[0]);
    Derive();
    if constexpr (kHeld) AwaitSums(held_.stage);
    PackLeft(left_[0], d_[0]);
    if constexpr (kKeyRows) PackLeft(left_[1], p_[0]);
    held_ = at_;
    at_.Advance();
    tile_ = walk_.Next();
  }
  // A tile from its products to its sums; the other group has the tensor cores meanwhile.
  __device__ __forceinline__ void StepAtOnce() {
    MBarrierWait(shared_.Full(at_.stage), at_.parity);
    WgmmaFence();
    StartProduct(p_[0], 0);
    StartProduct(d_[0], 1);
    WgmmaWait<1>();
    HoldRegisters(p_[0]);
    Weigh();
    PackLeft(left_[1], p_[0]);
    HoldSum(1);
    WgmmaFence();
    StartSum(1, at_.stage);
    WgmmaCommit();
    WgmmaWait<1>();
    HoldRegisters(d_[0]);
    Derive();
    PackLeft(left_[0], d_[0]);
    HoldSum(0);
    WgmmaFence();
    StartSum(0, at_.stage);
    WgmmaCommit();
    AwaitSums(at_.stage);
    at_.Advance();
    tile_ = walk_.Next();
  }

  const BackwardCall& call_;
  const HopperBackwardShared<Plan> shared_;
  const Mask mask_;
  TileWalk<!kKeyRows, kHopperRows, kTile> walk_;
  const int group_, row_;
  int tile_;
  Visibility see_;
  RingPlace<Plan::kStages> at_, held_;
  float acc_[Plan::kOuts][1][Plan::kD / 8][4], p_[1][kN][4], d_[1][kN][4], lse_[2], delta_[2];
  uint32_t left_[Plan::kOuts][kTile / 16][4];
};

#endif

template <class Plan>
__global__ void __launch_bounds__(kHopperThreads, 1)
    BackwardHopperKernel(const __grid_constant__ HopperBackwardCall call) {
#if PF_HOPPER
  PF_DYNAMIC_SHARED(base);
  const HopperBackwardShared<Plan> shared = {base};
  const BackwardCall& backward = call.backward;
  const int pair = blockIdx.x / backward.blocks, index = static_cast<int>(blockIdx.x % backward.blocks);
  const int lq = Plan::kKeyRows ? backward.other_length : backward.own_length;
  // Blocks that tend to meet most come first: late queries, early keys.
  const BackwardPlace place = {(Plan::kKeyRows ? index : backward.blocks - 1 - index) * kHopperRows,
                               pair % backward.heads,
                               pair / backward.heads,
                               backward.mask.Batch(pair / backward.heads),
                               backward.sums.lse + static_cast<int64_t>(pair) * lq,
                               backward.sums.delta + static_cast<int64_t>(pair) * lq};
  if (threadIdx.x == 0) shared.MakeBarriers();
  __syncthreads();
  const int group = GroupOfThread();
  if (group == kHopperGroups) {
    GiveRegisters<kCopyRegisters>();
    if (threadIdx.x % 128 < 32) BringBackwardTiles<Plan>(call, shared, place);
  } else {
    TakeRegisters<kGroupRegisters>();
    HopperGradients<Plan> work(backward, shared, place, group);
    work.Run();
    work.Store(place.head, place.batch);
  }
#endif
}

// False when this device or build is not for it, and nothing was done.
template <class Plan>
bool TryBackwardHopper(const PfArgs* a, const AttentionShape& s, const BackwardCall& backward,
                       int32_t* status) {
  static const bool built = HopperBuilt(&BackwardHopperKernel<Plan>);
  if (!built) return false;
  HopperBackwardCall call{};
  call.backward = backward;
  call.backward.blocks = static_cast<int>(CeilDiv(backward.own_length, kHopperRows));
  for (int i = 0; i < 2; ++i)
    if (!MapRows(s, backward.own[i], backward.own_length, kGroupRows, &call.own[i]) ||
        !MapRows(s, backward.other[i], backward.other_length, Plan::kTile, &call.other[i]))
      return false;
  const int64_t grid = s.batch * s.heads * call.backward.blocks;
  *status = Launch(a, &BackwardHopperKernel<Plan>, dim3(static_cast<unsigned>(grid)), kHopperThreads,
                   Plan::kShared, call);
  return true;
}
template <int D, int QueryTile>
bool TryBackwardHopper(const PfArgs* a, const AttentionShape& s, const BackwardCalls& calls,
                       int32_t* status) {
  typedef HopperBackwardPlan<D, QueryTile, 4, false> OfQueries;
  typedef HopperBackwardPlan<D, 64, 4, true> OfKeys;
  if (!TryBackwardHopper<OfQueries>(a, s, calls.of_queries, status)) return false;
  return *status != PF_OK || TryBackwardHopper<OfKeys>(a, s, calls.of_keys, status);
}
inline bool TryBackwardHopper(const PfArgs* a, const AttentionShape& s, const BackwardCalls& calls,
                              int32_t* status) {
  if (!HopperTakes(s)) return false;
  return s.d == 64 ? TryBackwardHopper<64, 128>(a, s, calls, status)
                   : TryBackwardHopper<128, 64>(a, s, calls, status);
}

}  // namespace
