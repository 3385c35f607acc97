#include "core/nn/matmul.h"

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>

#include <dnnl.hpp>

#include "core/base/error.h"
#include "core/base/threads.h"
#include "core/device/tf32.h"
#include "core/nn/activation.h"
#include "core/nn/on_cuda.h"
#include "core/nn/vector_math.h"
#include "core/tensor/shape_format.h"

namespace dattn {
namespace {

using dnnl::memory;

// Rows of a product below which a bias is written first: oneDNN's sgemm is 3x as fast as its primitive there.
constexpr std::int64_t kFewRows = 16;
constexpr std::size_t kMostPrimitives = 512;  // of one thread; new shapes beyond that start the cache afresh

memory::data_type type_of(DType type) {
  ensure(type == DType::kF32 || type == DType::kBF16, "oneDNN's matrix products take fp32 and bf16, got {}", name_of(type));
  return type == DType::kF32 ? memory::data_type::f32 : memory::data_type::bf16;
}

bool transposed(const TensorView& view) {
  const bool rows = view.stride(1) == 1 || view.size(1) == 1, columns = view.stride(0) == 1 || view.size(0) == 1;
  ensure(rows || columns, "a matrix {} with strides {} and {}: one must be 1", view.shape, view.stride(0), view.stride(1));
  return !rows || (columns && view.stride(1) > view.stride(0));
}

// The distance between rows (or columns, if transposed), at least what BLAS asks for.
std::int64_t leading(const TensorView& view, bool turned) {
  return turned ? std::max(view.stride(1), view.size(0)) : std::max(view.stride(0), view.size(1));
}

void by_sgemm(const TensorView& a, const TensorView& b, const TensorView& c, float beta) {
  const bool ta = transposed(a), tb = transposed(b);
  const dnnl::status status =
      dnnl::sgemm(ta ? 'T' : 'N', tb ? 'T' : 'N', c.size(0), c.size(1), a.size(1), 1.0f, a.ptr<float>(), leading(a, ta),
                  b.ptr<float>(), leading(b, tb), beta, c.ptr<float>(), leading(c, false));
  ensure(status == dnnl::status::success, "oneDNN sgemm [{}, {}] x [{}, {}] failed with status {}", a.size(0), a.size(1),
         b.size(0), b.size(1), static_cast<int>(status));
}

struct Prepared {
  dnnl::matmul primitive;
  memory a, b, c, bias;
};

// Everything of a thread: oneDNN streams are not shared between threads.
struct Library {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  using Key = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, int, int>;
  std::map<Key, Prepared> prepared;
};

Library& library() {
  thread_local Library instance;
  return instance;
}

memory::desc describe(const TensorView& view) {
  return {{view.size(0), view.size(1)}, type_of(view.dtype), memory::dims{view.stride(0), view.stride(1)}};
}

// Unit extents leave a stride free; oneDNN wants a plain one.
TensorView plain(TensorView view) {
  const bool turned = transposed(view);
  const std::int64_t distance = leading(view, turned);
  view.strides[0] = turned ? 1 : distance;
  view.strides[1] = turned ? distance : 1;
  return view;
}

Prepared prepare(const TensorView& a, const TensorView& b, const TensorView& c, const MatmulOptions& options) {
  Library& own = library();
  const memory::desc da = describe(a), db = describe(b), dc = describe(c);
  const memory::desc dbias({1, c.size(1)}, memory::data_type::f32, memory::format_tag::ab);
  dnnl::primitive_attr attributes;
  if (options.accumulate) {
    dnnl::post_ops sum;
    sum.append_sum(1.0f);
    attributes.set_post_ops(sum);
  }
  const bool biased = options.bias != nullptr;
  using Description = dnnl::matmul::primitive_desc;
#if DNNL_VERSION_MAJOR >= 3  // Ubuntu 24.04; Debian 12 has version 2, which describes the operation apart
  const Description description =
      biased ? Description(own.engine, da, db, dbias, dc, attributes) : Description(own.engine, da, db, dc, attributes);
#else
  using Operation = dnnl::matmul::desc;
  const Description description(biased ? Operation(da, db, dbias, dc) : Operation(da, db, dc), attributes, own.engine);
#endif
  return {dnnl::matmul(description), memory(da, own.engine, nullptr), memory(db, own.engine, nullptr),
          memory(dc, own.engine, nullptr), memory(dbias, own.engine, nullptr)};
}

void by_primitive(const TensorView& a, const TensorView& b, const TensorView& c, const MatmulOptions& options) {
  Library& own = library();
  const int kind = static_cast<int>(a.dtype) | static_cast<int>(c.dtype) << 3 | (options.bias != nullptr) << 6 |
                   options.accumulate << 7 | (a.stride(1) == 1) << 8 | (b.stride(1) == 1) << 9;
  const Library::Key key{a.size(0),   a.size(1), b.size(1),    leading(a, a.stride(1) != 1), leading(b, b.stride(1) != 1),
                         c.stride(0), kind,      num_threads()};
  auto found = own.prepared.find(key);
  if (found == own.prepared.end()) {
    if (own.prepared.size() >= kMostPrimitives) own.prepared.clear();
    found = own.prepared.emplace(key, prepare(a, b, c, options)).first;
  }
  Prepared& ready = found->second;
  ready.a.set_data_handle(a.data);
  ready.b.set_data_handle(b.data);
  ready.c.set_data_handle(c.data);
  if (options.bias != nullptr) ready.bias.set_data_handle(const_cast<float*>(options.bias));
  std::unordered_map<int, memory> arguments{{DNNL_ARG_SRC, ready.a}, {DNNL_ARG_WEIGHTS, ready.b}, {DNNL_ARG_DST, ready.c}};
  if (options.bias != nullptr) arguments.emplace(DNNL_ARG_BIAS, ready.bias);
  ready.primitive.execute(own.stream, arguments);
  own.stream.wait();
}

bool multiplies_by(dnnl::cpu_isa set) {
  const auto has = static_cast<unsigned>(dnnl::get_effective_cpu_isa()), needs = static_cast<unsigned>(set);
  return (has & needs) == needs;
}

// oneDNN multiplies bf16 on processors with AVX-512 only, and version 2 no fp16.
bool multiplies(DType type) {
  static const bool bf16 = multiplies_by(dnnl::cpu_isa::avx512_core);
  return type == DType::kF32 || (type == DType::kBF16 && bf16);
}

// A copy in fp32 whose rows, or columns, lie as those of x.
class Widened {
 public:
  explicit Widened(const TensorView& x) {
    const bool turned = transposed(x);
    const TensorView rows = turned ? x.transpose(0, 1) : x;
    if (x.dtype != DType::kF32) {
      copy_ = Tensor::uninitialized(DType::kF32, rows.shape);
      parallel_for(rows.size(0), [&](std::int64_t row) { copy(rows.slice(0, row, 1), copy_->slice(0, row, 1)); });
    }
    const TensorView wide = copy_.defined() ? copy_.view() : rows;
    view_ = turned ? wide.transpose(0, 1) : wide;
  }
  const TensorView& view() const { return view_; }

 private:
  Tensor copy_;
  TensorView view_;
};

// The same product through fp32 copies: products of two halves are exact there, and the result is rounded once.
void by_widening(const TensorView& a, const TensorView& b, const TensorView& c, const MatmulOptions& options) {
  const Widened left(a), right(b);
  const TensorView &wide_a = left.view(), &wide_b = right.view();
  if (c.dtype == DType::kF32) return matmul(wide_a, wide_b, c, options);
  Tensor wide_c = Tensor::uninitialized(DType::kF32, c.shape);
  matmul(wide_a, wide_b, wide_c, options);
  copy(wide_c, c);
}

// The matrix library starts no threads while this lives.
class OneThread {
 public:
  explicit OneThread(bool wanted) : before_(wanted ? num_threads() : 0) {
    if (wanted) set_num_threads(1);
  }
  ~OneThread() {
    if (before_ > 0) set_num_threads(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_;
};

// c = bias in every row, or 0.
void fill_rows(const TensorView& c, const float* bias) {
  for (std::int64_t i = 0; i < c.size(0); ++i) {
    for (std::int64_t j = 0; j < c.size(1); ++j) {
      const float value = bias != nullptr ? bias[j] : 0.0f;
      with_number(c.dtype, [&](auto zero) { store(c.at<decltype(zero)>(i, j), value); });
    }
  }
}

}  // namespace

std::string matmul_instructions() {
  constexpr std::pair<dnnl::cpu_isa, const char*> kSets[] = {{dnnl::cpu_isa::avx512_core_amx, "AVX512_CORE_AMX"},
                                                             {dnnl::cpu_isa::avx512_core_bf16, "AVX512_CORE_BF16"},
                                                             {dnnl::cpu_isa::avx512_core_vnni, "AVX512_CORE_VNNI"},
                                                             {dnnl::cpu_isa::avx512_core, "AVX512_CORE"},
                                                             {dnnl::cpu_isa::avx2, "AVX2"},
                                                             {dnnl::cpu_isa::sse41, "SSE41"}};
  for (const auto& [set, name] : kSets) {
    if (multiplies_by(set)) return name;
  }
  return {};
}

void matmul(const TensorView& a, const TensorView& b, const TensorView& c, const MatmulOptions& options) {
  ensure(a.size(1) == b.size(0) && a.size(0) == c.size(0) && b.size(1) == c.size(1) && a.dtype == b.dtype,
         "matrix product {} {} x {} {} into {}", name_of(a.dtype), a.shape, name_of(b.dtype), b.shape, c.shape);
  const TensorView* const before_gelu = options.before_gelu;
  ensure(!options.accumulate || (c.dtype == DType::kF32 && options.bias == nullptr && before_gelu == nullptr),
         "accumulate is for fp32 without bias or gelu");
  ensure(before_gelu == nullptr ||
             (before_gelu->shape == c.shape && before_gelu->dtype == c.dtype && before_gelu->contiguous() && c.contiguous()),
         "gelu's input and result are contiguous, of one type and shape");
  if (c.elements() == 0) return;
  if (on_cuda({&a, &b, &c})) {
    const CudaMatmul how{options.bias, options.accumulate, tf32_allowed(), options.fixed, before_gelu};
    return cuda_nn().matmul(a, b, c, how, cuda_stream());
  }
  if (before_gelu != nullptr) {
    matmul(a, b, *before_gelu, {.bias = options.bias, .fixed = options.fixed});
    return gelu_forward(*before_gelu, c);
  }
  if (a.size(1) == 0) {
    if (!options.accumulate) fill_rows(c, options.bias);
    return;
  }
  const OneThread alone(options.fixed);
  const bool all_f32 = a.dtype == DType::kF32 && c.dtype == DType::kF32;
  if (all_f32 && (options.bias == nullptr || c.size(0) <= kFewRows)) {
    if (options.bias != nullptr) fill_rows(c, options.bias);
    by_sgemm(a, b, c, options.accumulate || options.bias != nullptr ? 1.0f : 0.0f);
    return;
  }
  // fp32 factors with a half's result: oneDNN has that on some processors only.
  const bool mixed = a.dtype == DType::kF32 && c.dtype != DType::kF32;
  if (mixed || !multiplies(a.dtype) || !multiplies(c.dtype)) return by_widening(a, b, c, options);
  by_primitive(plain(a), plain(b), plain(c), options);
}

}  // namespace dattn
