// Shards of tensors along a sequence axis, by a layout.
//
//   whole [.., S, ..] --shard--> rows of this rank --unshard--> whole       (all-gather over the sequence axes)
//   whole on every rank --reduce_shard--> rows of this rank of the sum      (reduce-scatter)
#include <algorithm>

#include "core/attention/mask.h"
#include "parallel/rows.h"
#include "plugins/c/handles.h"
#include "plugins/c/options.h"
#include "plugins/c/tensor.h"

namespace dattn::c {
namespace {

struct Sharding {
  std::shared_ptr<MeshOnComm> mesh;
  std::int64_t seq = 0;
  std::vector<Positions> parts;  // of every place along the sequence

  Communicator& ranks() const { return mesh->mesh.sequence(); }
  const Positions& mine() const { return parts[static_cast<std::size_t>(mesh->mesh.sequence_index())]; }
};

// A mask that differs between batch rows says itself of how many.
std::int64_t batch_of(const Mask& mask) {
  return std::max<std::int64_t>(1, static_cast<std::int64_t>(std::max(mask.lengths.size(), mask.rows.size())));
}

std::vector<Positions> parts_of(Layout layout, std::int64_t seq, int parts, const char* attention) {
  require(seq >= 0 && seq <= kMaxPosition, "seq is {}; it must lie in [0, {}]", seq, kMaxPosition);
  if (layout == Layout::kBalanced) {
    const Mask mask = options_of(attention, seq, seq).mask;
    return balanced_positions(compile_batch(mask, batch_of(mask), seq, seq), seq, parts);
  }
  std::vector<Positions> all;
  for (int part = 0; part < parts; ++part) all.push_back(positions_of(layout, seq, parts, part));
  return all;
}

// One buffer with every rank's rows behind each other: [rows, other axes].
struct Slots {
  Tensor buffer;
  std::vector<TensorView> of_rank;  // with the axes of the tensors
  std::vector<std::int64_t> counts;

  Slots(const Sharding& sharding, int axis, const TensorView& whole) {
    buffer = Tensor::uninitialized(whole.dtype, {whole.elements()});
    std::int64_t begin = 0;
    for (const Positions& rows : sharding.parts) {
      Shape shape = whole.shape;
      shape[axis] = rows.count();
      counts.push_back(shape.elements());
      of_rank.push_back(buffer->slice(0, begin, counts.back()).reshape(shape));
      begin += counts.back();
    }
  }
};

// Checks what every function takes: two tensors that differ in `axis` only.
void check_pair(const Sharding& sharding, int axis, const TensorView& whole, const TensorView& shard) {
  require(axis >= 0 && axis < whole.axes(), "axis is {}; the tensor has {} axes, counted from 0", axis, whole.axes());
  Shape expected = whole.shape;
  require(whole.size(axis) == sharding.seq, "the whole tensor has {} rows in axis {}; the sharding was made for {}",
          whole.size(axis), axis, sharding.seq);
  expected[axis] = sharding.mine().count();
  require(shard.shape == expected, "the shard has shape {}; of a whole {} this rank's is {}", shard.shape.text(),
          whole.shape.text(), expected.text());
  require(shard.dtype == whole.dtype, "the whole tensor and the shard have elements of different types");
}

}  // namespace

void write_positions(const Positions& rows, int64_t* positions, int64_t capacity) {
  require(capacity >= rows.count(), "there are {} positions but room for {}", rows.count(), capacity);
  require(positions != nullptr || rows.count() == 0, "positions is NULL");
  for (const Run& run : rows.runs()) {
    for (std::int64_t i = 0; i < run.count; ++i) *positions++ = run.at(i);
  }
}

}  // namespace dattn::c

using namespace dattn;
using namespace dattn::c;

struct dattn_sharding {
  std::shared_ptr<Sharding> held;
};

namespace {

// Runs body(sharding, whole, shard) as the sharding's rank, once all has been checked.
template <class Body>
dattn_status on_sharding(const dattn_sharding* handle, int axis, const dattn_tensor* whole, const dattn_tensor* shard,
                         void* stream, const Body& body) noexcept {
  return guarded([&] {
    require_pointer(handle, "sharding");
    const Sharding& sharding = *handle->held;
    collective(*sharding.mesh->comm, [&] {
      const Device device = sharding.mesh->device();
      const TensorView all = view_of_elements(whole, device, "whole"), mine = view_of_elements(shard, device, "shard");
      check_pair(sharding, axis, all, mine);
      const CallerStream caller(device, stream);
      body(sharding, all, mine);
      caller.done();
    });
  });
}

}  // namespace

dattn_status dattn_sharding_create(dattn_mesh* mesh, int64_t seq, const char* layout, const char* attention,
                                   dattn_sharding** sharding) {
  return create(sharding, "sharding", [&] {
    require_pointer(mesh, "mesh");
    const RankScope scope(*mesh->held);
    return std::make_shared<Sharding>(
        Sharding{mesh->held, seq, parts_of(layout_of(layout), seq, mesh->held->mesh.shape().sequence_parts(), attention)});
  });
}

void dattn_sharding_destroy(dattn_sharding* sharding) { delete sharding; }

int64_t dattn_sharding_rows(const dattn_sharding* sharding) {
  return sharding == nullptr ? -1 : sharding->held->mine().count();
}

dattn_status dattn_sharding_positions(const dattn_sharding* sharding, int64_t* positions, int64_t capacity) {
  return guarded([&] {
    require_pointer(sharding, "sharding");
    write_positions(sharding->held->mine(), positions, capacity);
  });
}

dattn_status dattn_shard(dattn_sharding* sharding, int32_t axis, const dattn_tensor* whole, const dattn_tensor* shard,
                         void* stream) {
  return on_sharding(sharding, axis, whole, shard, stream,
                     [&](const Sharding& held, const TensorView& all, const TensorView& mine) {
                       for_each_run(held.mine(), axis, all, mine, copy);
                     });
}

dattn_status dattn_unshard(dattn_sharding* sharding, int32_t axis, const dattn_tensor* shard, const dattn_tensor* whole,
                           void* stream) {
  return on_sharding(sharding, axis, whole, shard, stream,
                     [&](const Sharding& held, const TensorView& all, const TensorView& mine) {
                       const Slots slots(held, axis, all);
                       copy(mine, slots.of_rank[static_cast<std::size_t>(held.ranks().rank())]);
                       held.ranks().all_gather(slots.buffer, slots.counts, {.verb = "unshard"});
                       for (std::size_t part = 0; part < held.parts.size(); ++part)
                         for_each_run(held.parts[part], axis, all, slots.of_rank[part],
                                      [](const TensorView& to, const TensorView& from) { copy(from, to); });
                     });
}

dattn_status dattn_reduce_shard(dattn_sharding* sharding, int32_t axis, const dattn_tensor* whole, const dattn_tensor* shard,
                                void* stream) {
  return on_sharding(sharding, axis, whole, shard, stream,
                     [&](const Sharding& held, const TensorView& all, const TensorView& mine) {
                       require(to_dtype(whole->dtype, "whole") == all.dtype, "sums are of floating types");
                       const Slots slots(held, axis, all);
                       for (std::size_t part = 0; part < held.parts.size(); ++part)
                         for_each_run(held.parts[part], axis, all, slots.of_rank[part], copy);
                       const Tensor own = Tensor::uninitialized(all.dtype, mine.shape);
                       held.ranks().reduce_scatter_sum(slots.buffer, slots.counts, own, {.verb = "reduce_shard"});
                       copy(own, mine);
                     });
}
