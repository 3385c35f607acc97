// Mesh: the ranks of a job with named axes. Axes, slowest first: data, ring_outer, ring, rows, ulysses, tensor. The index
// along the sequence (all but data and tensor) equals Megatron's context-parallel rank.
//
//   data: which batch rows      sequence axes: which positions      tensor: which heads, hidden units, vocabulary
#pragma once

#include <array>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "parallel/comm/communicator.h"

namespace dattn {

enum class Axis { kData, kRingOuter, kRing, kRows, kUlysses, kTensor };
inline constexpr std::array<Axis, 6> kAxes{Axis::kData, Axis::kRingOuter, Axis::kRing,
                                           Axis::kRows, Axis::kUlysses,   Axis::kTensor};
inline constexpr std::array<Axis, 4> kSequenceAxes{Axis::kRingOuter, Axis::kRing, Axis::kRows, Axis::kUlysses};
std::string_view name_of(Axis axis);
constexpr int around(int coordinate, int parts) { return (coordinate % parts + parts) % parts; }  // on a cyclic axis

inline constexpr int kMaxRanks = 1 << 16;

// Sizes of the axes; what a config states. Pure values, for any number of ranks.
struct MeshShape {
  std::array<int, kAxes.size()> sizes{1, 1, 1, 1, 1, 1};

  int size(Axis axis) const { return sizes[static_cast<std::size_t>(axis)]; }
  void set(Axis axis, int size) { sizes[static_cast<std::size_t>(axis)] = size; }
  int ranks() const;
  int sequence_parts() const;
  MeshShape with_one_ring() const;  // ring_outer, ring and rows as one ring of the same ranks

  int coordinate(int rank, Axis axis) const;
  int sequence_index(int rank) const;                                  // place along the sequence: the context-parallel rank
  int neighbour(int rank, Axis axis, int coordinate) const;            // the rank that differs from this one in that axis only
  std::vector<int> group(int rank, std::span<const Axis> axes) const;  // ranks that agree with it on all other axes, ascending
  void require_valid() const;  // throws Error(kBadInput) unless all are positive and their product is at most kMaxRanks
  std::string text() const;    // "ring 2 x ulysses 2"; axes of one rank are left out
  bool operator==(const MeshShape&) const = default;
};

// A mesh on a running job: the communicators of its axes, made at construction by partitions of the world.
class Mesh {
 public:
  // Throws Error(kBadInput) unless the sizes are positive and their product equals world.size().
  Mesh(Communicator& world, const MeshShape& shape);

  const MeshShape& shape() const { return shape_; }
  int rank() const { return world_.rank(); }
  int coordinate(Axis axis) const { return shape_.coordinate(rank(), axis); }
  int sequence_index() const { return shape_.sequence_index(rank()); }

  Communicator& world() const { return world_; }
  Communicator& axis(Axis axis) const { return *axes_[static_cast<std::size_t>(axis)]; }
  Communicator& sequence() const { return *sequence_; }  // the sequence axes together
  Communicator& replicas() const { return *replicas_; }  // data and sequence: the ranks that hold equal parameters

 private:
  Communicator& world_;
  MeshShape shape_;
  std::array<std::unique_ptr<Communicator>, kAxes.size()> axes_;
  std::unique_ptr<Communicator> sequence_;
  std::unique_ptr<Communicator> replicas_;
};

}  // namespace dattn
