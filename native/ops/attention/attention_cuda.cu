#include <initializer_list>

#include "ops/attention/attention_hopper_backward.cuh"
#include "ops/attention/attention_hopper_forward.cuh"
#include "ops/attention/attention_simt.cuh"

namespace {

bool AllBf16(const PfArgs* a, std::initializer_list<int> inputs) {
  for (int i : inputs)
    if (a->in[i].dtype != PF_BF16) return false;
  return true;
}

void MakeTurns(const PfArgs* a, const AttentionShape& s, RowTurn turns[2]) {
  const AttentionNormParams& params = PfParams<AttentionNormParams>(a);
  for (int i = 0; i < 2; ++i) {
    const PfView weight = AttentionInput(a, 5 + i);
    const bool two = PfPresent(weight) && PfCount(weight) == 2 * s.d;
    turns[i] = {ArrayOf(weight),
                PfData<float>(AttentionInput(a, 7)),
                PfData<float>(AttentionInput(a, 8)),
                i == 0 ? s.lq : s.lk,
                s.lk,
                two ? static_cast<int64_t>(params.split) : s.lk,
                static_cast<float>(params.eps)};
  }
}

}  // namespace

int32_t pf_cuda_attention(const PfArgs* a) {
  AttentionShape s;
  PF_TRY(AttentionCheck(a, &s));
  PF_TRY(AttentionRefuseForward(a));
  RowTurn turns[2];
  const bool turned = AttentionTurns(a);
  if (turned) MakeTurns(a, s, turns);
  Mask mask;
  PF_TRY(MakeMask(a, s, &mask));
  const RowTurn* turn = turned ? turns : nullptr;
  if (!AllBf16(a, {0, 1, 2}) || s.d > kMostForwardMma) return ForwardSimt(a, s, turn, mask);
  ForwardCall call{};
  PF_TRY(MakeForwardCall(a, s, turn, mask, &call));
  int32_t status;
  if (TryForwardHopper(a, s, call, &status)) return status;
  return HopperRequired(s) ? HopperMissing(a, "attention") : ForwardMma(a, s, call);
}

int32_t pf_cuda_attention_backward(const PfArgs* a) {
  AttentionShape s;
  PF_TRY(AttentionBackwardCheck(a, &s));
  PF_TRY(AttentionRefuseBackward(a));
  Mask mask;
  PF_TRY(MakeMask(a, s, &mask));
  if (!AllBf16(a, {0, 1, 2, 7}) || s.d > kMostBackwardMma) return BackwardSimt(a, s, mask);
  BackwardCalls calls{};
  PF_TRY(MakeBackwardCalls(a, s, mask, &calls));
  int32_t status;
  if (TryBackwardHopper(a, s, calls, &status)) return status;
  return HopperRequired(s) ? HopperMissing(a, "attention_backward") : BackwardMma(a, s, calls);
}
