// libcublaslt_standin.so: cuBLASLt's interface (as much of it as core/nn/cuda/cublaslt_api.h has) on host memory, so that the
// production code runs where there is no GPU. Not fast, and strict: a case that cuBLASLt's tables lack or whose description
// breaks a rule of its header has no algorithm, and an algorithm runs on pointers that are as well aligned as those it was
// asked for with, or not at all.
//
// Work goes on the stream by cudaLaunchHostFunc of whatever CUDA (or stand-in of it) the process has loaded. Sums are in fp32,
// in ascending order.
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "core/base/dtype.h"
#include "core/nn/cuda/cublaslt_api.h"
#include "tests/standins/cuda_function.h"

namespace dattn::cublaslt {

struct Context {};

struct ProductDescription {
  ComputeType compute;
  DataType scale;
  int transpose_a = kPlain, transpose_b = kPlain;
  int epilogue = 1;  // none
  const void* bias = nullptr;
  int bias_type = -1;  // that of the result
  void* aux = nullptr;
  std::int64_t aux_leading = 0;

  bool has(Epilogue part) const { return (epilogue & part) == part; }
};

struct LayoutDescription {
  DataType type;
  std::uint64_t rows, columns;
  std::int64_t leading;
};

struct PreferenceDescription {
  std::uint64_t workspace = 0;
  std::uint32_t schemes = ~0u;
  std::uint32_t alignments[4] = {256, 256, 256, 256};  // of A, B, C, D
};

namespace {

// What an algorithm was asked for with.
struct Promise {
  std::uint64_t workspace;
  std::uint32_t alignments[4];
  std::uint32_t bias_alignment, aux_alignment;
  int epilogue;
};
static_assert(sizeof(Promise) <= sizeof(Algorithm));

std::uint32_t alignment_of(const void* memory) {
  const auto at = std::bit_cast<std::uintptr_t>(memory) | 256;
  return static_cast<std::uint32_t>(at & -at);
}

std::uint64_t rows_of(const LayoutDescription& x, int operation) { return operation == kPlain ? x.rows : x.columns; }
std::uint64_t columns_of(const LayoutDescription& x, int operation) { return operation == kPlain ? x.columns : x.rows; }

bool fits(const LayoutDescription& x) { return x.leading >= static_cast<std::int64_t>(x.rows) && x.rows > 0 && x.columns > 0; }

// Of cublasLtMatmul's tables, where sums and scales are fp32.
bool supported_types(const LayoutDescription& a, const LayoutDescription& b, const LayoutDescription& c,
                     const LayoutDescription& d) {
  return a.type == b.type && c.type == d.type && (d.type == a.type || d.type == kFloat32);
}

bool valid_epilogue(const ProductDescription& p, const LayoutDescription& d) {
  if (p.has(kEpilogueBias) && (p.bias == nullptr || (p.bias_type != -1 && p.bias_type != d.type))) return false;
  if (!p.has(kEpilogueGeluAux)) return true;
  return p.aux != nullptr && p.aux_leading % 8 == 0 && p.aux_leading >= static_cast<std::int64_t>(d.rows);
}

bool valid(const ProductDescription& p, const LayoutDescription& a, const LayoutDescription& b, const LayoutDescription& c,
           const LayoutDescription& d) {
  return p.scale == kFloat32 && supported_types(a, b, c, d) && fits(a) && fits(b) && fits(c) && fits(d) &&
         rows_of(a, p.transpose_a) == d.rows && columns_of(b, p.transpose_b) == d.columns && c.rows == d.rows &&
         c.columns == d.columns && columns_of(a, p.transpose_a) == rows_of(b, p.transpose_b) && valid_epilogue(p, d);
}

// One product, as the stream will compute it.
struct Work {
  ProductDescription product;
  LayoutDescription a, b, c, d;
  const void *a_data, *b_data, *c_data;
  void* d_data;
  float alpha, beta;
};

float factor(float x, ComputeType compute) {  // 10 bits of mantissa for TF32
  return compute == kCompute32FFastTf32 ? std::bit_cast<float>((std::bit_cast<std::uint32_t>(x) + 0x1000u) & 0xffffe000u) : x;
}
template <class T>
float factor(T x, ComputeType /*compute*/) {
  return static_cast<float>(x);
}

float gelu(float x) { return 0.5f * x * (1.0f + std::tanh(0.7978845608f * (x + 0.044715f * x * x * x))); }

template <class In, class Out>
void compute(const Work& work) {
  const ProductDescription& p = work.product;
  const auto *a = static_cast<const In*>(work.a_data), *b = static_cast<const In*>(work.b_data);
  const auto *c = static_cast<const Out*>(work.c_data), *bias = static_cast<const Out*>(p.bias);
  auto *d = static_cast<Out*>(work.d_data), *aux = static_cast<Out*>(p.aux);
  const auto inner = static_cast<std::int64_t>(columns_of(work.a, p.transpose_a));
  const std::int64_t a_row = p.transpose_a == kPlain ? 1 : work.a.leading,
                     a_inner = p.transpose_a == kPlain ? work.a.leading : 1;
  const std::int64_t b_inner = p.transpose_b == kPlain ? 1 : work.b.leading,
                     b_column = p.transpose_b == kPlain ? work.b.leading : 1;
  for (std::int64_t j = 0; j < static_cast<std::int64_t>(work.d.columns); ++j) {
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(work.d.rows); ++i) {
      float sum = 0.0f;
      for (std::int64_t k = 0; k < inner; ++k) {
        sum = std::fma(factor(a[i * a_row + k * a_inner], p.compute), factor(b[k * b_inner + j * b_column], p.compute), sum);
      }
      sum *= work.alpha;
      if (work.beta != 0.0f) sum += work.beta * static_cast<float>(c[i + j * work.c.leading]);
      if (p.has(kEpilogueBias)) sum += static_cast<float>(bias[i]);
      if (p.has(kEpilogueGeluAux)) {
        aux[i + j * p.aux_leading] = Out(sum);
        sum = gelu(sum);
      }
      d[i + j * work.d.leading] = Out(sum);
    }
  }
}

template <class Body>
void with_type(DataType type, const Body& body) {
  if (type == kBfloat16) return body(BFloat16{});
  if (type == kFloat16) return body(Float16{});
  body(0.0f);
}

void run(void* argument) {
  const std::unique_ptr<Work> work(static_cast<Work*>(argument));
  with_type(work->a.type, [&]<class In>(In) { with_type(work->d.type, [&]<class Out>(Out) { compute<In, Out>(*work); }); });
}

struct Counts {
  std::mutex mutex;
  std::map<int, std::int64_t> of_epilogue;
};
Counts& counts() {
  static Counts all;
  return all;
}

template <class To>
Status set(To& place, const void* value, std::size_t bytes) {
  if (value == nullptr || bytes != sizeof(To)) return kInvalidValue;
  std::memcpy(&place, value, bytes);
  return kSuccess;
}

}  // namespace
}  // namespace dattn::cublaslt

using namespace dattn::cublaslt;  // NOLINT: this file is that interface

extern "C" {

// For tests: the products that were computed with this epilogue (or-ed Epilogues; 1: none).
std::int64_t cublasLtStandinProducts(int epilogue) {
  const std::lock_guard lock(counts().mutex);
  return counts().of_epilogue[epilogue];
}

std::size_t cublasLtGetVersion() { return 130000; }

Status cublasLtCreate(Handle* handle) {
  static Context context;
  *handle = &context;
  return kSuccess;
}

// What is described lives as long as the process.
Status cublasLtMatmulDescCreate(Product* product, ComputeType compute, DataType scale) {
  if (compute != kCompute32F && compute != kCompute32FFastTf32) return kNotSupported;
  *product = new ProductDescription{compute, scale};
  return kSuccess;
}

Status cublasLtMatmulDescSetAttribute(Product product, ProductAttribute attribute, const void* value, std::size_t bytes) {
  switch (attribute) {
    case kTransposeA: return set(product->transpose_a, value, bytes);
    case kTransposeB: return set(product->transpose_b, value, bytes);
    case kEpilogue: return set(product->epilogue, value, bytes);
    case kBiasPointer: return set(product->bias, value, bytes);
    case kAuxPointer: return set(product->aux, value, bytes);
    case kAuxLeading: return set(product->aux_leading, value, bytes);
    case kBiasType: return set(product->bias_type, value, bytes);
  }
  return kInvalidValue;
}

Status cublasLtMatrixLayoutCreate(Layout* layout, DataType type, std::uint64_t rows, std::uint64_t columns,
                                  std::int64_t leading) {
  *layout = new LayoutDescription{type, rows, columns, leading};
  return kSuccess;
}

Status cublasLtMatmulPreferenceCreate(Preference* preference) {
  *preference = new PreferenceDescription;
  return kSuccess;
}

Status cublasLtMatmulPreferenceSetAttribute(Preference preference, PreferenceAttribute attribute, const void* value,
                                            std::size_t bytes) {
  switch (attribute) {
    case kMaxWorkspace: return set(preference->workspace, value, bytes);
    case kReductionSchemes: return set(preference->schemes, value, bytes);
    case kAlignmentA: return set(preference->alignments[0], value, bytes);
    case kAlignmentB: return set(preference->alignments[1], value, bytes);
    case kAlignmentC: return set(preference->alignments[2], value, bytes);
    case kAlignmentD: return set(preference->alignments[3], value, bytes);
  }
  return kInvalidValue;
}

Status cublasLtMatmulAlgoGetHeuristic(Handle handle, Product product, Layout a, Layout b, Layout c, Layout d,
                                      Preference preference, int wanted, Heuristic* found, int* count) {
  *count = 0;
  if (handle == nullptr || wanted < 1) return kInvalidValue;
  if (!valid(*product, *a, *b, *c, *d)) return kNotSupported;
  Promise promise{preference->workspace, {}, alignment_of(product->bias), alignment_of(product->aux), product->epilogue};
  std::memcpy(promise.alignments, preference->alignments, sizeof promise.alignments);
  *found = {};
  std::memcpy(found->algorithm.data, &promise, sizeof promise);
  found->workspace_bytes = preference->workspace;
  *count = 1;
  return kSuccess;
}

Status cublasLtMatmul(Handle handle, Product product, const void* alpha, const void* a, Layout a_layout, const void* b,
                      Layout b_layout, const void* beta, const void* c, Layout c_layout, void* d, Layout d_layout,
                      const Algorithm* algorithm, void* workspace, std::size_t workspace_bytes, Stream stream) {
  if (handle == nullptr || algorithm == nullptr || !valid(*product, *a_layout, *b_layout, *c_layout, *d_layout))
    return kInvalidValue;
  Promise promise;
  std::memcpy(&promise, algorithm->data, sizeof promise);
  const void* const memory[] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) {
    if (alignment_of(memory[i]) < promise.alignments[i]) return kInvalidValue;
  }
  if (alignment_of(product->bias) < promise.bias_alignment || alignment_of(product->aux) < promise.aux_alignment ||
      product->epilogue != promise.epilogue || workspace_bytes < promise.workspace || workspace == nullptr)
    return kInvalidValue;
  {
    const std::lock_guard lock(counts().mutex);
    ++counts().of_epilogue[product->epilogue];
  }
  auto* const work = new Work{*product,
                              *a_layout,
                              *b_layout,
                              *c_layout,
                              *d_layout,
                              a,
                              b,
                              c,
                              d,
                              *static_cast<const float*>(alpha),
                              *static_cast<const float*>(beta)};
  const auto launch = standin::launch_host_function();
  return launch != nullptr && launch(stream, run, work) == 0 ? kSuccess : kInvalidValue;
}

}  // extern "C"
