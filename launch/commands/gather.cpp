#include "launch/commands/gather.h"

#include <algorithm>

#include "core/base/error.h"
#include "core/tensor/safetensors.h"
#include "parallel/rows.h"

namespace dattn {
namespace {

// The batch rows and heads of a shard, with all positions.
TensorView all_rows(const TensorView& whole, const Shard& shard) {
  return whole.slice(0, shard.batch.begin, shard.batch.count()).slice(2, shard.heads.begin, shard.heads.count());
}

}  // namespace

TensorView from_format(TensorView view, TensorFormat format) {
  if (format == TensorFormat::kSBHD) return view.transpose(0, 1);
  if (format == TensorFormat::kBHSD) return view.transpose(1, 2);
  if (format == TensorFormat::kBSHD) return view;
  return view.reshape({1, view.size(0), view.size(1), view.size(2)});
}

TensorView to_format(TensorView bshd, TensorFormat format) {
  if (format != TensorFormat::kTHD) return from_format(bshd, format);  // which swaps two axes or none
  return bshd.reshape({bshd.size(1), bshd.size(2), bshd.size(3)});
}

Tensor take_shard(const TensorView& whole, const Shard& shard, DType dtype) {
  Tensor mine = Tensor::uninitialized(dtype, {shard.batch.count(), shard.rows.count(), shard.heads.count(), whole.size(3)});
  for_each_run(shard.rows, 1, all_rows(whole, shard), mine, copy);
  return mine;
}

TensorView statistics_as_rows(const TensorView& statistics) {
  TensorView rows = statistics.transpose(1, 2);
  rows.shape = Shape{rows.size(0), rows.size(1), rows.size(2), 1};
  rows.strides[3] = 1;
  return rows;
}

Shard Gatherer::shard_of(int rank, Side side, const Shape& whole) const {
  const MeshShape& mesh = mesh_.shape();
  const int data = mesh.coordinate(rank, Axis::kData);
  const Problem& problem = *problems_[static_cast<std::size_t>(data)];
  const HeadRange heads =
      heads_of(problem.shape.heads, problem.shape.kv_heads, mesh.size(Axis::kTensor), mesh.coordinate(rank, Axis::kTensor));
  const auto held = [](Interval part, std::int64_t extent) {  // one for all: whoever holds any holds it
    return extent == 1 ? Interval{0, std::min<std::int64_t>(1, part.count())} : part;
  };
  return {held(split_evenly(batch_, mesh.size(Axis::kData), data), whole[0]), problem.shard_rows(side == Side::kKey, rank),
          held(side == Side::kQuery ? heads.q : heads.kv, whole[2])};
}

Tensor Gatherer::collect(const TensorView& own, const Shape& whole, const std::function<Shard(int rank)>& shard_of) {
  Communicator& world = mesh_.world();
  const OpLabel label{"collect"};
  const DeviceScope host(Device{});
  const Tensor mine = to_device(own, Device{});
  if (world.rank() != 0) {
    const SendPart part{0, mine->data, static_cast<std::size_t>(mine->bytes())};
    world.exchange({&part, 1}, {}, label);
    return {};
  }
  Tensor all(own.dtype, whole);
  for (int rank = 0; rank < world.size(); ++rank) {
    const Shard shard = shard_of(rank);
    Tensor theirs = Tensor::uninitialized(own.dtype, {shard.batch.count(), shard.rows.count(), shard.heads.count(), whole[3]});
    if (rank == 0) {
      copy(mine, theirs);
    } else {
      const RecvPart part{rank, theirs->data, static_cast<std::size_t>(theirs->bytes())};
      world.exchange({}, {&part, 1}, label);
    }
    for_each_run(shard.rows, 1, all_rows(all, shard), theirs,
                 [](const TensorView& part, const TensorView& rows) { dattn::add(rows, part); });
  }
  return all;
}

void Gatherer::keep(const std::string& name, Tensor whole, bool formatted) {
  if (whole.defined()) collected_.push_back({name, std::move(whole), formatted});
}

void Gatherer::add(const std::string& name, const TensorView& own, const Shape& whole, Side side) {
  keep(name, collect(own, whole, [&](int rank) { return shard_of(rank, side, whole); }), true);
}

void Gatherer::add_by_head(const std::string& name, const TensorView& own, const Shape& whole) {
  const Tensor all = collect(own, whole, [&](int rank) { return shard_of(rank, Side::kQuery, whole); });
  if (!all.defined()) return;
  keep(name, to_dtype(all->transpose(1, 2), all->dtype));
}

void Gatherer::add_heads(const std::string& name, const TensorView& own, std::int64_t heads) {
  const Shape whole{1, 1, heads, 1};
  keep(name, collect(own.reshape({1, 1, own.size(0), 1}), whole, [&](int rank) {
         const Interval part = shard_of(rank, Side::kQuery, {batch_, 1, heads, 1}).heads;
         return Shard{{0, 1}, Positions::range(0, 1), part};
       }));
}

void Gatherer::write(const std::string& path) {
  Communicator& world = mesh_.world();
  std::string failure;
  if (world.rank() == 0) {
    try {
      std::vector<NamedTensor> tensors;
      for (const auto& [name, tensor, formatted] : collected_) {
        TensorView view = formatted ? to_format(tensor, format_) : tensor.view();
        if (name == "lse") {
          const bool packed = format_ == TensorFormat::kTHD;
          view = view.reshape(packed ? Shape{view.size(1), view.size(2)} : Shape{view.size(0), view.size(1), view.size(2)});
        }
        if (name == "dsink") view = view.reshape({view.size(2)});
        tensors.push_back({name, view});
      }
      write_safetensors(path, tensors);
    } catch (const Error& error) {
      failure = error.what();
    }
  }
  const std::vector<std::string> said = world.gather_strings(failure, {"status"});
  if (!said[0].empty()) throw Error(ErrorCode::kSystem, said[0]);
}

}  // namespace dattn
