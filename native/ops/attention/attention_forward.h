// Forward pass in tiles of keys x queries: queries lie in the lanes, so that maxima, sums and rescaling are
// plain vector arithmetic, keys and values are read row by row as they come, and weights leave the softmax in
// the layout that the second product reads.
#pragma once
#include <span>
#include <type_traits>

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
  g.a_row = kOnTiles<E> ? kTileSide : 1;
  g.a_column = kOnTiles<E> ? kTileSide * width : width;
  g.accumulate = true;
  return g;
}

// Online softmax of a query block, in base 2: weights are 2^(logit - reference).
template <class E>
struct Softmax {
  alignas(64) float reference[kForwardBlock<E>];  // -inf until something is visible
  alignas(64) float sum[kForwardBlock<E>];

  void Reset() {
    for (float& r : reference) r = -INFINITY;
    memset(sum, 0, sizeof(sum));
  }

  // Turns NV vectors of queries, from column c of the block on, of a tile of logits s [keys, n] into weights;
  // o are their outputs so far [d, n], rescaled when the reference moves.
  template <int NV, bool kMask>
  void Columns(const Layout& l, const Block& q, const Block& k, float scale, int64_t c, int64_t n,
               const float* s, Unit* weights, float* o, int64_t d) {
    if constexpr (kOnTiles<E>) n = kStrip<E>;  // so that the compiler knows
    const Vf never = Set1(-INFINITY);
    Vf before[NV], part[NV];
    for (int v = 0; v < NV; ++v) before[v] = LoadF(reference + c + v * kLanes);
    const auto any = [&](const Vf* x, auto test) {
      bool found = false;
      for (int v = 0; v < NV; ++v) found |= AnyLane(test(x[v]));
      return found;
    };
    // Weights may sum to 2^8 in a tile before everything is rescaled: that costs no accuracy and saves most
    // rescaling, and until then the maximum need not be known.
    constexpr float kMost = 1 << 8;
    if (!any(before, [&](Vf x) { return x == never; })) {
      Weights<NV, kMask>(l, q, k, scale, c, n, s, weights, before, part);
      if (!any(part, [&](Vf x) { return x > kMost; })) {
        AddSums<NV>(c, part);
        return;
      }
    }

    // One chain of maxima would be as long as it takes; kChains of them overlap.
    constexpr int kChains = NV > 2 ? 1 : 4 / NV;
    Vf top[kChains][NV];
    for (auto& chain : top)
      for (Vf& t : chain) t = never;
    const auto raise = [&](int64_t j, int chain) {
      for (int v = 0; v < NV; ++v) {
        Vf t = LoadF(s + j * n + v * kLanes);
        if constexpr (kMask) t = WhereSeen(l, q, k, c + v * kLanes, j, t, never);
        top[chain][v] = Max(t, top[chain][v]);
      }
    };
    int64_t j = 0;
    for (; j + kChains <= k.count; j += kChains)
      for (int i = 0; i < kChains; ++i) raise(j + i, i);
    for (; j < k.count; ++j) raise(j, 0);
    for (int i = 1; i < kChains; ++i)
      for (int v = 0; v < NV; ++v) top[0][v] = Max(top[i][v], top[0][v]);

    for (int v = 0; v < NV; ++v) {
      const Vf now = top[0][v] == never ? never : top[0][v] * scale;
      if (!AnyLane(now > before[v])) continue;
      const Vf after = Max(now, before[v]);
      const Vf shrink = after == before[v] ? Set1(1) : Exp2<false>(before[v] - after);
      float* total = sum + c + v * kLanes;
      StoreF(total, LoadF(total) * shrink);
      for (int64_t i = 0; i < d; ++i) {
        float* value = o + i * n + v * kLanes;
        StoreF(value, LoadF(value) * shrink);
      }
      StoreF(reference + c + v * kLanes, after);
      before[v] = after;
    }
    Weights<NV, kMask>(l, q, k, scale, c, n, s, weights, before, part);
    AddSums<NV>(c, part);
  }
  template <int NV>
  void AddSums(int64_t c, const Vf* part) {
    for (int v = 0; v < NV; ++v) {
      float* total = sum + c + v * kLanes;
      StoreF(total, LoadF(total) + part[v]);
    }
  }

  // Weights of NV vectors against these references, as units of the second product, and their sums.
  template <int NV, bool kMask>
  void Weights(const Layout& l, const Block& q, const Block& k, float scale, int64_t c, int64_t n,
               const float* s, Unit* weights, const Vf* references, Vf* sums) {
    Vf minus[NV];
    for (int v = 0; v < NV; ++v) {
      minus[v] = references[v] == Set1(-INFINITY) ? (Vf){} : -references[v];
      sums[v] = (Vf){};
    }
    for (int64_t j = 0; j < k.count; j += kPerUnit<E>) {
      const bool pair = kPerUnit<E> == 2 && j + 1 < k.count;
      for (int v = 0; v < NV; ++v) {
        const auto weight = [&](int64_t key) {
          const Vf p = Exp2<kPerUnit<E> == 2>(Fma(LoadF(s + key * n + v * kLanes), Set1(scale), minus[v]));
          return kMask ? WhereSeen(l, q, k, c + v * kLanes, key, p, (Vf){}) : p;
        };
        const Vf first = weight(j), second = pair ? weight(j + 1) : (Vf){};
        sums[v] += first + second;
        PutUnits<E>(weights + j / kPerUnit<E> * n + v * kLanes, first, second);
      }
    }
    for (int64_t j = Units(k.count, kPerUnit<E>); j < SummedUnits<E>(k); ++j)
      memset(weights + j * n, 0, NV * sizeof(Vf));
  }

  // A strip of the block.
  void Weigh(const Layout& l, const Block& q, const Strip& t, const Block& k, bool mask, float scale,
             const float* s, Unit* weights, float* o, int64_t d) {
    constexpr int kAtOnce = kOnTiles<E> ? 1 : 3;
    const auto columns = [&](auto count, int64_t at) {
      constexpr int kCount = decltype(count)::value;
      const auto body = mask ? &Softmax::Columns<kCount, true> : &Softmax::Columns<kCount, false>;
      (this->*body)(l, q, k, scale, t.c + at, t.padded, s + at, weights + at, o + at, d);
    };
    int64_t at = 0;
    for (; at + kAtOnce * kLanes <= t.padded; at += kAtOnce * kLanes)
      columns(std::integral_constant<int, kAtOnce>(), at);
    for (; at < t.padded; at += kLanes) columns(std::integral_constant<int, 1>(), at);
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
  // Columns and outputs of a block, logits and weights of a strip.
  int64_t ThreadUnits() const {
    return RoundUp(
        kForwardBlock<E> * (units + width) + 2 * kKeyBlock * kStrip<E> + kBufferRows * RoundUp(s.d, 16), 16);
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
    Unit *columns = mine, *weights = columns + units * kForwardBlock<E>;
    float* logits = reinterpret_cast<float*>(weights + kKeyBlock * kStrip<E>);
    float* o = logits + kKeyBlock * kStrip<E>;
    float* buffer = RowBuffer(mine);
    Strip strips[kForwardBlock<E> / kStrip<E>];
    const int64_t count = CutStrips<E>(l, q, strips);
    for (const Strip& t : std::span(strips, count))
      PackColumns<E>(a->in[0], QueryOffset(pair, q.start + t.c), s.heads * s.d, t.count, t.padded, s.d,
                     negate, buffer, columns + t.c * units, &turns[0], pair / s.heads * s.lk + q.start + t.c);
    memset(o, 0, width * q.padded * sizeof(float));
    Softmax<E> softmax;
    softmax.Reset();
    for (int64_t j = k0; j < k1; ++j) {
      const Block& k = l.keys[j];
      if (pack) {
        if (j + 1 < k1) FetchKeys(pair, l.keys[j + 1]);
        Pack(pair, k, first_key, head, buffer);
      }
      if (See(q, k) == kNothing) continue;
      const Unit* k_rows = head + (k.at - first_key) * units;
      const Unit* v_pairs = head + keys * units + (k.at - first_key) / kPerUnit<E> * width;
      const int64_t k_units = k.padded * units, v_units = k.padded / kPerUnit<E> * width;
      for (int64_t i = 0; i < count; ++i) {
        const Strip& t = strips[i];
        const Visibility see = See(t, k);
        if (see == kNothing) continue;
        Product scores{units,    k_rows, units,    kRowColumn<E>, columns + t.c * units,
                       t.padded, logits, t.padded, false};
        Product values = SummedKeys<E>(k, v_pairs, width);
        values.b = weights;
        values.c = o + t.c * width;
        values.b_row = values.c_row = t.padded;
        if (!pack) {  // what has just been packed is near
          scores.ahead = PartOf<E>(k_rows + k_units, k_units, i, count);
          values.ahead = PartOf<E>(v_pairs + v_units, v_units, i, count);
        }
        Multiply<E>(k.count, t.padded, scores);
        softmax.Weigh(l, q, t, k, see == kSome, scale, logits, weights, values.c, s.d);
        Multiply<E>(s.d, t.padded, values);
      }
    }
    for (const Strip& t : std::span(strips, count)) Write(pair, q, t, softmax, o + t.c * width, buffer);
  }

  void Write(int64_t pair, const Block& q, const Strip& t, const Softmax<E>& softmax, float* o,
             float* buffer) const {
    const float *sums = softmax.sum + t.c, *references = softmax.reference + t.c;
    // The largest visible logit adds at least 2^-8, so a sum of 0 means that nothing was visible.
    for (int64_t c = 0; c < t.padded; c += kLanes) {
      const Vf sum = LoadF(sums + c), inverse = sum == 0 ? (Vf){} : 1 / sum;
      for (int64_t i = 0; i < s.d; ++i) StoreF(o + i * t.padded + c, LoadF(o + i * t.padded + c) * inverse);
    }
    WriteColumns(o, t.padded, s.d, t.count, a->out[0], QueryOffset(pair, q.start + t.c), s.heads * s.d,
                 buffer);
    float* lse = PfData<float>(a->out[1]);
    if (!lse) return;
    lse += pair * s.lq + q.start + t.c;
    for (int64_t i = 0; i < t.count; ++i)
      lse[i] = sums[i] == 0 ? -INFINITY : references[i] * kLn2 + logf(sums[i]);
  }
};

template <class E>
int32_t RunForward(const PfArgs* a, const AttentionShape& s) {
  const Layout* layouts = MakeLayouts(a, s, BlockSizesOf<E>(kForwardBlock<E>));
  if (!layouts) return NoMemory(a, "attention");
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
          forward.FetchKeys(pair, l.keys[k]);
          forward.Pack(pair, l.keys[k], 0, head_of(pair), row_buffer);
        });
        share(&Layout::query_count, most_queries, [&](int64_t pair, const Layout& l, int64_t q) {
          forward.FetchQueries(pair, l.queries[q]);
          forward.Attend(l, pair, l.queries[q], 0, l.key_count, 0, false, head_of(pair), buffer);
        });
      }
    }
  }
  return PF_OK;
}

}  // namespace
