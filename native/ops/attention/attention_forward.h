// Forward pass in tiles of keys x queries: queries lie in the lanes, so that maxima, sums and rescaling are
// plain vector arithmetic, keys and values are read row by row as they come, and weights leave the softmax in
// the layout that the second product reads.
#pragma once
#include "ops/attention/attention_layout.h"
#include "ops/attention/attention_panel.h"

namespace {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;

// A packed block of keys as the summed dimension of a product: a row of it, and how many units are summed.
template <class E>
inline int64_t SummedUnits(const Block& k) {
  return Units(kOnTiles<E> ? k.padded : k.count, kPerUnit<E>);
}

// Where PackSummed has put a block of keys, as the first operand of a product; `width` is a row of PackPairs.
template <class E>
inline Product SummedKeys(const Block& k, const Unit* keys, int64_t width) {
  Product g{};
  g.k = SummedUnits<E>(k);
  g.a = keys;
  g.a_row = kOnTiles<E> ? g.k : 1;
  g.a_column = kOnTiles<E> ? 1 : width;
  g.accumulate = true;
  return g;
}

// Online softmax of a query block, in base 2: weights are 2^(logit - reference).
struct Softmax {
  alignas(64) float reference[kQueryBlock];  // -inf until something is visible
  alignas(64) float sum[kQueryBlock];

  void Reset() {
    for (float& r : reference) r = -INFINITY;
    memset(sum, 0, sizeof(sum));
  }

  // Turns NV vectors of queries from column c on of a tile of logits s [keys, kQueryBlock] into weights; o
  // are the accumulated outputs [d, kQueryBlock], rescaled when the reference moves.
  template <class E, int NV>
  void Columns(const Layout& l, const Block& q, const Block& k, bool mask, float scale, int64_t c, float* s,
               Unit* weights, float* o, int64_t d) {
    const Vf never = Set1(-INFINITY);
    Vf top[NV];
    for (int v = 0; v < NV; ++v) top[v] = never;
    for (int64_t j = 0; j < k.count; ++j) {
      float* row = s + j * kQueryBlock + c;
      for (int v = 0; v < NV; ++v) {
        Vf t = LoadF(row + v * kLanes);
        if (mask) {
          t = WhereSeen(l, q.at + c + v * kLanes, l.key_segment[k.start + j], l.key_order[k.start + j], t,
                        never);
          StoreF(row + v * kLanes, t);
        }
        top[v] = Max(t, top[v]);
      }
    }
    Vf minus[NV], total[NV];
    for (int v = 0; v < NV; ++v) {
      float* ours = reference + c + v * kLanes;
      const Vf before = LoadF(ours), now = top[v] == never ? never : top[v] * scale;
      Vf after = before;
      total[v] = LoadF(sum + c + v * kLanes);
      // A weight may grow to 2^8 before everything is rescaled: that costs no accuracy and saves most
      // rescaling.
      constexpr float kSlack = 8;
      if (AnyLane(now > before + kSlack)) {
        after = Max(now, before);
        const Vf shrink = after == before ? Set1(1) : Exp2<false>(before - after);
        total[v] *= shrink;
        for (int64_t i = 0; i < d; ++i) {
          float* value = o + i * kQueryBlock + c + v * kLanes;
          StoreF(value, LoadF(value) * shrink);
        }
        StoreF(ours, after);
      }
      minus[v] = after == never ? (Vf){} : -after;
    }
    for (int64_t j = 0; j < k.count; j += kPerUnit<E>) {
      const float* row = s + j * kQueryBlock + c;
      const bool pair = kPerUnit<E> == 2 && j + 1 < k.count;
      for (int v = 0; v < NV; ++v) {
        const auto weight = [&](const float* from) {
          const Vf t = LoadF(from);
          const Vf p = Exp2<kPerUnit<E> == 2>(Fma(t, Set1(scale), minus[v]));
          return mask ? (t == never ? (Vf){} : p) : p;
        };
        const Vf first = weight(row + v * kLanes);
        const Vf second = pair ? weight(row + kQueryBlock + v * kLanes) : (Vf){};
        total[v] += first + second;
        PutUnits<E>(weights + j / kPerUnit<E> * kQueryBlock + c + v * kLanes, first, second);
      }
    }
    for (int64_t j = Units(k.count, kPerUnit<E>); j < SummedUnits<E>(k); ++j)
      memset(weights + j * kQueryBlock + c, 0, NV * sizeof(Vf));
    for (int v = 0; v < NV; ++v) StoreF(sum + c + v * kLanes, total[v]);
  }

  template <class E>
  void Tile(const Layout& l, const Block& q, const Block& k, bool mask, float scale, float* s, Unit* weights,
            float* o, int64_t d) {
    int64_t c = 0;
    constexpr int kAtOnce = kQueryBlock % (3 * kLanes) ? 2 : 3;
    for (; c + kAtOnce * kLanes <= q.padded; c += kAtOnce * kLanes)
      Columns<E, kAtOnce>(l, q, k, mask, scale, c, s, weights, o, d);
    for (; c < q.padded; c += kLanes) Columns<E, 1>(l, q, k, mask, scale, c, s, weights, o, d);
  }
};

template <class E>
struct Forward {
  const PfArgs* a;
  AttentionShape s;
  float scale;  // of logits in base 2, positive: the sign is packed with the queries
  bool negate;
  int64_t units, width;  // of a packed row, of a row of values
  int64_t keys;          // padded keys that a packed head has room for
  Turn turns[2];         // of queries and keys

  Forward(const PfArgs* args, const AttentionShape& shape)
      : a(args), s(shape), units(RowUnits<E>(shape.d)), width(RoundUp(shape.d, kLanes)), keys(0) {
    const float given = static_cast<float>(PfParams<AttentionParams>(args).scale);
    negate = given < 0;
    scale = fabsf(given) * kLog2E;
  }

  int64_t HeadUnits() const { return RoundUp(keys * units + keys / kPerUnit<E> * width, 16); }
  int64_t ThreadUnits() const {
    return RoundUp(kQueryBlock * (units + 2 * kKeyBlock + width) + kBufferRows * RoundUp(s.d, 16), 16);
  }
  float* RowBuffer(Unit* mine) const {
    return reinterpret_cast<float*>(mine + ThreadUnits()) - kBufferRows * RoundUp(s.d, 16);
  }

  // A packed head holds rows of k, then pairs of rows of v, of the blocks from padded key first_key on.
  void Pack(int64_t pair, const Block& k, int64_t first_key, Unit* head, float* buffer) const {
    const int64_t step = s.heads * s.d, at = k.at - first_key;
    const int64_t offset = KeyOffset(pair, k.start);
    PackRows<E>(a->in[1], offset, step, k.count, k.padded, s.d, buffer, head + at * units, &turns[1],
                pair / s.heads * s.lk + k.start);
    PackSummed<E>(a->in[2], offset, step, k.count, k.padded, s.d, width, buffer,
                  head + keys * units + at / kPerUnit<E> * width);
  }

  int64_t QueryOffset(int64_t pair, int64_t i) const {
    return ((pair / s.heads * s.lq + i) * s.heads + pair % s.heads) * s.d;
  }
  int64_t KeyOffset(int64_t pair, int64_t j) const {
    return ((pair / s.heads * s.lk + j) * s.heads + pair % s.heads) * s.d;
  }
  void FetchQueries(int64_t pair, const Block& q) const {
    FetchRows(a->in[0], QueryOffset(pair, q.start), s.heads * s.d, q.count, s.d);
  }
  void FetchKeys(int64_t pair, const Block& k) const {
    for (int i = 1; i <= 2; ++i) FetchRows(a->in[i], KeyOffset(pair, k.start), s.heads * s.d, k.count, s.d);
  }

  // One query block over key blocks [k0, k1), which are packed on the way if they are not yet.
  void Attend(const Layout& l, int64_t pair, const Block& q, int64_t k0, int64_t k1, int64_t first_key,
              bool pack, Unit* head, Unit* mine) const {
    Unit *columns = mine, *weights = columns + units * kQueryBlock;
    float* logits = reinterpret_cast<float*>(weights + kKeyBlock * kQueryBlock);
    float* o = logits + kKeyBlock * kQueryBlock;
    float* buffer = RowBuffer(mine);
    const int64_t offset = QueryOffset(pair, q.start);
    PackColumns<E>(a->in[0], offset, s.heads * s.d, q.count, q.padded, s.d, negate, buffer, columns,
                   &turns[0], pair / s.heads * s.lq + q.start);
    memset(o, 0, width * kQueryBlock * sizeof(float));
    Softmax softmax;
    softmax.Reset();
    for (int64_t j = k0; j < k1; ++j) {
      const Block& k = l.keys[j];
      if (pack) {
        if (j + 1 < k1) FetchKeys(pair, l.keys[j + 1]);
        Pack(pair, k, first_key, head, buffer);
      }
      const Visibility see = See(q, k);
      if (see == kNothing) continue;
      const Unit* k_rows = head + (k.at - first_key) * units;
      const Unit* v_pairs = head + keys * units + (k.at - first_key) / kPerUnit<E> * width;
      Multiply<E>(k.count, q.padded,
                  {units, k_rows, units, 1, columns, q.padded, logits, kQueryBlock, false});
      softmax.Tile<E>(l, q, k, see == kSome, scale, logits, weights, o, s.d);
      Product values = SummedKeys<E>(k, v_pairs, width);
      values.b = weights;
      values.b_row = values.c_row = kQueryBlock;
      values.c = o;
      Multiply<E>(s.d, q.padded, values);
    }
    Write(pair, q, offset, softmax, o, buffer);
  }

  void Write(int64_t pair, const Block& q, int64_t offset, const Softmax& softmax, float* o,
             float* buffer) const {
    // The largest visible logit adds at least 2^-8, so a sum of 0 means that nothing was visible.
    for (int64_t c = 0; c < q.padded; c += kLanes) {
      const Vf sum = LoadF(softmax.sum + c), inverse = sum == 0 ? (Vf){} : 1 / sum;
      for (int64_t i = 0; i < s.d; ++i)
        StoreF(o + i * kQueryBlock + c, LoadF(o + i * kQueryBlock + c) * inverse);
    }
    WriteColumns(o, kQueryBlock, s.d, q.count, a->out[0], offset, s.heads * s.d, buffer);
    float* lse = PfData<float>(a->out[1]);
    if (!lse) return;
    lse += pair * s.lq + q.start;
    for (int64_t i = 0; i < q.count; ++i)
      lse[i] = softmax.sum[i] == 0 ? -INFINITY : softmax.reference[i] * kLn2 + logf(softmax.sum[i]);
  }
};

template <class E>
int32_t RunForward(const PfArgs* a, const AttentionShape& s, const Layout* layouts) {
  Forward<E> forward(a, s);
  if (!MakeTurns(a, s, forward.turns)) return NoMemory(a, "attention");
  const int64_t pairs = s.batch * s.heads, threads = omp_get_max_threads();
  const int64_t most_queries = Most(layouts, s.batch, &Layout::query_count);
  const int64_t most_keys = Most(layouts, s.batch, &Layout::key_count);
  const int64_t most_spans = Most(layouts, s.batch, &Layout::span_count);
  int64_t span_queries;
  LongestSpan(layouts, s.batch, &forward.keys, &span_queries);
  // One part in 24: 30 heads on two threads, the published model on a small machine, are spans of their own.
  const bool local =
      forward.HeadUnits() <= LocalUnits() && SpansBalance(layouts, s.heads, 0, pairs, 1.0 / 24);
  if (!local) forward.keys = Most(layouts, s.batch, &Layout::key_length);
  const int64_t head_units = forward.HeadUnits(), mine = forward.ThreadUnits();
  const int64_t at_once = local ? pairs : HeadsAtOnce(pairs, head_units);
  Unit* packed = Scratch<Unit>(a, (local ? threads : at_once) * head_units);
  Unit* buffers = Scratch<Unit>(a, threads * mine);
  if (!packed || !buffers) return NoMemory(a, "attention");
  const bool parallel = pairs * s.lq * s.d > kParallelWork;

  for (int64_t first = 0; first < pairs; first += at_once) {
    const int64_t heads = pairs - first < at_once ? pairs - first : at_once;
#pragma omp parallel if (parallel)
    {
      const TileState tiles;
      Unit* buffer = buffers + omp_get_thread_num() * mine;
      float* row_buffer = forward.RowBuffer(buffer);
      const auto share = [&](int64_t Layout::*count, int64_t most, auto body) {
        ShareOut(layouts, s.heads, first, heads, count, most, body);
      };
      if (local) {
        Unit* head = packed + omp_get_thread_num() * head_units;
        share(&Layout::span_count, most_spans, [&](int64_t pair, const Layout& l, int64_t i) {
          const Span& span = l.spans[i];
          const int64_t first_key = span.k0 < l.key_count ? l.keys[span.k0].at : 0;
          for (int64_t q = span.q0; q < span.q1; ++q) {
            if (q + 1 < span.q1) forward.FetchQueries(pair, l.queries[q + 1]);
            forward.Attend(l, pair, l.queries[q], span.k0, span.k1, first_key, q == span.q0, head, buffer);
          }
        });
      } else {
        const auto head_of = [&](int64_t pair) { return packed + (pair - first) * head_units; };
        share(&Layout::key_count, most_keys, [&](int64_t pair, const Layout& l, int64_t k) {
          forward.Pack(pair, l.keys[k], 0, head_of(pair), row_buffer);
        });
        share(&Layout::query_count, most_queries, [&](int64_t pair, const Layout& l, int64_t q) {
          forward.Attend(l, pair, l.queries[q], 0, l.key_count, 0, false, head_of(pair), buffer);
        });
      }
    }
  }
  return PF_OK;
}

}  // namespace
