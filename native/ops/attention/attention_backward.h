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
  float *dq, *delta, *lse;  // [width, columns] by strips and, for the last two, [padded]
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
  static constexpr int64_t kTile = kKeyBlock * kBackwardBlock<E>, kStripTile = kKeyBlock * kStrip<E>;

  int64_t HeadUnits() const {
    return RoundUp(keys * 2 * units + keys / kPer * width + queries * (2 * units + width + 2) +
                       2 * (queries / kPer) * width,
                   16);
  }
  // Key blocks that a query block meets in a row, and those of them that one sum into dq takes together.
  static constexpr int64_t kGroup = 4, kSummed = kOnTiles<E> ? kGroup : 1;
  // Logits and their gradients of a strip, both of a block as the units of the products, those of dq for
  // kSummed blocks, and the gradients of a group of key blocks.
  static constexpr int64_t kTileUnits = 2 * kStripTile + (kPer == 1 ? 0 : (2 + kSummed) * kTile / kPer);
  int64_t ThreadUnits() const {
    return RoundUp(kTileUnits + 2 * kGroup * kKeyBlock * width + kBufferRows * RoundUp(s.d, 16), 16);
  }
  int64_t StripOf(const Block& q) const { return kOnTiles<E> ? kStrip<E> : q.padded; }
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
    for (int i : {1, 2}) FetchRows(a->in[i], offset, Step(), k.count, s.d);
    PackRows<E>(a->in[1], offset, Step(), k.count, k.padded, s.d, buffer, h.k_rows + at * units);
    PackRows<E>(a->in[2], offset, Step(), k.count, k.padded, s.d, buffer, h.v_rows + at * units);
    PackSummed<E>(a->in[1], offset, Step(), k.count, k.padded, s.d, width, buffer,
                  h.k_pairs + at / kPer * width);
  }
  void PackQueries(const Head& h, int64_t pair, const Block& q, float* buffer) const {
    const int64_t offset = QueryOffset(pair, q.start), at = q.at - h.first_query;
    const PfView &x = a->in[0], &out = a->in[5], &dout = a->in[7];
    for (const PfView* v : {&x, &dout, &out}) FetchRows(*v, offset, Step(), q.count, s.d);
    const int64_t strip = StripOf(q);
    for (int64_t c = 0; c < q.padded; c += strip) {
      const int64_t left = q.count - c, some = left < 0 ? 0 : left < strip ? left : strip;
      const int64_t first = offset + c * Step(), to = (at + c) * units;
      PackColumns<E>(x, first, Step(), some, strip, s.d, false, buffer, h.q_columns + to);
      PackColumns<E>(dout, first, Step(), some, strip, s.d, false, buffer, h.do_columns + to);
    }
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
    float *p, *ds;           // of a strip, [keys, kStrip]
    Unit *p_rows, *ds_rows;  // the same as pairs of queries, [kChunk queries, keys, kTileRow]
    Unit* ds_pairs;          // and as pairs of keys, [strips, kSummed blocks of keys, kStrip]

    explicit Tile(Unit* mine)
        : p(reinterpret_cast<float*>(mine)),
          ds(p + kStripTile),
          p_rows(mine + 2 * kStripTile),
          ds_rows(p_rows + kTile / kPer),
          ds_pairs(ds_rows + kTile / kPer) {
      if constexpr (kPer == 1) {
        p_rows = mine;
        ds_rows = ds_pairs = mine + kTile;
      }
    }
    // Of the strip at column c, of the block that begins `key` padded keys after the first.
    Unit* Pairs(int64_t c, int64_t key) const {
      return ds_pairs + (c * kKeyBlock * kSummed + key * kStrip<E>) / kPer;
    }
    // Where the chunk with column c of p_rows or ds_rows begins.
    static int64_t Chunk(int64_t c) { return c / kChunk * kKeyBlock * kTileRow; }
  };
  // On tiles a row of a chunk fills one.
  static constexpr int64_t kChunk = kOnTiles<E> ? kPer * kTileSide : kBackwardBlock<E>;
  static constexpr int64_t kTileRow = kChunk / kPer;

  // The strip from column c on. The gradients lack the factor `scale`, which dq and dk get at the end.
  template <bool kMask>
  void Weigh(const Layout& l, const Head& h, const Block& q, const Block& k, int64_t c, int64_t n,
             const Tile& t, Unit* pairs) const {
    for (int64_t v = 0; v < n; v += kLanes) {
      const int64_t at = q.at - h.first_query + c + v;
      const Vf minus = -LoadF(h.lse + at), delta = LoadF(h.delta + at);
      const auto weight = [&](int64_t j) {
        Vf p = Exp2<kPer == 2>(Fma(LoadF(t.p + j * kStrip<E> + v), Set1(scale2), minus));
        if constexpr (kMask) p = WhereSeen(l, q, k, c + v, j, p, (Vf){});
        return p;
      };
      const auto gradient = [&](int64_t j, Vf p) { return p * (LoadF(t.ds + j * kStrip<E> + v) - delta); };
      if constexpr (kPer == 1) {
        for (int64_t j = 0; j < k.count; ++j) {
          const Vf p = weight(j), ds = gradient(j, p);
          StoreF(t.p + j * kStrip<E> + v, p);
          StoreF(t.ds + j * kStrip<E> + v, ds);
        }
      } else {
        const int64_t row = 2 * kTileRow;  // in values
        Bf16* p_row = reinterpret_cast<Bf16*>(t.p_rows + Tile::Chunk(c)) + c % kChunk + v;
        Bf16* ds_row = reinterpret_cast<Bf16*>(t.ds_rows + Tile::Chunk(c)) + c % kChunk + v;
        int64_t j = 0;
        for (; j + 1 < k.count; j += 2, p_row += 2 * row, ds_row += 2 * row) {
          const Vf p0 = weight(j), p1 = weight(j + 1), ds0 = gradient(j, p0), ds1 = gradient(j + 1, p1);
          StoreRows(p_row, row, p0, p1, nullptr);
          StoreRows(ds_row, row, ds0, ds1, pairs + j / 2 * kStrip<E> + v);
        }
        if (j < k.count) {
          const Vf p = weight(j), ds = gradient(j, p);
          StoreF(p_row, p);
          StoreF(ds_row, ds);
          PutUnits<E>(pairs + j / 2 * kStrip<E> + v, ds, (Vf){});
        }
      }
      for (int64_t j = Units(k.count, kPer); j < SummedUnits<E>(k); ++j)
        memset(pairs + j * kStrip<E> + v, 0, sizeof(Vf));
    }
  }
  // The strips of a block; those of padding see nothing.
  struct Strips {
    Strip all[kBackwardBlock<E> / kStrip<E>];
    int64_t count;
    Strips(const Layout& l, const Block& q) : count(CutStrips<E>(l, q, all)) {}
    Visibility Seen(int64_t c, const Block& k) const {
      const int64_t i = c / kStrip<E>;
      return i < count ? See(all[i], k) : kNothing;
    }
  };
  // Logits of a strip, their gradients, and both as units; `pairs` is where those of dq go.
  void Compute(const Layout& l, const Head& h, const Block& q, const Block& k, Visibility see, int64_t c,
               const Tile& t, Unit* pairs) const {
    const int64_t qi = q.at - h.first_query + c, kj = k.at - h.first_key, n = StripOf(q);
    Product g{units, h.k_rows + kj * units, units, kRowColumn<E>, h.q_columns + qi * units, n, t.p, kStrip<E>,
              false};
    Multiply<E>(k.count, n, g);
    g.a = h.v_rows + kj * units;
    g.b = h.do_columns + qi * units;
    g.c = t.ds;
    Multiply<E>(k.count, n, g);
    if (see == kSome)
      Weigh<true>(l, h, q, k, c, n, t, pairs);
    else
      Weigh<false>(l, h, q, k, c, n, t, pairs);
  }
  // What a strip that is not seen adds to the sums of its chunk.
  void Clear(const Block& k, int64_t c, const Tile& t) const {
    for (Unit* rows : {t.p_rows, t.ds_rows})
      for (int64_t j = 0; j < k.count; ++j)
        memset(rows + Tile::Chunk(c) + j * kTileRow + c % kChunk / kPer, 0, kStrip<E> / kPer * sizeof(Unit));
  }
  // The query block's dq from key blocks [k0, k1), at most kSummed, whose tiles have been computed. Those
  // that a strip sees in a row are one sum.
  void AddQueryGradient(const Layout& l, const Head& h, const Block& q, const Strips& strips, int64_t k0,
                        int64_t k1, const Tile& t) const {
    for (int64_t c = 0; c < q.padded; c += StripOf(q)) {
      const auto seen = [&](int64_t j) { return strips.Seen(c, l.keys[j]) != kNothing; };
      const int64_t qi = q.at - h.first_query + c, n = StripOf(q);
      for (int64_t j = k0; j < k1; ++j) {
        if (!seen(j)) continue;
        const Block& first = l.keys[j];
        while (j + 1 < k1 && seen(j + 1)) ++j;
        Product g = SummedKeys<E>(l.keys[j], h.k_pairs + (first.at - h.first_key) / kPer * width, width);
        g.k += (l.keys[j].at - first.at) / kPer;
        g.b = t.Pairs(c, first.at - l.keys[k0].at);
        g.b_row = kStrip<E>;
        g.c = h.dq + qi * width;
        g.c_row = n;
        Multiply<E>(s.d, n, g);
      }
    }
  }
  // What one query block adds to dk and dv of one key block, [keys, width], which begins `key` padded keys
  // after the first that the next sum into dq takes.
  void AddKeyGradients(const Layout& l, const Head& h, const Block& q, const Strips& strips, const Block& k,
                       const Tile& t, int64_t key, float* dk, float* dv) const {
    // Chunks between these have something to sum.
    int64_t from = q.padded, to = 0;
    for (int64_t c = 0; c < q.padded; c += StripOf(q))
      if (strips.Seen(c, k) != kNothing) {
        const int64_t chunk = c / kChunk * kChunk, end = chunk + kChunk;
        if (chunk < from) from = chunk;
        to = end < q.padded ? end : q.padded;
      }
    if (from >= to) return;
    for (int64_t c = from; c < to; c += StripOf(q)) {
      const Visibility see = strips.Seen(c, k);
      if (see == kNothing)
        Clear(k, c, t);
      else
        Compute(l, h, q, k, see, c, t, t.Pairs(c, key));
    }
    const int64_t at = (q.at - h.first_query + from) / kPer * width,
                  column = kOnTiles<E> ? Tile::Chunk(kChunk) : 1;
    Product g{(to - from) / kPer,
              t.p_rows + Tile::Chunk(from),
              kTileRow,
              column,
              h.do_pairs + at,
              width,
              dv,
              width,
              true};
    Multiply<E>(k.count, width, g);
    g.a = t.ds_rows + Tile::Chunk(from);
    g.b = h.q_pairs + at;
    g.c = dk;
    Multiply<E>(k.count, width, g);
  }
  // dk and dv of key blocks [k0, k1), at most kGroup, over query blocks [q0, q1), in order; dq of those too
  // when asked. What a query block needs is fetched once for all of the group.
  void Keys(const Layout& l, const Head& h, int64_t pair, int64_t k0, int64_t k1, int64_t q0, int64_t q1,
            bool with_dq, Unit* mine) const {
    const Tile t(mine);
    const int64_t size = kKeyBlock * width;
    float *dk = reinterpret_cast<float*>(mine + kTileUnits), *dv = dk + kGroup * size;
    memset(dk, 0, (k1 - k0) * size * sizeof(float));
    memset(dv, 0, (k1 - k0) * size * sizeof(float));
    for (int64_t i = q0; i < q1; ++i) {
      const Block& q = l.queries[i];
      const Strips strips(l, q);
      for (int64_t j = k0, first = k0; j < k1; ++j) {
        const int64_t at = (j - k0) * size;
        AddKeyGradients(l, h, q, strips, l.keys[j], t, l.keys[j].at - l.keys[first].at, dk + at, dv + at);
        if (j + 1 < k1 && j + 1 - first < kSummed) continue;
        if (with_dq) AddQueryGradient(l, h, q, strips, first, j + 1, t);
        first = j + 1;
      }
    }
    for (int64_t j = k0; j < k1; ++j, dk += size, dv += size) {
      const Block& k = l.keys[j];
      ScaleAll(dk, k.count * width);
      for (int64_t r = 0; r < k.count; ++r) {
        WriteRow(a->out[1], KeyOffset(pair, k.start + r), s.d, dk + r * width);
        WriteRow(a->out[2], KeyOffset(pair, k.start + r), s.d, dv + r * width);
      }
    }
  }
  // dq of one query block over all key blocks, in order.
  void Queries(const Layout& l, const Head& h, int64_t pair, const Block& q, Unit* mine) const {
    const Tile t(mine);
    const Strips strips(l, q);
    for (int64_t first = 0; first < l.key_count; first += kSummed) {
      const int64_t end = first + kSummed < l.key_count ? first + kSummed : l.key_count;
      for (int64_t j = first; j < end; ++j)
        for (int64_t c = 0; c < q.padded; c += StripOf(q)) {
          const Block& k = l.keys[j];
          const Visibility see = strips.Seen(c, k);
          if (see != kNothing) Compute(l, h, q, k, see, c, t, t.Pairs(c, k.at - l.keys[first].at));
        }
      AddQueryGradient(l, h, q, strips, first, end, t);
    }
    WriteQueries(h, pair, q, RowBuffer(mine));
  }
  void ScaleAll(float* x, int64_t count) const {
    for (int64_t i = 0; i < count; i += kLanes) StoreF(x + i, LoadF(x + i) * scale);
  }
  void WriteQueries(const Head& h, int64_t pair, const Block& q, float* buffer) const {
    const int64_t strip = StripOf(q);
    float* dq = h.dq + (q.at - h.first_query) * width;
    ScaleAll(dq, q.padded * width);
    for (int64_t c = 0; c < q.count; c += strip, dq += strip * width) {
      const int64_t left = q.count - c;
      WriteColumns(dq, strip, s.d, left < strip ? left : strip, a->out[0], QueryOffset(pair, q.start + c),
                   Step(), buffer);
    }
  }
  void OneSweep(const Layout& l, const Head& h, int64_t pair, const Span& span, Unit* mine) const {
    for (int64_t k = span.k0; k < span.k1; k += kGroup)
      Keys(l, h, pair, k, k + kGroup < span.k1 ? k + kGroup : span.k1, span.q0, span.q1, true, mine);
    for (int64_t q = span.q0; q < span.q1; ++q) WriteQueries(h, pair, l.queries[q], RowBuffer(mine));
  }
};

// One sweep does 5/7 of the work of two.
constexpr double kSweepLoss = 0.2;

// One sweep over (key block, query block) serves all three gradients when the units balance. Otherwise two
// sweeps with 7/5 of the work: dq by query block, dk and dv by key block. Both add the same tiles in the same
// order, so the choice changes no bit.
template <class E>
int32_t RunBackward(const PfArgs* a, const AttentionShape& s) {
  const Layout* layouts = MakeLayouts(a, s, BlockSizesOf<E>(kBackwardBlock<E>));
  if (!layouts) return NoMemory(a, "attention_backward");
  Backward<E> backward(a, s);
  const int64_t pairs = s.batch * s.heads, threads = omp_get_max_threads();
  const int64_t most_queries = Most(layouts, s.batch, &Layout::query_count);
  const int64_t most_keys = Most(layouts, s.batch, &Layout::key_count);
  const int64_t most_spans = Most(layouts, s.batch, &Layout::span_count);
  LongestSpan(layouts, s.batch, &backward.keys, &backward.queries);
  const bool local = HeadsAtOnce(threads, backward.HeadUnits()) == threads &&
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
            backward.Keys(l, head_of(pair), pair, k, k + 1, 0, l.query_count, false, tile);
          });
        }
      }
    }
  }
  return PF_OK;
}

}  // namespace
