// Matrix products on the device by cuBLASLt, loaded at run time; without it, the plain kernel (matmul.cu).
//
// cuBLASLt thinks in columns: c [m, n] by rows is c^T [n, m] by columns, so c^T = b^T a^T is what it is asked for. A bias and
// gelu are epilogues of the product: its gelu is the approximation by tanh, as ours is (activation.h).
#include <dlfcn.h>

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#include <fmt/format.h>

#include "core/base/error.h"
#include "core/base/library.h"
#include "core/base/log.h"
#include "core/device/cuda/language.h"
#include "core/device/cuda/scratch.h"
#include "core/nn/cuda/cublaslt_api.h"
#include "core/nn/cuda/matmul.h"
#include "core/nn/cuda/ops.h"

namespace dattn::cuda {
namespace {

using namespace cublaslt;  // NOLINT: this file speaks that interface

constexpr const char* kVariable = "DATTN_CUBLASLT";
constexpr const char* kName = DATTN_CUBLASLT_NAME;         // by the build: the toolkit's, or that of the tests' stand-in
constexpr std::size_t kWorkspace = std::size_t{32} << 20;  // what NVIDIA recommends for Hopper
constexpr std::int64_t kAuxUnit = 8;  // elements that the leading dimension of gelu's input is a multiple of

struct Loaded {
  CublasLt call;
  bool ok = false;
  std::string text;  // path and version, or why there is none
};

Loaded load() {
  const Library library = open_nvidia_library(kVariable, kName, RTLD_NOW | RTLD_LOCAL);
  if (library.handle == nullptr)
    return {{}, false, missing_text(library, kVariable, kName, "cuBLAS 13 (pip install nvidia-cublas)")};
  Loaded loaded;
  std::string missing;
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library.handle, name));
    if (function == nullptr) missing += std::string(missing.empty() ? "" : ", ") + name;
  };
  find(loaded.call.get_version, "cublasLtGetVersion");
  find(loaded.call.create, "cublasLtCreate");
  find(loaded.call.product_create, "cublasLtMatmulDescCreate");
  find(loaded.call.product_set, "cublasLtMatmulDescSetAttribute");
  find(loaded.call.layout_create, "cublasLtMatrixLayoutCreate");
  find(loaded.call.preference_create, "cublasLtMatmulPreferenceCreate");
  find(loaded.call.preference_set, "cublasLtMatmulPreferenceSetAttribute");
  find(loaded.call.get_heuristic, "cublasLtMatmulAlgoGetHeuristic");
  find(loaded.call.matmul, "cublasLtMatmul");
  loaded.ok = missing.empty();
  loaded.text = loaded.ok ? fmt::format("{} (version {})", library.path, loaded.call.get_version())
                          : fmt::format("{} has no {}", library.path, missing);
  return loaded;
}

const Loaded& loaded_once() {
  static const Loaded loaded = load();
  return loaded;
}

void check_status(Status status, const char* call) {
  if (status != kSuccess) fail(ErrorCode::kSystem, "{} failed with cuBLAS status {}", call, static_cast<int>(status));
}

DataType type_of(DType type) {
  switch (type) {
    case DType::kBF16: return kBfloat16;
    case DType::kF16: return kFloat16;
    default: return kFloat32;
  }
}

// One matrix as a column-major operand: rows x columns with a leading dimension, to be transposed or not.
struct Operand {
  Operation op;
  std::uint64_t rows, columns;
  std::int64_t leading;
};

// The transpose of a row-major view as an operand of a product by columns.
Operand transposed_operand(const TensorView& x) {
  const auto rows = static_cast<std::uint64_t>(x.size(0)), columns = static_cast<std::uint64_t>(x.size(1));
  const bool by_rows = x.stride(1) == 1 && (x.size(0) == 1 || x.stride(0) >= x.size(1));
  if (by_rows) return {kPlain, columns, rows, x.size(0) == 1 ? x.size(1) : x.stride(0)};
  return {kTransposed, rows, columns, x.size(1) == 1 ? x.size(0) : x.stride(1)};
}

// Bytes that the beginnings of all rows (or columns) of a matrix are multiples of, at most what allocations are. Slices of
// whole rows of one matrix have the same: a choice by it is no choice by place.
std::uint32_t alignment_of(const void* data, std::int64_t row_bytes) {
  constexpr std::uintptr_t kMost = 256;
  const std::uintptr_t all = reinterpret_cast<std::uintptr_t>(data) | static_cast<std::uintptr_t>(row_bytes) | kMost;
  return static_cast<std::uint32_t>(all & -all);
}
using Alignments = std::array<std::uint32_t, 5>;  // of what cuBLASLt calls A, B, and C and D; of the bias, of gelu's input

// Elements from row to row.
std::int64_t row_distance(const TensorView& c) { return c.size(0) == 1 ? c.size(1) : c.stride(0); }

// What epilogues read and write beside the matrices. cuBLASLt takes their alignment from the pointers.
struct Beside {
  const void* bias = nullptr;  // [n] in the type of c
  void* before_gelu = nullptr;
  std::int64_t before_gelu_leading = 0;
};

// A product that is ready to run: what it is made of depends on shapes, strides, types and alignments alone.
struct Prepared {
  Product product{};
  Layout left{}, right{}, result{};
  Algorithm algorithm{};
  bool found = false;
};

class LtLibrary {
 public:
  explicit LtLibrary(const CublasLt& call) : call_(call) { check_status(call.create(&handle_), "cublasLtCreate"); }

  bool run(const TensorView& a, const TensorView& b, const TensorView& c, const CudaMatmul& how, NativeStream stream) {
    std::optional<Scratch> rounded;
    Beside beside{bias_in(c, how.bias, rounded, stream)};
    if (how.before_gelu != nullptr) {
      beside.before_gelu = how.before_gelu->data;
      beside.before_gelu_leading = row_distance(*how.before_gelu);
      if (beside.before_gelu_leading % kAuxUnit != 0) return false;
    }
    const Prepared ready = find(a, b, c, how, beside);
    if (!ready.found) return false;
    if (only_host()) return true;
    point_to(beside, ready.product);
    const float one = 1.0f, kept = how.accumulate ? 1.0f : 0.0f;
    const Scratch workspace(kWorkspace, stream);
    check_status(call_.matmul(handle_, ready.product, &one, b.data, ready.left, a.data, ready.right, &kept, c.data,
                              ready.result, c.data, ready.result, &ready.algorithm, workspace.ptr<void>(), kWorkspace, stream),
                 "cublasLtMatmul");
    return true;
  }

 private:
  // Device, extents, leading dimensions, kinds, alignments.
  using Key = std::tuple<int, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                         int, Alignments>;

  // A bias has the type of the result: that of halves is rounded, into `storage`.
  static const void* bias_in(const TensorView& c, const float* bias, std::optional<Scratch>& storage, NativeStream stream) {
    if (bias == nullptr || c.dtype == DType::kF32) return bias;
    const TensorView from(const_cast<float*>(bias), DType::kF32, {c.size(1)}, c.device);
    storage.emplace(static_cast<std::size_t>(c.size(1) * size_of(c.dtype)), stream);
    copy(from, TensorView(storage->ptr<void>(), c.dtype, from.shape, c.device), stream);
    return storage->ptr<void>();
  }

  template <class Value>
  void set(Product product, ProductAttribute attribute, const Value& value) {
    check_status(call_.product_set(product, attribute, &value, sizeof(value)), "cublasLtMatmulDescSetAttribute");
  }

  void point_to(const Beside& beside, Product product) {
    if (beside.bias != nullptr) set(product, kBiasPointer, beside.bias);
    if (beside.before_gelu != nullptr) set(product, kAuxPointer, beside.before_gelu);
  }

  // By thread, because pointers are written into what is prepared.
  Prepared find(const TensorView& a, const TensorView& b, const TensorView& c, const CudaMatmul& how, const Beside& beside) {
    thread_local std::map<Key, Prepared> prepared;
    const Operand left = transposed_operand(b), right = transposed_operand(a);
    const int kinds = static_cast<int>(a.dtype) | static_cast<int>(c.dtype) << 3 | (beside.bias != nullptr) << 6 |
                      (beside.before_gelu != nullptr) << 7 | (left.op == kTransposed) << 8 | (right.op == kTransposed) << 9 |
                      how.tf32 << 10 | how.fixed << 11;
    const std::int64_t width = size_of(a.dtype), result_width = size_of(c.dtype);
    const Alignments alignments{alignment_of(b.data, left.leading * width), alignment_of(a.data, right.leading * width),
                                alignment_of(c.data, c.stride(0) * result_width), alignment_of(beside.bias, 0),
                                alignment_of(beside.before_gelu, beside.before_gelu_leading * result_width)};
    const Key key{a.device.index, a.size(0),     a.size(1),   b.size(1),
                  left.leading,   right.leading, c.stride(0), beside.before_gelu_leading,
                  kinds,          alignments};
    const auto known = prepared.find(key);
    if (known != prepared.end()) return known->second;
    return prepared.emplace(key, prepare(left, right, a.dtype, c, how, beside, alignments)).first->second;
  }

  Prepared prepare(const Operand& left, const Operand& right, DType type, const TensorView& c, const CudaMatmul& how,
                   const Beside& beside, const Alignments& alignments) {
    Prepared made;
    const bool tf32 = how.tf32 && type == DType::kF32;
    check_status(call_.product_create(&made.product, tf32 ? kCompute32FFastTf32 : kCompute32F, kFloat32),
                 "cublasLtMatmulDescCreate");
    set(made.product, kTransposeA, left.op);
    set(made.product, kTransposeB, right.op);
    describe_epilogue(made.product, beside, c.dtype);
    made.left = layout_of(type, left.rows, left.columns, left.leading);
    made.right = layout_of(type, right.rows, right.columns, right.leading);
    made.result =
        layout_of(c.dtype, static_cast<std::uint64_t>(c.size(1)), static_cast<std::uint64_t>(c.size(0)), row_distance(c));
    Heuristic best{};
    int count = 0;
    const Status status = call_.get_heuristic(handle_, made.product, made.left, made.right, made.result, made.result,
                                              preference_for(how, alignments), 1, &best, &count);
    made.found = status == kSuccess && count > 0 && best.state == kSuccess;
    made.algorithm = best.algorithm;
    return made;
  }

  void describe_epilogue(Product product, const Beside& beside, DType result) {
    const int epilogue = (beside.bias != nullptr ? kEpilogueBias : 0) | (beside.before_gelu != nullptr ? kEpilogueGeluAux : 0);
    if (epilogue == 0) return;
    set(product, kEpilogue, epilogue);
    if (beside.bias != nullptr) set(product, kBiasType, type_of(result));
    if (beside.before_gelu != nullptr) set(product, kAuxLeading, beside.before_gelu_leading);
    point_to(beside, product);
  }

  Layout layout_of(DType type, std::uint64_t rows, std::uint64_t columns, std::int64_t leading) {
    Layout layout{};
    check_status(call_.layout_create(&layout, type_of(type), rows, columns, leading), "cublasLtMatrixLayoutCreate");
    return layout;
  }

  Preference preference_for(const CudaMatmul& how, const Alignments& alignments) {
    Preference preference{};
    check_status(call_.preference_create(&preference), "cublasLtMatmulPreferenceCreate");
    const auto prefer = [&](PreferenceAttribute attribute, const auto& value) {
      check_status(call_.preference_set(preference, attribute, &value, sizeof(value)), "cublasLtMatmulPreferenceSetAttribute");
    };
    prefer(kMaxWorkspace, kWorkspace);
    prefer(kAlignmentA, alignments[0]);
    prefer(kAlignmentB, alignments[1]);
    prefer(kAlignmentC, alignments[2]);
    prefer(kAlignmentD, alignments[2]);
    if (how.fixed) prefer(kReductionSchemes, kNoReductionScheme);
    return preference;
  }

  const CublasLt& call_;
  Handle handle_{};
};

LtLibrary& library() {
  thread_local std::map<int, std::unique_ptr<LtLibrary>> of_device;
  std::unique_ptr<LtLibrary>& own = of_device[current_device_index()];
  if (!own) own = std::make_unique<LtLibrary>(loaded_once().call);
  return *own;
}

// Whether cuBLASLt has done it; where it has no gelu for the case, the product alone and a pass of our own.
bool by_library(const TensorView& a, const TensorView& b, const TensorView& c, const CudaMatmul& how, NativeStream stream) {
  if (library().run(a, b, c, how, stream)) return true;
  if (how.before_gelu == nullptr) return false;
  CudaMatmul product = how;
  product.before_gelu = nullptr;
  if (!library().run(a, b, *how.before_gelu, product, stream)) return false;
  gelu(*how.before_gelu, c, stream);
  return true;
}

}  // namespace

void matmul(const TensorView& a, const TensorView& b, const TensorView& c, const CudaMatmul& how, NativeStream stream) {
  if (!loaded_once().ok) {
    note_once("matrix products are taken by a plain kernel, much slower than cuBLASLt: " + loaded_once().text, LogLevel::kInfo);
  } else if (a.size(1) > 0) {
    if (by_library(a, b, c, how, stream)) return;
    note_once(fmt::format("matrix products of {} into {}{}: cuBLASLt has no algorithm, a plain kernel serves, which is much "
                          "slower",
                          name_of(a.dtype), name_of(c.dtype), how.bias != nullptr ? " with a bias" : ""),
              LogLevel::kInfo);
  }
  plain_matmul(a, b, c, how, stream);
}

std::string matmul_library() { return loaded_once().ok ? loaded_once().text : "plain kernel: " + loaded_once().text; }

}  // namespace dattn::cuda
