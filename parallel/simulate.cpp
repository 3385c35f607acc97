#include "parallel/simulate.h"

#include <algorithm>
#include <exception>
#include <numeric>

#include "core/base/error.h"
#include "core/base/threads.h"
#include "parallel/message.h"
#include "parallel/overlap.h"
#include "parallel/rank_plan.h"

namespace dattn {
namespace {

struct Message {
  int from = 0;  // ranks of the job
  int to = 0;
  int round = 0;  // how much further along the axis `to` is
  std::int64_t bytes = 0;
};

// What a step costs on every rank. Computations: before_s alone.
struct StepCost {
  std::vector<double> before_s;  // by rank; moves: copying into messages
  std::vector<double> after_s;   // by rank; moves: copying out of messages
  std::vector<Message> messages;
};

// Of the rows of all batch rows together.
double share_touched(std::span<const BatchTiles> tiles, std::int64_t batch, std::int64_t rows, Interval Region::*side) {
  std::int64_t touched = 0;
  for (const BatchTiles& part : tiles) {
    std::int64_t of_one = 0;
    for (const Tile& tile : part.tiles) of_one += (tile.rows.*side).count();
    touched += std::min(of_one, rows) * part.batch.count();
  }
  return rows * batch == 0 ? 0 : static_cast<double>(touched) / static_cast<double>(rows * batch);
}

constexpr std::int64_t kRanksAtOnce = 64;  // whose messages are held beside those of all

// The costs of a plan, of every rank; a rank's plan is made, read and dropped. Ranks are spread over this thread's threads, and
// what they add up stays in the order of ranks.
class Costs {
 public:
  Costs(const Plan& plan, const Machine& machine) : plan_(plan), machine_(machine), steps_(plan.steps.size()) {
    const auto ranks = static_cast<std::size_t>(plan.problem->mesh.ranks());
    from_input_.assign(plan.values.size(), false);
    for (const ValueId value : plan.inputs) from_input_[static_cast<std::size_t>(value)] = true;
    for (std::size_t i = 0; i < plan.steps.size(); ++i) {
      steps_[i].before_s.resize(ranks);
      if (is_move(plan.steps[i].verb)) steps_[i].after_s.resize(ranks);
    }
  }

  void add_ranks(std::vector<RankTimes>& times) {
    const auto ranks = static_cast<std::int64_t>(times.size());
    for (std::int64_t first = 0; first < ranks; first += kRanksAtOnce) {
      const std::int64_t count = std::min(kRanksAtOnce, ranks - first);
      std::vector<std::vector<StepMessage>> received(index(count));
      std::vector<std::exception_ptr> failed(index(count));
      parallel_for(count, [&](std::int64_t i) {
        try {
          add_rank(static_cast<int>(first + i), times[index(first + i)], received[index(i)]);
        } catch (...) {
          failed[index(i)] = std::current_exception();
        }
      });
      for (const std::exception_ptr& failure : failed) {
        if (failure) std::rethrow_exception(failure);
      }
      for (const auto& of_rank : received) {
        for (const auto& [step, message] : of_rank) steps_[step].messages.push_back(message);
      }
    }
  }

  std::vector<StepCost> of_steps() && {
    for (StepCost& step : steps_) {
      std::stable_sort(step.messages.begin(), step.messages.end(),
                       [](const Message& a, const Message& b) { return a.round < b.round; });
    }
    return std::move(steps_);
  }

 private:
  using StepMessage = std::pair<std::size_t, Message>;

  template <class Id>
  static std::size_t index(Id id) {
    return static_cast<std::size_t>(id);
  }

  void add_rank(int rank, RankTimes& times, std::vector<StepMessage>& received) {
    const RankPlan mine = make_rank_plan(plan_, rank);
    times.flops = mine.flops();
    times.peak_memory = memory_with_inputs(plan_, mine);
    for (std::size_t i = 0; i < steps_.size(); ++i) {
      if (is_move(plan_.steps[i].verb)) {
        add_move(i, mine, times, received);
      } else {
        steps_[i].before_s[index(rank)] = computing(plan_.steps[i], mine, mine.steps[i]);
      }
    }
  }

  double computing(const Step& step, const RankPlan& mine, const RankStep& part) const {
    const bool attends = step.verb == Verb::kAttend || step.verb == Verb::kAttendGrad;
    if (attends && part.tiles().empty()) return 0;
    const DType storage = plan_.problem->shape.dtype;
    if (step.verb == Verb::kFinish && storage == accumulate_type(storage)) return 0;  // the state becomes the result
    const double moving = memory_bytes(step, mine, part, attends) / machine_.memory_bandwidth;
    if (!attends) return moving + machine_.kernel_latency_s;
    const double pairs = area(part.tiles());
    double worked_pairs = 0;
    for (const BatchTiles& stretch : part.tiles()) {
      worked_pairs +=
          static_cast<double>(machine_.worked_pairs(step.verb, stretch.tiles)) * static_cast<double>(stretch.batch.count());
    }
    const double worked = pairs == 0 ? 0 : worked_pairs / pairs;
    const double working = part.flops() * worked / machine_.attend_rate(step.verb, storage);
    return std::max(working, moving) + machine_.kernel_latency_s;
  }

  // Bytes read and written; of an attend, those of the rows that its tiles touch.
  double memory_bytes(const Step& step, const RankPlan& mine, const RankStep& part, bool attends) const {
    double bytes = 0;
    for (const auto* values : {&step.in, &step.out}) {
      for (const ValueId value : *values) {
        if (value == kNoValue) continue;
        const Block& block = mine.blocks[index(value)];
        const auto side = is_key_side(plan_.values[index(value)].what) ? &Region::k : &Region::q;
        const double share = attends ? share_touched(part.tiles(), plan_.problem->shape.batch, block.rows.count(), side) : 1.0;
        bytes += share * static_cast<double>(bytes_of(plan_, value, block));
      }
    }
    return bytes;
  }

  void add_move(std::size_t i, const RankPlan& mine, RankTimes& times, std::vector<StepMessage>& received) {
    const Step& step = plan_.steps[i];
    const RankStep& part = mine.steps[i];
    const MeshShape& mesh = plan_.problem->mesh;
    const std::vector<Field> fields = message_fields(step.verb, plan_.values[index(step.out[0])].what, plan_.problem->shape);
    const int own = mesh.coordinate(mine.rank, step.axis), parts = mesh.size(step.axis);
    std::int64_t sent = 0, placed = 0;
    for (const auto pieces : by_peer(part.sends)) {
      if (pieces[0].peer != own) sent += message_bytes(fields, plan_.problem->shape.batch, pieces);
    }
    for (const auto pieces : by_peer(part.receives)) {
      const std::int64_t bytes = message_bytes(fields, plan_.problem->shape.batch, pieces);
      placed += bytes;
      if (pieces[0].peer == own) continue;
      const int from = mesh.neighbour(mine.rank, step.axis, pieces[0].peer);
      const bool inside = machine_.node_of(from) == machine_.node_of(mine.rank);
      (inside ? times.bytes_inside : times.bytes_between) += bytes;
      times.over(step.axis).bytes += bytes;
      received.push_back({i, {from, mine.rank, (own - pieces[0].peer + parts) % parts, bytes}});
    }
    const bool rotates = step.verb == Verb::kRotate;  // in place but for what the caller gave as separate tensors
    const auto copying = [&](std::int64_t bytes) { return 2.0 * static_cast<double>(bytes) / machine_.memory_bandwidth; };
    steps_[i].before_s[index(mine.rank)] = !rotates || from_input_[index(step.in[0])] ? copying(sent) : 0;
    steps_[i].after_s[index(mine.rank)] = rotates ? 0 : copying(placed);
  }

  const Plan& plan_;
  const Machine& machine_;
  std::vector<bool> from_input_;
  std::vector<StepCost> steps_;
};

// The ways out and in of every rank and node, with the time each is free from.
class Network {
 public:
  Network(const Machine& machine, int ranks) : machine_(machine) {
    const auto nodes = static_cast<std::size_t>(machine.node_of(ranks - 1)) + 1;
    for (Ways& ways : ways_) {
      ways.out.assign(static_cast<std::size_t>(ranks), 0);
      ways.in = ways.out;
      ways.node_out.assign(nodes, 0);
      ways.node_in.assign(nodes, 0);
    }
  }

  struct Passage {
    Span::Kind kind = Span::Kind::kInside;
    double begin_s = 0;  // at the receiver: its first byte arrives
    double left_s = 0;
    double arrived_s = 0;
  };

  // Sends a message that both sides are ready for from `ready_s` on.
  Passage send(const Message& message, double ready_s) {
    const int from_node = machine_.node_of(message.from), to_node = machine_.node_of(message.to);
    const bool inside = from_node == to_node;
    const Link& link = inside ? machine_.links.inside : *machine_.links.between;
    Ways& ways = ways_[inside ? 0 : 1];
    const auto bytes = static_cast<double>(message.bytes);
    double &out = at(ways.out, message.from), &in = at(ways.in, message.to);
    const double begin = std::max({ready_s, out, in});
    double left = begin + bytes / link.bandwidth;
    if (link.node_bandwidth) {
      for (double* shared : {&at(ways.node_out, from_node), &at(ways.node_in, to_node)}) {
        *shared = std::max(*shared, begin) + bytes / *link.node_bandwidth;
        left = std::max(left, *shared);
      }
    }
    out = in = left;  // both in the sender's time; everything arrives a latency later
    return {inside ? Span::Kind::kInside : Span::Kind::kBetween, begin + link.latency_s, left, left + link.latency_s};
  }

 private:
  struct Ways {
    std::vector<double> out, in;  // by rank
    std::vector<double> node_out, node_in;
  };
  static double& at(std::vector<double>& times, int i) { return times[static_cast<std::size_t>(i)]; }

  const Machine& machine_;
  Ways ways_[2];  // inside, between
};

class Simulator {
 public:
  Simulator(const Plan& plan, const Machine& machine, int timeline_ranks)
      : plan_(plan),
        ranks_(plan.problem->mesh.ranks()),
        timeline_ranks_(timeline_ranks),
        network_(machine, ranks_),
        ended_(plan.steps.size()) {
    result_.ranks.resize(static_cast<std::size_t>(ranks_));
    Costs costs(plan, machine);
    costs.add_ranks(result_.ranks);
    costs_ = std::move(costs).of_steps();
  }

  Simulation run() && {
    for (const Action& action : actions_of(plan_)) {
      switch (action.kind) {
        case Action::Kind::kCompute: work_all(action.step, costs_[action.step].before_s, Span::Kind::kCompute); break;
        case Action::Kind::kStart: start(action.step); break;
        case Action::Kind::kWait: wait(action.step); break;
      }
    }
    for (const RankTimes& rank : result_.ranks) result_.time_s = std::max(result_.time_s, rank.end_s);
    return std::move(result_);
  }

 private:
  RankTimes& times(int rank) { return result_.ranks[static_cast<std::size_t>(rank)]; }

  void note(const Span& span) {
    if (span.rank < timeline_ranks_ && span.seconds > 0) result_.spans.push_back(span);
  }

  void work_all(std::size_t step, const std::vector<double>& seconds, Span::Kind kind) {
    for (int rank = 0; rank < ranks_; ++rank) {
      const double takes = seconds[static_cast<std::size_t>(rank)];
      note({kind, rank, step, times(rank).end_s, takes});
      times(rank).end_s += takes;
      times(rank).compute_s += takes;
    }
  }

  void start(std::size_t step) {
    StepCost& cost = costs_[step];
    work_all(step, cost.before_s, Span::Kind::kCopy);
    std::vector<double>& ended = ended_[step];
    for (int rank = 0; rank < ranks_; ++rank) ended.push_back(times(rank).end_s);
    for (const Message& message : cost.messages) {
      const auto passage = network_.send(message, std::max(times(message.from).end_s, times(message.to).end_s));
      for (const auto& [rank, end] : {std::pair{message.from, passage.left_s}, std::pair{message.to, passage.arrived_s}}) {
        double& last = ended[static_cast<std::size_t>(rank)];
        last = std::max(last, end);
      }
      times(message.to).over(plan_.steps[step].axis).busy_s += passage.arrived_s - passage.begin_s;
      note({passage.kind, message.to, step, passage.begin_s, passage.arrived_s - passage.begin_s, message.bytes, message.from});
    }
    cost.messages = {};
  }

  void wait(std::size_t step) {
    for (int rank = 0; rank < ranks_; ++rank) {
      const double ended = ended_[step][static_cast<std::size_t>(rank)];
      RankTimes& mine = times(rank);
      mine.exposed_s += std::max(0.0, ended - mine.end_s);
      mine.end_s = std::max(mine.end_s, ended);
    }
    ended_[step] = {};
    work_all(step, costs_[step].after_s, Span::Kind::kCopy);
  }

  const Plan& plan_;
  int ranks_;
  int timeline_ranks_;
  std::vector<StepCost> costs_;
  Network network_;
  std::vector<std::vector<double>> ended_;  // of every move, by rank, while it is under way
  Simulation result_;
};

}  // namespace

double Simulation::mean(double RankTimes::*member) const {
  double sum = 0;
  for (const RankTimes& rank : ranks) sum += rank.*member;
  return sum / static_cast<double>(ranks.size());
}

double Simulation::most(double RankTimes::*member) const {
  double most = 0;
  for (const RankTimes& rank : ranks) most = std::max(most, rank.*member);
  return most;
}

std::int64_t Simulation::most(std::int64_t RankTimes::*member) const {
  std::int64_t most = 0;
  for (const RankTimes& rank : ranks) most = std::max(most, rank.*member);
  return most;
}

std::int64_t Simulation::sum(std::int64_t RankTimes::*member) const {
  std::int64_t sum = 0;
  for (const RankTimes& rank : ranks) sum += rank.*member;
  return sum;
}

std::vector<AxisUse> Simulation::axes() const {
  std::vector<AxisUse> all;
  for (const Axis axis : kAxes) {
    AxisUse use{axis};
    for (const RankTimes& rank : ranks) {
      const AxisTimes& mine = rank.over(axis);
      use.bytes += static_cast<double>(mine.bytes) / static_cast<double>(ranks.size());
      if (mine.busy_s > use.busiest_s) use.busiest_s = mine.busy_s, use.busiest_bytes = mine.bytes;
    }
    if (use.bytes > 0) all.push_back(use);
  }
  return all;
}

double simulated_time(const Plan& forward, const Plan& gradient, const Machine& machine) {
  return simulate(forward, machine).time_s + simulate(gradient, machine).time_s;
}

bool quick_to_simulate(const AttentionShape& shape, int ranks) {
  constexpr int kMostRanks = 256;
  constexpr double kMostRows = 0x1p28;  // of all ranks together
  return ranks <= kMostRanks && static_cast<double>(std::max(shape.seq_q, shape.seq_kv)) * ranks <= kMostRows;
}

Simulation simulate(const Plan& plan, const Machine& machine, int timeline_ranks) {
  const int ranks = plan.problem->mesh.ranks();
  require(machine.links.between.has_value() || ranks <= machine.ranks_per_node,
          "the mesh has {} ranks but machine {} is one node of {}; give links.between or use a smaller mesh", ranks,
          machine.name, machine.ranks_per_node);
  return Simulator(plan, machine, timeline_ranks).run();
}

}  // namespace dattn
