// The forward pass for compute capability 9.0 in the manner of FlashAttention-3. The logits of a tile are
// computed while the tile before is summed, and the groups take turns in starting products, so that one is at
// its exponentials while the other has the tensor cores.
#pragma once
#include "ops/attention/attention_hopper.cuh"

namespace {

template <int D, int Stages>
struct HopperPlan {
  static constexpr int kD = D, kStages = Stages, kKeys = 128, kPanels = D / 64;
  static constexpr int kQueryBytes = kGroupRows * D * 2, kKeyBytes = kKeys * D * 2;
  static constexpr int kKeysAt = kHopperGroups * kQueryBytes, kValuesAt = kKeysAt + kStages * kKeyBytes;
  static constexpr int kBarriersAt = kValuesAt + kStages * kKeyBytes;
  static constexpr int kWordsAt = kBarriersAt + 16 * (2 * kStages + 1);
  static constexpr size_t kShared = kWordsAt + 2 * kStages * kKeys * sizeof(int32_t);
};

struct HopperCall {
  TensorMap q, k, v;
  ForwardCall forward;
};

#if PF_HOPPER

// Shared memory of a block. A tile lies in panels as ChunkAt has them.
template <class Plan>
struct HopperShared {
  unsigned char* base;

  __device__ unsigned char* Queries(int group) const { return base + group * Plan::kQueryBytes; }
  __device__ unsigned char* Keys(int stage) const { return base + Plan::kKeysAt + stage * Plan::kKeyBytes; }
  __device__ unsigned char* Values(int stage) const {
    return base + Plan::kValuesAt + stage * Plan::kKeyBytes;
  }
  // The mask values of a stage's keys: segments, then orders.
  __device__ int32_t* Words(int stage) const {
    return reinterpret_cast<int32_t*>(base + Plan::kWordsAt) + stage * 2 * Plan::kKeys;
  }
  __device__ uint64_t* Barrier(int i) const {
    return reinterpret_cast<uint64_t*>(base + Plan::kBarriersAt) + i;
  }
  __device__ uint64_t* QueriesFull() const { return Barrier(0); }
  __device__ uint64_t* KeysFull(int stage) const { return Barrier(2 + 4 * stage); }
  __device__ uint64_t* KeysFree(int stage) const { return Barrier(3 + 4 * stage); }
  __device__ uint64_t* ValuesFull(int stage) const { return Barrier(4 + 4 * stage); }
  __device__ uint64_t* ValuesFree(int stage) const { return Barrier(5 + 4 * stage); }

  __device__ void MakeBarriers() const {
    MBarrierInit(QueriesFull(), 1);
    for (int i = 0; i < Plan::kStages; ++i) {
      MBarrierInit(KeysFull(i), 1 + 32);  // who starts the copy, and every lane that brings mask values
      MBarrierInit(ValuesFull(i), 1);
      MBarrierInit(KeysFree(i), 4 * kHopperGroups);
      MBarrierInit(ValuesFree(i), 4 * kHopperGroups);
    }
    MBarrierInitFence();
  }
};

// By one warp. Every copy is awaited by the groups, those of skipped tiles, too: none may be under way when
// the block ends and its shared memory goes to the next one.
template <class Plan>
__device__ __forceinline__ void BringTiles(const HopperCall& call, const HopperShared<Plan>& shared,
                                           const Mask& mask, int first, int head, int batch) {
  constexpr int kKeys = Plan::kKeys, kPanels = Plan::kPanels;
  const int lane = threadIdx.x % 32, lk = call.forward.lk;
  if (lane == 0) {
    MBarrierArriveExpecting(shared.QueriesFull(), kHopperGroups * Plan::kQueryBytes);
    for (int i = 0; i < kHopperGroups; ++i)
      CopyPanels<kPanels, kGroupRows>(shared.Queries(i), call.q, head, first + i * kGroupRows, batch,
                                      shared.QueriesFull());
  }
  RingPlace<Plan::kStages> at;
  auto walk = TileWalk<true, kHopperRows, kKeys>::Over(mask, first, lk);
  for (int tile = walk.Next(); tile < walk.count(); tile = walk.Next(), at.Advance()) {
    MBarrierWait(shared.KeysFree(at.stage), at.parity ^ 1);  // at first they count as freed
    if (lane == 0) {
      MBarrierArriveExpecting(shared.KeysFull(at.stage), Plan::kKeyBytes);
      CopyPanels<kPanels, kKeys>(shared.Keys(at.stage), call.k, head, tile * kKeys, batch,
                                 shared.KeysFull(at.stage));
    }
    // Mask values come by plain loads: a batch's first lies at no multiple of 16 bytes. Keys do not count as
    // there before their mask values are.
    if (mask.segment) {
      int32_t* const words = shared.Words(at.stage);
#pragma unroll
      for (int i = lane; i < kKeys; i += 32) {
        const int key = tile * kKeys + i < lk ? tile * kKeys + i : lk - 1;
        words[i] = mask.segment[key];
        words[kKeys + i] = mask.order[key];
      }
    }
    MBarrierArrive(shared.KeysFull(at.stage));
    MBarrierWait(shared.ValuesFree(at.stage), at.parity ^ 1);
    if (lane == 0) {
      MBarrierArriveExpecting(shared.ValuesFull(at.stage), Plan::kKeyBytes);
      CopyPanels<kPanels, kKeys>(shared.Values(at.stage), call.v, head, tile * kKeys, batch,
                                 shared.ValuesFull(at.stage));
    }
  }
}

// A warpgroup's 64 queries.
template <class Plan>
class HopperGroup {
 public:
  __device__ __forceinline__ HopperGroup(const ForwardCall& call, const HopperShared<Plan>& shared,
                                         const Mask& mask, int first, int group)
      : call_(call),
        shared_(shared),
        mask_(mask),
        walk_(TileWalk<true, kHopperRows, kKeys>::Over(mask, first, call.lk)),
        group_(group),
        row_(first + group * kGroupRows),
        queries_(PanelDescriptor<kGroupRows>(shared.Queries(group), false)) {}

  __device__ __forceinline__ void Run() {
    Clear(o_);
#pragma unroll
    for (int h = 0; h < 2; ++h) top_[h] = -INFINITY, sum_[h] = 0;
    tile_ = walk_.Next();
    // The first group begins; each passes the turn on once a tile, the last time to nobody.
    if (group_ == 1 && tile_ < walk_.count()) NamedBarrierArrive(1, 256);
    MBarrierWait(shared_.QueriesFull(), 0);
    // Runs of tiles that this group sees. A run ends with the sums of its last tile: they cannot wait for the
    // next run, since they hold a stage that the tiles between need.
    while (tile_ < walk_.count()) {
      see_ = Look();
      if (see_ == kNothing) {
        Skip();
        continue;
      }
      Step<false>();
      while (tile_ < walk_.count() && (see_ = Look()) != kNothing) Step<true>();
      AwaitAndSum();
      WgmmaWait<0>();
      HoldRegisters(o_[0]);
      Release(shared_.ValuesFree(held_.stage));
    }
  }

  __device__ __forceinline__ void Store(int64_t pair, int64_t at) {
    const int lane = threadIdx.x % 32, warp_row = WarpRow();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum_[h] += __shfl_xor_sync(0xffffffffu, sum_[h], 1);
      sum_[h] += __shfl_xor_sync(0xffffffffu, sum_[h], 2);
      const int i = row_ + warp_row + 8 * h + lane / 4;
      if (call_.lse && lane % 4 == 0 && i < call_.lq)
        call_.lse[pair * call_.lq + i] =
            sum_[h] == 0 ? -INFINITY : top_[h] * call_.unit * kLn2 + logf(sum_[h]);
    }
    // The group's own queries make room, once all of its warps are done with them.
    NamedBarrierSync(3 + group_, 128);
    StoreRows<kGroupRows>(o_, shared_.Queries(group_), warp_row, call_.lq - row_, 0, call_.o, at,
                          [&](int, int h) { return sum_[h] == 0 ? 0 : 1 / sum_[h]; });
  }

 private:
  static constexpr int kKeys = Plan::kKeys;

  __device__ __forceinline__ Visibility Look() const {
    return LookAt<true, kKeys>(mask_, row_, call_.lq, tile_, call_.lk);
  }
  __device__ __forceinline__ void AwaitTurn() const { NamedBarrierSync(1 + group_, 256); }
  __device__ __forceinline__ void PassTurn(int next) const {
    if (group_ == 0 || next < walk_.count()) NamedBarrierArrive(2 - group_, 256);
  }

  // A tile that only the other group sees. It is freed after it came, so that no phase is counted twice.
  __device__ __forceinline__ void Skip() {
    const int next = walk_.Next();
    AwaitTurn();
    PassTurn(next);
    MBarrierWait(shared_.KeysFull(at_.stage), at_.parity);
    Release(shared_.KeysFree(at_.stage));
    MBarrierWait(shared_.ValuesFull(at_.stage), at_.parity);
    Release(shared_.ValuesFree(at_.stage));
    at_.Advance();
    tile_ = next;
  }

  // Starts s = q k^T with the tile at hand.
  __device__ __forceinline__ void StartLogits() {
    StartRows<Plan::kD, kKeys>(s_[0], queries_, PanelDescriptor<kKeys>(shared_.Keys(at_.stage), false));
    WgmmaCommit();
  }
  // Starts o += p v with the tile before it.
  __device__ __forceinline__ void StartSums() {
    StartColumns(o_[0], p_, PanelDescriptor<kKeys>(shared_.Values(held_.stage), true));
    WgmmaCommit();
  }
  __device__ __forceinline__ void AwaitAndSum() {
    MBarrierWait(shared_.ValuesFull(held_.stage), held_.parity);
    HoldRegisters(o_[0]);
    HoldRegisters(p_);
    WgmmaFence();
    StartSums();
  }

  // The weights of a tile, while those of the tile before it are summed (kHeld) or without one. Nothing but
  // waiting comes between the start of products and the wait for them: the compiler makes them one after the
  // other where it sees their registers touched.
  template <bool kHeld>
  __device__ __forceinline__ void Step() {
    const int next = walk_.Next();
    AwaitTurn();
    MBarrierWait(shared_.KeysFull(at_.stage), at_.parity);
    if constexpr (kHeld) {
      MBarrierWait(shared_.ValuesFull(held_.stage), held_.parity);
      HoldRegisters(o_[0]);
      HoldRegisters(p_);
    }
    WgmmaFence();
    StartLogits();
    if constexpr (kHeld) StartSums();
    PassTurn(next);
    WgmmaWait<kHeld ? 1 : 0>();
    HoldRegisters(s_[0]);
    if (call_.negate)
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s_[0][n][i] = -s_[0][n][i];
    if (see_ == kSome) {
      const WarpMask<1, true> own = {mask_, row_ + WarpRow(), call_.lq, call_.lk, nullptr};
      const int32_t* const words = shared_.Words(at_.stage);
      own.Hide(s_, -INFINITY, words, words + kKeys, call_.lk - tile_ * kKeys);
    }
    Release(shared_.KeysFree(at_.stage));  // the words of its mask, too, were read
    float shrink[2];
    const bool grows = Weigh(s_[0], call_.unit, top_, sum_, shrink);
    if constexpr (kHeld) {
      WgmmaWait<0>();
      HoldRegisters(o_[0]);
      Release(shared_.ValuesFree(held_.stage));
    }
    if (__any_sync(0xffffffffu, grows))
#pragma unroll
      for (int n = 0; n < Plan::kD / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) o_[0][n][i] *= shrink[i / 2];
    PackLeft(p_, s_[0]);
    held_ = at_;
    at_.Advance();
    tile_ = next;
  }

  const ForwardCall& call_;
  const HopperShared<Plan> shared_;
  const Mask mask_;
  TileWalk<true, kHopperRows, kKeys> walk_;
  const int group_, row_;
  const uint64_t queries_;
  int tile_;
  Visibility see_;
  RingPlace<Plan::kStages> at_, held_;
  float o_[1][Plan::kD / 8][4], s_[1][kKeys / 8][4], top_[2], sum_[2];
  uint32_t p_[kKeys / 16][4];
};

#endif

template <class Plan>
__global__ void __launch_bounds__(kHopperThreads, 1)
    ForwardHopperKernel(const __grid_constant__ HopperCall call) {
#if PF_HOPPER
  PF_DYNAMIC_SHARED(base);
  const HopperShared<Plan> shared = {base};
  const ForwardCall& forward = call.forward;
  const int pair = blockIdx.x / forward.blocks, batch = pair / forward.heads, head = pair % forward.heads;
  // Later queries tend to see more keys: they come first.
  const int first = (forward.blocks - 1 - static_cast<int>(blockIdx.x % forward.blocks)) * kHopperRows;
  const Mask mask = forward.mask.Batch(batch);
  if (threadIdx.x == 0) shared.MakeBarriers();
  __syncthreads();
  const int group = GroupOfThread();
  if (group == kHopperGroups) {
    GiveRegisters<kCopyRegisters>();
    if (threadIdx.x % 128 < 32) BringTiles<Plan>(call, shared, mask, first, head, batch);
  } else {
    TakeRegisters<kGroupRegisters>();
    HopperGroup<Plan> work(forward, shared, mask, first, group);
    work.Run();
    work.Store(pair,
               (static_cast<int64_t>(batch) * forward.lq + first + group * kGroupRows) * forward.o.token +
                   static_cast<int64_t>(head) * forward.o.d);
  }
#endif
}

// False when this device, build or shape is not for it, and nothing was done.
template <class Plan>
bool TryForwardHopper(const PfArgs* a, const AttentionShape& s, const ForwardCall& forward, int32_t* status) {
  static const bool built = HopperBuilt(&ForwardHopperKernel<Plan>);
  if (!built) return false;
  HopperCall call{};
  call.forward = forward;
  call.forward.blocks = static_cast<int>(CeilDiv(s.lq, kHopperRows));
  if (!MapRows(s, forward.q, s.lq, kGroupRows, &call.q) ||
      !MapRows(s, forward.k, s.lk, Plan::kKeys, &call.k) ||
      !MapRows(s, forward.v, s.lk, Plan::kKeys, &call.v))
    return false;
  const int64_t grid = s.batch * s.heads * call.forward.blocks;
  *status = Launch(a, &ForwardHopperKernel<Plan>, dim3(static_cast<unsigned>(grid)), kHopperThreads,
                   Plan::kShared, call);
  return true;
}
inline bool TryForwardHopper(const PfArgs* a, const AttentionShape& s, const ForwardCall& forward,
                             int32_t* status) {
  if (!HopperTakes(s)) return false;
  return s.d == 64 ? TryForwardHopper<HopperPlan<64, 4>>(a, s, forward, status)
                   : TryForwardHopper<HopperPlan<128, 2>>(a, s, forward, status);
}

}  // namespace
