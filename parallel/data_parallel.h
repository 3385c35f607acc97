// Data parallelism: ranks that hold equal parameters but other tokens (mesh.replicas(): data, ring, ulysses) sum their
// gradients, and so do the ranks of the tensor axis for the parameters that are flagged so. Over the replicas each rank gets
// the sums of its share alone, updates that, and all take the new values from each other (see parameter_shares.h).
//
//   sync.sum(); .. sync.squared_norm_share() ..; update sync.own(); sync.gather_values();
//
// A parameter whose slices overlap between tensor parts (KV heads held twice) is placed in a tensor of its global shape
// with zeros elsewhere, summed over the tensor axis, and cut again. Every sum is taken in rank order, in buckets, which go in a
// fixed order, so runs repeat bit by bit.
// Source: Li et al., "PyTorch distributed: experiences on accelerating data parallel training", 2020 (buckets).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/nn/parameter.h"
#include "parallel/mesh.h"
#include "parallel/parameter_shares.h"

namespace dattn {

class GradientSync {
 public:
  static constexpr std::int64_t kBucketBytes = 4 << 20;
  static constexpr std::int64_t kSlotBytes = 64 << 10;

  // Mesh and parameters must outlive this. Buckets of kBucketBytes, or larger ones where there are so many replicas that their
  // slots would be below kSlotBytes; or of `bucket_bytes`.
  GradientSync(const Mesh& mesh, std::span<Parameter* const> parameters);
  GradientSync(const Mesh& mesh, std::span<Parameter* const> parameters, std::int64_t bucket_bytes);
  virtual ~GradientSync() = default;

  // Called after each backward of a step: the gradients hold what the pieces so far added up to.
  virtual void piece_done() {}

  // Makes the gradients of own() sums over all ranks that share them, in place. Verbs "gradient_tensor" and "gradient".
  virtual void sum();

  // What this rank is to update.
  std::span<const ParameterRun> own() const { return shares_.own(); }
  const ParameterShares& shares() const { return shares_; }

  // This rank's share of the squared norm of the summed gradients: added over the world, every element of the model
  // counts once, whatever is replicated or held twice.
  double squared_norm_share() const;

  // Gives all replicas the values that each has updated. Verb "values".
  void gather_values();

 protected:
  // Where sum() leaves all gradients on every rank, each updates all.
  enum class Updates { kShare, kAll };
  GradientSync(const Mesh& mesh, std::span<Parameter* const> parameters, std::int64_t bucket_bytes, Updates updates);

  const Mesh& mesh() const { return mesh_; }
  std::span<Parameter* const> parameters() const { return parameters_; }
  std::int64_t bucket_bytes() const { return bucket_bytes_; }

 private:
  void sum_over_tensor();

  const Mesh& mesh_;
  std::vector<Parameter*> parameters_;
  std::vector<Parameter*> tensor_summed_;
  std::int64_t bucket_bytes_;
  ParameterShares shares_;
};

// Sums a contiguous fp32 tensor over a group, in place.
using AllReduce = void (*)(Communicator& group, const TensorView& data, const OpLabel& label);
inline void sum_in_rank_order(Communicator& group, const TensorView& data, const OpLabel& label) {
  group.all_reduce_sum(data, label);
}

// Sums every tensor of the list over the group, in place, in buckets of at most `bucket_bytes`, or one tensor, without a copy.
// Fp32, contiguous, shapes equal on every rank.
void all_reduce_in_buckets(Communicator& group, std::span<const TensorView> tensors, std::int64_t bucket_bytes,
                           const OpLabel& label, AllReduce all_reduce = sum_in_rank_order);

}  // namespace dattn
