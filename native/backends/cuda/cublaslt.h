// cuBLASLt, NVIDIA's library of matrix products, looked for at run time: nothing of it is needed to build or
// to run. PYRAFLOW_CUBLASLT names its file, or is "off"; else it is looked for where the CUDA toolkit and the
// system's linker have it.
#pragma once
#include "backends/cuda/gemm.h"

// Whether the product has been queued; if not, nothing has been written and our own kernel has to do it.
bool CublasLtMatmul(const PfArgs* args, const GemmProblem& p);

// Which library is used, or why none is.
const char* CublasLtState();
