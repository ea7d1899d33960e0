#include "ops/attention/attention_backward.h"

namespace {

// bf16 operands go into the products as they are where the level multiplies them, and as floats elsewhere.
inline bool InPairs(const PfArgs* a) {
#if defined(__AVX512BF16__)
  return a->in[0].dtype == PF_BF16 && a->in[1].dtype == PF_BF16 && a->in[2].dtype == PF_BF16;
#else
  (void)a;
  return false;
#endif
}

}  // namespace

int32_t pf_cpu_attention(const PfArgs* a) {
  AttentionShape s;
  if (int32_t e = AttentionCheck(a, &s)) return e;
  if (int32_t e = AttentionRefuseForward(a)) return e;
  return InPairs(a) ? RunForward<Bf16>(a, s) : RunForward<float>(a, s);
}

int32_t pf_cpu_attention_backward(const PfArgs* a) {
  AttentionShape s;
  if (int32_t e = AttentionBackwardCheck(a, &s)) return e;
  if (int32_t e = AttentionRefuseBackward(a)) return e;
  return InPairs(a) && a->in[7].dtype == PF_BF16 ? RunBackward<Bf16>(a, s) : RunBackward<float>(a, s);
}
