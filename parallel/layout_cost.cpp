#include "parallel/layout_cost.h"

#include <algorithm>

#include "parallel/cost_model.h"
#include "parallel/rank_plan.h"

namespace dattn {
namespace {

constexpr int kSampledRanks = 16;
constexpr int kExactRanks = 64;  // meshes up to this size are not sampled,
constexpr int kFewRanks = 8;     // but for masks of many regions, that planning a call of 64 ranks takes about a millisecond
constexpr std::size_t kMostRegions = 1 << 13;  // of all ranks looked at together
constexpr double kMostLookedUp = 1 << 17;      // where all are looked at

// Pairs of runs of a rank's blocks in a grid; where there are more its work is estimated.
constexpr double kMostRuns = 1 << 14, kMostRunsOfMany = 1 << 7;  // the latter on meshes that are sampled

constexpr int kSummedStrides = 64;        // of a row of a grid
constexpr int kWaitingGroups = 32;        // longer rings are looked at as so many groups of neighbours
constexpr std::int64_t kTiled = 1 << 16;  // rows of a run whose tiles are counted
constexpr int kTiledRuns = 16;            // and runs
constexpr int kTiledBlocks = 4, kTiledBatches = 4, kRoundedBlocks = 16;

// Of step 1.
Positions joined_runs(const std::vector<Run>& runs) {
  std::vector<Interval> ranges;
  for (const Run& run : runs) ranges.push_back({run.begin, run.last() + 1});
  std::vector<Run> joined;
  for (const Interval& range : join(std::move(ranges))) joined.push_back({range.begin, range.count(), 1});
  return Positions(joined);
}

// The rows of `count` neighbouring places along the sequence, in closed form where the layout allows it.
Positions rows_of_places(const Problem& problem, bool key_side, int first, int count) {
  const std::int64_t length = key_side ? problem.shape.seq_kv : problem.shape.seq_q;
  const int parts = problem.mesh.sequence_parts(), last = first + count - 1;
  if (parts == count) return Positions::range(0, length);
  const auto range = [&](int pieces, int from, int to) {
    const std::int64_t begin = split_evenly(length, pieces, from).begin;
    return Run{begin, split_evenly(length, pieces, to).end - begin, 1};
  };
  if (problem.layout == Layout::kContiguous) return Positions({range(parts, first, last)});
  if (problem.layout == Layout::kZigzag)
    return Positions({range(2 * parts, first, last), range(2 * parts, 2 * parts - 1 - last, 2 * parts - 1 - first)});
  std::vector<Run> runs;
  for (int place = first; place <= last; ++place) {
    const Positions own = problem.part_rows(key_side, place);
    runs.insert(runs.end(), own.runs().begin(), own.runs().end());
  }
  if (problem.layout == Layout::kBalanced && count > 1) return joined_runs(runs);
  return Positions(runs);
}

// The rows that a rank of the grid has of every rank along its rings, `stride` places apart.
Positions rows_along(const Problem& problem, bool key_side, int first, int count, int stride) {
  std::vector<Run> runs;
  for (; first < problem.mesh.sequence_parts(); first += stride) {
    const Positions own = rows_of_places(problem, key_side, first, count);
    runs.insert(runs.end(), own.runs().begin(), own.runs().end());
  }
  return Positions(runs);
}

// Of the places along the sequence.
std::vector<int> looked_at(const Problem& problem, int places) {
  std::size_t regions = 0;
  for (const BatchRegions& part : problem.mask) regions += part.regions.size();
  if (regions * static_cast<std::size_t>(std::min(places, kExactRanks)) > kMostRegions) return sample(places, kFewRanks);
  return sample(places, places <= kExactRanks ? kExactRanks : kSampledRanks);
}

// How many runs a place has, of all sides alike.
double runs_of_place(const Problem& problem) {
  switch (problem.layout) {
    case Layout::kBalanced: return static_cast<double>(problem.balanced->front().runs().size());
    case Layout::kZigzag: return 2;
    default: return 1;
  }
}

// Seconds of a ring in which rank r works work[r][s] on what the rank s before it had.
struct RingTimes {
  double busiest = 0;  // of the rank with most work
  double loose = 0;    // what comes is ready before the sender's work: a rank waits for its neighbours to begin a step
  double locked = 0;   // what comes is the sender's work of the step before; the own block last
};

RingTimes ring_times(const std::vector<std::vector<double>>& work) {
  const std::size_t ranks = work.size();
  std::vector<double> loose(ranks, 0), locked(ranks, 0), before;
  RingTimes times;
  for (std::size_t s = 0; s < ranks; ++s) {
    before = loose;
    for (std::size_t r = 0; r < ranks; ++r)
      loose[r] = std::max({before[r] + work[r][s], before[(r + ranks - 1) % ranks], before[(r + 1) % ranks]});
    if (s == 0) continue;
    before = locked;
    for (std::size_t r = 0; r < ranks; ++r) locked[r] = std::max(before[r], before[(r + ranks - 1) % ranks]) + work[r][s];
  }
  for (std::size_t r = 0; r < ranks; ++r) {
    double sum = 0;
    for (const double step : work[r]) sum += step;
    times.busiest = std::max(times.busiest, sum);
    times.loose = std::max(times.loose, loose[r]);
    times.locked = std::max(times.locked, locked[r] + work[r][0]);
  }
  return times;
}

}  // namespace

SeenRows seen_rows(const Problem& problem) {
  const int parts = problem.mesh.size(Axis::kRing), ulysses = problem.mesh.size(Axis::kUlysses);
  SeenRows seen;
  if (parts == 1) return seen;
  const std::vector<int> places = looked_at(problem, parts);
  for (const int place : places) {
    const std::vector<Interval> wanted = seen_keys(problem.mask, rows_of_places(problem, false, place * ulysses, ulysses));
    const auto held = [&](int other) {
      return rows_of_places(problem, true, around(other, parts) * ulysses, ulysses).inside(wanted).count();
    };
    std::int64_t fetched = -held(place);
    for (const Interval& range : wanted) fetched += range.count();
    seen.fetched += static_cast<double>(fetched) / static_cast<double>(places.size());
    if (parts > 3 && fetched != held(place - 1) + held(place + 1)) seen.neighbours_only = false;
  }
  return seen;
}

Sharing sharing_of(std::string_view strategy) {
  if (strategy.starts_with("grid")) return Sharing::kGrid;
  return strategy == "tree" || strategy == "ring_q" ? Sharing::kKeys : Sharing::kQueries;
}

LayoutCosts::LayoutCosts(const Problem& problem, double pairs, const Machine* machine)
    : problem_(problem), pairs_(pairs), machine_(machine) {
  const AttentionShape& shape = problem.shape;
  sees_all_ = pairs == static_cast<double>(shape.batch) * static_cast<double>(shape.seq_q) * static_cast<double>(shape.seq_kv);
}

LayoutCosts::Key LayoutCosts::key(std::string_view strategy) const {
  const Sharing sharing = sharing_of(strategy);
  return {problem_.mesh.size(Axis::kUlysses), sharing == Sharing::kGrid ? problem_.mesh.size(Axis::kRows) : 1, problem_.layout,
          sharing};
}

const PairGrid& LayoutCosts::grid() {
  if (!grid_) grid_.emplace(problem_);
  return *grid_;
}

double LayoutCosts::balance(std::string_view strategy) {
  const Key wanted = key(strategy);
  const auto known = balances_.find(wanted);
  if (known != balances_.end()) return known->second;
  return balances_[wanted] = count_balance(sharing_of(strategy));
}

const std::vector<double>& LayoutCosts::pairs_before(bool key_side) {
  std::vector<double>& sums = pairs_before_[{problem_.layout, key_side}];
  if (!sums.empty()) return sums;
  sums.push_back(0);
  const int parts = problem_.mesh.sequence_parts();
  double regions = 0, pairs = 0;
  for (const BatchRegions& part : problem_.mask) regions += static_cast<double>(part.regions.size());
  int alike = std::max(1, parts / kExactRanks);  // strides, and neighbours where there is too much to look at
  if (problem_.layout != Layout::kStriped) alike = std::clamp(static_cast<int>(regions * parts / kMostLookedUp), 1, alike);
  for (int place = 0; place < parts; ++place) {
    if (place % alike == 0 || place == parts - 1)
      pairs = pairs_with_all(rows_of_places(problem_, key_side, place, 1), key_side);
    sums.push_back(sums.back() + pairs);
  }
  return sums;
}

// Of layout balanced, whose places have many runs: what all places before each hold of every cell.
const LayoutCosts::Held& LayoutCosts::held_before(bool key_side, int place) {
  key_side = key_side && problem_.shape.seq_q != problem_.shape.seq_kv;  // else keys lie where their queries lie
  std::vector<Held>& sums = held_before_[key_side ? 1 : 0];
  if (sums.empty()) {
    Held sum(static_cast<std::size_t>(grid().cells(key_side)), 0);
    sums.push_back(sum);
    for (int i = 0; i < problem_.mesh.sequence_parts(); ++i) {
      for (const auto& [cell, held] : grid().share(problem_.part_rows(key_side, i), key_side))
        sum[static_cast<std::size_t>(cell)] += held;
      sums.push_back(sum);
    }
  }
  return sums[static_cast<std::size_t>(place)];
}

// Of `count` neighbours from `first` on, and of as many every `stride` places further.
PairGrid::Share LayoutCosts::share_of_places(bool key_side, int first, int count, int stride) {
  const int parts = problem_.mesh.sequence_parts();
  if (problem_.layout != Layout::kBalanced)
    return grid().share(stride < parts ? rows_along(problem_, key_side, first, count, stride)
                                       : rows_of_places(problem_, key_side, first, count),
                        key_side);
  Held sum(static_cast<std::size_t>(grid().cells(key_side)), 0);
  const int strides = (parts - first + stride - 1) / stride;
  const std::vector<int> summed = sample(strides, kSummedStrides);
  const double of_one = static_cast<double>(strides) / static_cast<double>(summed.size());
  for (const int i : summed) {
    const int place = first + i * stride;
    const Held &before = held_before(key_side, place), &after = held_before(key_side, place + count);
    for (std::size_t cell = 0; cell < sum.size(); ++cell) sum[cell] += of_one * (after[cell] - before[cell]);
  }
  PairGrid::Share share;
  for (std::size_t cell = 0; cell < sum.size(); ++cell) share.emplace_back(static_cast<int>(cell), sum[cell]);
  return share;
}

// Of queries with all keys, or of keys with all queries.
double LayoutCosts::pairs_with_all(const Positions& own, bool key_side) const {
  double pairs = 0;
  for (const BatchRegions& part : problem_.mask) {
    const std::int64_t of_row =
        key_side ? area(part.regions, {0, problem_.shape.seq_q}, own) : area(part.regions, own, {0, problem_.shape.seq_kv});
    pairs += static_cast<double>(of_row) * static_cast<double>(part.batch.count());
  }
  return pairs;
}

// Of a grid with many runs: by the picture where blocks are shared out for their work, else as if a row of the grid had its
// share of the keys that each query sees.
double LayoutCosts::count_balance(Sharing sharing) {
  const MeshShape& mesh = problem_.mesh;
  const int ulysses = mesh.size(Axis::kUlysses), parts = mesh.sequence_parts();
  const int places = parts / ulysses;  // place: rows, fastest, and rings
  const int rows = sharing == Sharing::kGrid ? mesh.size(Axis::kRows) : 1;
  const bool keeps_keys = sharing == Sharing::kKeys;
  const bool joined = problem_.layout == Layout::kContiguous || problem_.layout == Layout::kZigzag;
  const double runs = runs_of_place(problem_) * (joined ? 1 : ulysses);  // of the keys of a ulysses group
  const bool many_ranks = parts > kExactRanks, balanced = problem_.layout == Layout::kBalanced;
  const int rings = places / rows;
  const bool many_runs = rows > 1 && runs * (joined ? 1 : rows) * runs * rings > (many_ranks ? kMostRunsOfMany : kMostRuns);
  double most = 0;
  if ((many_ranks && rows == 1) || (many_runs && !balanced)) {
    const std::vector<double>& before = pairs_before(keeps_keys);
    const auto step = static_cast<std::size_t>(rows) * static_cast<std::size_t>(ulysses);
    for (std::size_t first = 0; first < static_cast<std::size_t>(parts); first += step) {
      most = std::max(most, (before[first + step] - before[first]) / rows);
    }
  } else {
    for (const int place : many_runs&& many_ranks ? sample(places, kFewRanks) : looked_at(problem_, places)) {
      const int first = place * ulysses, group = place / rows * rows * ulysses;  // first place of its column of the grid
      if (many_runs) {
        const PairGrid::Share keys = share_of_places(true, first - group, ulysses, rows * ulysses);
        most = std::max(most, PairGrid::pairs(grid().seen(share_of_places(false, group, rows * ulysses, parts)), keys));
        continue;
      }
      const Positions own =
          rows_of_places(problem_, keeps_keys, keeps_keys ? first : group, keeps_keys ? ulysses : rows * ulysses);
      if (rows == 1) {
        most = std::max(most, pairs_with_all(own, keeps_keys));
      } else {
        const Positions keys = rows_along(problem_, true, first - group, ulysses, rows * ulysses);
        most = std::max(most, area(make_tiles(problem_.mask, own, keys)));
      }
    }
  }
  return most == 0 ? 1.0 : std::min(1.0, pairs_ / places / most);
}

LayoutWork LayoutCosts::work(std::string_view strategy) {
  LayoutWork work{balance(strategy)};
  const bool hops =
      strategy == "ring" || strategy == "double_ring" || strategy == "hybrid" || strategy == "grid" || strategy == "ring_q";
  const Key where = key(strategy);
  // Full masks and strides are alike at every hop.
  if (hops && !sees_all_ && problem_.layout != Layout::kStriped) {
    auto& known = waits_.try_emplace({where, strategy == "ring_q"}).first->second;
    if (known.first == 0) known = count_waits(strategy);
    std::tie(work.in_step, work.in_step_backward) = known;
  }
  if (machine_ != nullptr && machine_->tile) {
    const int ulysses = std::get<0>(where);
    const bool strides = problem_.layout == Layout::kStriped && ulysses < problem_.mesh.sequence_parts();
    const TiledRows& rows = tiled_rows(strides ? 0 : ulysses * std::get<1>(where));
    work.worked = rows.worked;
    work.worked_backward = rows.worked_backward;
    const bool gathers = strategy == "allgather" || strategy == "grid_gather";  // keys, whose runs join
    if (!strides && !gathers) {
      work.worked *= key_rounding(rows.seen, Verb::kAttend);
      work.worked_backward *= key_rounding(rows.seen, Verb::kAttendGrad);
    }
  }
  return work;
}

// Of a ring's groups of neighbours, and of a grid's first and last row of keys.
std::pair<double, double> LayoutCosts::count_waits(std::string_view strategy) {
  const MeshShape& mesh = problem_.mesh;
  const int ulysses = mesh.size(Axis::kUlysses), rows = mesh.size(Axis::kRows);
  const int places = mesh.sequence_parts() / ulysses / rows, groups = std::min(places, kWaitingGroups);
  if (groups == 1) return {1, 1};
  const PairGrid& picture = grid();
  const auto in_group = [&](int i) {
    const Interval own = split_evenly(places, groups, i);
    return std::pair(static_cast<int>(own.begin) * rows * ulysses, static_cast<int>(own.count()) * rows * ulysses);
  };
  std::vector<std::vector<double>> seen;
  for (int i = 0; i < groups; ++i)
    seen.push_back(picture.seen(share_of_places(false, in_group(i).first, in_group(i).second, mesh.sequence_parts())));
  const bool passes_q = strategy == "ring_q";
  RingTimes all;
  for (int row = 0; row < rows; row += std::max(1, rows - 1)) {
    std::vector<PairGrid::Share> keys;
    for (int i = 0; i < groups; ++i) {
      const auto [first, count] = in_group(i);
      const bool one_row = rows > 1 && places == groups;
      keys.push_back(
          share_of_places(true, one_row ? first + row * ulysses : first, one_row ? ulysses : count, mesh.sequence_parts()));
    }
    std::vector<std::vector<double>> work(static_cast<std::size_t>(groups));
    for (int r = 0; r < groups; ++r) {
      for (int s = 0; s < groups; ++s) {
        const auto own = static_cast<std::size_t>(r), from = static_cast<std::size_t>((r - s + groups) % groups);
        work[own].push_back(passes_q ? PairGrid::pairs(seen[from], keys[own]) : PairGrid::pairs(seen[own], keys[from]));
      }
    }
    const RingTimes times = ring_times(work);
    all = {std::max(all.busiest, times.busiest), std::max(all.loose, times.loose), std::max(all.locked, times.locked)};
  }
  if (all.busiest == 0) return {1, 1};
  return {all.busiest / (passes_q ? all.locked : all.loose), all.busiest / all.locked};
}

// Of some blocks of the queries of `group` neighbouring places, with all keys; 0: of strides, with strides of two places. Of
// the block with most of each.
const LayoutCosts::TiledRows& LayoutCosts::tiled_rows(int group) {
  const auto [known, is_new] = tiled_.try_emplace({group, problem_.layout});
  TiledRows& most = known->second;
  if (!is_new) return most;
  const bool strides = group == 0;
  const int parts = problem_.mesh.sequence_parts();
  double forward = 0, backward = 0;
  for (const int block : sample(strides ? parts : parts / group, kTiledBlocks)) {
    const Positions own = strides ? problem_.part_rows(false, block) : rows_of_places(problem_, false, block * group, group);
    std::vector<Run> queries;
    for (const int i : sample(static_cast<int>(own.runs().size()), kTiledRuns)) {
      Run run = own.runs()[static_cast<std::size_t>(i)];
      if (run.count > kTiled) run = {run.at((run.count - kTiled) / 2), kTiled, run.step};
      queries.push_back(run);
    }
    const Positions tiled(queries);
    if (tiled.count() == 0) continue;
    double of_block[3] = {};
    for (const int other : sample(strides ? parts : 1, 2)) {
      const Positions keys = strides ? problem_.part_rows(true, other) : Positions::range(0, problem_.shape.seq_kv);
      for (const int batch : sample(static_cast<int>(problem_.mask.size()), kTiledBatches)) {
        const BatchRegions& part = problem_.mask[static_cast<std::size_t>(batch)];
        const std::vector<Tile> tiles = make_tiles(part.regions, tiled, keys);
        const auto weight = static_cast<double>(part.batch.count()) / static_cast<double>(tiled.count());
        of_block[0] += static_cast<double>(area(tiles)) * weight;
        of_block[1] += static_cast<double>(machine_->worked_pairs(Verb::kAttend, tiles)) * weight;
        of_block[2] += static_cast<double>(machine_->worked_pairs(Verb::kAttendGrad, tiles)) * weight;
      }
    }
    most.seen = std::max(most.seen, of_block[0]);
    forward = std::max(forward, of_block[1]);
    backward = std::max(backward, of_block[2]);
  }
  if (most.seen == 0) return most;
  most.worked = forward / most.seen;
  most.worked_backward = backward / most.seen;
  most.seen /= static_cast<double>(std::max<std::int64_t>(1, problem_.shape.batch));
  return most;
}

// Where rows see more keys than a run of keys has, every run ends in a tile of its own.
double LayoutCosts::key_rounding(double seen_of_row, Verb verb) {
  const TileSize& tile = verb == Verb::kAttendGrad && machine_->grad_tile ? *machine_->grad_tile : *machine_->tile;
  const int ulysses = problem_.mesh.size(Axis::kUlysses), groups = problem_.mesh.sequence_parts() / ulysses;
  if (tile.clipped || groups == 1) return 1;
  const auto [known, is_new] = key_runs_.try_emplace({ulysses, problem_.layout, verb});
  auto& [run_length, rounding] = known->second;
  if (is_new) {
    double length = 0, rounded = 0, runs = 0;
    for (const int group : sample(groups, kRoundedBlocks)) {
      const Positions keys = rows_of_places(problem_, true, group * ulysses, ulysses);
      for (const Run& run : keys.runs()) {
        length += static_cast<double>(run.count);
        const std::int64_t tiles = (run.count + tile.keys - 1) / tile.keys;
        rounded += static_cast<double>(tiles * tile.keys);
      }
      runs += static_cast<double>(keys.runs().size());
    }
    if (length > 0) run_length = length / runs, rounding = rounded / length;
  }
  return seen_of_row <= run_length ? 1 : rounding;
}

}  // namespace dattn
