#include "parallel/mesh.h"

#include <algorithm>

#include <fmt/format.h>

#include "core/base/error.h"

namespace dattn {

std::string_view name_of(Axis axis) {
  switch (axis) {
    case Axis::kData: return "data";
    case Axis::kRingOuter: return "ring_outer";
    case Axis::kRing: return "ring";
    case Axis::kRows: return "rows";
    case Axis::kUlysses: return "ulysses";
    case Axis::kTensor: return "tensor";
  }
  return "?";
}

int MeshShape::ranks() const {
  int product = 1;
  for (const int size : sizes) product *= size;
  return product;
}

int MeshShape::coordinate(int rank, Axis axis) const {
  for (std::size_t i = kAxes.size() - 1; i > static_cast<std::size_t>(axis); --i) rank /= sizes[i];
  return rank % size(axis);
}

int MeshShape::sequence_parts() const {
  int product = 1;
  for (const Axis axis : kSequenceAxes) product *= size(axis);
  return product;
}

MeshShape MeshShape::with_one_ring() const {
  MeshShape mesh = *this;
  mesh.set(Axis::kRing, size(Axis::kRingOuter) * size(Axis::kRing) * size(Axis::kRows));
  mesh.set(Axis::kRingOuter, 1);
  mesh.set(Axis::kRows, 1);
  return mesh;
}

// The sequence axes are neighbours, tensor alone varies faster.
int MeshShape::sequence_index(int rank) const { return rank / size(Axis::kTensor) % sequence_parts(); }

int MeshShape::neighbour(int rank, Axis axis, int target) const {
  int stride = 1;
  for (std::size_t i = kAxes.size() - 1; i > static_cast<std::size_t>(axis); --i) stride *= sizes[i];
  return rank + (target - coordinate(rank, axis)) * stride;
}

std::vector<int> MeshShape::group(int rank, std::span<const Axis> axes) const {
  std::vector<int> ranks{rank};
  for (const Axis axis : axes) {
    std::vector<int> wider;
    for (const int member : ranks) {
      for (int i = 0; i < size(axis); ++i) wider.push_back(neighbour(member, axis, i));
    }
    ranks = std::move(wider);
  }
  std::sort(ranks.begin(), ranks.end());
  return ranks;
}

void MeshShape::require_valid() const {
  std::int64_t product = 1;
  for (const Axis axis : kAxes) {
    require(size(axis) >= 1 && size(axis) <= kMaxRanks, "mesh.{} is {}; use a size from 1 to {}", name_of(axis), size(axis),
            kMaxRanks);
    product *= size(axis);
    require(product <= kMaxRanks, "the mesh {} has more than {} ranks; use smaller axes", text(), kMaxRanks);
  }
}

std::string MeshShape::text() const {
  std::string all;
  for (const Axis axis : kAxes) {
    if (size(axis) > 1) all += fmt::format("{}{} {}", all.empty() ? "" : " x ", name_of(axis), size(axis));
  }
  return all.empty() ? "1" : all;
}

Mesh::Mesh(Communicator& world, const MeshShape& shape) : world_(world), shape_(shape) {
  shape.require_valid();
  require(shape.ranks() == world.size(), "the mesh {} has {} ranks but the job has {}; start {} ranks or change the mesh",
          shape.text(), shape.ranks(), world.size(), shape.ranks());
  for (const Axis axis : kAxes) {
    axes_[static_cast<std::size_t>(axis)] = world.partition(shape.group(rank(), std::array{axis}), name_of(axis));
  }
  sequence_ = world.partition(shape.group(rank(), kSequenceAxes), "sequence");
  std::vector<Axis> equal_parameters{Axis::kData};
  equal_parameters.insert(equal_parameters.end(), kSequenceAxes.begin(), kSequenceAxes.end());
  replicas_ = world.partition(shape.group(rank(), equal_parameters), "replicas");
}

}  // namespace dattn
