#include "parallel/rank_plan.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "core/base/error.h"

namespace dattn {
namespace {

// x with a * x = 1 modulo n, for coprime a and n.
std::int64_t inverse(std::int64_t a, std::int64_t n) {
  std::int64_t old_r = a % n, r = n, old_x = 1, x = 0;
  while (r != 0) {
    const std::int64_t quotient = old_r / r;
    old_r = std::exchange(r, old_r - quotient * r);
    old_x = std::exchange(x, old_x - quotient * x);
  }
  return (old_x % n + n) % n;
}

// Rows shared by two runs: positions a.begin + i * a.step = b.begin + j * b.step, which lie apart by the least common
// multiple of the steps (the Chinese remainder theorem).
void append_shared(const Run& a, std::int64_t a_row, const Run& b, std::int64_t b_row, std::vector<SharedRows>& shared) {
  const std::int64_t begin = std::max(a.begin, b.begin), last = std::min(a.last(), b.last());
  if (begin > last) return;
  const std::int64_t common = std::gcd(a.step, b.step), apart = b.begin - a.begin;
  if (apart % common != 0) return;
  const std::int64_t every_a = b.step / common, every_b = a.step / common, step = a.step * every_a;
  std::int64_t i = 0;  // a row of `a` whose position is one of b's, were b endless
  if (every_a > 1) i = (apart / common % every_a + every_a) % every_a * inverse(every_b, every_a) % every_a;
  i += std::max<std::int64_t>(0, (begin - a.at(i) + step - 1) / step) * every_a;
  if (a.at(i) > last) return;
  const std::int64_t count = (last - a.at(i)) / step + 1;
  shared.push_back(
      {a_row + i, b_row + (a.at(i) - b.begin) / b.step, count, count == 1 ? 1 : every_a, count == 1 ? 1 : every_b});
}

Interval shared_heads(const Interval& a, const Interval& b) {
  const Interval both{std::max(a.begin, b.begin), std::min(a.end, b.end)};
  return both.count() > 0 ? both : Interval{};
}

class RankPlanner {
 public:
  RankPlanner(const Plan& plan, int rank) : plan_(plan), problem_(*plan.problem) { result_.rank = rank; }

  RankPlan make() {
    for (const Step& step : plan_.steps) result_.steps.push_back(make_step(step));
    count_values_memory();
    for (std::size_t i = 0; i < plan_.values.size(); ++i) {
      block(static_cast<ValueId>(i));
      result_.blocks.push_back(std::move(blocks_[static_cast<ValueId>(i)]));
    }
    result_.cost.peak_memory = runner_memory(plan_, result_);
    return std::move(result_);
  }

  RankStep make_step(const Step& step) {
    RankStep mine;
    if (is_move(step.verb)) plan_move(step, mine);
    if (step.verb == Verb::kAttend || step.verb == Verb::kAttendGrad) plan_attend(step, mine);
    return mine;
  }

 private:
  const Block& block(ValueId value) {
    const auto found = blocks_.find(value);
    return found != blocks_.end() ? found->second : blocks_.emplace(value, plan_.block(value, result_.rank)).first->second;
  }
  What what(ValueId value) const { return plan_.values[static_cast<std::size_t>(value)].what; }

  // The block of a value on another rank of the axis. Gathered rows are the same on all of them.
  Block block_on(ValueId value, int rank, Axis axis) {
    const Placing& placing = plan_.placing(value);
    const bool gathered = placing.kind == Placing::Kind::kGathered || placing.kind == Placing::Kind::kHeadSplit;
    if (gathered && placing.axis == axis) return {block(value).rows, plan_.heads(value, rank)};
    return plan_.block(value, rank);
  }

  // Of a fetched value on another rank of the axis, the part that comes from this rank's rows.
  Block fetched_on(const Placing& placing, int rank) {
    const int parts = problem_.mesh.size(placing.axis);
    const int peer = problem_.mesh.coordinate(rank, placing.axis), own = problem_.mesh.coordinate(result_.rank, placing.axis);
    const Block& mine = block(placing.base);
    if (!placing.comes_from(own, peer, parts)) return {{}, mine.heads};
    return {mine.rows.inside(plan_.wanted(placing, rank)), mine.heads};
  }

  void plan_move(const Step& step, RankStep& mine) {
    const MeshShape& mesh = problem_.mesh;
    const int parts = mesh.size(step.axis), own = mesh.coordinate(result_.rank, step.axis);
    const ValueId in = step.in[0], out = step.out[0];
    const bool from_fetched = plan_.placing(in).kind == Placing::Kind::kFetched && step.verb == Verb::kReduceScatter;
    if (step.verb == Verb::kRotate) {
      append_whole(block(in), what(in), around(own + step.shift, parts), mine.sends);
      append_whole(block(out), what(in), around(own - step.shift, parts), mine.receives);
    } else {
      for (int peer = 0; peer < parts; ++peer) {
        const int rank = mesh.neighbour(result_.rank, step.axis, peer);
        if (step.verb == Verb::kFetch && peer == own) continue;
        const Block to = step.verb == Verb::kFetch ? fetched_on(plan_.placing(out), rank) : block_on(out, rank, step.axis);
        const Block from = from_fetched ? fetched_on(plan_.placing(in), rank) : block_on(in, rank, step.axis);
        append(block(in), to, what(in), peer, true, mine.sends);
        append(from, block(out), what(in), peer, false, mine.receives);
      }
    }
    for (const Piece& piece : mine.receives) {
      if (piece.peer != own) count_received(step, piece);
    }
  }

  // A rotation moves blocks whole: one piece, in the order in which a value lies in memory.
  static void append_whole(const Block& held, What what, int peer, std::vector<Piece>& pieces) {
    const Interval heads = held.heads_for(what);
    if (held.rows.count() > 0 && heads.count() > 0) pieces.push_back({peer, 0, held.rows.count(), heads, 1});
  }

  // The pieces that go from block `from` to block `to`, as the sender or the receiver lists them.
  static void append(const Block& from, const Block& to, What what, int peer, bool sender, std::vector<Piece>& pieces) {
    const Interval heads = shared_heads(from.heads_for(what), to.heads_for(what));
    if (heads.count() == 0) return;
    for (const SharedRows& rows : shared_rows(from.rows, to.rows)) {
      pieces.push_back({peer, sender ? rows.row_a : rows.row_b, rows.count, heads, sender ? rows.step_a : rows.step_b});
    }
  }

  void count_received(const Step& step, const Piece& piece) {
    for (const Field& field : message_fields(step.verb, what(step.out[0]), problem_.shape)) {
      const std::int64_t bytes = piece_bytes({&field, 1}, problem_.shape.batch, piece);
      (field.statistic ? result_.cost.stats_bytes : result_.cost.bytes_received) += bytes;
      result_.cost.received_by_verb[std::string(name_of(step.verb))] += bytes;
    }
  }

  void plan_attend(const Step& step, RankStep& mine) {
    const Block &q = block(step.in[0]), &kv = block(step.in[1]);
    const AttentionShape& shape = problem_.shape;
    mine.heads = {q.heads.q.begin, kv.heads.kv.begin, shape.heads / shape.kv_heads};
    if (q.heads.q.count() == 0) return;
    mine.attended = AttendTiles(plan_.problem, q.rows, kv.rows);
    const auto heads = static_cast<double>(q.heads.q.count());
    const auto d = static_cast<double>(shape.dim_qk), v = static_cast<double>(shape.dim_v);
    if (step.verb == Verb::kAttend) {
      mine.flops_of_pair = heads * 2 * (d + v);
    } else {  // scores and dP, then what is wanted
      mine.flops_of_pair = heads * 2 * (d + v + (step.out[0] != kNoValue ? d : 0) + (step.out[1] != kNoValue ? d + v : 0));
    }
  }

  void count_values_memory() {
    const std::vector<int> last = last_uses(plan_);
    std::vector<std::int64_t> bytes(plan_.values.size(), 0);
    std::int64_t now = 0;
    for (std::size_t i = 0; i < plan_.steps.size(); ++i) {
      const Step& step = plan_.steps[i];
      for (std::size_t j = 0; j < step.in.size(); ++j) {
        if (step.in[j] != kNoValue && consumes(step, j)) now -= std::exchange(bytes[static_cast<std::size_t>(step.in[j])], 0);
      }
      for (const ValueId value : step.out) {
        if (value != kNoValue) now += bytes[static_cast<std::size_t>(value)] = bytes_of(plan_, value, block(value));
      }
      result_.cost.values_memory = std::max(result_.cost.values_memory, now);
      for (const auto* values : {&step.in, &step.out}) {
        for (const ValueId id : *values) {
          const auto value = static_cast<std::size_t>(id);
          if (id != kNoValue && last[value] <= static_cast<int>(i)) now -= std::exchange(bytes[value], 0);
        }
      }
    }
  }

  const Plan& plan_;
  const Problem& problem_;
  std::map<ValueId, Block> blocks_;  // as far as they were asked for
  RankPlan result_;
};

}  // namespace

AttendTiles::AttendTiles(std::shared_ptr<const Problem> problem, Positions queries, Positions keys)
    : made_(std::make_shared<Made>()) {
  made_->problem = std::move(problem);
  made_->queries = std::move(queries);
  made_->keys = std::move(keys);
}

const std::vector<BatchTiles>& AttendTiles::get() const {
  static const std::vector<BatchTiles> none;
  if (made_ == nullptr) return none;
  std::call_once(made_->once, [this] { made_->tiles = make_tiles(made_->problem->mask, made_->queries, made_->keys); });
  return made_->tiles;
}

double RankPlan::flops() const {
  double sum = 0;
  for (const RankStep& step : steps) sum += step.flops();
  return sum;
}

RankPlan make_rank_plan(const Plan& plan, int rank) { return RankPlanner(plan, rank).make(); }

RankStep make_rank_step(const Plan& plan, std::size_t step, int rank) {
  return RankPlanner(plan, rank).make_step(plan.steps[step]);
}

std::vector<BatchTiles> make_tiles(const CompiledMask& mask, const Positions& queries, const Positions& keys) {
  std::vector<BatchTiles> all;
  for (const BatchRegions& part : mask) {
    std::vector<Tile> tiles = make_tiles(part.regions, queries, keys);
    if (!tiles.empty()) all.push_back({part.batch, std::move(tiles)});
  }
  return all;
}

double area(std::span<const BatchTiles> tiles) {
  double sum = 0;
  for (const BatchTiles& part : tiles) sum += static_cast<double>(area(part.tiles)) * static_cast<double>(part.batch.count());
  return sum;
}

std::int64_t memory_with_inputs(const Plan& plan, const RankPlan& mine) {
  std::int64_t bytes = mine.cost.peak_memory;
  for (const ValueId value : plan.inputs) bytes += bytes_of(plan, value, mine.blocks[static_cast<std::size_t>(value)]);
  return bytes;
}

std::int64_t piece_bytes(std::span<const Field> fields, std::int64_t batch, const Piece& piece) {
  std::int64_t bytes = 0;
  for (const Field& field : fields)
    bytes += field_shape(field, batch, piece.rows, piece.heads.count()).elements() * size_of(field.dtype);
  return bytes;
}

std::vector<SharedRows> shared_rows(const Positions& a, const Positions& b) {
  std::vector<SharedRows> shared;
  const std::vector<Run>& others = b.runs();
  std::vector<std::size_t> order(others.size());  // by begin, with the last position of all runs so far
  std::vector<std::int64_t> reach(others.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t x, std::size_t y) { return others[x].begin < others[y].begin; });
  for (std::size_t i = 0; i < order.size(); ++i)
    reach[i] = std::max(i == 0 ? INT64_MIN : reach[i - 1], others[order[i]].last());
  for (std::size_t i = 0; i < a.runs().size(); ++i) {
    const Run& run = a.runs()[i];
    const auto first = static_cast<std::size_t>(std::lower_bound(reach.begin(), reach.end(), run.begin) - reach.begin());
    for (std::size_t j = first; j < order.size() && others[order[j]].begin <= run.last(); ++j)
      append_shared(run, a.row_of_run(i), others[order[j]], b.row_of_run(order[j]), shared);
  }
  std::sort(shared.begin(), shared.end(), [](const SharedRows& x, const SharedRows& y) { return x.row_a < y.row_a; });
  return shared;
}

std::vector<int> last_uses(const Plan& plan) {
  std::vector<int> last(plan.values.size(), -1);
  for (std::size_t i = 0; i < plan.steps.size(); ++i) {
    for (const ValueId value : plan.steps[i].in) {
      if (value != kNoValue) last[static_cast<std::size_t>(value)] = static_cast<int>(i);
    }
  }
  for (const ValueId value : plan.outputs) last[static_cast<std::size_t>(value)] = static_cast<int>(plan.steps.size());
  return last;
}

bool consumes(const Step& step, std::size_t index) {
  switch (step.verb) {
    case Verb::kAttend: return index == 2;
    case Verb::kAttendGrad: return index >= 3;
    case Verb::kAdd: return index == 0;
    case Verb::kFinish: return index == 0;
    default: return false;
  }
}

std::int64_t bytes_of(const Plan& plan, ValueId value, const Block& block) {
  const What what = plan.values[static_cast<std::size_t>(value)].what;
  const Piece whole{0, 0, block.rows.count(), block.heads_for(what), 1};
  return piece_bytes(fields_of(what, plan.problem->shape), plan.problem->shape.batch, whole);
}

}  // namespace dattn
