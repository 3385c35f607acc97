// Whole tensors from the shards of all ranks, and back: for commands that read and write files.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "launch/run_config.h"
#include "parallel/plan.h"

namespace dattn {

enum class Side { kQuery, kKey };

// What a rank holds of a tensor [B, S, H, X].
struct Shard {
  Interval batch;
  Positions rows;
  Interval heads;
};

// A tensor of a file as [B, S, H, X], and such a tensor as a file has it: views of the same memory.
TensorView from_format(TensorView view, TensorFormat format);
TensorView to_format(TensorView bshd, TensorFormat format);

Tensor take_shard(const TensorView& whole, const Shard& shard, DType dtype);
TensorView statistics_as_rows(const TensorView& statistics);  // [B, H, S] seen as [B, S, H, 1]

using Problems = std::vector<std::shared_ptr<const Problem>>;

// Collects tensors [B, S, H, X] on rank 0. What several ranks hold (KV heads shared by parts of the tensor axis, what one
// serves for all batch rows or heads) is summed.
class Gatherer {
 public:
  // problems, on rank 0: of every data coordinate, since who holds which rows may follow from the masks of its batch rows;
  // batch: the rows of the whole job.
  Gatherer(const Mesh& mesh, Problems problems, std::int64_t batch, TensorFormat format)
      : mesh_(mesh), problems_(std::move(problems)), batch_(batch), format_(format) {}

  // Collective. `own` is this rank's shard of the tensor of shape `whole`.
  void add(const std::string& name, const TensorView& own, const Shape& whole, Side side);
  void add_by_head(const std::string& name, const TensorView& own, const Shape& whole);  // query side; kept as [B, H, S, X]
  void add_heads(const std::string& name, const TensorView& own, std::int64_t heads);    // own: one number a query head here
  // Collective: rank 0 writes the file (what add() collected in the format; "lse" as [B, H, S], of packed tokens [H, S];
  // "dsink" as [H]); a failure there is an error on every rank.
  void write(const std::string& path);

 private:
  Shard shard_of(int rank, Side side, const Shape& whole) const;
  Tensor collect(const TensorView& own, const Shape& whole, const std::function<Shard(int rank)>& shard_of);  // rank 0
  void keep(const std::string& name, Tensor whole, bool formatted = false);

  const Mesh& mesh_;
  Problems problems_;
  std::int64_t batch_;
  TensorFormat format_;
  struct Collected {
    std::string name;
    Tensor whole;
    bool formatted = false;
  };
  std::vector<Collected> collected_;  // rank 0
};

}  // namespace dattn
