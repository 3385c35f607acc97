// Our declarations of cuBLASLt's interface against the real cublasLt.h, at compile time.
#include <cublasLt.h>

#include <cstddef>

#include "core/nn/cuda/cublaslt_api.h"
#include "tests/standins/same_abi.h"

namespace dattn::cublaslt {

using standin::same;

static_assert(same<decltype(CublasLt::get_version), decltype(cublasLtGetVersion)>);
static_assert(same<decltype(CublasLt::create), decltype(cublasLtCreate)>);
static_assert(same<decltype(CublasLt::product_create), decltype(cublasLtMatmulDescCreate)>);
static_assert(same<decltype(CublasLt::product_set), decltype(cublasLtMatmulDescSetAttribute)>);
static_assert(same<decltype(CublasLt::layout_create), decltype(cublasLtMatrixLayoutCreate)>);
static_assert(same<decltype(CublasLt::preference_create), decltype(cublasLtMatmulPreferenceCreate)>);
static_assert(same<decltype(CublasLt::preference_set), decltype(cublasLtMatmulPreferenceSetAttribute)>);
static_assert(same<decltype(CublasLt::get_heuristic), decltype(cublasLtMatmulAlgoGetHeuristic)>);
static_assert(same<decltype(CublasLt::matmul), decltype(cublasLtMatmul)>);

static_assert(int{kSuccess} == CUBLAS_STATUS_SUCCESS && int{kInvalidValue} == CUBLAS_STATUS_INVALID_VALUE &&
              int{kNotSupported} == CUBLAS_STATUS_NOT_SUPPORTED);
static_assert(int{kFloat32} == CUDA_R_32F && int{kFloat16} == CUDA_R_16F && int{kBfloat16} == CUDA_R_16BF);
static_assert(int{kCompute32F} == CUBLAS_COMPUTE_32F && int{kCompute32FFastTf32} == CUBLAS_COMPUTE_32F_FAST_TF32);
static_assert(int{kPlain} == CUBLAS_OP_N && int{kTransposed} == CUBLAS_OP_T);
static_assert(int{kTransposeA} == CUBLASLT_MATMUL_DESC_TRANSA && int{kTransposeB} == CUBLASLT_MATMUL_DESC_TRANSB &&
              int{kEpilogue} == CUBLASLT_MATMUL_DESC_EPILOGUE && int{kBiasPointer} == CUBLASLT_MATMUL_DESC_BIAS_POINTER &&
              int{kAuxPointer} == CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER &&
              int{kAuxLeading} == CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD &&
              int{kBiasType} == CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE);
static_assert(int{kEpilogueBias} == CUBLASLT_EPILOGUE_BIAS && int{kEpilogueGeluAux} == CUBLASLT_EPILOGUE_GELU_AUX &&
              (kEpilogueBias | kEpilogueGeluAux) == CUBLASLT_EPILOGUE_GELU_AUX_BIAS);
static_assert(int{kMaxWorkspace} == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES &&
              int{kReductionSchemes} == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK &&
              int{kAlignmentA} == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES &&
              int{kAlignmentB} == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES &&
              int{kAlignmentC} == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES &&
              int{kAlignmentD} == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
static_assert(kNoReductionScheme == CUBLASLT_REDUCTION_SCHEME_NONE);

static_assert(sizeof(Algorithm) == sizeof(cublasLtMatmulAlgo_t));
static_assert(sizeof(Heuristic) == sizeof(cublasLtMatmulHeuristicResult_t) &&
              offsetof(Heuristic, algorithm) == offsetof(cublasLtMatmulHeuristicResult_t, algo) &&
              offsetof(Heuristic, workspace_bytes) == offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize) &&
              offsetof(Heuristic, state) == offsetof(cublasLtMatmulHeuristicResult_t, state) &&
              offsetof(Heuristic, waves) == offsetof(cublasLtMatmulHeuristicResult_t, wavesCount));

}  // namespace dattn::cublaslt
