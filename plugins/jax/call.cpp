#include "plugins/jax/call.h"

#include <array>
#include <cstddef>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <sstream>

namespace dattn::jax {
namespace {

constexpr std::size_t kPlainArrays = 3;  // q, k, v

// dattn_tensors over arrays, kept as long as a call takes.
class Tensors {
 public:
  Tensors(const CallRequest& request, const dattn_plan_info& info) : request_(request), info_(info) {}

  // Axes of the array in the order of the C tensor; row_axis, counted there, keeps its first `rows`.
  const dattn_tensor* add(const ArrayWindow& array, std::initializer_list<std::size_t> axes, int row_axis, std::int64_t rows) {
    Entry& entry = entries_.emplace_back();
    std::int64_t stride = 1;
    std::array<std::int64_t, 4> strides{};
    for (std::size_t axis = array.shape.size(); axis-- > 0; stride *= array.shape[axis]) strides.at(axis) = stride;
    std::size_t at = 0;
    for (const std::size_t axis : axes) entry.shape.at(at) = array.shape[axis], entry.strides.at(at++) = strides.at(axis);
    if (row_axis >= 0) entry.shape.at(static_cast<std::size_t>(row_axis)) = rows;
    entry.tensor = {array.data,
                    request_.device,
                    static_cast<std::int32_t>(axes.size()),
                    array.dtype,
                    entry.shape.data(),
                    entry.strides.data(),
                    0};
    return &entry.tensor;
  }
  const dattn_tensor* queries(const ArrayWindow& array) { return add(array, {0, 1, 2, 3}, 1, info_.q_rows); }
  const dattn_tensor* keys(const ArrayWindow& array) { return add(array, {0, 1, 2, 3}, 1, info_.kv_rows); }
  const dattn_tensor* bias(const ArrayWindow& array) { return add(array, {0, 2, 1, 3}, 1, info_.q_rows); }
  const dattn_tensor* statistics(const ArrayWindow& array) { return add(array, {0, 1, 2}, 2, info_.q_rows); }
  const dattn_tensor* heads(const ArrayWindow& array) { return add(array, {0}, -1, 0); }

 private:
  struct Entry {
    std::array<std::int64_t, 4> shape{}, strides{};
    dattn_tensor tensor{};
  };
  const CallRequest& request_;
  const dattn_plan_info& info_;
  std::deque<Entry> entries_;
};

std::string shape_text(const ArrayWindow& array) {
  std::ostringstream text;
  for (std::size_t axis = 0; axis < array.shape.size(); ++axis) text << (axis == 0 ? "[" : ", ") << array.shape[axis];
  text << (array.shape.empty() ? "[]" : "]");
  return text.str();
}

std::int64_t bytes_of(const ArrayWindow& array) {
  return std::accumulate(array.shape.begin(), array.shape.end(), std::int64_t{array.dtype.bits / 8}, std::multiplies<>());
}

// Rows past those of this rank hold zeros.
void clear_padding(const CallRequest& request, const dattn_plan_info& info) {
  const bool padded = request.arrays[0].shape[1] != info.q_rows || request.arrays[1].shape[1] != info.kv_rows;
  if (!padded || request.device.type != DATTN_CPU) return;
  for (const ArrayWindow& result : request.results) std::memset(result.data, 0, static_cast<std::size_t>(bytes_of(result)));
}

Outcome check_rows(const CallRequest& request, const dattn_plan_info& info) {
  const ArrayWindow &q = request.arrays[0], &k = request.arrays[1];
  const bool fits = q.shape[1] >= info.q_rows && k.shape[1] >= info.kv_rows;
  const bool padded = q.shape[1] != info.q_rows || k.shape[1] != info.kv_rows;
  if (fits && (!padded || request.device.type == DATTN_CPU)) return {};
  std::ostringstream text;
  text << "q has shape " << shape_text(q) << " and k " << shape_text(k) << ", but of " << request.site->seq_q << " queries and "
       << request.site->seq_kv << " keys rank " << request.rank << " holds " << info.q_rows << " and " << info.kv_rows;
  return refused(text.str());
}

// The members that forward and backward share, from the arrays up to `next`, which then counts on.
template <class Args>
Args shared_args(Tensors& tensors, const CallRequest& request, std::size_t& next) {
  Args args{};
  args.struct_size = sizeof args;
  args.q = tensors.queries(request.arrays[0]);
  args.k = tensors.keys(request.arrays[1]);
  args.v = tensors.keys(request.arrays[2]);
  next = kPlainArrays;
  if (request.site->bias) args.bias = tensors.bias(request.arrays[next++]);
  if (request.site->sink) args.sink = tensors.heads(request.arrays[next++]);
  args.dropout_stream = request.dropout_stream;
  args.batch_begin = request.batch_coordinate * request.arrays[0].shape[0];
  args.stream = request.stream;
  return args;
}

Outcome forward(dattn_plan* plan, const CallRequest& request, const dattn_plan_info& info) {
  Tensors tensors(request, info);
  std::size_t next = 0;
  auto args = shared_args<dattn_forward>(tensors, request, next);
  args.out = tensors.queries(request.results[0]);
  args.lse = tensors.statistics(request.results[1]);
  return outcome_of(dattn_attention_forward(plan, &args));
}

Outcome backward(dattn_plan* plan, const CallRequest& request, const dattn_plan_info& info) {
  Tensors tensors(request, info);
  std::size_t next = 0, result = kPlainArrays;
  auto args = shared_args<dattn_backward>(tensors, request, next);
  args.out = tensors.queries(request.arrays[next++]);
  args.lse = tensors.statistics(request.arrays[next++]);
  args.dout = tensors.queries(request.arrays[next++]);
  args.dq = tensors.queries(request.results[0]);
  args.dk = tensors.keys(request.results[1]);
  args.dv = tensors.keys(request.results[2]);
  if (request.site->bias) args.dbias = tensors.bias(request.results[result++]);
  if (request.site->sink) args.dsink = tensors.heads(request.results[result++]);
  return outcome_of(dattn_attention_backward(plan, &args));
}

int bias_flags(const ArrayWindow& bias) {
  return DATTN_BIAS | (bias.shape[0] > 1 ? DATTN_BIAS_PER_BATCH : 0) | (bias.shape[1] > 1 ? DATTN_BIAS_PER_HEAD : 0);
}

const char* text_or_null(const std::string& text) { return text.empty() ? nullptr : text.c_str(); }

}  // namespace

Outcome outcome_of(dattn_status status) { return status == DATTN_OK ? Outcome{} : Outcome{status, dattn_last_error()}; }

Outcome refused(std::string message) { return {DATTN_BAD_INPUT, std::move(message)}; }

Outcome execute(const PlannedCall& planned, const CallRequest& request) {
  if (Outcome rows = check_rows(request, planned.info); rows.status != DATTN_OK) return rows;
  clear_padding(request, planned.info);
  const auto& call = request.site->backward ? backward : forward;
  return call(planned.plan, request, planned.info);
}

std::string plan_key(const CallRequest& request) {
  std::ostringstream text;
  text << request.site->key;
  const std::size_t inputs = kPlainArrays + (request.site->bias ? 1 : 0);
  for (std::size_t i = 0; i < inputs; ++i)
    text << ' ' << int{request.arrays[i].dtype.code} << ' ' << int{request.arrays[i].dtype.bits}
         << shape_text(request.arrays[i]);
  return text.str();
}

Outcome make_plan(dattn_mesh* mesh, const CallRequest& request, PlannedCall& planned) {
  const CallSite& site = *request.site;
  const ArrayWindow &q = request.arrays[0], &k = request.arrays[1], &v = request.arrays[2];
  dattn_attention_options options{};
  options.struct_size = sizeof options;
  options.batch = q.shape[0];
  options.seq_q = site.seq_q;
  options.seq_kv = site.seq_kv;
  options.heads = q.shape[2] * site.mesh.tensor;
  options.kv_heads = k.shape[2] * site.mesh.tensor;
  options.dim_qk = q.shape[3];
  options.dim_v = v.shape[3];
  options.dtype = q.dtype;
  options.attention = text_or_null(site.attention);
  options.layout = text_or_null(site.layout);
  options.strategy = text_or_null(site.strategy);
  options.determinism = text_or_null(site.determinism);
  options.bias = site.bias ? bias_flags(request.arrays[kPlainArrays]) : DATTN_BIAS_NONE;
  options.sink = site.sink ? 1 : 0;
  Outcome made = outcome_of(dattn_plan_create(mesh, &options, &planned.plan));
  planned.info.struct_size = sizeof planned.info;
  return made.status == DATTN_OK ? outcome_of(dattn_plan_get_info(planned.plan, &planned.info)) : made;
}

}  // namespace dattn::jax
