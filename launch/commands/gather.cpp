#include "launch/commands/gather.h"

#include "core/base/error.h"
#include "core/tensor/safetensors.h"

namespace dattn {
namespace {

// Calls body(part of the whole, row of the shard) for every run of rows; strided runs are strided views.
template <class Body>
void for_each_run(const TensorView& whole, const Shard& shard, const Body& body) {
  const TensorView mine =
      whole.slice(0, shard.batch.begin, shard.batch.count()).slice(2, shard.heads.begin, shard.heads.count());
  for (std::size_t i = 0; i < shard.rows.runs().size(); ++i) {
    const Run& run = shard.rows.runs()[i];
    TensorView part = mine.slice(1, run.begin, 1);
    part.shape[1] = run.count;
    part.strides[1] *= run.step;
    body(part, shard.rows.row_of_run(i));
  }
}

}  // namespace

Tensor take_shard(const TensorView& whole, const Shard& shard, DType dtype) {
  Tensor mine = Tensor::uninitialized(dtype, {shard.batch.count(), shard.rows.count(), shard.heads.count(), whole.size(3)});
  for_each_run(whole, shard, [&](const TensorView& part, std::int64_t row) { copy(part, mine->slice(1, row, part.size(1))); });
  return mine;
}

TensorView statistics_as_rows(const TensorView& statistics) {
  TensorView rows = statistics.transpose(1, 2);
  rows.shape = Shape{rows.size(0), rows.size(1), rows.size(2), 1};
  rows.strides[3] = 1;
  return rows;
}

Shard Gatherer::shard_of(int rank, Side side) const {
  const MeshShape& mesh = mesh_.shape();
  const HeadRange heads =
      heads_of(problem_.shape.heads, problem_.shape.kv_heads, mesh.size(Axis::kTensor), mesh.coordinate(rank, Axis::kTensor));
  return {split_evenly(batch_, mesh.size(Axis::kData), mesh.coordinate(rank, Axis::kData)),
          problem_.shard_rows(side == Side::kKey, rank), side == Side::kQuery ? heads.q : heads.kv};
}

void Gatherer::add(const std::string& name, const TensorView& own, const Shape& whole, Side side) {
  Communicator& world = mesh_.world();
  const OpLabel label{"collect"};
  const Tensor mine = to_dtype(own, own.dtype);
  if (world.rank() != 0) {
    const SendPart part{0, mine->data, static_cast<std::size_t>(mine->bytes())};
    world.exchange({&part, 1}, {}, label);
    return;
  }
  Tensor all(own.dtype, whole);
  for (int rank = 0; rank < world.size(); ++rank) {
    const Shard shard = shard_of(rank, side);
    Tensor theirs = Tensor::uninitialized(own.dtype, {shard.batch.count(), shard.rows.count(), shard.heads.count(), whole[3]});
    if (rank == 0) {
      copy(mine, theirs);
    } else {
      const RecvPart part{rank, theirs->data, static_cast<std::size_t>(theirs->bytes())};
      world.exchange({}, {&part, 1}, label);
    }
    for_each_run(all, shard,
                 [&](const TensorView& part, std::int64_t row) { dattn::add(theirs->slice(1, row, part.size(1)), part); });
  }
  // Adding to zero makes an lse of -inf come out right, too: each query head has one holder.
  if (name == "lse") all = to_dtype(all->reshape({whole[0], whole[1], whole[2]}).transpose(1, 2), own.dtype);
  collected_.emplace_back(name, std::move(all));
}

void Gatherer::write(const std::string& path) {
  Communicator& world = mesh_.world();
  std::string failure;
  if (world.rank() == 0) {
    try {
      std::vector<NamedTensor> tensors;
      for (const auto& [name, tensor] : collected_) tensors.push_back({name, tensor.view()});
      write_safetensors(path, tensors);
    } catch (const Error& error) {
      failure = error.what();
    }
  }
  const std::vector<std::string> said = world.gather_strings(failure, {"status"});
  if (!said[0].empty()) throw Error(ErrorCode::kSystem, said[0]);
}

}  // namespace dattn
