// Backward pass in the same tiles of keys x queries. Weights are computed again from the log-sum-exp.
#pragma once
#include "ops/attention/attention_forward.h"

namespace {

// Everything backward needs of one head, or of one span of it, packed once. Blocks are found by key.at -
// first_key and query.at - first_query.
struct Head {
  int64_t first_key, first_query;
  Unit *k_rows, *v_rows, *k_pairs;                    // per key block
  Unit *q_columns, *do_columns, *q_pairs, *do_pairs;  // per query block
  float *dq, *delta, *lse;                            // [width, padded] and, for the last two, [padded]
};

template <class E>
struct Backward {
  const PfArgs* a;
  AttentionShape s;
  float scale, scale2;  // of logits, in base e and base 2
  int64_t units, width;
  int64_t keys, queries;  // padded lengths a Head has room for

  Backward(const PfArgs* args, const AttentionShape& shape)
      : a(args),
        s(shape),
        scale(static_cast<float>(PfParams<AttentionParams>(args).scale)),
        scale2(scale * kLog2E),
        units(RowUnits<E>(shape.d)),
        width(RoundUp(shape.d, kLanes)),
        keys(0),
        queries(0) {}

  static constexpr int64_t kPer = kPerUnit<E>;
  static constexpr int64_t kTile = kKeyBlock * kQueryBlock;

  int64_t HeadUnits() const {
    return RoundUp(keys * 2 * units + keys / kPer * width + queries * (2 * units + width + 2) +
                       2 * (queries / kPer) * width,
                   16);
  }
  // Logits, their gradients, both as the units of the products, and the gradients of one key block.
  int64_t ThreadUnits() const {
    return RoundUp(5 * kTile + 2 * kKeyBlock * width + kBufferRows * RoundUp(s.d, 16), 16);
  }
  float* RowBuffer(Unit* mine) const {
    return reinterpret_cast<float*>(mine + ThreadUnits()) - kBufferRows * RoundUp(s.d, 16);
  }

  Head Place(Unit* base, int64_t first_key, int64_t first_query) const {
    Head h{first_key, first_query, base,    nullptr, nullptr, nullptr,
           nullptr,   nullptr,     nullptr, nullptr, nullptr, nullptr};
    h.v_rows = h.k_rows + keys * units;
    h.k_pairs = h.v_rows + keys * units;
    h.q_columns = h.k_pairs + keys / kPer * width;
    h.do_columns = h.q_columns + queries * units;
    h.q_pairs = h.do_columns + queries * units;
    h.do_pairs = h.q_pairs + queries / kPer * width;
    h.dq = reinterpret_cast<float*>(h.do_pairs + queries / kPer * width);
    h.delta = h.dq + queries * width;
    h.lse = h.delta + queries;
    return h;
  }
  int64_t Step() const { return s.heads * s.d; }
  int64_t QueryOffset(int64_t pair, int64_t i) const {
    return (pair / s.heads * s.lq + i) * Step() + pair % s.heads * s.d;
  }
  int64_t KeyOffset(int64_t pair, int64_t j) const {
    return (pair / s.heads * s.lk + j) * Step() + pair % s.heads * s.d;
  }

  void PackKeys(const Head& h, int64_t pair, const Block& k, float* buffer) const {
    const int64_t offset = KeyOffset(pair, k.start), at = k.at - h.first_key;
    PackRows<E>(a->in[1], offset, Step(), k.count, k.padded, s.d, buffer, h.k_rows + at * units);
    PackRows<E>(a->in[2], offset, Step(), k.count, k.padded, s.d, buffer, h.v_rows + at * units);
    PackSummed<E>(a->in[1], offset, Step(), k.count, k.padded, s.d, width, buffer,
                  h.k_pairs + at / kPer * width);
  }
  void PackQueries(const Head& h, int64_t pair, const Block& q, float* buffer) const {
    const int64_t offset = QueryOffset(pair, q.start), at = q.at - h.first_query;
    const PfView &x = a->in[0], &out = a->in[5], &dout = a->in[7];
    PackColumns<E>(x, offset, Step(), q.count, q.padded, s.d, false, buffer, h.q_columns + at * units);
    PackColumns<E>(dout, offset, Step(), q.count, q.padded, s.d, false, buffer, h.do_columns + at * units);
    PackPairs<E>(x, offset, Step(), q.count, q.padded, s.d, width, buffer, h.q_pairs + at / kPer * width);
    PackPairs<E>(dout, offset, Step(), q.count, q.padded, s.d, width, buffer, h.do_pairs + at / kPer * width);
    memset(h.dq + at * width, 0, q.padded * width * sizeof(float));
    const float* lse = PfData<float>(a->in[6]) + pair * s.lq + q.start;
    for (int64_t r = 0; r < q.padded; ++r) {
      // Rows that see nothing, and rows that are not there, get the weight 2^-infinity.
      const bool blind = r >= q.count || lse[r] == -INFINITY;
      h.lse[at + r] = blind ? INFINITY : lse[r] * kLog2E;
      h.delta[at + r] = 0;
      if (r >= q.count) continue;
      const float* o = ReadRow(out, offset + r * Step(), s.d, buffer);
      const float* g = ReadRow(dout, offset + r * Step(), s.d, buffer + RoundUp(s.d, 16));
      h.delta[at + r] = RowSum(s.d, [&](int64_t i, int64_t m) { return LoadN(o + i, m) * LoadN(g + i, m); });
    }
  }

  // Weights and gradients of the logits of one tile, as the units of the products that follow.
  struct Tile {
    float *p, *ds;  // [keys, kQueryBlock]
    Unit *p_rows, *ds_rows, *ds_pairs;

    explicit Tile(Unit* mine)
        : p(reinterpret_cast<float*>(mine)),
          ds(p + kTile),
          p_rows(mine + 2 * kTile),
          ds_rows(mine + 3 * kTile),
          ds_pairs(mine + 4 * kTile) {
      if constexpr (kPer == 1) {
        p_rows = mine;
        ds_rows = ds_pairs = mine + kTile;
      }
    }
  };
  static constexpr int64_t kTileRow = kQueryBlock / kPer;  // units of a row of p_rows and ds_rows

  void Compute(const Layout& l, const Head& h, const Block& q, const Block& k, bool mask,
               const Tile& t) const {
    const int64_t qi = q.at - h.first_query, kj = k.at - h.first_key;
    Multiply<E>(k.count, q.padded,
                {units, h.k_rows + kj * units, units, 1, h.q_columns + qi * units, q.padded, t.p, kQueryBlock,
                 false});
    Multiply<E>(k.count, q.padded,
                {units, h.v_rows + kj * units, units, 1, h.do_columns + qi * units, q.padded, t.ds,
                 kQueryBlock, false});
    for (int64_t c = 0; c < q.padded; c += kLanes) {
      const Vf lse = LoadF(h.lse + qi + c), delta = LoadF(h.delta + qi + c);
      for (int64_t j = 0; j < k.count; j += kPer) {
        Vf p[2] = {}, ds[2] = {};
        for (int64_t i = 0; i < kPer && j + i < k.count; ++i) {
          const int64_t at = (j + i) * kQueryBlock + c;
          p[i] = Exp2<kPerUnit<E> == 2>(Fma(LoadF(t.p + at), Set1(scale2), -lse));
          if (mask)
            p[i] = WhereSeen(l, q.at + c, l.key_segment[k.start + j + i], l.key_order[k.start + j + i], p[i],
                             (Vf){});
          ds[i] = p[i] * (LoadF(t.ds + at) - delta) * scale;
          if constexpr (kPer == 2) {
            StoreF(reinterpret_cast<Bf16*>(t.p_rows) + at, p[i]);
            StoreF(reinterpret_cast<Bf16*>(t.ds_rows) + at, ds[i]);
          } else {
            StoreF(t.p + at, p[i]);
            StoreF(t.ds + at, ds[i]);
          }
        }
        if constexpr (kPer == 2) PutUnits<E>(t.ds_pairs + j / 2 * kQueryBlock + c, ds[0], ds[1]);
      }
      for (int64_t j = Units(k.count, kPer); j < SummedUnits<E>(k); ++j)
        memset(t.ds_pairs + j * kQueryBlock + c, 0, sizeof(Vf));
    }
  }
  void AddQueryGradient(const Head& h, const Block& q, const Block& k, const Tile& t) const {
    const int64_t qi = q.at - h.first_query, kj = k.at - h.first_key;
    Product g = SummedKeys<E>(k, h.k_pairs + kj / kPer * width, width);
    g.b = t.ds_pairs;
    g.b_row = kQueryBlock;
    g.c = h.dq + qi * width;
    g.c_row = q.padded;
    Multiply<E>(s.d, q.padded, g);
  }
  // dk and dv of one key block over query blocks [q0, q1), in order; dq of those too when asked.
  void Keys(const Layout& l, const Head& h, int64_t pair, const Block& k, int64_t q0, int64_t q1,
            bool with_dq, Unit* mine) const {
    const Tile t(mine);
    float *dk = reinterpret_cast<float*>(mine + 5 * kTile), *dv = dk + kKeyBlock * width;
    memset(dk, 0, k.count * width * sizeof(float));
    memset(dv, 0, k.count * width * sizeof(float));
    for (int64_t i = q0; i < q1; ++i) {
      const Block& q = l.queries[i];
      const Visibility see = See(q, k);
      if (see == kNothing) continue;
      Compute(l, h, q, k, see == kSome, t);
      const int64_t at = (q.at - h.first_query) / kPer * width, sums = q.padded / kPer;
      Multiply<E>(k.count, width, {sums, t.p_rows, kTileRow, 1, h.do_pairs + at, width, dv, width, true});
      Multiply<E>(k.count, width, {sums, t.ds_rows, kTileRow, 1, h.q_pairs + at, width, dk, width, true});
      if (with_dq) AddQueryGradient(h, q, k, t);
    }
    for (int64_t r = 0; r < k.count; ++r) {
      WriteRow(a->out[1], KeyOffset(pair, k.start + r), s.d, dk + r * width);
      WriteRow(a->out[2], KeyOffset(pair, k.start + r), s.d, dv + r * width);
    }
  }
  // dq of one query block over all key blocks, in order.
  void Queries(const Layout& l, const Head& h, int64_t pair, const Block& q, Unit* mine) const {
    const Tile t(mine);
    for (int64_t j = 0; j < l.key_count; ++j) {
      const Visibility see = See(q, l.keys[j]);
      if (see == kNothing) continue;
      Compute(l, h, q, l.keys[j], see == kSome, t);
      AddQueryGradient(h, q, l.keys[j], t);
    }
    WriteQueries(h, pair, q, RowBuffer(mine));
  }
  void WriteQueries(const Head& h, int64_t pair, const Block& q, float* buffer) const {
    WriteColumns(h.dq + (q.at - h.first_query) * width, q.padded, s.d, q.count, a->out[0],
                 QueryOffset(pair, q.start), Step(), buffer);
  }
  void OneSweep(const Layout& l, const Head& h, int64_t pair, const Span& span, Unit* mine) const {
    for (int64_t k = span.k0; k < span.k1; ++k) Keys(l, h, pair, l.keys[k], span.q0, span.q1, true, mine);
    for (int64_t q = span.q0; q < span.q1; ++q) WriteQueries(h, pair, l.queries[q], RowBuffer(mine));
  }
};

// One sweep does 5/7 of the work of two.
constexpr double kSweepLoss = 0.2;

// One sweep over (key block, query block) serves all three gradients when the units balance. Otherwise two
// sweeps with 7/5 of the work: dq by query block, dk and dv by key block. Both add the same tiles in the same
// order, so the choice changes no bit.
template <class E>
int32_t RunBackward(const PfArgs* a, const AttentionShape& s, const Layout* layouts) {
  Backward<E> backward(a, s);
  const int64_t pairs = s.batch * s.heads, threads = omp_get_max_threads();
  const int64_t most_queries = Most(layouts, s.batch, &Layout::query_count);
  const int64_t most_keys = Most(layouts, s.batch, &Layout::key_count);
  const int64_t most_spans = Most(layouts, s.batch, &Layout::span_count);
  LongestSpan(layouts, s.batch, &backward.keys, &backward.queries);
  const bool local = most_spans > 1 && backward.HeadUnits() <= LocalUnits() &&
                     SpansBalance(layouts, s.heads, 0, pairs, kSweepLoss);
  if (!local) {
    backward.keys = Most(layouts, s.batch, &Layout::key_length);
    backward.queries = Most(layouts, s.batch, &Layout::query_length);
  }
  const int64_t head_units = backward.HeadUnits(), mine = backward.ThreadUnits();
  const int64_t at_once = local ? pairs : HeadsAtOnce(pairs, head_units);
  Unit* packed = Scratch<Unit>(a, (local ? threads : at_once) * head_units);
  Unit* buffers = Scratch<Unit>(a, threads * mine);
  if (!packed || !buffers) return NoMemory(a, "attention_backward");
  const bool parallel = pairs * s.lq * s.d > kParallelWork;

  for (int64_t first = 0; first < pairs; first += at_once) {
    const int64_t heads = pairs - first < at_once ? pairs - first : at_once;
    const bool one_sweep = SpansBalance(layouts, s.heads, first, heads, kSweepLoss);
    const auto head_of = [&](int64_t pair) {
      return backward.Place(packed + (pair - first) * head_units, 0, 0);
    };
#pragma omp parallel if (parallel)
    {
      const TileState tiles;
      Unit* tile = buffers + omp_get_thread_num() * mine;
      float* row_buffer = backward.RowBuffer(tile);
      const auto share = [&](int64_t Layout::*count, int64_t most, auto body) {
        ShareOut(layouts, s.heads, first, heads, count, most, body);
      };
      if (local) {
        Unit* mine_packed = packed + omp_get_thread_num() * head_units;
        share(&Layout::span_count, most_spans, [&](int64_t pair, const Layout& l, int64_t i) {
          const Span& span = l.spans[i];
          const Head head = backward.Place(mine_packed, span.k0 < l.key_count ? l.keys[span.k0].at : 0,
                                           span.q0 < l.query_count ? l.queries[span.q0].at : 0);
          for (int64_t k = span.k0; k < span.k1; ++k) backward.PackKeys(head, pair, l.keys[k], row_buffer);
          for (int64_t q = span.q0; q < span.q1; ++q)
            backward.PackQueries(head, pair, l.queries[q], row_buffer);
          backward.OneSweep(l, head, pair, span, tile);
        });
      } else {
        share(&Layout::key_count, most_keys, [&](int64_t pair, const Layout& l, int64_t k) {
          backward.PackKeys(head_of(pair), pair, l.keys[k], row_buffer);
        });
        share(&Layout::query_count, most_queries, [&](int64_t pair, const Layout& l, int64_t q) {
          backward.PackQueries(head_of(pair), pair, l.queries[q], row_buffer);
        });
        if (one_sweep) {
          share(&Layout::span_count, most_spans, [&](int64_t pair, const Layout& l, int64_t i) {
            backward.OneSweep(l, head_of(pair), pair, l.spans[i], tile);
          });
        } else {
          share(&Layout::query_count, most_queries, [&](int64_t pair, const Layout& l, int64_t q) {
            backward.Queries(l, head_of(pair), pair, l.queries[q], tile);
          });
          share(&Layout::key_count, most_keys, [&](int64_t pair, const Layout& l, int64_t k) {
            backward.Keys(l, head_of(pair), pair, l.keys[k], 0, l.query_count, false, tile);
          });
        }
      }
    }
  }
  return PF_OK;
}

}  // namespace
