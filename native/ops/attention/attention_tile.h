// What forward and backward share: token blocks with the bounds of their mask values, and a register-blocked
// product of small f32 panels.
#pragma once
#include "backends/cpu/rows.h"
#include "ops/attention/attention.h"

namespace {

constexpr int64_t kQueryBlock = 48;  // a multiple of the micro-kernel's 6 rows
constexpr int64_t kKeyBlock = 64;
constexpr int64_t kShortestBlock = 16;

struct Block {
  int64_t start, count;
  int64_t padded;  // count rounded up to whole vectors
  int64_t at;      // where the block begins when blocks of padded length are laid end to end
  int32_t segment_min, segment_max, order_min, order_max;
};

struct Span {  // query blocks [q0, q1) and key blocks [k0, k1) that no other block sees or is seen by
  int64_t q0, q1, k0, k1, tiles;
};

// The blocks of one batch entry.
struct Layout {
  Block *queries, *keys;
  int64_t query_count, key_count, key_length;  // key_length: all padded key blocks end to end
  const int32_t *query_segment, *query_order;  // per token; nullptr without a mask
  int32_t *key_segment, *key_order;            // per padded key
  Span* spans;
  int64_t span_count;
};

enum Visibility { kNothing, kSome, kAll };

inline Visibility See(const Block& q, const Block& k) {
  if (q.segment_max < k.segment_min || q.segment_min > k.segment_max || q.order_max < k.order_min)
    return kNothing;
  const bool one_segment = q.segment_min == q.segment_max && k.segment_min == k.segment_max;
  return one_segment && q.order_min >= k.order_max ? kAll : kSome;
}

// Cuts tokens into blocks. A change of segment ends a block that is not too short, so that packed sequences
// fall into tiles which are wholly visible or wholly skipped.
int64_t CutBlocks(const int32_t* segment, const int32_t* order, int64_t length, int64_t longest,
                  Block* blocks) {
  int64_t n = 0, at = 0;
  for (int64_t i = 0; i < length; ++n) {
    const int32_t s0 = segment ? segment[i] : 0, o0 = order ? order[i] : 0;
    Block b{i, 0, 0, at, s0, s0, o0, o0};
    for (; i < length && b.count < longest; ++i, ++b.count) {
      if (!segment) continue;
      if (b.count >= kShortestBlock && segment[i] != segment[i - 1]) break;
      if (segment[i] < b.segment_min) b.segment_min = segment[i];
      if (segment[i] > b.segment_max) b.segment_max = segment[i];
      if (order[i] < b.order_min) b.order_min = order[i];
      if (order[i] > b.order_max) b.order_max = order[i];
    }
    b.padded = RoundUp(b.count, kLanes);
    at += b.padded;
    blocks[n] = b;
  }
  return n;
}

// Splits the blocks where no tile crosses: packed sequences become units that need nothing from each other.
void CutSpans(Layout& l, int64_t* low) {
  int64_t reach = l.key_count;
  for (int64_t q = l.query_count; q-- > 0;) {  // low[q]: the first key block seen from q on
    for (int64_t k = 0; k < reach; ++k)
      if (See(l.queries[q], l.keys[k]) != kNothing) reach = k;
    low[q] = reach;
  }
  Span open{0, 0, 0, 0, 0};
  int64_t high = 0;
  l.span_count = 0;
  for (int64_t q = 0; q < l.query_count; ++q) {
    if (q > open.q0 && high <= low[q]) {
      open.q1 = q;
      open.k1 = high;
      l.spans[l.span_count++] = open;
      open = {q, 0, high, 0, 0};
    }
    for (int64_t k = low[q]; k < l.key_count; ++k)
      if (See(l.queries[q], l.keys[k]) != kNothing) {
        ++open.tiles;
        if (k + 1 > high) high = k + 1;
      }
  }
  open.q1 = l.query_count;
  open.k1 = l.key_count;  // what nobody sees still gets its zeros
  l.spans[l.span_count++] = open;
}

// One layout per batch entry; nullptr when scratch runs out.
Layout* MakeLayouts(const PfArgs* a, const AttentionShape& s) {
  const auto most = [](int64_t length) { return length / kShortestBlock + 2; };
  Layout* layouts = Scratch<Layout>(a, s.batch);
  int64_t* low = Scratch<int64_t>(a, most(s.lq));
  if (!layouts || !low) return nullptr;
  for (int64_t b = 0; b < s.batch; ++b) {
    Layout& l = layouts[b];
    l = {};
    if (s.masked) {
      l.query_segment = PfData<int32_t>(a->in[3]) + b * s.lq;
      l.query_order = PfData<int32_t>(a->in[4]) + b * s.lq;
    } else if (b) {
      l = layouts[0];
      continue;
    }
    l.queries = Scratch<Block>(a, most(s.lq));
    l.keys = Scratch<Block>(a, most(s.lk));
    if (!l.queries || !l.keys) return nullptr;
    l.query_count = CutBlocks(l.query_segment, l.query_order, s.lq, kQueryBlock, l.queries);
    l.key_count = CutBlocks(l.query_segment, l.query_order, s.lk, kKeyBlock, l.keys);
    if (l.key_count) l.key_length = l.keys[l.key_count - 1].at + l.keys[l.key_count - 1].padded;
    if (s.masked) {
      l.key_segment = Scratch<int32_t>(a, l.key_length);
      l.key_order = Scratch<int32_t>(a, l.key_length);
      if (!l.key_segment || !l.key_order) return nullptr;
      for (int64_t k = 0; k < l.key_count; ++k)
        for (int64_t i = 0; i < l.keys[k].padded; ++i) {
          const bool real = i < l.keys[k].count;
          l.key_segment[l.keys[k].at + i] = real ? l.query_segment[l.keys[k].start + i] : 0;
          l.key_order[l.keys[k].at + i] = real ? l.query_order[l.keys[k].start + i] : 0;
        }
    }
    l.spans = Scratch<Span>(a, most(s.lq));
    if (!l.spans) return nullptr;
    CutSpans(l, low);
  }
  return layouts;
}

// c[m, n] (=|+=) sum_k a[m, k] b[k, n]: the product held in MR x NR registers. a is read one value at a time,
// so any strides do, and a transposed operand costs nothing.
struct Product {
  int64_t k;
  const float* a;
  int64_t a_row, a_column;
  const float* b;
  int64_t b_row;
  float* c;
  int64_t c_row;
  bool accumulate;
};

template <int MR, int NR>
void Micro(const Product& g) {
  // Every loop over i and j must vanish, or the compiler keeps the sums in memory around the loop over k.
  Vf sum[MR][NR] = {};
  if (g.accumulate) {
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) sum[i][j] = LoadF(g.c + i * g.c_row + j * kLanes);
  }
  const float *a = g.a, *b = g.b;
  const int64_t a_row = g.a_row;
  for (int64_t k = 0; k < g.k; ++k, a += g.a_column, b += g.b_row) {
    Vf row[NR];
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) row[j] = LoadF(b + j * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
      const Vf x = Set1(a[i * a_row]);
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) sum[i][j] = Fma(x, row[j], sum[i][j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) StoreF(g.c + i * g.c_row + j * kLanes, sum[i][j]);
}

constexpr int kMr = 6;
#if defined(__AVX512F__)
constexpr int kNr = 4;  // 24 of 32 registers hold the product
#else
constexpr int kNr = 2;  // 12 of 16
#endif

template <int NR>
void MicroRows(int64_t rows, const Product& g) {
  switch (rows) {
    case 1: return Micro<1, NR>(g);
    case 2: return Micro<2, NR>(g);
    case 3: return Micro<3, NR>(g);
    case 4: return Micro<4, NR>(g);
    case 5: return Micro<5, NR>(g);
    default: return Micro<6, NR>(g);
  }
}

// n is a multiple of kLanes.
void Multiply(int64_t m, int64_t n, const Product& g) {
  for (int64_t j = 0; j < n;) {
    const int64_t vectors = (n - j) / kLanes < kNr ? (n - j) / kLanes : kNr;
    for (int64_t i = 0; i < m; i += kMr) {
      Product part = g;
      part.a += i * g.a_row;
      part.b += j;
      part.c += i * g.c_row + j;
      const int64_t rows = m - i;
      switch (vectors) {
        case 1: MicroRows<1>(rows, part); break;
#if defined(__AVX512F__)
        case 2: MicroRows<2>(rows, part); break;
        case 3: MicroRows<3>(rows, part); break;
#endif
        default: MicroRows<kNr>(rows, part); break;
      }
    }
    j += vectors * kLanes;
  }
}

inline Vi LoadI(const int32_t* p) {
  Vi v;
  memcpy(&v, p, sizeof(v));
  return v;
}

// Lanes whose key the query sees.
inline Vi Sees(const Layout& l, int64_t query, int64_t key) {
  return (LoadI(l.key_segment + key) == l.query_segment[query]) &
         (LoadI(l.key_order + key) <= l.query_order[query]);
}

inline void WriteRow(const PfView& v, int64_t offset, int64_t n, const float* row) {
  if (v.dtype == PF_F32)
    memcpy(PfData<float>(v) + offset, row, n * sizeof(float));
  else
    CommitRow(v, offset, n, row);
}

// count rows of one head, `step` elements apart, into rows of width columns filled up with zeros.
void PackRows(const PfView& v, int64_t offset, int64_t step, int64_t count, int64_t d, int64_t width,
              float* to) {
  for (int64_t i = 0; i < count; ++i, to += width) {
    const float* row = ReadRow(v, offset + i * step, d, to);
    if (row != to) memcpy(to, row, d * sizeof(float));
    for (int64_t c = d; c < width; ++c) to[c] = 0;
  }
}

// The same rows as columns: to[c * padded + i]. Missing rows are zero columns. buffer holds four rows.
void PackColumns(const PfView& v, int64_t offset, int64_t step, const Block& block, int64_t d, float* buffer,
                 float* to) {
  const int64_t n = block.padded, room = RoundUp(d, 16);
  int64_t i = 0;
  for (; i + 4 <= block.count; i += 4) {
    const float* row[4];
    for (int r = 0; r < 4; ++r) row[r] = ReadRow(v, offset + (i + r) * step, d, buffer + r * room);
    int64_t c = 0;
    for (; c + 4 <= d; c += 4) {
      __m128 r0 = _mm_loadu_ps(row[0] + c), r1 = _mm_loadu_ps(row[1] + c);
      __m128 r2 = _mm_loadu_ps(row[2] + c), r3 = _mm_loadu_ps(row[3] + c);
      _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
      _mm_storeu_ps(to + c * n + i, r0);
      _mm_storeu_ps(to + (c + 1) * n + i, r1);
      _mm_storeu_ps(to + (c + 2) * n + i, r2);
      _mm_storeu_ps(to + (c + 3) * n + i, r3);
    }
    for (; c < d; ++c)
      for (int r = 0; r < 4; ++r) to[c * n + i + r] = row[r][c];
  }
  for (; i < n; ++i) {
    const float* row = i < block.count ? ReadRow(v, offset + i * step, d, buffer) : nullptr;
    for (int64_t c = 0; c < d; ++c) to[c * n + i] = row ? row[c] : 0;
  }
}

// Longest stretch of padded keys and of queries in one span.
inline void LongestSpan(const Layout* layouts, int64_t batch, int64_t* keys, int64_t* queries) {
  *keys = *queries = 0;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < layouts[b].span_count; ++i) {
      const Layout& l = layouts[b];
      const Span& span = l.spans[i];
      int64_t n =
          span.k1 > span.k0 ? l.keys[span.k1 - 1].at + l.keys[span.k1 - 1].padded - l.keys[span.k0].at : 0;
      if (n > *keys) *keys = n;
      n = span.q1 > span.q0
              ? l.queries[span.q1 - 1].start + l.queries[span.q1 - 1].count - l.queries[span.q0].start
              : 0;
      if (n > *queries) *queries = n;
    }
}

// Where one task finds packed operands: whole heads share them, short spans pack their own, which then never
// leave the core's cache. kLocalFloats is what such a span may take.
constexpr int64_t kLocalFloats = 1 << 17;

// Heads packed at a time, so that scratch stays bounded for long sequences.
inline int64_t HeadsAtOnce(int64_t heads, int64_t floats_per_head) {
  constexpr int64_t kBudget = int64_t{64} << 20;  // floats
  const int64_t n = kBudget / (floats_per_head > 0 ? floats_per_head : 1);
  return n < 1 ? 1 : n > heads ? heads : n;
}

inline int32_t AttentionRefuse(const PfArgs* a, const char* op, int f32_input, int f32_output) {
  for (int i = 0; i < a->n_in; ++i) {
    const PfView& v = a->in[i];
    if (i == 3 || i == 4 || !PfPresent(v)) continue;
    if (!PfIsFloat(v) || (i == f32_input && v.dtype != PF_F32))
      return Fail(a, PF_ERR_DTYPE, "%s: input %d has a dtype this op does not take", op, i);
  }
  for (int i = 0; i < a->n_out; ++i) {
    const PfView& v = a->out[i];
    if (PfPresent(v) && (!PfIsFloat(v) || (i == f32_output && v.dtype != PF_F32)))
      return Fail(a, PF_ERR_DTYPE, "%s: output %d has a dtype this op does not give", op, i);
  }
  return PF_OK;
}

}  // namespace
