// The blocks of all ranks as the verifier sees them: short lists of atoms in place of positions.
//
// Every value is placed like one of a few roots, seen from a rank some places back along the axes: what rotates moves the
// rank, all else is a root. An atom is one shard of the layout, whole or inside some ranges of positions (fetched rows).
//
//   kv2 = rotate(rotate(kv)): root kv, two back on the ring       all = gather(q): a root, the atoms of the axis
#pragma once

#include <array>
#include <deque>
#include <map>
#include <span>
#include <vector>

#include "parallel/plan.h"

namespace dattn::proof {

inline constexpr int kWhole = -1;

struct Atom {
  int shard = 0;        // index along the sequence, of the value's side
  int within = kWhole;  // number of a list of ranges
};

class Blocks {
 public:
  explicit Blocks(const Plan& plan);  // well formed (form.cpp)

  int ranks() const { return static_cast<int>(coordinates_.size()); }
  int shards() const { return static_cast<int>(query_shards_.size()); }
  int neighbour(int rank, Axis axis, int coordinate) const;  // the coordinate wraps around
  int coordinate(int rank, Axis axis) const { return coordinates_[static_cast<std::size_t>(rank)][index(axis)]; }

  // Whether a on every rank holds what b holds `shift` ranks earlier on the axis, rows in the same order, by placing alone.
  bool placed_alike(ValueId a, ValueId b, Axis axis = Axis::kData, int shift = 0) const;

  int block(ValueId value, int rank);  // a number; equal numbers mean equal rows
  const std::vector<Atom>& atoms(int block) const { return blocks_[static_cast<std::size_t>(block)]; }
  std::span<const Atom> atoms_of_shard(int block, int shard) const;
  std::int64_t row_count(ValueId value, int rank);
  const HeadRange& heads(ValueId value, int rank);

  const Positions& shard(bool key_side, int index) const;
  Positions rows(bool key_side, const Atom& atom) const;
  std::span<const Interval> ranges(int within) const { return ranges_[static_cast<std::size_t>(within)]; }
  int both(int within_a, int within_b);  // ranges that lie in both

 private:
  struct Home {
    ValueId root = kNoValue;
    std::array<int, kAxes.size()> back{};  // per axis, in [0, size)
    bool rotated = false;
  };
  struct Less {
    bool operator()(const std::vector<Interval>& a, const std::vector<Interval>& b) const;
  };

  Home home_of(ValueId value);
  static std::size_t index(Axis axis) { return static_cast<std::size_t>(axis); }
  int moved(int rank, const Home& home) const;  // the rank whose block of the root it holds
  int make_block(ValueId root, int rank);
  std::vector<Atom> gathered(const Placing& placing, int rank);
  std::vector<Atom> fetched(const Placing& placing, int rank);
  int wanted(const Placing& placing, int rank);
  int number_of(std::vector<Interval> ranges);
  ValueId head_root(ValueId value) const;

  const Plan& plan_;
  const MeshShape& mesh_;
  std::vector<std::array<int, kAxes.size()>> coordinates_;  // by rank
  std::array<int, kAxes.size()> strides_{};
  std::vector<Positions> query_shards_, key_shards_;
  std::map<std::vector<int>, ValueId> roots_;  // by how they are placed
  std::vector<Home> homes_;                    // by value
  std::vector<std::vector<int>> tables_;       // by root and rank: block, or -1; empty until asked for
  std::deque<std::vector<Atom>> blocks_;       // ascending shards; references stay valid
  std::vector<std::vector<HeadRange>> heads_;  // by head root and rank
  std::vector<std::vector<Interval>> ranges_;
  std::map<std::vector<Interval>, int, Less> range_numbers_;
  std::map<std::pair<int, int>, int> intersections_;
  std::map<std::pair<ValueId, int>, int> wanted_;  // by root and rank of the queries
};

}  // namespace dattn::proof
