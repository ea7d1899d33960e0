#include "backends/cuda/elementwise.h"
#include "ops/patchify/patchify.h"

namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 64, kChannels = 16;  // latent columns and channels of a tile

struct PatchCall {
  FloatArray from, to;
  Patches p;
  int column_tiles, channel_tiles;
};

// A tile of one latent row goes through shared memory: latents are contiguous along the row, tokens along the
// channels.
template <bool kToRows>
__global__ void __launch_bounds__(kThreads) PatchKernel(PatchCall call) {
  __shared__ float tile[kChannels][kColumns + 1];
  const Patches& p = call.p;
  int64_t rest = blockIdx.x;
  const int64_t column = rest % call.column_tiles * kColumns;
  rest /= call.column_tiles;
  const int64_t channel = rest % call.channel_tiles * kChannels;
  rest /= call.channel_tiles;
  const int64_t py = rest % 2, row = rest / 2;
  const int columns = static_cast<int>(2 * p.w - column < kColumns ? 2 * p.w - column : kColumns);
  const int channels = static_cast<int>(p.c - channel < kChannels ? p.c - channel : kChannels);
  const int64_t first_row = p.Row(row);
  const auto latent = [&](int k) {
    const int c = k / kColumns, x = k % kColumns;
    return p.Element(row, channel + c) + py * 2 * p.w + column + x;
  };
  const auto token = [&](int k) {
    const int64_t c = k % kChannels, x = column + k / kChannels;
    return (first_row + x / 2) * 4 * p.c + (py * 2 + x % 2) * p.c + channel + c;
  };
  for (int k = threadIdx.x; k < kColumns * kChannels; k += kThreads) {
    const int c = kToRows ? k / kColumns : k % kChannels, x = kToRows ? k % kColumns : k / kChannels;
    if (c < channels && x < columns) tile[c][x] = ReadOne(call.from, kToRows ? latent(k) : token(k));
  }
  __syncthreads();
  for (int k = threadIdx.x; k < kColumns * kChannels; k += kThreads) {
    const int c = kToRows ? k % kChannels : k / kColumns, x = kToRows ? k / kChannels : k % kColumns;
    if (c < channels && x < columns) WriteOne(call.to, kToRows ? token(k) : latent(k), tile[c][x]);
  }
}

template <bool kToRows>
int32_t Run(const PfArgs* a, const char* op, const PfView& latent, const PfView& rows) {
  PatchCall call = {};
  PF_TRY(MakePatches(a, op, latent, rows, &call.p));
  PF_TRY(NeedFloat(a, op, "x", a->in[0]));
  PF_TRY(NeedFloat(a, op, "y", a->out[0]));
  if (PfCount(latent) == 0) return PF_OK;
  call.from = ArrayOf(a->in[0]);
  call.to = ArrayOf(a->out[0]);
  call.column_tiles = static_cast<int>(CeilDiv(2 * call.p.w, kColumns));
  call.channel_tiles = static_cast<int>(CeilDiv(call.p.c, kChannels));
  const int64_t blocks = call.p.b * call.p.t * call.p.h * 2 * call.column_tiles * call.channel_tiles;
  return Launch(a, &PatchKernel<kToRows>, dim3(static_cast<unsigned>(blocks)), kThreads, 0, call);
}

}  // namespace

int32_t pf_cuda_patchify(const PfArgs* a) { return Run<true>(a, "patchify", a->in[0], a->out[0]); }
int32_t pf_cuda_unpatchify(const PfArgs* a) { return Run<false>(a, "unpatchify", a->out[0], a->in[0]); }
