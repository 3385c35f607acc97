// Attention kernels on one device. A kernel computes the visible pairs of a block of queries and a block of keys,
// given as tiles, and folds them into a state (out, lse). The list of kernels is ordered, best first, reference last;
// each says whether it takes a problem and, if not, why.
//
// Letters: B batch, S query rows, T key rows, H query heads, K KV heads, D dim of q and k, V dim of v.
#pragma once

#include <span>
#include <string>
#include <string_view>

#include "core/attention/tile.h"
#include "core/tensor/tensor.h"

namespace dattn {

// Which KV head a local query head reads. Heads are numbered globally: this block holds query heads from q_begin on
// and KV heads from kv_begin on; `group` consecutive query heads share one KV head (H / K of the whole model).
struct HeadMap {
  std::int64_t q_begin = 0;
  std::int64_t kv_begin = 0;
  std::int64_t group = 1;

  std::int64_t kv_of(std::int64_t local_q) const { return (q_begin + local_q) / group - kv_begin; }
};

// Dropout of probabilities. Which pairs are dropped is a function of seed, stream, row, head and both positions.
struct AttentionDropout {
  double p = 0;                  // probability of dropping; kept probabilities are multiplied by 1 / (1 - p)
  std::uint64_t seed = 0;        // Philox key
  std::uint64_t stream = 0;      // step and layer, below 2^32
  std::int64_t batch_begin = 0;  // global number of batch row 0 of q
  std::int64_t heads = 1;        // query heads of the whole model: (batch row, head) is numbered row * heads + head
};

// What changes a score or a probability beside scale * q k^T. Everything is keyed by global positions and global heads,
// which the tiles and the head map carry, so that it is the same on any mesh.
// Order: s = scale * q k^T; s = softcap * tanh(s / softcap); s += alibi_slopes[head] * (k - q); s += bias.
// Softmax and lse are those of s; dropout only decides which probabilities reach the values.
struct ScoreTerms {
  double softcap = 0;                    // 0 = none
  std::span<const double> alibi_slopes;  // by global query head; empty = none
  TensorView bias{};  // [B or 1, S, H or 1, N], storage type or fp32; column = global key position; no memory = none
  AttentionDropout dropout{};

  bool changes_scores() const { return softcap != 0 || !alibi_slopes.empty() || bias.data != nullptr; }
  bool any() const { return changes_scores() || dropout.p > 0; }
};

// softmax(scale * q k^T over visible pairs) v. Storage type (q, k, v, dout): fp32, bf16, fp16 or fp64, equal for all four.
// Accumulators (out, lse, delta, dq, dk, dv): accumulate_type(storage). Views may have any strides but for the last
// axis, which must be contiguous.
struct AttendArgs {
  TensorView q;  // [B, S, H, D]
  TensorView k;  // [B, T, K, D]
  TensorView v;  // [B, T, K, V]
  HeadMap heads;
  std::span<const Tile> tiles;  // disjoint
  double scale = 1.0;
  TensorView out;      // [B, S, H, V], normalised: sum of p v / sum of p
  TensorView lse;      // [B, H, S], natural logarithm of sum of exp(scores); -inf where nothing was seen
  bool merge = false;  // true: the result is merged into (out, lse); false: they are overwritten
  ScoreTerms terms{};
  bool invariant = false;  // see "Invariant" below
};

// Gradients of one piece, additive over pieces because lse and delta are the final ones of the whole row:
// p = exp(s - lse), m = 1 / (1 - dropout p) or 0 where dropped (1 without dropout), ds = p * (m dout v^T - delta),
// dbias += ds, then ds *= 1 - tanh^2 under a softcap, dq += scale * ds k, dk += scale * ds^T q, dv += (m p)^T dout.
// What has no memory is not wanted: dq alone, dk and dv together, dbias.
struct AttendGradArgs {
  TensorView q, k, v;
  HeadMap heads;
  std::span<const Tile> tiles;
  double scale = 1.0;
  TensorView dout;   // [B, S, H, V], storage type
  TensorView lse;    // [B, H, S], final
  TensorView delta;  // [B, H, S], attention_delta of the final out
  TensorView dq;     // [B, S, H, D], added to
  TensorView dk;     // [B, T, K, D], added to
  TensorView dv;     // [B, T, K, V], added to
  ScoreTerms terms{};
  bool invariant = false;
  TensorView dbias{};      // like terms.bias, accumulator type, added to; summed over batch rows and heads that share it
  bool repeatable = true;  // the same bits from call to call; false lets a kernel add in any order
};

// Invariant: a row gets the same bits whatever other rows are in the call. That holds for out, lse and dq of a query row
// when the call brings all keys (row = position, from 0 on, in one run) and for dk and dv of a key row when it brings
// all queries. dk and dv of the query heads of a group are then finished apart, scaled and added in ascending order of
// heads, so calls with a part of the heads, added in that order, give the same bits. Merging is a fold: states of
// several calls depend on how the keys were cut between the calls and on the order of the calls.

// What a kernel is asked about before any tensor exists.
struct AttendTraits {
  DType storage = DType::kF32;
  std::int64_t dim_qk = 0;
  std::int64_t dim_v = 0;
  Device device{};
};

struct Support {
  bool ok = true;
  std::string why;  // the reason where not ok
};

// Implementations are stateless and callable from several threads (ranks) at once. Results do not depend on the
// number of threads.
class AttentionKernel {
 public:
  virtual ~AttentionKernel() = default;
  virtual std::string_view name() const = 0;
  virtual Support supports(const AttendTraits& traits) const = 0;
  virtual void attend(const AttendArgs& args) const = 0;
  virtual void attend_grad(const AttendGradArgs& args) const = 0;
};

// Best first; on the cpu the reference last. Those of CUDA devices are in the CUDA module (core/device/cuda_module.h).
std::span<const AttentionKernel* const> attention_kernels(Device device = {});
const AttentionKernel& find_kernel(std::string_view name, Device device = {});  // throws Error(kBadInput) naming the known ones
// The first kernel of the list that supports the problem; DATTN_KERNEL=name forces one. Logs choice and refusals once.
const AttentionKernel& select_kernel(const AttendTraits& traits);

const AttentionKernel& reference_kernel();  // plain loops in fp64, whatever the storage type
const AttentionKernel& cpu_kernel();        // tiled online softmax, SIMD chosen at run time

}  // namespace dattn
