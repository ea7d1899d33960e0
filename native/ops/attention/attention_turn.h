// RMS norm and rotary embedding of queries and keys as they are read, so that neither is written and read
// again. The arithmetic is that of the op rope, in the same order.
#pragma once
#include "backends/cpu/rows.h"
#include "ops/attention/attention.h"

namespace {

struct Turn {
  const float* weight;  // [1 or 2, D]; nullptr: no norm
  const float *cos, *sin;
  int64_t length, rows;  // tokens of a sequence, of all
  int64_t split;         // of a sequence's tokens those from here on take the second row of weights
  float eps;
};

// Nothing is done where turn has neither weights nor angles. False when scratch runs out.
inline bool MakeTurns(const PfArgs* a, const AttentionShape& s, Turn turns[2]) {
  turns[0] = turns[1] = {};
  if (!AttentionTurns(a)) return true;
  const AttentionNormParams& params = PfParams<AttentionNormParams>(a);
  for (int i = 0; i < 2; ++i) {
    Turn& t = turns[i];
    const PfView weight = AttentionInput(a, 5 + i);
    if (!AsFloats(a, weight, &t.weight)) return false;
    t.cos = PfData<float>(AttentionInput(a, 7));
    t.sin = PfData<float>(AttentionInput(a, 8));
    t.length = s.lq;
    t.rows = s.batch * s.lq;
    t.split = t.weight && PfCount(weight) == 2 * s.d ? static_cast<int64_t>(params.split) : s.lq;
    t.eps = static_cast<float>(params.eps);
  }
  return true;
}

// Lane by lane: the other member of every pair, and the first half of a vector with every value twice.
inline Vf OtherOfPair(Vf v) {
#if PF_LANES == 16
  const Vi other = {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14};
#elif PF_LANES == 8
  const Vi other = {1, 0, 3, 2, 5, 4, 7, 6};
#else
  const Vi other = {1, 0, 3, 2};
#endif
  return __builtin_shuffle(v, other);
}
inline Vf Twice(Vf v) {
#if PF_LANES == 16
  const Vi twice = {0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7};
#elif PF_LANES == 8
  const Vi twice = {0, 0, 1, 1, 2, 2, 3, 3};
#else
  const Vi twice = {0, 0, 1, 1};
#endif
  return __builtin_shuffle(v, twice);
}
inline Vf FirstNegative() {
  Vf sign;
  for (int i = 0; i < kLanes; ++i) sign[i] = i % 2 ? 1.0f : -1.0f;
  return sign;
}

// One head of token n.
template <class From, class To>
void TurnRow(const Turn& turn, int64_t n, const From* x, int64_t d, To* y) {
  const float* w = turn.weight;
  float rstd = 1;
  if (w) {
    if (n % turn.length >= turn.split) w += d;
    const float square = RowSum(d, [&](int64_t i, int64_t m) {
      const Vf v = LoadN(x + i, m);
      return v * v;
    });
    rstd = 1 / sqrtf(square / d + turn.eps);
  }
  const Vf sign = FirstNegative();
  ForLanes(d, [&](int64_t i, int64_t m) {
    Vf t = LoadN(x + i, m);
    if (w) t = t * rstd * LoadN(w + i, m);
    if (turn.cos) {
      const int64_t at = n * (d / 2) + i / 2, left = turn.rows * (d / 2) - at;
      const Vf c = Twice(LoadN(turn.cos + at, left)), s = Twice(LoadN(turn.sin + at, left)) * sign;
      t = t * c + OtherOfPair(t) * s;
    }
    StoreN(y + i, t, m);
  });
}

}  // namespace
