#include "core/op_test.h"

namespace {

using op_test::Dims;

struct Mask {
  op_test::Values segment, order;
};

// Adds q [B, Lq, H, D], k and v [B, Lk, H, D], and the mask where there is one.
op_test::Case& Operands(op_test::Case& c, const Dims& q, const Dims& k, const Mask* mask) {
  c.In(q).In(k).In(k);
  if (!mask) return c.Missing().Missing();
  return c.InInt({k[0], k[1]}, mask->segment).InInt({k[0], k[1]}, mask->order);
}

// `gpu`: so many times, and on a GPU alone.
void Forward(op_test::Test& test, const Dims& q, const Dims& k, const Mask* mask, double scale, int gpu = 0) {
  if (gpu && !op_test::HasGpu()) return;  // what takes too long elsewhere
  op_test::Case c = test.Case("attention");
  if (gpu) c.OnGpu(gpu);
  Operands(c, q, k, mask).Out(q).OutF32({q[0], q[2], q[1]}).Scalars({scale}).Tolerance(2e-6, 4e-3).Run();
}

// What the forward pass saves is the reference's.
void Backward(op_test::Test& test, const Dims& q, const Dims& k, const Mask* mask, double scale,
              int gpu = 0) {
  const std::vector<int> inputs = mask ? std::vector<int>{0, 1, 2, 3, 4} : std::vector<int>{0, 1, 2, -1, -1};
  const std::vector<Dims> saved = {q, {q[0], q[2], q[1]}};
  if (gpu && !op_test::HasGpu()) return;
  op_test::Case c = test.Case("attention_backward");
  if (gpu) c.OnGpu(gpu);
  Operands(c, q, k, mask)
      .FromRef("attention", inputs, {scale}, saved, 0, false)
      .FromRef("attention", inputs, {scale}, saved, 1)
      .In(q)
      .Out(q)
      .Out(k)
      .Out(k)
      .Scalars({scale})
      .Tolerance(6e-6, 1.2e-2)
      .Run();
}

}  // namespace

PF_CASES(attention) {
  const Mask masks[] = {
      {[](int64_t i) { return i % 3; }, [](int64_t i) { return i / 5; }},  // scattered segments
      {[](int64_t i) { return i / 37; },
       [](int64_t i) { return i % 37 / 9; }},                         // packed sequences, causal units
      {[](int64_t) { return 0; }, [](int64_t i) { return i / 16; }},  // one causal sequence
      {[](int64_t i) { return i % 97 < 70 ? i / 97 : -1 - i / 97; },
       [](int64_t) { return 0; }},                                                       // padding segments
      {[](int64_t i) { return i * 7 % 5; }, [](int64_t i) { return i * 31 % 11 - 5; }},  // orders up and down
      {[](int64_t i) { return i; }, [](int64_t) { return 0; }},  // each sees itself only
  };
  for (int64_t l : {1, 17, 64, 130, 203})
    for (int64_t d : {16, 64, 5}) {
      const int64_t b = l == 17 ? 2 : 1, h = 2;
      const Dims x = {b, l, h, d};
      for (const Mask& mask : masks) {
        Forward(test, x, x, &mask, 0.125);
        // Alone, or seeing only itself, a token has dq = dk = 0, a difference of two equal sums: only
        // rounding would be compared.
        if (l == 1 || &mask == &masks[5]) continue;
        Backward(test, x, x, &mask, 0.125);
      }
      Forward(test, x, x, nullptr, 0.125);
    }
  for (int64_t d : {48, 80, 127, 128, 512})
    for (int64_t lk : {3, 70, 129}) {
      const Dims q = {2, 50, 1, d}, k = {2, lk, 1, d};
      Forward(test, q, k, nullptr, 0.1);
      Backward(test, q, k, nullptr, 0.1);
    }
  // Runs of tokens with mask values drawn at random, in lengths that fit no block.
  for (uint32_t seed = 1; seed <= 12; ++seed) {
    const auto draw = [seed](int64_t i, uint32_t salt) {
      uint32_t h = (static_cast<uint32_t>(i) * 2654435761u) ^ (seed * 40503u + salt * 97u);
      h = (h ^ (h >> 15)) * 2246822519u;
      return static_cast<int64_t>((h ^ (h >> 13)) & 0xffff);
    };
    const int64_t run = 1 + draw(0, 1) % 40, l = 60 + draw(0, 2) % 180, d = seed % 3 ? 64 : 128;
    const Mask drawn = {[=](int64_t i) { return draw(i / run, 3) % 4; },
                        [=](int64_t i) { return draw(i / (1 + run / 2), 4) % 6; }};
    const Dims x = {1, l, 2, d};
    Forward(test, x, x, &drawn, -0.1);
    Backward(test, x, x, &drawn, -0.1);
  }
  // Heads of 64 and 128 over several tiles of 64 and 128 keys: buffers are used again, lengths fit nothing.
  const int64_t blocks_of_64[] = {0, 1, 0, 0, 1, 1, 0, 1, 2, 2, 1, 1};
  const Mask long_masks[] = {
      {[&](int64_t i) { return blocks_of_64[i / 64 % 12]; },
       [](int64_t i) { return i % 3; }},  // half of the rows see a tile, the other half does not
      {[](int64_t i) { return i % 301 < 280 ? i / 301 : -1 - i / 301; },
       [](int64_t i) { return i % 301 / 24; }},                          // causal clips, each with padding
      {[](int64_t) { return 5; }, [](int64_t i) { return -(i / 50); }},  // everybody sees what comes later
      {[](int64_t i) { return i / 129; }, [](int64_t) { return 0; }},    // sequences one longer than a tile
  };
  for (int64_t d : {64, 128}) {
    for (const Mask& mask : long_masks) {
      const int64_t b = &mask == &long_masks[1] ? 2 : 1, l = d == 64 ? 717 : 600, h = b == 2 ? 3 : 1;
      const Dims x = {b, l, h, d};
      Forward(test, x, x, &mask, 0.125);
    }
    const Dims clips = {1, 390, 1, d};
    for (const Mask& mask : {long_masks[0], long_masks[1]}) Backward(test, clips, clips, &mask, 0.125);
    const int64_t lengths[][2] = {{300, 70}, {70, 645}, {129, 384}, {1, 1}, {64, 256}};
    for (const auto& [lq, lk] : lengths) {
      const Dims q = {2, lq, 3, d}, k = {2, lk, 3, d};
      Forward(test, q, k, nullptr, 0.1);
    }
    Backward(test, {2, 300, 1, d}, {2, 70, 1, d}, nullptr, 0.1);
    Backward(test, {1, 70, 1, d}, {1, 421, 1, d}, nullptr, 0.1);
    // Results in f32, no lse, scale 0; and many heads of few tokens.
    const Dims few = {2, 150, 2, d}, many = {1, 9, 24, d};
    test.Case("attention")
        .In(few)
        .In(few)
        .In(few)
        .Missing()
        .Missing()
        .OutF32(few)
        .OutMissing()
        .Scalars({0})
        .Tolerance(2e-6, 4e-3)
        .Run();
    test.Case("attention")
        .In(many, 4)
        .In(many, 4)
        .In(many)
        .InInt({1, 9}, masks[1].segment)
        .InInt({1, 9}, [](int64_t i) { return i / 4; })
        .Out(many)
        .OutF32({1, 24, 9})
        .Scalars({-0.1})
        .Tolerance(2e-6, 4e-3)
        .Run();
  }
  // Norms and rotation of queries and keys on the way in: alone, together, and with weights of two kinds.
  for (int64_t l : {1, 50, 131})
    for (int64_t d : {8, 64, 80})
      for (int variant = 0; variant < 4; ++variant) {
        const Dims x = {2, l, 2, d}, weights = {variant == 3 ? 2 : 1, d}, angles = {2 * l, d / 2};
        op_test::Case c = test.Case("attention");
        c.In(x).In(x).In(x).InInt({2, l}, masks[1].segment).InInt({2, l}, masks[1].order);
        if (variant == 1)
          c.Missing().Missing();
        else
          c.In(weights).In(weights);
        if (variant != 0) c.InF32(angles).InF32(angles);
        c.Out(x).OutF32({2, 2, l}).Scalars({0.125, 1e-6, 7}).Tolerance(2e-6, 6e-3).Run();
      }
  const Dims turned = {1, 6, 2, 8};
  test.Case("attention")
      .In(turned)
      .In(turned)
      .In(turned)
      .Missing()
      .Missing()
      .In({3, 8})
      .In({1, 8})
      .Out(turned)
      .OutF32({1, 2, 6})
      .Scalars({1, 1e-6, 0})
      .RunExpecting(PF_ERR_SHAPE);
  test.Case("attention")
      .In(turned)
      .In(turned)
      .In(turned)
      .Missing()
      .Missing()
      .Missing()
      .Missing()
      .InF32({6, 4})
      .Missing()
      .Out(turned)
      .OutF32({1, 2, 6})
      .Scalars({1, 1e-6, 0})
      .RunExpecting(PF_ERR_SHAPE);
  // Logits up to about 80: the largest weights decide, the rest must vanish without overflow.
  test.Case("attention")
      .In({1, 90, 2, 64}, 4)
      .In({1, 90, 2, 64}, 4)
      .In({1, 90, 2, 64})
      .Missing()
      .Missing()
      .Out({1, 90, 2, 64})
      .OutF32({1, 2, 90})
      .Scalars({0.16})
      .Tolerance(2e-6, 4e-3)
      .Run();
  // Many short sequences, of which a block sees few; operands of two dtypes; no lse asked for; wide heads.
  const Dims packed = {1, 2150, 1, 24};
  const Mask ninety = {[](int64_t i) { return i / 2100 ? 3 : i / 90; },
                       [](int64_t i) { return i % 90 / 20; }};
  Forward(test, packed, packed, &ninety, 0.2);
  Backward(test, packed, packed, &ninety, 0.2);
  const Dims mixed = {2, 70, 2, 24}, wide = {1, 70, 2, 600};
  test.Case("attention")
      .In(mixed)
      .InF32(mixed)
      .In(mixed)
      .Missing()
      .Missing()
      .Out(mixed)
      .OutMissing()
      .Scalars({0.2})
      .Tolerance(2e-6, 4e-3)
      .Run();
  test.Case("attention")
      .In(mixed)
      .In(mixed)
      .In(mixed)
      .Missing()
      .Missing()
      .OutF32(mixed)
      .OutMissing()
      .Scalars({0})
      .Tolerance(2e-6, 4e-3)
      .Run();
  test.Case("attention_backward")
      .In(mixed)
      .In(mixed)
      .In(mixed)
      .Missing()
      .Missing()
      .FromRef("attention", {0, 1, 2, -1, -1}, {0.2}, {mixed, {2, 2, 70}}, 0, false)
      .FromRef("attention", {0, 1, 2, -1, -1}, {0.2}, {mixed, {2, 2, 70}}, 1)
      .InF32(mixed)
      .OutF32(mixed)
      .Out(mixed)
      .OutF32(mixed)
      .Scalars({0.2})
      .Tolerance(6e-6, 1.2e-2)
      .Run();
  Forward(test, wide, wide, &masks[1], 0.04);
  // Nothing at all.
  test.Case("attention")
      .In({1, 0, 2, 8})
      .In({1, 0, 2, 8})
      .In({1, 0, 2, 8})
      .Missing()
      .Missing()
      .Out({1, 0, 2, 8})
      .OutF32({1, 2, 0})
      .Scalars({1})
      .Run();
  // Queries without a single key: o is 0 and lse -inf, and their gradient 0.
  const Dims q = {1, 5, 1, 16}, none = {1, 0, 1, 16}, stats = {1, 1, 5};
  test.Case("attention")
      .In(q)
      .In(none)
      .In(none)
      .Missing()
      .Missing()
      .Out(q)
      .OutF32(stats)
      .Scalars({1})
      .Tolerance(0, 0)
      .Run();
  test.Case("attention_backward")
      .In(q)
      .In(none)
      .In(none)
      .Missing()
      .Missing()
      .FromRef("attention", {0, 1, 2, -1, -1}, {1}, {q, stats}, 0)
      .FromRef("attention", {0, 1, 2, -1, -1}, {1}, {q, stats}, 1)
      .In(q)
      .Out(q)
      .Out(none)
      .Out(none)
      .Scalars({1})
      .Tolerance(0, 0)
      .Run();

  const Dims x = {1, 6, 2, 8};
  test.Case("attention")
      .In(x)
      .In({1, 6, 2, 4})
      .In(x)
      .Missing()
      .Missing()
      .Out(x)
      .OutF32({1, 2, 6})
      .Scalars({1})
      .RunExpecting(PF_ERR_SHAPE);
  test.Case("attention")
      .In(x)
      .In({1, 5, 2, 8})
      .In({1, 5, 2, 8})
      .InInt({1, 5}, masks[0].segment)
      .InInt({1, 5}, masks[0].order)
      .Out(x)
      .OutF32({1, 2, 6})
      .Scalars({1})
      .RunExpecting(PF_ERR_SHAPE);
  test.Case("attention")
      .In(x)
      .In(x)
      .In(x)
      .InInt({1, 6}, masks[0].segment)
      .Missing()
      .Out(x)
      .OutF32({1, 2, 6})
      .Scalars({1})
      .RunExpecting(PF_ERR_SHAPE);
  test.Case("attention")
      .In(x)
      .In(x)
      .In(x)
      .In({1, 6})
      .In({1, 6})
      .Out(x)
      .OutF32({1, 2, 6})
      .Scalars({1})
      .RunExpecting(PF_ERR_DTYPE);
  test.Case("attention_backward")
      .In(x)
      .In(x)
      .In(x)
      .Missing()
      .Missing()
      .In(x)
      .InF32({1, 2, 5})
      .In(x)
      .Out(x)
      .Out(x)
      .Out(x)
      .Scalars({1})
      .RunExpecting(PF_ERR_SHAPE);

  // Queries that are the first tokens of a longer sequence, behind which lies what they see of the past.
  const Mask past = {[](int64_t i) { return i / 10 % 3; }, [](int64_t i) { return i * 7 % 13; }};
  for (int64_t d : {24, 64, 128})
    for (const auto& [lq, lk] : {std::pair<int64_t, int64_t>{1, 2}, {40, 131}, {130, 203}, {96, 520}})
      for (const Mask& mask : {past, long_masks[0]}) {
        Forward(test, {2, lq, 2, d}, {2, lk, 2, d}, &mask, 0.125);
        if (lq > 1) Backward(test, {2, lq, 1, d}, {2, lk, 1, d}, &mask, 0.125);
      }
  for (int64_t d : {8, 64, 80}) {
    const int64_t lq = 30, lk = 131;
    op_test::Case c = test.Case("attention");
    c.In({2, lq, 2, d}).In({2, lk, 2, d}).In({2, lk, 2, d});
    c.InInt({2, lk}, past.segment).InInt({2, lk}, past.order).In({2, d}).In({2, d});
    c.InF32({2 * lk, d / 2}).InF32({2 * lk, d / 2});
    c.Out({2, lq, 2, d}).OutF32({2, 2, lq}).Scalars({0.125, 1e-6, 100}).Tolerance(2e-6, 6e-3).Run();
  }
  for (int64_t d : {64, 128}) {
    // Rings of buffers that go round several times while many blocks run at once.
    const Mask units = {[](int64_t i) { return i / 900; }, [](int64_t i) { return i % 900 / 100; }};
    for (const auto& [lq, lk] : {std::pair<int64_t, int64_t>{260, 1150}, {1150, 260}})
      for (const Mask* mask : {&units, static_cast<const Mask*>(nullptr)}) {
        if (mask && lk < lq) continue;
        Forward(test, {1, lq, 4, d}, {1, lk, 4, d}, mask, 0.125, 20);
        Backward(test, {1, lq, 4, d}, {1, lk, 4, d}, mask, 0.125, 20);
      }
    Backward(test, {1, 1150, 1, d}, {1, 1150, 1, d}, &units, 0.125, 20);
  }
}
