#include "ops/conv3d/winograd_cpu.h"

namespace {

// The part [lo, hi) of one axis that a tile of the other side touches, and the zeros it sees beyond the ends.
struct Span {
  int64_t lo, hi, left, right;
};

int64_t CeilDiv(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }
int64_t FloorDiv(int64_t a, int64_t b) { return a >= 0 ? a / b : -CeilDiv(-a, b); }

// Inputs read by outputs [begin, end) of an axis.
Span InputsOf(const Conv3dShape& s, int axis, int64_t begin, int64_t end) {
  const int64_t first = begin * s.stride[axis] - s.pad[axis];
  const int64_t last = (end - 1) * s.stride[axis] - s.pad[axis] + s.kernel[axis];
  Span r{first < 0 ? 0 : first, last > s.in[axis] ? s.in[axis] : last, 0, 0};
  r.left = r.lo - first;
  r.right = last - r.hi;
  return r;
}

// Outputs that read any of inputs [begin, end); left and right belong to the small convolution between the
// two.
Span OutputsOf(const Conv3dShape& s, int axis, int64_t begin, int64_t end) {
  const int64_t k = s.kernel[axis], stride = s.stride[axis], pad = s.pad[axis];
  int64_t lo = CeilDiv(begin + pad - k + 1, stride), hi = FloorDiv(end - 1 + pad, stride) + 1;
  if (lo < 0) lo = 0;
  if (hi > s.out[axis]) hi = s.out[axis];
  const int64_t right = (hi - 1) * stride - pad + k - end;
  return {lo, hi, begin + pad - lo * stride, right < 0 ? 0 : right};
}

// A tile: frames [t0, t1) and rows [r0, r1) of one batch entry of the op's result, and what it reads of the
// source.
struct Tile {
  int64_t b, t0, t1, r0, r1;
  Span t, r;
  OnednnKernel* kernel;
  int weight;              // which reordered copy
  bool empty;              // reads nothing: the result is zero
  int64_t entries, zeros;  // weights: batch entries, and frames of zeros written out in front of each
};

constexpr int kMaxLayouts = 8;

double FlopsPerFrame(const Conv3dShape& s, const int64_t* result, bool data) {
  double flops = 2.0 * s.c_in * s.c_out * s.kernel[0] * s.kernel[1] * s.kernel[2] * result[1] * result[2];
  if (data) flops /= static_cast<double>(s.stride[0] * s.stride[1] * s.stride[2]);
  return flops;
}

// How many frames and rows a tile has: by shape alone, so that bits never depend on threads. Frames of a
// batch entry are contiguous, so a tile of whole frames reads and writes in place; rows are split only where
// one frame is so much work that copying the rows it reads is nothing beside it.
void ChooseTile(const Conv3dShape& s, const int64_t* result, bool data, int64_t* frames, int64_t* rows) {
  const double flops = FlopsPerFrame(s, result, data);
  *frames = 1;
  while (*frames < result[0] && flops * *frames < 4e6) ++*frames;
  // Where strides skip inputs, single frames keep every gap at a tile's border, where OutputsOf handles it.
  if (data && s.stride[0] > s.kernel[0]) *frames = 1;
  *rows = result[1];
  const int64_t tiles = s.batch * ((result[0] + *frames - 1) / *frames);
  const int64_t products_per_value = (data ? s.c_in : s.c_out) * s.kernel[1] * s.kernel[2];
  if (tiles >= 16 || flops < 6e7 || products_per_value < 512 || (data && s.stride[1] > s.kernel[1])) return;
  int64_t parts = static_cast<int64_t>(flops / 3e7);
  if (parts > CeilDiv(32, tiles)) parts = CeilDiv(32, tiles);
  *frames = 1;
  *rows = CeilDiv(CeilDiv(result[1], parts), s.stride[1]) * s.stride[1];
}

// Copies rows [r.lo, r.hi) of frames [t.lo, t.hi) next to each other.
void GatherRows(const char* from, const int64_t* dims, int64_t row_bytes, const Span& t, const Span& r,
                char* to) {
  const int64_t bytes = (r.hi - r.lo) * row_bytes;
  for (int64_t f = t.lo; f < t.hi; ++f, to += bytes)
    memcpy(to, from + (f * dims[1] + r.lo) * row_bytes, bytes);
}

// y from x (forward) or dx from dy (data): both read a source through a weight, tile by tile.
int32_t Map(const PfArgs* a, const char* op, const Conv3dShape& s, bool data, const PfView& source,
            const PfView& w, const PfView* bias, const PfView& result) {
  bool done = false;
  const int32_t tried = TryWinograd(a, op, s, data, source, w, bias, result, &done);
  if (done) return tried;
  const int64_t* to_dims = data ? s.in : s.out;
  const int64_t* from_dims = data ? s.out : s.in;
  const int64_t to_c = data ? s.c_in : s.c_out, from_c = data ? s.c_out : s.c_in;
  const int32_t dtype = source.dtype == PF_BF16 && w.dtype == PF_BF16 && OnednnHasBf16() ? PF_BF16 : PF_F32;
  const int32_t out_type = dtype == PF_BF16 ? result.dtype : static_cast<int32_t>(PF_F32);
  const char* from = static_cast<const char*>(As(a, source, dtype));
  const char* plain = static_cast<const char*>(As(a, w, dtype));
  char* to = static_cast<char*>(result.data);
  if (out_type != result.dtype) to = static_cast<char*>(Scratch(a, PfCount(result) * PfSize(out_type)));
  float* bias_f32 = bias && PfPresent(*bias) ? static_cast<float*>(As(a, *bias, PF_F32)) : nullptr;

  int64_t frames, rows;
  ChooseTile(s, to_dims, data, &frames, &rows);
  const int64_t per_frame = CeilDiv(to_dims[1], rows), per_entry = CeilDiv(to_dims[0], frames) * per_frame;
  const int64_t count = s.batch * per_entry;
  Tile* tiles = static_cast<Tile*>(Scratch(a, count * sizeof(Tile)));
  if (!from || !plain || !to || !tiles || (bias && PfPresent(*bias) && !bias_f32)) return NoMemory(a, op);

  void* weights[kMaxLayouts];
  const OnednnKernel* layouts[kMaxLayouts];
  int n_layouts = 0;
  size_t scratch = 0, gather = 0;
  int32_t status = PF_OK;
  const int64_t from_row = from_dims[2] * from_c * PfSize(dtype),
                to_row = to_dims[2] * to_c * PfSize(out_type);
  int64_t made = 0;
  for (; made < count && status == PF_OK; ++made) {
    Tile& tile = tiles[made];
    const int64_t at = made % per_entry;
    tile.b = made / per_entry;
    tile.t0 = at / per_frame * frames;
    tile.t1 = tile.t0 + frames < to_dims[0] ? tile.t0 + frames : to_dims[0];
    tile.r0 = at % per_frame * rows;
    tile.r1 = tile.r0 + rows < to_dims[1] ? tile.r0 + rows : to_dims[1];
    tile.t = data ? OutputsOf(s, 0, tile.t0, tile.t1) : InputsOf(s, 0, tile.t0, tile.t1);
    tile.r = data ? OutputsOf(s, 1, tile.r0, tile.r1) : InputsOf(s, 1, tile.r0, tile.r1);
    const Span c = data ? OutputsOf(s, 2, 0, to_dims[2]) : InputsOf(s, 2, 0, to_dims[2]);
    tile.kernel = nullptr;
    tile.empty = tile.t.hi <= tile.t.lo || tile.r.hi <= tile.r.lo || c.hi <= c.lo;
    if (tile.empty) continue;
    // Forward, whole rows: what a stride leaves over at the end is still part of the memory.
    if (!data && rows == to_dims[1]) tile.r.hi = s.in[1];
    OnednnConv v{};
    v.kind = data ? kConvBackwardData : kConvForward;
    v.n = 1;
    v.c_in = s.c_in;
    v.c_out = s.c_out;
    const int64_t to_size[3] = {tile.t1 - tile.t0, tile.r1 - tile.r0, to_dims[2]};
    const int64_t from_size[3] = {tile.t.hi - tile.t.lo, tile.r.hi - tile.r.lo, from_dims[2]};
    memcpy(v.in, data ? to_size : from_size, sizeof(v.in));
    memcpy(v.out, data ? from_size : to_size, sizeof(v.out));
    const Span* spans[3] = {&tile.t, &tile.r, &c};
    for (int i = 0; i < 3; ++i) {
      v.kernel[i] = s.kernel[i];
      v.stride[i] = s.stride[i];
      v.left[i] = spans[i]->left;
      v.right[i] = spans[i]->right;
    }
    v.dtype = dtype;
    v.out_dtype = out_type;
    v.bias = bias_f32 != nullptr;
    tile.kernel = OnednnGetConv(v, a->context->error);
    if (!tile.kernel) {
      status = PF_ERR_DEVICE;
      continue;
    }
    if (OnednnScratchBytes(tile.kernel) > scratch) scratch = OnednnScratchBytes(tile.kernel);
    if (rows != to_dims[1] && tile.t.hi - tile.t.lo > 1) {
      const size_t bytes = from_size[0] * from_size[1] * from_row;
      if (bytes > gather) gather = bytes;
    }
    tile.weight = 0;
    while (tile.weight < n_layouts && !OnednnSameWeightLayout(layouts[tile.weight], tile.kernel))
      ++tile.weight;
    if (tile.weight < n_layouts) continue;
    if (n_layouts == kMaxLayouts) {
      status = Fail(a, PF_ERR_DEVICE, "%s: too many weight layouts", op);
      continue;
    }
    layouts[n_layouts] = tile.kernel;
    weights[n_layouts] = Scratch(a, OnednnConvWeightBytes(tile.kernel));
    status = weights[n_layouts]
                 ? OnednnReorderConvWeight(tile.kernel, true, plain, weights[n_layouts], a->context->error)
                 : NoMemory(a, op);
    ++n_layouts;
  }
  scratch = (scratch + 63) / 64 * 64;
  gather = (gather + 63) / 64 * 64;
  char* memory = nullptr;
  if (status == PF_OK) {
    memory = static_cast<char*>(Scratch(a, (scratch + gather) * omp_get_max_threads()));
    if (!memory) status = NoMemory(a, op);
  }
  if (status == PF_OK)
    status = ForTiles(a, count, kWorthProducts + 1, [&](int64_t i, int thread, char* error) {
      const Tile& tile = tiles[i];
      char* mine = memory + thread * (scratch + gather);
      char* out = to + ((tile.b * to_dims[0] + tile.t0) * to_dims[1] + tile.r0) * to_row;
      if (tile.empty) {
        memset(out, 0, (tile.t1 - tile.t0) * (tile.r1 - tile.r0) * to_row);
        return static_cast<int32_t>(PF_OK);
      }
      const char* entry = from + tile.b * from_dims[0] * from_dims[1] * from_row;
      const char* in = entry + (tile.t.lo * from_dims[1] + tile.r.lo) * from_row;
      if (rows != to_dims[1] && tile.t.hi - tile.t.lo > 1) {
        GatherRows(entry, from_dims, from_row, tile.t, tile.r, mine + scratch);
        in = mine + scratch;
      }
      void* source = const_cast<char*>(in);
      return OnednnRunConv(tile.kernel, data ? out : source, weights[tile.weight], bias_f32,
                           data ? source : out, mine, error);
    });
  for (int64_t i = 0; i < made; ++i) OnednnRelease(tiles[i].kernel);
  if (status == PF_OK && out_type != result.dtype)
    ConvertFloats(to, out_type, result.data, result.dtype, PfCount(result));
  return status;
}

// to[i] (=|+=) from[i] + from[i + stride] + ..., always in this order.
void SumParts(const float* from, int64_t parts, int64_t stride, int64_t n, bool accumulate, float* to) {
  constexpr int64_t kChunk = 4096;
#pragma omp parallel for schedule(static) if (n * parts > kWorthThreads)
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = begin + kChunk < n ? begin + kChunk : n;
    for (int64_t i = begin; i < end; i += kLanes) {
      Vf v = LoadN(from + i, end - i);
      for (int64_t p = 1; p < parts; ++p) v = v + LoadN(from + p * stride + i, end - i);
      if (accumulate) v = v + LoadN(to + i, end - i);
      StoreN(to + i, v, end - i);
    }
  }
}

}  // namespace

int32_t pf_cpu_conv3d(const PfArgs* a) {
  const PfView &x = a->in[0], &w = a->in[1], &bias = a->in[2], &y = a->out[0];
  Conv3dShape s{};
  int32_t status = GetConv3dShape(a, "conv3d", x, w, y, &bias, &s);
  if (status == PF_OK) status = CheckConv3dFloats(a, "conv3d", x, y);
  if (status == PF_OK) status = CheckConv3dFloats(a, "conv3d", w, PfPresent(bias) ? bias : w);
  if (status != PF_OK || s.batch == 0) return status;
  return Map(a, "conv3d", s, false, x, w, &bias, y);
}

int32_t pf_cpu_conv3d_backward_data(const PfArgs* a) {
  const PfView &dy = a->in[0], &w = a->in[1], &dx = a->out[0];
  Conv3dShape s{};
  int32_t status = GetConv3dShape(a, "conv3d_backward_data", dx, w, dy, nullptr, &s);
  if (status == PF_OK) status = CheckConv3dFloats(a, "conv3d_backward_data", dx, dy);
  if (status == PF_OK) status = CheckConv3dFloats(a, "conv3d_backward_data", w, w);
  if (status != PF_OK || s.batch == 0) return status;
  return Map(a, "conv3d_backward_data", s, true, dy, w, nullptr, dx);
}

// The sum over positions is cut into parts by shape alone; each part is one kernel on one thread with a
// gradient of its own, and the parts are added in order. Left to itself oneDNN would cut by thread count, and
// round differently.
int32_t pf_cpu_conv3d_backward_weights(const PfArgs* a) {
  const char* op = "conv3d_backward_weights";
  const PfView &x = a->in[0], &dy = a->in[1], &dw = a->out[0], &db = a->out[1];
  Conv3dShape s{};
  int32_t status = GetConv3dShape(a, op, x, dw, dy, &db, &s);
  if (status == PF_OK) status = CheckConv3dFloats(a, op, x, dy);
  if (status == PF_OK) status = CheckConv3dGradients(a, op, dw, db);
  if (status != PF_OK) return status;
  const bool accumulate = PfParams<Conv3dParams>(a).accumulate != 0;
  if (s.batch == 0) {
    if (!accumulate) memset(dw.data, 0, PfCount(dw) * 4);
    if (!accumulate && PfPresent(db)) memset(db.data, 0, s.c_out * 4);
    return PF_OK;
  }
  const int32_t dtype = x.dtype == PF_BF16 && dy.dtype == PF_BF16 && OnednnHasBf16() ? PF_BF16 : PF_F32;
  const char* x_data = static_cast<const char*>(As(a, x, dtype));
  const char* dy_data = static_cast<const char*>(As(a, dy, dtype));

  // A part is a run of frames of one entry, or several whole entries: enough positions to pay for writing and
  // adding a gradient, and at most 64 MB of gradients.
  const int64_t frame = s.out[1] * s.out[2], entry = frame * s.out[0], dw_count = PfCount(dw);
  int64_t most = (int64_t{16} << 20) / dw_count;
  most = most < 2 ? 2 : most > 32 ? 32 : most;
  const int64_t want = CeilDiv(s.batch * entry, most) > 512 ? CeilDiv(s.batch * entry, most) : 512;
  const int64_t frames = want < entry ? CeilDiv(want, frame) : s.out[0];
  const int64_t entries = frames < s.out[0]                ? 1
                          : CeilDiv(want, entry) < s.batch ? CeilDiv(want, entry)
                                                           : s.batch;
  const int64_t per_entry = CeilDiv(s.out[0], frames), count = CeilDiv(s.batch, entries) * per_entry;

  Tile* tiles = static_cast<Tile*>(Scratch(a, count * sizeof(Tile)));
  if (!x_data || !dy_data || !tiles) return NoMemory(a, op);
  size_t scratch = 0, dw_bytes = 0, gather = 0;
  const size_t frame_bytes = s.in[1] * s.in[2] * s.c_in * PfSize(dtype);
  int64_t made = 0;
  for (; made < count && status == PF_OK; ++made) {
    Tile& tile = tiles[made];
    tile.b = made / per_entry * entries;
    tile.t0 = made % per_entry * frames;
    tile.t1 = tile.t0 + frames < s.out[0] ? tile.t0 + frames : s.out[0];
    tile.t = InputsOf(s, 0, tile.t0, tile.t1);
    if (frames == s.out[0]) tile.t.hi = s.in[0];
    tile.r = InputsOf(s, 1, 0, s.out[1]);
    const Span c = InputsOf(s, 2, 0, s.out[2]);
    OnednnConv v{};
    v.kind = kConvBackwardWeights;
    v.n = tile.b + entries < s.batch ? entries : s.batch - tile.b;
    v.c_in = s.c_in;
    v.c_out = s.c_out;
    const Span* spans[3] = {&tile.t, &tile.r, &c};
    for (int i = 0; i < 3; ++i) {
      v.in[i] = i ? s.in[i] : tile.t.hi - tile.t.lo;
      v.out[i] = i ? s.out[i] : tile.t1 - tile.t0;
      v.kernel[i] = s.kernel[i];
      v.stride[i] = s.stride[i];
      v.left[i] = spans[i]->left;
      v.right[i] = spans[i]->right;
    }
    v.dtype = dtype;
    v.out_dtype = PF_F32;
    v.bias = PfPresent(db);
    tile.entries = v.n;
    tile.zeros = 0;
    tile.kernel = OnednnGetConv(v, a->context->error);
    if (tile.kernel && tile.t.left > 0 && OnednnGetRank(tile.kernel) != kRankDirect) {
      // oneDNN's direct kernels refuse a kernel that mostly hangs over the front; zeros that are really there
      // help.
      v.in[0] += tile.t.left;
      v.left[0] = 0;
      OnednnKernel* better = OnednnGetConv(v, a->context->error);
      const bool use = better && OnednnGetRank(better) > OnednnGetRank(tile.kernel);
      OnednnRelease(use ? tile.kernel : better);
      if (use) {
        tile.kernel = better;
        tile.zeros = tile.t.left;
        const size_t bytes = v.n * v.in[0] * frame_bytes;
        if (bytes > gather) gather = bytes;
      }
    }
    if (!tile.kernel) {
      status = PF_ERR_DEVICE;
      continue;
    }
    if (OnednnScratchBytes(tile.kernel) > scratch) scratch = OnednnScratchBytes(tile.kernel);
    dw_bytes = OnednnConvWeightBytes(tile.kernel);
    // A part in another layout could not be added blockwise: such parts are brought to plain order one by
    // one.
    tile.weight = OnednnSameWeightLayout(tile.kernel, tiles[0].kernel) ? 0 : 1;
  }
  bool one_layout = true;
  for (int64_t i = 0; i < made && status == PF_OK; ++i) {
    one_layout = one_layout && tiles[i].weight == 0;
    if (OnednnConvWeightBytes(tiles[i].kernel) > dw_bytes) dw_bytes = OnednnConvWeightBytes(tiles[i].kernel);
  }
  scratch = (scratch + 63) / 64 * 64;
  gather = (gather + 63) / 64 * 64;
  dw_bytes = (dw_bytes + 63) / 64 * 64;
  const int64_t db_floats = (s.c_out + 15) / 16 * 16;
  float* parts = static_cast<float*>(Scratch(a, count * dw_bytes));
  float* bias_parts = static_cast<float*>(Scratch(a, count * db_floats * 4));
  float* plain = static_cast<float*>(Scratch(a, (one_layout ? 1 : count) * dw_count * 4));
  char* memory = static_cast<char*>(Scratch(a, (scratch + gather) * omp_get_max_threads()));
  if (status == PF_OK && (!parts || !bias_parts || !plain || !memory)) status = NoMemory(a, op);
  const int64_t stride = dw_bytes / 4;
  if (status == PF_OK)
    status = ForTiles(a, count, kWorthProducts + 1, [&](int64_t i, int thread, char* error) {
      const Tile& tile = tiles[i];
      const char* in = x_data + (tile.b * s.in[0] + tile.t.lo) * frame_bytes;
      const char* grad = dy_data + (tile.b * s.out[0] + tile.t0) * frame * s.c_out * PfSize(dtype);
      float* part = parts + i * stride;
      char* mine = memory + thread * (scratch + gather);
      if (tile.zeros) {
        const int64_t frames = tile.t.hi - tile.t.lo;
        char* copy = mine + scratch;
        for (int64_t e = 0; e < tile.entries; ++e, copy += (tile.zeros + frames) * frame_bytes) {
          memset(copy, 0, tile.zeros * frame_bytes);
          memcpy(copy + tile.zeros * frame_bytes, in + e * s.in[0] * frame_bytes, frames * frame_bytes);
        }
        in = mine + scratch;
      }
      int32_t status = OnednnRunConv(tile.kernel, const_cast<char*>(in), part,
                                     PfPresent(db) ? bias_parts + i * db_floats : nullptr,
                                     const_cast<char*>(grad), mine, error);
      if (status == PF_OK && !one_layout)
        status = OnednnReorderConvWeight(tile.kernel, false, part, plain + i * dw_count, error);
      return status;
    });
  if (status == PF_OK && one_layout) {
    SumParts(parts, count, stride, OnednnConvWeightBytes(tiles[0].kernel) / 4, false, parts);
    status = OnednnReorderConvWeight(tiles[0].kernel, false, parts, plain, a->context->error);
  }
  for (int64_t i = 0; i < made; ++i) OnednnRelease(tiles[i].kernel);
  if (status != PF_OK) return status;
  SumParts(plain, one_layout ? 1 : count, dw_count, dw_count, accumulate, PfData<float>(dw));
  if (PfPresent(db)) SumParts(bias_parts, count, db_floats, s.c_out, accumulate, PfData<float>(db));
  return PF_OK;
}
