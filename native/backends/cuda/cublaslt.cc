#include "backends/cuda/cublaslt.h"

bool CublasLtMatmul(const PfArgs*, const GemmProblem&) { return false; }
const char* CublasLtState() { return "not available in the emulator"; }
