// The door to oneDNN. Only onednn.cc includes its headers; everything here is plain data.
//
// Every kernel behind this door computes one tile on one thread: oneDNN splits work (and sums) by the number
// of threads it sees, so its results for a whole problem may change with that number. The ops cut their
// problem into tiles by shape alone and spread the tiles over threads themselves; then bits cannot depend on
// the thread count.
#pragma once
#include "core/op.h"

// Caps oneDNN at this level's instructions; must run before its first use in the process.
int32_t OnednnInit(const char* level, char* error);
size_t OnednnPackBytes(int64_t n, int64_t k, int32_t dtype);

// Whether bf16 products have a vector path here. Without one the ops convert to f32.
bool OnednnHasBf16();
// Whether products of eight bits have exact ones: dot products into whole numbers of 32 bits.
bool OnednnHasInt8();

// A created primitive. Get from the cache, Release after use; Run may be called from several threads at once.
struct OnednnKernel;
void OnednnRelease(OnednnKernel* kernel);
size_t OnednnScratchBytes(const OnednnKernel* kernel);
// What oneDNN offers for this problem: its plain reference loops, a product of gathered copies, or a direct
// kernel.
enum OnednnRank { kRankReference, kRankGemm, kRankDirect };
OnednnRank OnednnGetRank(const OnednnKernel* kernel);

// c[m, n] = a[m, k] b[k, n], element strides; a and b of one dtype: f32 or bf16 with c f32, or i8 with c i32.
// packed: b is a tile of a packed weight and its strides are unused.
struct OnednnGemm {
  int64_t m, n, k;
  int64_t a_row, a_column, b_row, b_column, c_row;
  int64_t dtype, packed;
};
OnednnKernel* OnednnGetGemm(const OnednnGemm& gemm, char* error);
int32_t OnednnRunGemm(const OnednnKernel* kernel, const void* a, const void* b, void* c, void* scratch,
                      char* error);

// Packed weights: a header, then tiles of kOnednnPackColumns outputs, each in the layout its kernels like
// best.
static constexpr int64_t kOnednnPackColumns = 256;
// Bytes of a tile of n outputs, 0 with a message when oneDNN refuses; b[k, n] of any strides as such a tile.
size_t OnednnPackTileBytes(int64_t n, int64_t k, int64_t dtype, char* error);
int32_t OnednnPackTile(const void* b, int64_t b_row, int64_t b_column, int64_t n, int64_t k, int64_t dtype,
                       void* tile, char* error);
// What w[n, k] is stored as: bf16 only where that is fast.
int32_t OnednnPackDType(int32_t dtype);
// w is plain [n, k] of the stored dtype.
int32_t OnednnPack(const void* w, int64_t n, int64_t k, int32_t dtype, void* blob, char* error);
struct OnednnPacked {
  int64_t n, k, dtype;
  const char* data;
  int64_t tile_bytes;  // from one tile to the next
};
int32_t OnednnOpenPacked(const void* blob, size_t bytes, OnednnPacked* packed, char* error);
// The plain [n, k] weight again.
int32_t OnednnUnpack(const OnednnPacked& packed, void* w, char* error);

// One convolution on dense channels-last memory [n, t, h, w, c]. Index 0, 1, 2 = t, h, w. What does not fit
// the padding on the right is left unread, as a floor division does.
enum OnednnConvKind : int64_t { kConvForward, kConvBackwardData, kConvBackwardWeights };
struct OnednnConv {
  int64_t kind, n, c_in, c_out;
  int64_t in[3], out[3], kernel[3], stride[3], left[3], right[3];
  int64_t dtype;      // of x, w and dy
  int64_t out_dtype;  // of y or dx; dw is f32
  int64_t bias;       // f32, forward and weights only
};
OnednnKernel* OnednnGetConv(const OnednnConv& conv, char* error);
// Bytes of the weight in the kernel's own layout, and whether two kernels share one.
size_t OnednnConvWeightBytes(const OnednnKernel* kernel);
bool OnednnSameWeightLayout(const OnednnKernel* a, const OnednnKernel* b);
// Between the checkpoint order [c_out, c_in, kt, kh, kw] and the kernel's layout (from_plain: into it).
int32_t OnednnReorderConvWeight(const OnednnKernel* kernel, bool from_plain, const void* from, void* to,
                                char* error);
// forward: x, w, bias -> y.  data: w, y = dy -> x = dx.  weights: x, y = dy -> w = dw, bias = dbias.
int32_t OnednnRunConv(const OnednnKernel* kernel, void* x, void* w, void* bias, void* y, void* scratch,
                      char* error);
