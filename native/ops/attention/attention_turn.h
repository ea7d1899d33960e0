// RMS norm and rotary embedding of queries and keys as they are read, so that neither is written and read
// again. The arithmetic is that of the op rope up to rounding.
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
    t.length = s.lk;
    t.rows = s.batch * s.lk;
    t.split = t.weight && PfCount(weight) == 2 * s.d ? static_cast<int64_t>(params.split) : s.lk;
    t.eps = static_cast<float>(params.eps);
  }
  return true;
}

// One head of token n.
template <class From, class To>
void TurnRow(const Turn& turn, int64_t n, const From* x, int64_t d, To* y) {
  const float* w = turn.weight;
  float rstd = 1;
  if (w) {
    if (n % turn.length >= turn.split) w += d;
    rstd = 1 / sqrtf(SquareSum(x, d) / d + turn.eps);
  }
  ForLanes(d, [&](int64_t i, int64_t m) {
    Vf t = LoadN(x + i, m);
    if (w) t = t * rstd * LoadN(w + i, m);
    if (turn.cos) {
      const int64_t at = n * (d / 2) + i / 2, left = turn.rows * (d / 2) - at;
      const Vf c = TwiceLow(LoadN(turn.cos + at, left)),
               s = TwiceLow(LoadN(turn.sin + at, left)) * kAlternate;
      t = t * c + SwapPairs(t) * s;
    }
    StoreN(y + i, t, m);
  });
}

}  // namespace
