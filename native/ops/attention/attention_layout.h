// Token blocks with the bounds of their mask values, and what follows from them: which tiles to skip, which
// need no mask arithmetic, and which stretches of a packed batch are independent of one another.
#pragma once
#include <unistd.h>

#include "backends/cpu/rows.h"
#include "ops/attention/attention.h"

namespace {

constexpr int64_t kKeyBlock = 64;
constexpr int64_t kShortestBlock = 16;

// How many queries make a block, and what block lengths are padded to.
struct BlockSizes {
  int64_t queries, query_multiple, key_multiple;
};

struct Block : MaskBounds {
  int64_t start, count;
  int64_t padded;  // count rounded up to a multiple
  int64_t at;      // where the block begins when blocks of padded length are laid end to end
};

struct Span {  // query blocks [q0, q1) and key blocks [k0, k1) that no other block sees or is seen by
  int64_t q0, q1, k0, k1, tiles;
};

// The blocks of one batch entry.
struct Layout {
  Block *queries, *keys;
  int64_t query_count, key_count;
  int64_t query_length, key_length;        // all padded blocks end to end
  const int32_t *key_segment, *key_order;  // per token, queries first; nullptr without a mask
  int32_t *query_segment, *query_order;    // per padded query
  Span* spans;
  int64_t span_count;
};

inline void Include(MaskBounds* b, int32_t segment, int32_t order) {
  if (segment < b->segment_min) b->segment_min = segment;
  if (segment > b->segment_max) b->segment_max = segment;
  if (order < b->order_min) b->order_min = order;
  if (order > b->order_max) b->order_max = order;
}

// Cuts tokens into blocks. A change of segment ends a block that is not too short, so that packed sequences
// fall into tiles which are wholly visible or wholly skipped.
int64_t CutBlocks(const int32_t* segment, const int32_t* order, int64_t length, int64_t longest,
                  int64_t multiple, Block* blocks) {
  int64_t n = 0, at = 0;
  for (int64_t i = 0; i < length; ++n) {
    const int32_t s0 = segment ? segment[i] : 0, o0 = order ? order[i] : 0;
    Block b{{s0, s0, o0, o0}, i, 0, 0, at};
    for (; i < length && b.count < longest; ++i, ++b.count) {
      if (!segment) continue;
      if (b.count >= kShortestBlock && segment[i] != segment[i - 1]) break;
      Include(&b, segment[i], order[i]);
    }
    b.padded = RoundUp(b.count, multiple);
    at += b.padded;
    blocks[n] = b;
  }
  return n;
}

inline int64_t LengthOf(const Block* blocks, int64_t count) {
  return count ? blocks[count - 1].at + blocks[count - 1].padded : 0;
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
Layout* MakeLayouts(const PfArgs* a, const AttentionShape& s, const BlockSizes& sizes) {
  const auto most = [](int64_t length) { return length / kShortestBlock + 2; };
  Layout* layouts = Scratch<Layout>(a, s.batch);
  int64_t* low = Scratch<int64_t>(a, most(s.lq));
  if (!layouts || !low) return nullptr;
  for (int64_t b = 0; b < s.batch; ++b) {
    Layout& l = layouts[b];
    l = {};
    if (s.masked) {
      l.key_segment = PfData<int32_t>(a->in[3]) + b * s.lk;
      l.key_order = PfData<int32_t>(a->in[4]) + b * s.lk;
    } else if (b) {
      l = layouts[0];
      continue;
    }
    l.queries = Scratch<Block>(a, most(s.lq));
    l.keys = Scratch<Block>(a, most(s.lk));
    if (!l.queries || !l.keys) return nullptr;
    l.query_count =
        CutBlocks(l.key_segment, l.key_order, s.lq, sizes.queries, sizes.query_multiple, l.queries);
    l.key_count = CutBlocks(l.key_segment, l.key_order, s.lk, kKeyBlock, sizes.key_multiple, l.keys);
    l.query_length = LengthOf(l.queries, l.query_count);
    l.key_length = LengthOf(l.keys, l.key_count);
    if (s.masked) {
      l.query_segment = Scratch<int32_t>(a, l.query_length);
      l.query_order = Scratch<int32_t>(a, l.query_length);
      if (!l.query_segment || !l.query_order) return nullptr;
      for (int64_t q = 0; q < l.query_count; ++q)
        for (int64_t i = 0; i < l.queries[q].padded; ++i) {
          const bool real = i < l.queries[q].count;
          l.query_segment[l.queries[q].at + i] = real ? l.key_segment[l.queries[q].start + i] : 0;
          l.query_order[l.queries[q].at + i] = real ? l.key_order[l.queries[q].start + i] : 0;
        }
    }
    l.spans = Scratch<Span>(a, most(s.lq));
    if (!l.spans) return nullptr;
    CutSpans(l, low);
  }
  return layouts;
}

// Largest of a count or length over the batch.
inline int64_t Most(const Layout* layouts, int64_t batch, int64_t Layout::*count) {
  int64_t n = 0;
  for (int64_t b = 0; b < batch; ++b)
    if (layouts[b].*count > n) n = layouts[b].*count;
  return n;
}

// Of `count` queries from column c of a block on.
inline MaskBounds BoundsOf(const Layout& l, const Block& q, int64_t c, int64_t count) {
  if (!l.query_segment) return q;
  const int32_t *segment = l.query_segment + q.at + c, *order = l.query_order + q.at + c;
  MaskBounds b{segment[0], segment[0], order[0], order[0]};
  for (int64_t i = 1; i < count; ++i) Include(&b, segment[i], order[i]);
  return b;
}

// Inside a parallel region: shares out body(pair, its layout, i) for i below layout.*count, over heads first
// .. first + heads - 1 of all batch entries. Higher i come first: later queries see more keys, and short
// tasks at the end even out what is left.
template <class Body>
inline void ShareOut(const Layout* layouts, int64_t heads_per_batch, int64_t first, int64_t heads,
                     int64_t Layout::*count, int64_t most, Body body) {
#pragma omp for schedule(dynamic)
  for (int64_t task = 0; task < heads * most; ++task) {
    const int64_t pair = first + task / most, i = most - 1 - task % most;
    const Layout& l = layouts[pair / heads_per_batch];
    if (i < l.*count) body(pair, l, i);
  }
}

// Whether the threads have about equally much to do when each task is a span of one head: at worst all but
// one wait for the largest. `part` is the share of the work that may be lost so.
inline bool SpansBalance(const Layout* layouts, int64_t heads_per_batch, int64_t first, int64_t heads,
                         double part) {
  int64_t tiles = 0, largest = 0;
  for (int64_t pair = first; pair < first + heads; ++pair) {
    const Layout& l = layouts[pair / heads_per_batch];
    for (int64_t i = 0; i < l.span_count; ++i) {
      tiles += l.spans[i].tiles;
      if (l.spans[i].tiles > largest) largest = l.spans[i].tiles;
    }
  }
  return static_cast<double>(largest * (omp_get_max_threads() - 1)) <= part * static_cast<double>(tiles);
}

// Longest stretches of padded keys and of padded queries in one span.
inline void LongestSpan(const Layout* layouts, int64_t batch, int64_t* keys, int64_t* queries) {
  *keys = *queries = 0;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < layouts[b].span_count; ++i) {
      const Layout& l = layouts[b];
      const Span& span = l.spans[i];
      int64_t n = LengthOf(l.keys, span.k1) - LengthOf(l.keys, span.k0);
      if (n > *keys) *keys = n;
      n = LengthOf(l.queries, span.q1) - LengthOf(l.queries, span.q0);
      if (n > *queries) *queries = n;
    }
}

// Where a task of forward finds packed operands: long spans share them, short ones pack their own, which then
// never leave the core's cache. Three quarters of the second level is what such a span may take. The choice
// changes no bit of any result.
inline int64_t LocalUnits() {
  static const int64_t units = [] {
    const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return static_cast<int64_t>(bytes > 0 ? bytes : 1 << 20) / 4 * 3 / static_cast<int64_t>(sizeof(int32_t));
  }();
  return units;
}

// Heads packed at a time, so that scratch stays bounded for long sequences.
inline int64_t HeadsAtOnce(int64_t heads, int64_t units_per_head) {
  constexpr int64_t kBudget = int64_t{12} << 20;  // 48 MiB
  const int64_t n = kBudget / (units_per_head > 0 ? units_per_head : 1);
  return n < 1 ? 1 : n > heads ? heads : n;
}

inline Vi LoadI(const int32_t* p) {
  Vi v;
  memcpy(&v, p, sizeof(v));
  return v;
}

// v where the queries from column c of q on see key j of k, otherwise `other`.
inline Vf WhereSeen(const Layout& l, const Block& q, const Block& k, int64_t c, int64_t j, Vf v, Vf other) {
  const int32_t segment = l.key_segment[k.start + j], order = l.key_order[k.start + j];
  const Vi seen = (LoadI(l.query_segment + q.at + c) == segment) & (LoadI(l.query_order + q.at + c) >= order);
  return seen ? v : other;
}

}  // namespace
