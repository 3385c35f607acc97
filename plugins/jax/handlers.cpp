// The custom calls of dattn.jax, for XLA's FFI (jaxlib/include/xla/ffi/api/ffi.h): on the CPU and, without CUDA's headers, on
// CUDA devices.
//
//   dattn_jax_{cpu,cuda}_instantiate: attributes -> CallSite, when XLA compiles the call
//   dattn_jax_{cpu,cuda}_execute: operands q, k, v, place, dropout, [bias], [sink], backward: out, lse, dout
//
// place: 3 int32, the rank, its group and the batch coordinate; dropout: 1 uint32. They are operands since one program runs on
// all devices.
#include <xla/ffi/api/ffi.h>

#include <future>
#include <memory>
#include <sstream>

#include "plugins/jax/cuda_copy.h"
#include "plugins/jax/gang.h"

namespace dattn::jax {
namespace {

namespace ffi = xla::ffi;

constexpr std::size_t kPlaceAt = 3, kDropoutAt = 4, kOptionalAt = 5;  // operands

// XLA numbers types anew for each platform.
struct CpuSite : CallSite {
  static ffi::TypeId id;
};
struct CudaSite : CallSite {
  static ffi::TypeId id;
};
ffi::TypeId CpuSite::id = {};
ffi::TypeId CudaSite::id = {};
constexpr ffi::TypeInfo kCpuSiteInfo = ffi::MakeTypeInfo<CpuSite>();
constexpr ffi::TypeInfo kCudaSiteInfo = ffi::MakeTypeInfo<CudaSite>();

ffi::Error error_of(const Outcome& outcome) {
  switch (outcome.status) {
    case DATTN_OK: return ffi::Error::Success();
    case DATTN_BAD_INPUT: return {ffi::ErrorCode::kInvalidArgument, outcome.message};
    case DATTN_PEER: return {ffi::ErrorCode::kAborted, outcome.message};
    case DATTN_SYSTEM: return {ffi::ErrorCode::kUnavailable, outcome.message};
    default: return {ffi::ErrorCode::kInternal, outcome.message};
  }
}

// ---- attributes ----

struct Attributes {
  const ffi::Dictionary& all;
  std::string problem = {};

  template <class T>
  T get(std::string_view name) {
    const ffi::ErrorOr<T> value = all.get<T>(name);
    if (value.has_value()) return *value;
    problem = "attribute " + std::string(name) + ": " + value.error().message();
    return {};
  }
  std::string text(std::string_view name) { return std::string(get<std::string_view>(name)); }
};

void read(Attributes& attributes, CallSite& site) {
  const auto mesh = attributes.get<ffi::Span<const std::int64_t>>("mesh");
  site.backward = attributes.get<bool>("backward");
  site.bias = attributes.get<bool>("bias");
  site.sink = attributes.get<bool>("sink");
  site.threads = attributes.get<std::int32_t>("threads");
  site.timeout_s = attributes.get<double>("timeout_s");
  site.seq_q = attributes.get<std::int64_t>("seq_q");
  site.seq_kv = attributes.get<std::int64_t>("seq_kv");
  site.attention = attributes.text("attention");
  site.layout = attributes.text("layout");
  site.strategy = attributes.text("strategy");
  site.determinism = attributes.text("determinism");
  if (!attributes.problem.empty()) return;
  std::int32_t* const sizes[] = {&site.mesh.ring_outer, &site.mesh.ring, &site.mesh.rows, &site.mesh.ulysses,
                                 &site.mesh.tensor};
  if (mesh.size() != std::size(sizes)) {
    attributes.problem = "attribute mesh must have 5 numbers";
    return;
  }
  site.mesh.struct_size = sizeof site.mesh;
  site.mesh.data = 1;
  std::ostringstream key;
  for (std::size_t axis = 0; axis < mesh.size(); ++axis) {
    *sizes[axis] = static_cast<std::int32_t>(mesh[axis]);
    site.ranks *= *sizes[axis];
    key << mesh[axis] << ' ';
  }
  key << site.bias << site.sink << ' ' << site.seq_q << ' ' << site.seq_kv << ' ' << site.attention << ' ' << site.layout << ' '
      << site.strategy << ' ' << site.determinism;
  site.key = key.str();
}

template <class Site>
ffi::ErrorOr<std::unique_ptr<Site>> instantiate(ffi::Dictionary dictionary) {
  auto site = std::make_unique<Site>();
  Attributes attributes{dictionary};
  read(attributes, *site);
  if (!attributes.problem.empty())
    return ffi::Unexpected(ffi::Error(ffi::ErrorCode::kInvalidArgument, "dattn: " + attributes.problem));
  return site;
}

// ---- operands ----

dattn_dtype dtype_of(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F32: return {DATTN_FLOAT, 32, 1};
    case ffi::DataType::F64: return {DATTN_FLOAT, 64, 1};
    case ffi::DataType::BF16: return {DATTN_BFLOAT, 16, 1};
    case ffi::DataType::F16: return {DATTN_FLOAT, 16, 1};
    default: return {DATTN_INT, static_cast<std::uint8_t>(8 * ffi::ByteWidth(type)), 1};
  }
}

ArrayWindow window_of(const ffi::AnyBuffer& buffer) {
  const auto dimensions = buffer.dimensions();
  return {buffer.untyped_data(), dtype_of(buffer.element_type()), {dimensions.begin(), dimensions.end()}};
}

// The arrays of a request; their addresses are no longer known once the handler has returned.
std::string take_arrays(const CallSite& site, const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
                        CallRequest& request) {
  const std::size_t optional = (site.bias ? 1 : 0) + (site.sink ? 1 : 0);
  const std::size_t expected = kOptionalAt + optional + (site.backward ? 3 : 0);
  const std::size_t results = site.backward ? 3 + optional : 2;
  if (args.size() != expected || rets.size() != results) return "wrong number of operands or results";
  for (std::size_t i = 0; i < args.size(); ++i) {
    const auto array = args.get<ffi::AnyBuffer>(i);
    if (!array.has_value()) return array.error().message();
    if (i != kPlaceAt && i != kDropoutAt) request.arrays.push_back(window_of(*array));
  }
  for (std::size_t i = 0; i < rets.size(); ++i) {
    auto array = rets.get<ffi::AnyBuffer>(i);
    if (!array.has_value()) return array.error().message();
    request.results.push_back(window_of(**array));
  }
  for (std::size_t i = 0; i < 3; ++i) {
    if (request.arrays[i].shape.size() != 4) return "q, k and v must have 4 axes";
  }
  return {};
}

// What differs between the devices that run the program.
std::string take_place(const ffi::RemainingArgs& args, std::int32_t ordinal, CallRequest& request) {
  const auto place = args.get<ffi::Buffer<ffi::S32>>(kPlaceAt);
  const auto dropout = args.get<ffi::Buffer<ffi::U32>>(kDropoutAt);
  if (!place.has_value() || place->element_count() != 3) return "operand place must be 3 int32";
  if (!dropout.has_value() || dropout->element_count() != 1) return "operand dropout must be 1 uint32";
  std::int32_t at[3] = {};
  std::uint32_t stream = 0;
  if (request.device.type == DATTN_CUDA) {
    std::string problem = copy_from_device(at, place->untyped_data(), sizeof at, request.stream);
    if (problem.empty()) problem = copy_from_device(&stream, dropout->untyped_data(), sizeof stream, request.stream);
    if (!problem.empty()) return problem;
  } else {
    std::copy_n(place->typed_data(), 3, at);
    stream = *dropout->typed_data();
  }
  request.rank = at[0];
  // One rank meets nobody: each device has a thread of its own.
  request.group = request.site->ranks == 1 ? ordinal : at[1];
  request.batch_coordinate = at[2];
  request.dropout_stream = stream;
  return {};
}

std::string take(CallRequest& request, std::int32_t ordinal, const ffi::RemainingArgs& args, const ffi::RemainingRets& rets) {
  std::string problem = take_arrays(*request.site, args, rets, request);
  return problem.empty() ? take_place(args, ordinal, request) : problem;
}

ffi::Future execute_on_cpu(CpuSite* site, ffi::RunId run, std::int32_t ordinal, ffi::RemainingArgs args,
                           ffi::RemainingRets rets, ffi::Dictionary) {
  ffi::Promise promise;
  ffi::Future future(promise);
  CallRequest request;
  request.site = site;
  request.run = run.run_id;
  request.done = [promise = std::move(promise)](const Outcome& outcome) mutable {
    if (outcome.status == DATTN_OK)
      promise.SetAvailable();
    else
      promise.SetError(error_of(outcome));
  };
  const std::string problem = take(request, ordinal, args, rets);
  if (problem.empty())
    submit(std::move(request));
  else
    request.done(refused("dattn: " + problem));
  return future;
}

ffi::Error execute_on_cuda(CudaSite* site, ffi::RunId run, std::int32_t ordinal, void* stream, ffi::RemainingArgs args,
                           ffi::RemainingRets rets, ffi::Dictionary) {
  std::promise<Outcome> promise;
  CallRequest request;
  request.site = site;
  request.run = run.run_id;
  request.device = {DATTN_CUDA, ordinal};
  request.stream = stream;
  request.done = [&promise](Outcome outcome) { promise.set_value(std::move(outcome)); };
  const std::string problem = take(request, ordinal, args, rets);
  if (!problem.empty()) return error_of(refused("dattn: " + problem));
  submit(std::move(request));
  return error_of(promise.get_future().get());
}

}  // namespace
}  // namespace dattn::jax

#define DATTN_JAX_API extern "C" __attribute__((visibility("default")))
DATTN_JAX_API XLA_FFI_Error* dattn_jax_cpu_instantiate(XLA_FFI_CallFrame*);
DATTN_JAX_API XLA_FFI_Error* dattn_jax_cpu_execute(XLA_FFI_CallFrame*);
DATTN_JAX_API XLA_FFI_Error* dattn_jax_cuda_instantiate(XLA_FFI_CallFrame*);
DATTN_JAX_API XLA_FFI_Error* dattn_jax_cuda_execute(XLA_FFI_CallFrame*);

using namespace dattn::jax;

XLA_FFI_DEFINE_HANDLER_SYMBOL(dattn_jax_cpu_instantiate, instantiate<CpuSite>, xla::ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER_SYMBOL(dattn_jax_cpu_execute, execute_on_cpu,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::State<CpuSite>>()
                                  .Ctx<xla::ffi::RunId>()
                                  .Ctx<xla::ffi::DeviceOrdinal>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs());
XLA_FFI_DEFINE_HANDLER_SYMBOL(dattn_jax_cuda_instantiate, instantiate<CudaSite>, xla::ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER_SYMBOL(dattn_jax_cuda_execute, execute_on_cuda,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::State<CudaSite>>()
                                  .Ctx<xla::ffi::RunId>()
                                  .Ctx<xla::ffi::DeviceOrdinal>()
                                  .Ctx<xla::ffi::PlatformStream<void*>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs());

// For jax.ffi.register_ffi_type.
DATTN_JAX_API void* dattn_jax_cpu_type_id() { return &CpuSite::id; }
DATTN_JAX_API const void* dattn_jax_cpu_type_info() { return &kCpuSiteInfo; }
DATTN_JAX_API void* dattn_jax_cuda_type_id() { return &CudaSite::id; }
DATTN_JAX_API const void* dattn_jax_cuda_type_info() { return &kCudaSiteInfo; }
