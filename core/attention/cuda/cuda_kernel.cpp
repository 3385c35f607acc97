// The cuda kernel: exact attention for anything the program can describe, forward and backward, every sum in a fixed order.
// The host turns tiles into lists of blocks (core/attention/block_list.h) and starts one of the paths: bf16, fp16 and, where
// TF32 is allowed (core/device/tf32.h), fp32 on tensor cores (mma_*), or anything on CUDA cores (plain_*). All paths are
// invariant (core/attention/kernel.h): blocks of keys and queries begin at multiples of 64 rows, the list holds no trace of how
// tiles were cut, and what a pair adds to a sum does not depend on whether its neighbours are visible.
#include <algorithm>
#include <array>
#include <utility>

#include "core/attention/check_args.h"
#include "core/attention/cuda/kernels.h"
#include "core/attention/cuda/launchers.h"
#include "core/attention/cuda/upload.h"
#include "core/attention/cudnn/cuda/cudnn_kernel.h"
#include "core/attention/dropout.h"
#include "core/base/error.h"
#include "core/base/log.h"

namespace dattn {
namespace {

using namespace cuda;  // NOLINT: this file is its host side

struct Path {
  const char* name;
  bool tensor_cores;
  std::int64_t dim_qk, dim_v;  // at most
  int forward_rows;            // of a block of queries
  void (*attend)(const AttendParams&, cudaStream_t);
  void (*attend_grad)(const GradParams&, cudaStream_t);
};

constexpr std::array kPaths = {
    Path{"mma, dims to 64", true, 64, 64, 128, mma_attend_64, mma_attend_grad_64},
    Path{"mma, dims to 128", true, 128, 128, 128, mma_attend_128, mma_attend_grad_128},
    Path{"mma, dims to 192 and 128", true, 192, 128, 128, mma_attend_192, mma_attend_grad_192},
    Path{"mma, dims to 256", true, 256, 256, 64, mma_attend_256, mma_attend_grad_256},
    Path{"plain", false, kMaxPlainDim, kMaxPlainDim, kPlainRows, plain_attend, plain_attend_grad},
};
constexpr int kGradRows = 64;
// A call of few query rows gives blocks this many columns each, so that long keys keep a whole device busy. By the shape
// alone: the same call has the same bits on every device.
constexpr std::int64_t kShareColumns = 8;  // blocks of 64 keys, at least
constexpr std::int64_t kMostShares = 64;
constexpr std::int64_t kManyBlocks = 1024;  // of a launch: several for each multiprocessor of any device
constexpr std::int64_t kMaxSeq = (std::int64_t{1} << 31) - 256, kMaxGrid = 65535;

// Rows begin at multiples of 16 bytes, as copies to shared memory want them.
bool aligned(const TensorView& view) {
  if (view.empty()) return true;
  const std::int64_t elements = 16 / size_of(view.dtype);
  bool all = reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0 && view.size(3) % elements == 0;
  for (int axis = 0; axis < 3; ++axis) all = all && (view.size(axis) <= 1 || view.stride(axis) % elements == 0);
  return all;
}

template <class... Views>
const Path& path_for(const TensorView& q, const TensorView& v, const Views&... others) {
  const bool tf32 = q.dtype == DType::kF32 && host_allows_tf32(), wanted = is_half(q.dtype) || tf32;
  const bool tensor_cores = wanted && aligned(q) && aligned(v) && (aligned(others) && ...);
  const auto fits = [&](const Path& path) {
    if (path.tensor_cores && (!tensor_cores || (tf32 && path.dim_qk > kMostTf32Dim))) return false;
    return q.size(3) <= path.dim_qk && v.size(3) <= path.dim_v;
  };
  const Path& path = *std::find_if(kPaths.begin(), kPaths.end(), fits);
  const char* why = "";
  if (wanted && !path.tensor_cores)
    why = tensor_cores ? "; too large for TF32" : "; tensor cores need rows aligned to 16 bytes";
  note_once(fmt::format("cuda attention, {}{}, dims {} and {}: {}{}", name_of(q.dtype),
                        tf32 && path.tensor_cores ? " rounded to TF32" : "", q.size(3), v.size(3), path.name, why));
  return path;
}

Storage storage_of(DType type) {
  switch (type) {
    case DType::kBF16: return Storage::kBF16;
    case DType::kF16: return Storage::kF16;
    case DType::kF64: return Storage::kF64;
    default: return Storage::kF32;
  }
}

Matrix matrix_of(const TensorView& view) {
  if (view.data == nullptr) return {};
  return {view.data, view.stride(0), view.stride(1), view.stride(2), static_cast<std::int32_t>(view.size(3))};
}

Statistic statistic_of(const TensorView& view) { return {view.data, view.stride(0), view.stride(1), view.stride(2)}; }

Bias bias_of(const TensorView& view) {
  if (view.data == nullptr) return {};
  return {view.data, view.size(0) == 1 ? 0 : view.stride(0), view.stride(1), view.size(2) == 1 ? 0 : view.stride(2),
          storage_of(view.dtype)};
}

template <class Args>
AttendProblem problem_of(const Args& args) {
  AttendProblem p{};
  p.storage = storage_of(args.q.dtype);
  p.q = matrix_of(args.q);
  p.k = matrix_of(args.k);
  p.v = matrix_of(args.v);
  p.batch = static_cast<std::int32_t>(args.q.size(0));
  p.seq_q = static_cast<std::int32_t>(args.q.size(1));
  p.seq_kv = static_cast<std::int32_t>(args.k.size(1));
  p.heads = static_cast<std::int32_t>(args.q.size(2));
  p.kv_heads = static_cast<std::int32_t>(args.k.size(2));
  p.q_begin = args.heads.q_begin;
  p.kv_begin = args.heads.kv_begin;
  p.group = args.heads.group;
  p.scale = args.scale;
  const AttentionDropout& dropout = args.terms.dropout;
  p.terms.softcap = args.terms.softcap;
  p.terms.bias = bias_of(args.terms.bias);
  p.terms.drop_below = drop_below(dropout);
  p.terms.key[0] = static_cast<std::uint32_t>(dropout.seed);
  p.terms.key[1] = static_cast<std::uint32_t>(dropout.seed >> 32);
  p.terms.stream = static_cast<std::uint32_t>(dropout.stream);
  p.terms.row = dropout_row(dropout, 0, args.heads.q_begin);
  p.terms.heads = static_cast<std::uint32_t>(dropout.heads);
  p.terms.keep = 1 / (1 - dropout.p);
  return p;
}

// Positions of the rows that tiles hold. Runs that lie inside those before them are left out.
std::vector<PositionRun> runs_of(std::span<const Tile> tiles, bool keys) {
  std::vector<PositionRun> runs;
  runs.reserve(tiles.size());
  for (const Tile& tile : tiles) {
    const Interval rows = keys ? tile.rows.k : tile.rows.q;
    runs.push_back({keys ? tile.k_position : tile.q_position, keys ? tile.k_step : tile.q_step,
                    static_cast<std::int32_t>(rows.begin), static_cast<std::int32_t>(rows.count())});
  }
  std::sort(runs.begin(), runs.end(),
            [](const PositionRun& a, const PositionRun& b) { return a.row != b.row ? a.row < b.row : a.count > b.count; });
  std::int32_t covered = 0;
  std::erase_if(runs, [&](const PositionRun& run) {
    if (run.row + run.count <= covered) return true;
    covered = run.row + run.count;
    return false;
  });
  return runs;
}

// A block list and the positions of an axis on their way to the device.
class SentBlocks {
 public:
  SentBlocks(Upload& upload, BlockList list)
      : list_(std::move(list)),
        offsets_(upload.add<std::int32_t>(list_.offsets)),
        pieces_(upload.add<BlockPiece>(list_.pieces)),
        masks_(upload.add<std::uint64_t>(list_.masks)),
        order_(upload.add<std::int32_t>(list_.order)) {}
  BlockTable sent(const Upload& upload) const {
    return {upload.at<std::int32_t>(offsets_), upload.at<BlockPiece>(pieces_), upload.at<std::uint64_t>(masks_),
            upload.at<std::int32_t>(order_), list_.blocks()};
  }

 private:
  BlockList list_;
  std::size_t offsets_, pieces_, masks_, order_;
};

class SentTerms {
 public:
  template <class Args>
  SentTerms(Upload& upload, const Args& args) : with_slopes_(!args.terms.alibi_slopes.empty()) {
    if (with_slopes_) {
      slopes_ = upload.add(args.terms.alibi_slopes.subspan(static_cast<std::size_t>(args.heads.q_begin),
                                                           static_cast<std::size_t>(args.q.size(2))));
    }
    if (!with_slopes_ && args.terms.bias.data == nullptr && args.terms.dropout.p == 0) return;
    runs_[0] = runs_of(args.tiles, false);
    runs_[1] = runs_of(args.tiles, true);
    for (std::size_t i = 0; i < 2; ++i) sent_runs_[i] = upload.add<PositionRun>(runs_[i]);
    rows_ = {static_cast<std::size_t>(args.q.size(1)), static_cast<std::size_t>(args.k.size(1))};
  }
  void add_room(Upload& upload) {
    for (std::size_t i = 0; i < 2; ++i) positions_[i] = upload.add_room(rows_[i] * sizeof(std::int64_t));
  }
  void finish(const Upload& upload, cudaStream_t stream, ScoreParams& terms) const {
    if (with_slopes_) terms.slopes = upload.at<double>(slopes_);
    if (runs_[0].empty()) return;
    for (std::size_t i = 0; i < 2; ++i) {
      auto* const positions = upload.at<std::int64_t>(positions_[i]);
      expand_positions(upload.at<PositionRun>(sent_runs_[i]), static_cast<int>(runs_[i].size()), positions, stream);
      (i == 0 ? terms.q_positions : terms.k_positions) = positions;
    }
  }

 private:
  bool with_slopes_;
  std::array<std::vector<PositionRun>, 2> runs_;  // of queries, of keys
  std::array<std::size_t, 2> sent_runs_{}, positions_{}, rows_{};
  std::size_t slopes_ = 0;
};

// The states that shares of the keys give, beside what the kernel is told of them.
class Shares {
 public:
  // Cuts the list where it is of one block of rows with many columns. Invariant sums are of whole rows.
  Shares(const AttendArgs& args, BlockList& list) {
    const std::int64_t columns = column_blocks(list),
                       shares = std::min(kMostShares, kManyBlocks / (args.q.size(0) * args.q.size(2)));
    if (args.invariant || list.blocks() != 1 || shares < 2 || columns <= kShareColumns) return;
    list = cut_into_shares(list, static_cast<std::int32_t>(std::max(kShareColumns, (columns + shares - 1) / shares)));
    params_.count = list.blocks();
  }
  void add_room(Upload& upload, const AttendArgs& args) {
    if (params_.count == 0) return;
    const Shape& rows = args.out.shape;  // [B, S, H, V]
    params_.share_out = rows.elements();
    params_.share_lse = rows[0] * rows[1] * rows[2];
    params_.shares = {nullptr, rows[1] * rows[2] * rows[3], rows[2] * rows[3], rows[3], static_cast<std::int32_t>(rows[3])};
    params_.shares_lse = {nullptr, rows[2] * rows[1], rows[1], 1};
    const auto bytes = static_cast<std::size_t>(params_.count * size_of(args.out.dtype));
    out_ = upload.add_room(static_cast<std::size_t>(params_.share_out) * bytes);
    lse_ = upload.add_room(static_cast<std::size_t>(params_.share_lse) * bytes);
  }
  // Tells the kernel to write states of shares in place of `params`' own.
  void take_results(const Upload& upload, AttendParams& params) {
    if (params_.count == 0) return;
    const AttendProblem& p = params.problem;
    params_.shares.data = upload.at<void>(out_);
    params_.shares_lse.data = upload.at<void>(lse_);
    params_.out = std::exchange(params.out, params_.shares);
    params_.lse = std::exchange(params.lse, params_.shares_lse);
    params_.merge = std::exchange(params.merge, false);
    params_.fp64 = p.storage == Storage::kF64;
    params_.batch = p.batch;
    params_.seq_q = p.seq_q;
    params_.heads = p.heads;
    params.share_out = params_.share_out;
    params.share_lse = params_.share_lse;
  }
  void merge(cudaStream_t stream) const {
    if (params_.count > 0) merge_shares(params_, stream);
  }

 private:
  SharesParams params_{};  // count 0: none
  std::size_t out_ = 0, lse_ = 0;
};

class CudaKernel final : public AttentionKernel {
 public:
  std::string_view name() const override { return "cuda"; }

  Support supports(const AttendTraits& traits) const override {
    if (traits.storage == DType::kI32)
      return {false, fmt::format("storage is {}; it takes fp32, bf16, fp16 and fp64", name_of(traits.storage))};
    if (traits.dim_qk < 1 || traits.dim_qk > kMaxPlainDim || traits.dim_v < 1 || traits.dim_v > kMaxPlainDim)
      return {false, fmt::format("dims are {} and {}; it takes 1 to {}", traits.dim_qk, traits.dim_v, kMaxPlainDim)};
    return {};
  }

  void attend(const AttendArgs& args) const override {
    const cudaStream_t stream = current_stream();
    check(args);
    if (args.q.size(0) * args.q.size(1) * args.q.size(2) == 0 || (args.merge && args.tiles.empty())) return;
    const Path& path = path_for(args.q, args.v, args.k);
    BlockList list = make_block_list(args.tiles, args.q.size(1), path.forward_rows, false);
    Shares shares(args, list);
    Upload upload;
    const SentBlocks blocks(upload, std::move(list));
    SentTerms terms(upload, args);
    terms.add_room(upload);
    shares.add_room(upload, args);
    upload.send(stream);
    AttendParams params{};
    params.problem = problem_of(args);
    terms.finish(upload, stream, params.problem.terms);
    params.blocks = blocks.sent(upload);
    params.out = matrix_of(args.out);
    params.lse = statistic_of(args.lse);
    params.merge = args.merge;
    shares.take_results(upload, params);
    path.attend(params, stream);
    shares.merge(stream);
  }

  void attend_grad(const AttendGradArgs& args) const override {
    const cudaStream_t stream = current_stream();
    check(args);
    if (args.q.size(0) * args.q.size(1) * args.q.size(2) == 0 || args.tiles.empty()) return;
    const bool by_query = args.dq.data != nullptr || args.dbias.data != nullptr, by_key = args.dk.data != nullptr;
    const Path& path = path_for(args.q, args.v, args.k, args.dout);
    Upload upload;
    const auto send = [&](bool wanted, std::int64_t rows, bool keys) {
      return SentBlocks(upload, wanted ? make_block_list(args.tiles, rows, kGradRows, keys) : BlockList{});
    };
    const SentBlocks queries = send(by_query, args.q.size(1), false), keys = send(by_key, args.k.size(1), true);
    SentTerms terms(upload, args);
    terms.add_room(upload);
    upload.send(stream);
    GradParams params{};
    params.problem = problem_of(args);
    terms.finish(upload, stream, params.problem.terms);
    params.queries = queries.sent(upload);
    params.keys = keys.sent(upload);
    params.dout = matrix_of(args.dout);
    params.lse = statistic_of(args.lse);
    params.delta = statistic_of(args.delta);
    params.dq = matrix_of(args.dq);
    params.dk = matrix_of(args.dk);
    params.dv = matrix_of(args.dv);
    params.dbias = bias_of(args.dbias);
    path.attend_grad(params, stream);
  }

 private:
  template <class Args>
  void check(const Args& args) const {
    const Support support = supports({args.q.dtype, args.q.size(3), args.v.size(3), args.q.device});
    ensure(support.ok, "the cuda kernel was called where it refuses: {}", support.why);
    check_args(args);
    require(args.q.size(1) <= kMaxSeq && args.k.size(1) <= kMaxSeq, "{} query rows and {} key rows on one device; at most {}",
            args.q.size(1), args.k.size(1), kMaxSeq);
    require(args.q.size(0) <= kMaxGrid && args.q.size(2) <= kMaxGrid, "{} batch rows and {} heads on one device; at most {}",
            args.q.size(0), args.q.size(2), kMaxGrid);
  }
};

}  // namespace

std::span<const AttentionKernel* const> cuda_kernels() {
  static const CudaKernel kernel;
  static const std::array<const AttentionKernel*, 2> kernels{&cudnn_kernel(kernel), &kernel};
  return kernels;
}

}  // namespace dattn
