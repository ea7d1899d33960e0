#include "ops/attention/attention_tile.h"

namespace {

// Largest over the batch.
int64_t LongestKeys(const Layout* layouts, int64_t batch) {
  int64_t n = 0;
  for (int64_t b = 0; b < batch; ++b)
    if (layouts[b].key_length > n) n = layouts[b].key_length;
  return n;
}
int64_t MostBlocks(const Layout* layouts, int64_t batch, int64_t Layout::*count) {
  int64_t n = 0;
  for (int64_t b = 0; b < batch; ++b)
    if (layouts[b].*count > n) n = layouts[b].*count;
  return n;
}

// Online softmax of a query block: logits of one tile become weights, relative to the largest logit so far.
struct Softmax {
  alignas(64) float sum[kQueryBlock * kLanes];  // one partial sum per lane
  float max[kQueryBlock];

  void Reset() {
    memset(sum, 0, sizeof(sum));
    for (float& m : max) m = -INFINITY;
  }

  void Row(const Layout& l, const Block& q, const Block& k, bool mask, int64_t r, float scale, float* s,
           float* o, int64_t width) {
    const Vf never = Set1(-INFINITY);
    Vi lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    Vf top = never;
    for (int64_t j = 0; j < k.padded; j += kLanes) {
      Vf t = LoadF(s + j) * scale;
      if (mask) t = Sees(l, q.start + r, k.at + j) ? t : never;
      if (j + kLanes > k.count) t = lane < static_cast<int32_t>(k.count - j) ? t : never;
      StoreF(s + j, t);
      top = Max(t, top);
    }
    const float tile_max = MaxLane(top);
    float* row_sum = sum + r * kLanes;
    if (tile_max == -INFINITY && max[r] == -INFINITY) {
      // Nothing visible yet. A NaN logit also ends here, since it is never the larger one: it must stay
      // visible.
      Vf all = {};
      for (int64_t j = 0; j < k.padded; j += kLanes) {
        all += LoadF(s + j);
        StoreF(s + j, (Vf){});
      }
      const float check = Sum(all);
      if (check != check) StoreF(row_sum, Set1(check));
      return;
    }
    if (tile_max > max[r]) {
      if (max[r] != -INFINITY) {
        const float shrink = expf(max[r] - tile_max);
        StoreF(row_sum, LoadF(row_sum) * shrink);
        for (int64_t c = 0; c < width; c += kLanes) StoreF(o + c, LoadF(o + c) * shrink);
      }
      max[r] = tile_max;
    }
    Vf total = LoadF(row_sum);
    for (int64_t j = 0; j < k.padded; j += kLanes) {
      const Vf p = Exp(LoadF(s + j) - max[r]);
      StoreF(s + j, p);
      total += p;
    }
    StoreF(row_sum, total);
  }
};

}  // namespace

int32_t pf_cpu_attention(const PfArgs* a) {
  const char* op = "attention";
  AttentionShape s;
  if (int32_t e = AttentionCheck(a, &s)) return e;
  if (int32_t e = AttentionRefuse(a, op, -1, 1)) return e;
  const Layout* layouts = MakeLayouts(a, s);
  if (!layouts) return NoMemory(a, op);
  const float scale = static_cast<float>(PfParams<AttentionParams>(a).scale);
  const int64_t d = s.d, width = RoundUp(d, kLanes), step = s.heads * d, pairs = s.batch * s.heads;
  const int64_t most_queries = MostBlocks(layouts, s.batch, &Layout::query_count);
  const int64_t most_keys = MostBlocks(layouts, s.batch, &Layout::key_count);
  const int64_t most_spans = MostBlocks(layouts, s.batch, &Layout::span_count);
  int64_t span_keys, span_queries;
  LongestSpan(layouts, s.batch, &span_keys, &span_queries);
  const bool local = most_spans > 1 && span_keys * (d + width) <= kLocalFloats;
  const int64_t key_length = local ? span_keys : LongestKeys(layouts, s.batch);
  const int64_t key_floats = key_length * (d + width),
                at_once = local ? pairs : HeadsAtOnce(pairs, key_floats);
  const int64_t mine = kQueryBlock * (2 * width + kKeyBlock) + 4 * RoundUp(d, 16);
  const int64_t threads = omp_get_max_threads();
  float* packed = Scratch<float>(a, (local ? threads : at_once) * key_floats);
  float* buffers = Scratch<float>(a, threads * mine);
  if (!packed || !buffers) return NoMemory(a, op);
  float* lse = PfData<float>(a->out[1]);
  const bool parallel = pairs * s.lq * d > kParallelWork;

  // keys holds columns of k, then rows of v, of the blocks from first_key on.
  const auto pack = [&](int64_t pair, const Block& k, int64_t first_key, float* keys, float* buffer) {
    const int64_t offset = ((pair / s.heads * s.lk + k.start) * s.heads + pair % s.heads) * d,
                  at = k.at - first_key;
    PackColumns(a->in[1], offset, step, k, d, buffer, keys + at * d);
    PackRows(a->in[2], offset, step, k.count, d, width, keys + key_length * d + at * width);
  };
  const auto attend = [&](int64_t pair, const Block& q, int64_t k0, int64_t k1, int64_t first_key,
                          const float* keys, float* buffer) {
    const Layout& l = layouts[pair / s.heads];
    float *q_rows = buffer, *o_rows = q_rows + kQueryBlock * width, *weights = o_rows + kQueryBlock * width;
    const int64_t offset = ((pair / s.heads * s.lq + q.start) * s.heads + pair % s.heads) * d;
    PackRows(a->in[0], offset, step, q.count, d, width, q_rows);
    memset(o_rows, 0, q.count * width * sizeof(float));
    Softmax softmax;
    softmax.Reset();
    for (int64_t j = k0; j < k1; ++j) {
      const Block& k = l.keys[j];
      const Visibility see = See(q, k);
      if (see == kNothing) continue;
      const float *columns = keys + (k.at - first_key) * d,
                  *values = keys + key_length * d + (k.at - first_key) * width;
      Multiply(q.count, k.padded, {d, q_rows, width, 1, columns, k.padded, weights, kKeyBlock, false});
      for (int64_t r = 0; r < q.count; ++r)
        softmax.Row(l, q, k, see == kSome, r, scale, weights + r * kKeyBlock, o_rows + r * width, width);
      Multiply(q.count, width, {k.count, weights, kKeyBlock, 1, values, width, o_rows, width, true});
    }
    for (int64_t r = 0; r < q.count; ++r) {
      // The largest visible logit adds exactly 1, so a sum of 0 means that nothing was visible.
      const float sum = Sum(LoadF(softmax.sum + r * kLanes)), inverse = sum == 0 ? 0 : 1 / sum;
      float* o = o_rows + r * width;
      for (int64_t c = 0; c < width; c += kLanes) StoreF(o + c, LoadF(o + c) * inverse);
      WriteRow(a->out[0], offset + r * step, d, o);
      if (lse) lse[pair * s.lq + q.start + r] = sum == 0 ? -INFINITY : softmax.max[r] + logf(sum);
    }
  };

  for (int64_t first = 0; first < pairs; first += at_once) {
    const int64_t heads = pairs - first < at_once ? pairs - first : at_once;
#pragma omp parallel if (parallel)
    {
      float* buffer = buffers + omp_get_thread_num() * mine;
      float* row_buffer = buffer + kQueryBlock * (2 * width + kKeyBlock);
      if (local) {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < heads * most_spans; ++task) {
          const int64_t pair = first + task / most_spans;
          const Layout& l = layouts[pair / s.heads];
          if (task % most_spans >= l.span_count) continue;
          const Span& span = l.spans[task % most_spans];
          float* keys = packed + omp_get_thread_num() * key_floats;
          const int64_t first_key = span.k0 < l.key_count ? l.keys[span.k0].at : 0;
          for (int64_t k = span.k0; k < span.k1; ++k) pack(pair, l.keys[k], first_key, keys, row_buffer);
          for (int64_t q = span.q0; q < span.q1; ++q)
            attend(pair, l.queries[q], span.k0, span.k1, first_key, keys, buffer);
        }
      } else {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < heads * most_keys; ++task) {
          const int64_t pair = first + task / most_keys;
          const Layout& l = layouts[pair / s.heads];
          if (task % most_keys < l.key_count)
            pack(pair, l.keys[task % most_keys], 0, packed + (pair - first) * key_floats, row_buffer);
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < heads * most_queries; ++task) {
          const int64_t pair = first + task / most_queries;
          const Layout& l = layouts[pair / s.heads];
          if (task % most_queries < l.query_count)
            attend(pair, l.queries[task % most_queries], 0, l.key_count, 0,
                   packed + (pair - first) * key_floats, buffer);
        }
      }
    }
  }
  return PF_OK;
}

namespace {

// Everything backward needs of one head, or of one span of it, packed once. Blocks are found by key.at -
// first_key and q.start - first_query.
struct Head {
  int64_t first_key, first_query;
  float *key_columns, *value_columns, *key_rows;  // per key block: [d, padded], [d, padded], [count, width]
  float *q, *dout, *dq, *delta;                   // [lq, width] and, for delta, [lq]
};

struct Backward {
  const PfArgs* a;
  AttentionShape s;
  float scale;
  int64_t width, keys, queries;  // lengths a Head has room for

  int64_t Floats() const { return keys * (2 * s.d + width) + queries * 3 * width + RoundUp(queries, 16); }
  Head Place(float* base, int64_t first_key, int64_t first_query) const {
    float *key_rows = base + 2 * keys * s.d, *q = key_rows + keys * width;
    return {first_key,
            first_query,
            base,
            base + keys * s.d,
            key_rows,
            q,
            q + queries * width,
            q + 2 * queries * width,
            q + 3 * queries * width};
  }
  int64_t QueryOffset(int64_t pair, int64_t i) const {
    return ((pair / s.heads * s.lq + i) * s.heads + pair % s.heads) * s.d;
  }
  int64_t KeyOffset(int64_t pair, int64_t j) const {
    return ((pair / s.heads * s.lk + j) * s.heads + pair % s.heads) * s.d;
  }

  void PackKeys(const Head& head, int64_t pair, const Block& k, float* buffer) const {
    const int64_t offset = KeyOffset(pair, k.start), step = s.heads * s.d, at = k.at - head.first_key;
    PackColumns(a->in[1], offset, step, k, s.d, buffer, head.key_columns + at * s.d);
    PackColumns(a->in[2], offset, step, k, s.d, buffer, head.value_columns + at * s.d);
    PackRows(a->in[1], offset, step, k.count, s.d, width, head.key_rows + at * width);
  }
  void PackQueries(const Head& head, int64_t pair, const Block& q, float* buffer) const {
    const int64_t offset = QueryOffset(pair, q.start), step = s.heads * s.d, at = q.start - head.first_query;
    PackRows(a->in[0], offset, step, q.count, s.d, width, head.q + at * width);
    PackRows(a->in[7], offset, step, q.count, s.d, width, head.dout + at * width);
    memset(head.dq + at * width, 0, q.count * width * sizeof(float));
    for (int64_t r = 0; r < q.count; ++r) {
      const float* o = ReadRow(a->in[5], offset + r * step, s.d, buffer);
      const float* g = head.dout + (at + r) * width;
      head.delta[at + r] =
          RowSum(s.d, [&](int64_t i, int64_t m) { return LoadN(o + i, m) * LoadN(g + i, m); });
    }
  }

  // p and ds of one tile. Columns beyond count hold nothing of meaning; nobody reads them.
  void Tile(const Layout& l, const Head& head, int64_t pair, const Block& q, const Block& k, bool mask,
            float* p, float* ds) const {
    const int64_t qi = q.start - head.first_query, kj = k.at - head.first_key;
    Multiply(
        q.count, k.padded,
        {s.d, head.q + qi * width, width, 1, head.key_columns + kj * s.d, k.padded, p, kKeyBlock, false});
    Multiply(q.count, k.padded,
             {s.d, head.dout + qi * width, width, 1, head.value_columns + kj * s.d, k.padded, ds, kKeyBlock,
              false});
    const float* lses = PfData<float>(a->in[6]) + pair * s.lq + q.start;
    for (int64_t r = 0; r < q.count; ++r) {
      const float lse = lses[r], delta = head.delta[qi + r];
      float *p_row = p + r * kKeyBlock, *ds_row = ds + r * kKeyBlock;
      const bool blind = lse == -INFINITY;
      for (int64_t j = 0; j < k.padded; j += kLanes) {
        Vf weight = {};
        if (!blind) weight = Exp(LoadF(p_row + j) * scale - lse);
        if (mask) weight = Sees(l, q.start + r, k.at + j) ? weight : (Vf){};
        StoreF(p_row + j, weight);
        StoreF(ds_row + j, weight * (LoadF(ds_row + j) - delta) * scale);
      }
    }
  }
  void AddQueryGradient(const Head& head, const Block& q, const Block& k, const float* ds) const {
    Multiply(q.count, width,
             {k.count, ds, kKeyBlock, 1, head.key_rows + (k.at - head.first_key) * width, width,
              head.dq + (q.start - head.first_query) * width, width, true});
  }
  // dk and dv of one key block over query blocks [q0, q1), in order; dq of those too when asked.
  void Keys(const Layout& l, const Head& head, int64_t pair, const Block& k, int64_t q0, int64_t q1,
            bool with_dq, float* tile) const {
    float *p = tile, *ds = p + kQueryBlock * kKeyBlock, *dk = ds + kQueryBlock * kKeyBlock;
    float* dv = dk + kKeyBlock * width;
    memset(dk, 0, k.count * width * sizeof(float));
    memset(dv, 0, k.count * width * sizeof(float));
    for (int64_t i = q0; i < q1; ++i) {
      const Block& q = l.queries[i];
      const Visibility see = See(q, k);
      if (see == kNothing) continue;
      Tile(l, head, pair, q, k, see == kSome, p, ds);
      const int64_t at = (q.start - head.first_query) * width;
      Multiply(k.count, width, {q.count, p, 1, kKeyBlock, head.dout + at, width, dv, width, true});
      Multiply(k.count, width, {q.count, ds, 1, kKeyBlock, head.q + at, width, dk, width, true});
      if (with_dq) AddQueryGradient(head, q, k, ds);
    }
    for (int64_t r = 0; r < k.count; ++r) {
      WriteRow(a->out[1], KeyOffset(pair, k.start + r), s.d, dk + r * width);
      WriteRow(a->out[2], KeyOffset(pair, k.start + r), s.d, dv + r * width);
    }
  }
  // dq of one query block over all key blocks, in order.
  void Queries(const Layout& l, const Head& head, int64_t pair, const Block& q, float* tile) const {
    float* ds = tile + kQueryBlock * kKeyBlock;
    for (int64_t j = 0; j < l.key_count; ++j) {
      const Visibility see = See(q, l.keys[j]);
      if (see == kNothing) continue;
      Tile(l, head, pair, q, l.keys[j], see == kSome, tile, ds);
      AddQueryGradient(head, q, l.keys[j], ds);
    }
    WriteQueries(head, pair, q);
  }
  void WriteQueries(const Head& head, int64_t pair, const Block& q) const {
    for (int64_t r = 0; r < q.count; ++r)
      WriteRow(a->out[0], QueryOffset(pair, q.start + r), s.d,
               head.dq + (q.start + r - head.first_query) * width);
  }
  void OneSweep(const Layout& l, const Head& head, int64_t pair, const Span& span, float* tile) const {
    for (int64_t k = span.k0; k < span.k1; ++k) Keys(l, head, pair, l.keys[k], span.q0, span.q1, true, tile);
    for (int64_t q = span.q0; q < span.q1; ++q) WriteQueries(head, pair, l.queries[q]);
  }
};

// A unit of independent work (a span of one head) is small beside a thread's share of the tiles.
bool UnitsBalance(const Layout* layouts, int64_t heads_per_batch, int64_t first, int64_t heads) {
  int64_t tiles = 0, largest = 0;
  for (int64_t pair = first; pair < first + heads; ++pair) {
    const Layout& l = layouts[pair / heads_per_batch];
    for (int64_t i = 0; i < l.span_count; ++i) {
      tiles += l.spans[i].tiles;
      if (l.spans[i].tiles > largest) largest = l.spans[i].tiles;
    }
  }
  return omp_get_max_threads() == 1 || 5 * largest * omp_get_max_threads() <= 2 * tiles;
}

}  // namespace

// One sweep over (key block, query block) serves all three gradients when the units balance. Otherwise two
// sweeps with 7/5 of the work: dq by query block, dk and dv by key block. Both add the same tiles in the same
// order, so the choice changes no bit.
int32_t pf_cpu_attention_backward(const PfArgs* a) {
  const char* op = "attention_backward";
  AttentionShape s;
  if (int32_t e = AttentionBackwardCheck(a, &s)) return e;
  if (int32_t e = AttentionRefuse(a, op, 6, -1)) return e;
  const Layout* layouts = MakeLayouts(a, s);
  if (!layouts) return NoMemory(a, op);
  const int64_t width = RoundUp(s.d, kLanes), pairs = s.batch * s.heads, threads = omp_get_max_threads();
  Backward backward{a, s, static_cast<float>(PfParams<AttentionParams>(a).scale), width, 0, 0};
  const int64_t most_queries = MostBlocks(layouts, s.batch, &Layout::query_count);
  const int64_t most_keys = MostBlocks(layouts, s.batch, &Layout::key_count);
  const int64_t most_spans = MostBlocks(layouts, s.batch, &Layout::span_count);
  LongestSpan(layouts, s.batch, &backward.keys, &backward.queries);
  const bool local =
      most_spans > 1 && backward.Floats() <= kLocalFloats && UnitsBalance(layouts, s.heads, 0, pairs);
  if (!local) {
    backward.keys = LongestKeys(layouts, s.batch);
    backward.queries = s.lq;
  }
  const int64_t head_floats = RoundUp(backward.Floats(), 16);
  const int64_t at_once = local ? pairs : HeadsAtOnce(pairs, head_floats);
  const int64_t mine = 2 * kQueryBlock * kKeyBlock + 2 * kKeyBlock * width + 4 * RoundUp(s.d, 16);
  float* packed = Scratch<float>(a, (local ? threads : at_once) * head_floats);
  float* buffers = Scratch<float>(a, threads * mine);
  if (!packed || !buffers) return NoMemory(a, op);
  const bool parallel = pairs * s.lq * s.d > kParallelWork;

  for (int64_t first = 0; first < pairs; first += at_once) {
    const int64_t heads = pairs - first < at_once ? pairs - first : at_once;
    const bool one_sweep = UnitsBalance(layouts, s.heads, first, heads);
    const auto head_of = [&](int64_t pair) {
      return backward.Place(packed + (pair - first) * head_floats, 0, 0);
    };
#pragma omp parallel if (parallel)
    {
      float* tile = buffers + omp_get_thread_num() * mine;
      float* row_buffer = tile + mine - 4 * RoundUp(s.d, 16);
      if (local) {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < heads * most_spans; ++task) {
          const int64_t pair = first + task / most_spans;
          const Layout& l = layouts[pair / s.heads];
          if (task % most_spans >= l.span_count) continue;
          const Span& span = l.spans[task % most_spans];
          const Head head = backward.Place(packed + omp_get_thread_num() * head_floats,
                                           span.k0 < l.key_count ? l.keys[span.k0].at : 0,
                                           span.q0 < l.query_count ? l.queries[span.q0].start : 0);
          for (int64_t k = span.k0; k < span.k1; ++k) backward.PackKeys(head, pair, l.keys[k], row_buffer);
          for (int64_t q = span.q0; q < span.q1; ++q)
            backward.PackQueries(head, pair, l.queries[q], row_buffer);
          backward.OneSweep(l, head, pair, span, tile);
        }
      } else {
#pragma omp for schedule(static) nowait
        for (int64_t task = 0; task < heads * most_keys; ++task) {
          const int64_t pair = first + task / most_keys;
          const Layout& l = layouts[pair / s.heads];
          if (task % most_keys < l.key_count)
            backward.PackKeys(head_of(pair), pair, l.keys[task % most_keys], row_buffer);
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < heads * most_queries; ++task) {
          const int64_t pair = first + task / most_queries;
          const Layout& l = layouts[pair / s.heads];
          if (task % most_queries < l.query_count)
            backward.PackQueries(head_of(pair), pair, l.queries[task % most_queries], row_buffer);
        }
        if (one_sweep) {
#pragma omp for schedule(dynamic)
          for (int64_t task = 0; task < heads * most_spans; ++task) {
            const int64_t pair = first + task / most_spans;
            const Layout& l = layouts[pair / s.heads];
            if (task % most_spans < l.span_count)
              backward.OneSweep(l, head_of(pair), pair, l.spans[task % most_spans], tile);
          }
        } else {
#pragma omp for schedule(dynamic) nowait
          for (int64_t task = 0; task < heads * most_queries; ++task) {
            const int64_t pair = first + task / most_queries;
            const Layout& l = layouts[pair / s.heads];
            if (task % most_queries < l.query_count)
              backward.Queries(l, head_of(pair), pair, l.queries[task % most_queries], tile);
          }
#pragma omp for schedule(dynamic)
          for (int64_t task = 0; task < heads * most_keys; ++task) {
            const int64_t pair = first + task / most_keys;
            const Layout& l = layouts[pair / s.heads];
            if (task % most_keys < l.key_count)
              backward.Keys(l, head_of(pair), pair, l.keys[task % most_keys], 0, l.query_count, false, tile);
          }
        }
      }
    }
  }
  return PF_OK;
}
