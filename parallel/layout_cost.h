// What a layout makes of a mask on a mesh, for planning: the rows that ranks fetch, how evenly the visible pairs are shared
// out, how long a ring waits for its slowest ranks, and how much of a kernel's tiles is hidden. Exact on small meshes, of a
// sample of ranks on large ones; waits are those of a coarse picture of the mask.
#pragma once

#include <map>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "parallel/machine.h"
#include "parallel/pair_grid.h"
#include "parallel/plan.h"

namespace dattn {

// Key rows that fetch and halo move, of a mean rank.
struct SeenRows {
  double fetched = 0;
  bool neighbours_only = true;  // all of them lie on the ring's neighbours
};
SeenRows seen_rows(const Problem& problem);

// Which visible pairs are a rank's work: those of its queries, those of its keys, or of a grid's column of queries and row of
// keys.
enum class Sharing { kQueries, kKeys, kGrid };
Sharing sharing_of(std::string_view strategy);

struct LayoutWork {
  double balance = 1;  // mean over most visible pairs of a rank, heads not counted
  // A ring's busiest rank over the whole ring, whose ranks wait for each other's hops; 1 without a ring. Backward gradients
  // travel behind each computation, so ranks wait more.
  double in_step = 1, in_step_backward = 1;
  double worked = 1, worked_backward = 1;  // pairs of the kernel's tiles over visible ones
};

// Of one problem that is placed on meshes of equally many parts, in any layout; what was worked out is kept.
class LayoutCosts {
 public:
  // `pairs`: all that the mask shows. No machine: tiles of single pairs.
  LayoutCosts(const Problem& problem, double pairs, const Machine* machine);

  bool sees_all() const { return sees_all_; }
  double balance(std::string_view strategy);   // as the problem is placed now
  LayoutWork work(std::string_view strategy);  // the same and the rest

 private:
  using Key = std::tuple<int, int, Layout, Sharing>;  // ulysses, rows where they matter, ..
  Key key(std::string_view strategy) const;
  const PairGrid& grid();
  const std::vector<double>& pairs_before(bool key_side);  // of all places before each, with all of the other side
  double pairs_with_all(const Positions& own, bool key_side) const;
  using Held = std::vector<double>;  // by cells of a side of the picture
  const Held& held_before(bool key_side, int place);
  PairGrid::Share share_of_places(bool key_side, int first, int count, int stride);
  double count_balance(Sharing sharing);
  std::pair<double, double> count_waits(std::string_view strategy);
  struct TiledRows {
    double seen = 0;  // keys of a query
    double worked = 1, worked_backward = 1;
  };
  const TiledRows& tiled_rows(int group);
  double key_rounding(double seen_of_row, Verb verb);

  const Problem& problem_;
  double pairs_;
  const Machine* machine_;
  bool sees_all_ = false;
  std::optional<PairGrid> grid_;
  std::vector<Held> held_before_[2];  // of queries, keys
  std::map<std::pair<Layout, bool>, std::vector<double>> pairs_before_;
  std::map<Key, double> balances_;
  std::map<std::pair<Key, bool>, std::pair<double, double>> waits_;
  std::map<std::pair<int, Layout>, TiledRows> tiled_;                            // by places whose queries are together
  std::map<std::tuple<int, Layout, Verb>, std::pair<double, double>> key_runs_;  // by ulysses: mean length, rounded over it
};

}  // namespace dattn
