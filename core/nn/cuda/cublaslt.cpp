// Matrix products on the device by cuBLASLt, loaded at run time; without it, the plain kernel (matmul.cu).
//
// cuBLASLt thinks in columns: c [m, n] by rows is c^T [n, m] by columns, so c^T = b^T a^T is what it is asked for.
#include <cublasLt.h>
#include <dlfcn.h>

#include <array>
#include <map>
#include <memory>
#include <string>
#include <tuple>

#include <fmt/format.h>

#include "core/base/error.h"
#include "core/base/library.h"
#include "core/device/cuda/language.h"
#include "core/device/cuda/scratch.h"
#include "core/nn/cuda/matmul.h"
#include "core/nn/cuda/ops.h"

namespace dattn::cuda {
namespace {

constexpr std::size_t kWorkspace = std::size_t{32} << 20;  // what NVIDIA recommends for Hopper

#define DATTN_CUBLASLT_FUNCTIONS(f)                                                                     \
  f(cublasLtCreate) f(cublasLtMatmul) f(cublasLtMatmulAlgoGetHeuristic) f(cublasLtMatmulDescCreate)     \
      f(cublasLtMatmulDescSetAttribute) f(cublasLtMatrixLayoutCreate) f(cublasLtMatmulPreferenceCreate) \
          f(cublasLtMatmulPreferenceSetAttribute) f(cublasLtGetVersion)

struct Functions {
#define DATTN_MEMBER(name) decltype(&::name) name = nullptr;  // NOLINT(bugprone-macro-parentheses): a declaration
  DATTN_CUBLASLT_FUNCTIONS(DATTN_MEMBER)
#undef DATTN_MEMBER
};

struct Loaded {
  Functions call;
  bool ok = false;
  std::string text;  // path and version, or why there is none
};

Loaded load() {
  Loaded loaded;
  const Library library = open_nvidia_library("DATTN_CUBLASLT", "libcublasLt.so.13", RTLD_NOW | RTLD_LOCAL);
  if (library.handle == nullptr) return {{}, false, library.tried + "; set DATTN_CUBLASLT to its path"};
#define DATTN_FIND(name)                                                                \
  loaded.call.name = reinterpret_cast<decltype(&::name)>(dlsym(library.handle, #name)); \
  if (loaded.call.name == nullptr) return {{}, false, library.path + " has no " + #name};
  DATTN_CUBLASLT_FUNCTIONS(DATTN_FIND)
#undef DATTN_FIND
  return {loaded.call, true, fmt::format("{} (version {})", library.path, loaded.call.cublasLtGetVersion())};
}

const Loaded& loaded_once() {
  static const Loaded loaded = load();
  return loaded;
}

void check_status(cublasStatus_t status, const char* call) {
  if (status != CUBLAS_STATUS_SUCCESS)
    fail(ErrorCode::kSystem, "{} failed with cuBLAS status {}", call, static_cast<int>(status));
}

cudaDataType_t type_of(DType type) {
  switch (type) {
    case DType::kBF16: return CUDA_R_16BF;
    case DType::kF16: return CUDA_R_16F;
    default: return CUDA_R_32F;
  }
}

// One matrix as a column-major operand: rows x columns with a leading dimension, to be transposed or not.
struct Operand {
  cublasOperation_t op;
  std::uint64_t rows, columns;
  std::int64_t leading;
};

// The transpose of a row-major view as an operand of a product by columns.
Operand transposed_operand(const TensorView& x) {
  const auto rows = static_cast<std::uint64_t>(x.size(0)), columns = static_cast<std::uint64_t>(x.size(1));
  const bool by_rows = x.stride(1) == 1 && (x.size(0) == 1 || x.stride(0) >= x.size(1));
  if (by_rows) return {CUBLAS_OP_N, columns, rows, x.size(0) == 1 ? x.size(1) : x.stride(0)};
  return {CUBLAS_OP_T, rows, columns, x.size(1) == 1 ? x.size(0) : x.stride(1)};
}

// Bytes that the beginnings of all rows (or columns) of a matrix are multiples of, at most what allocations are. Slices of
// whole rows of one matrix have the same: a choice by it is no choice by place.
std::uint32_t alignment_of(const TensorView& x, std::int64_t leading) {
  constexpr std::uintptr_t kMost = 256;
  const std::uintptr_t all =
      reinterpret_cast<std::uintptr_t>(x.data) | static_cast<std::uintptr_t>(leading * size_of(x.dtype)) | kMost;
  return static_cast<std::uint32_t>(all & -all);
}
using Alignments = std::array<std::uint32_t, 3>;  // of what cuBLASLt calls A, B, and C and D

// A product that is ready to run: what it is made of depends on shapes, strides, types and alignments alone.
struct Prepared {
  cublasLtMatmulDesc_t product{};
  cublasLtMatrixLayout_t left{}, right{}, result{};
  cublasLtMatmulAlgo_t algorithm{};
  bool found = false;
};

cublasLtMatrixLayout_t layout_of(const Functions& call, DType type, std::uint64_t rows, std::uint64_t columns,
                                 std::int64_t leading) {
  cublasLtMatrixLayout_t layout{};
  check_status(call.cublasLtMatrixLayoutCreate(&layout, type_of(type), rows, columns, leading), "cublasLtMatrixLayoutCreate");
  return layout;
}

class LtLibrary {
 public:
  explicit LtLibrary(const Functions& call) : call_(call) { check_status(call.cublasLtCreate(&handle_), "cublasLtCreate"); }

  bool run(const TensorView& a, const TensorView& b, const TensorView& c, const CudaMatmul& how, NativeStream stream) {
    Prepared ready = find(a, b, c, how);
    if (!ready.found) return false;
    if (only_host()) return true;
    if (how.bias != nullptr) set(ready.product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, how.bias);
    const float one = 1.0f, kept = how.accumulate ? 1.0f : 0.0f;
    const Scratch workspace(kWorkspace, stream);
    check_status(call_.cublasLtMatmul(handle_, ready.product, &one, b.data, ready.left, a.data, ready.right, &kept, c.data,
                                      ready.result, c.data, ready.result, &ready.algorithm, workspace.ptr<void>(), kWorkspace,
                                      static_cast<cudaStream_t>(stream)),
                 "cublasLtMatmul");
    return true;
  }

 private:
  // Device, extents, leading dimensions, kinds, alignments.
  using Key =
      std::tuple<int, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, int, Alignments>;

  template <class Value>
  void set(cublasLtMatmulDesc_t product, cublasLtMatmulDescAttributes_t attribute, const Value& value) {
    check_status(call_.cublasLtMatmulDescSetAttribute(product, attribute, &value, sizeof(value)),
                 "cublasLtMatmulDescSetAttribute");
  }

  // By thread, because the pointer to the bias is written into what is prepared.
  Prepared find(const TensorView& a, const TensorView& b, const TensorView& c, const CudaMatmul& how) {
    thread_local std::map<Key, Prepared> prepared;
    const Operand left = transposed_operand(b), right = transposed_operand(a);
    const int kinds = static_cast<int>(a.dtype) | static_cast<int>(c.dtype) << 3 | (how.bias != nullptr) << 6 |
                      (left.op == CUBLAS_OP_T) << 7 | (right.op == CUBLAS_OP_T) << 8 | how.tf32 << 9 | how.fixed << 10;
    const Alignments alignments{alignment_of(b, left.leading), alignment_of(a, right.leading), alignment_of(c, c.stride(0))};
    const Key key{a.device.index, a.size(0), a.size(1), b.size(1), left.leading, right.leading, c.stride(0), kinds, alignments};
    const auto known = prepared.find(key);
    if (known != prepared.end()) return known->second;
    return prepared.emplace(key, prepare(left, right, a.dtype, c, how, alignments)).first->second;
  }

  Prepared prepare(const Operand& left, const Operand& right, DType type, const TensorView& c, const CudaMatmul& how,
                   const Alignments& alignments) {
    Prepared made;
    const bool biased = how.bias != nullptr;
    const cublasComputeType_t compute = how.tf32 && type == DType::kF32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
    check_status(call_.cublasLtMatmulDescCreate(&made.product, compute, CUDA_R_32F), "cublasLtMatmulDescCreate");
    set(made.product, CUBLASLT_MATMUL_DESC_TRANSA, left.op);
    set(made.product, CUBLASLT_MATMUL_DESC_TRANSB, right.op);
    if (biased) {
      set(made.product, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
      set(made.product, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, CUDA_R_32F);
    }
    made.left = layout_of(call_, type, left.rows, left.columns, left.leading);
    made.right = layout_of(call_, type, right.rows, right.columns, right.leading);
    made.result = layout_of(call_, c.dtype, static_cast<std::uint64_t>(c.size(1)), static_cast<std::uint64_t>(c.size(0)),
                            c.size(0) == 1 ? c.size(1) : c.stride(0));
    const cublasLtMatmulPreference_t preference = preference_for(how, alignments);
    cublasLtMatmulHeuristicResult_t best{};
    int count = 0;
    const cublasStatus_t status = call_.cublasLtMatmulAlgoGetHeuristic(handle_, made.product, made.left, made.right,
                                                                       made.result, made.result, preference, 1, &best, &count);
    made.found = status == CUBLAS_STATUS_SUCCESS && count > 0;
    made.algorithm = best.algo;
    return made;
  }

  cublasLtMatmulPreference_t preference_for(const CudaMatmul& how, const Alignments& alignments) {
    cublasLtMatmulPreference_t preference{};
    check_status(call_.cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
      check_status(call_.cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value)),
                   "cublasLtMatmulPreferenceSetAttribute");
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspace);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignments[0]);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignments[1]);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignments[2]);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignments[2]);
    if (how.fixed)
      prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_NONE));
    return preference;
  }

  const Functions& call_;
  cublasLtHandle_t handle_{};
};

LtLibrary& library() {
  thread_local std::map<int, std::unique_ptr<LtLibrary>> of_device;
  std::unique_ptr<LtLibrary>& own = of_device[current_device_index()];
  if (!own) own = std::make_unique<LtLibrary>(loaded_once().call);
  return *own;
}

}  // namespace

void matmul(const TensorView& a, const TensorView& b, const TensorView& c, const CudaMatmul& how, NativeStream stream) {
  if (a.size(1) > 0 && loaded_once().ok && library().run(a, b, c, how, stream)) return;
  plain_matmul(a, b, c, how, stream);
}

std::string matmul_library() { return loaded_once().ok ? loaded_once().text : "plain kernel: " + loaded_once().text; }

}  // namespace dattn::cuda
