// Tensor maps of the TMA unit (hopper.h), made on the host.
#pragma once
#include "backends/cuda/hopper.h"

// Heads of tokens in bf16, [batch, length, heads, 64 panels].
struct PanelTensor {
  const void* data;
  int64_t batch, length, heads, panels;
  int64_t token, head;  // bytes from one to the next, multiples of 16 like the address
};

#if defined(__CUDACC__)

// The driver's function, found at run time: the library has to load where there is no driver.
typedef CUresult (*EncodeTiled)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                                CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                CUtensorMapFloatOOBfill);
inline EncodeTiled FindEncodeTiled() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
  if (status == cudaSuccess && result == cudaDriverEntryPointSuccess)
    return reinterpret_cast<EncodeTiled>(found);
  cudaGetLastError();
  return nullptr;
}

#endif

// A map whose boxes are `rows` tokens of one head and one panel, 64 elements or 128 bytes wide, in the
// 128-byte swizzle. False when the driver cannot make it.
inline bool MakeTensorMap(const PanelTensor& x, int rows, TensorMap* map) {
  const uint64_t dims[4] = {static_cast<uint64_t>(64 * x.panels), static_cast<uint64_t>(x.heads),
                            static_cast<uint64_t>(x.length), static_cast<uint64_t>(x.batch)};
  const uint64_t strides[3] = {static_cast<uint64_t>(x.head), static_cast<uint64_t>(x.token),
                               static_cast<uint64_t>(x.token * x.length)};
  const uint32_t box[4] = {64, 1, static_cast<uint32_t>(rows), 1};
#if defined(__CUDACC__)
  static const EncodeTiled encode = FindEncodeTiled();
  const uint32_t steps[4] = {1, 1, 1, 1};
  cuuint64_t map_dims[4], map_strides[3];
  for (int i = 0; i < 4; ++i) map_dims[i] = dims[i];
  for (int i = 0; i < 3; ++i) map_strides[i] = strides[i];
  return encode &&
         encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(x.data), map_dims, map_strides,
                box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
#else
  map->data = static_cast<const unsigned char*>(x.data);
  memcpy(map->dims, dims, sizeof(dims));
  memcpy(map->strides, strides, sizeof(strides));
  memcpy(map->box, box, sizeof(box));
  return true;
#endif
}
