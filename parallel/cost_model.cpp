#include "parallel/cost_model.h"

#include <algorithm>
#include <initializer_list>

#include "parallel/rank_plan.h"
#include "parallel/strategy.h"

namespace dattn {
namespace {

constexpr int kSampledRanks = 16;

// Elements of a mean rank's share of each tensor, and bytes of an element.
struct Sizes {
  double q, out;   // all its query heads; q with the bias of its rows, once for each ulysses rank where one serves all heads
  double k, v;     // KV heads after replication to ulysses, of one rank's rows
  double key_row;  // k and v of one position, heads as above over ulysses
  double storage, sum;
};

Sizes sizes_of(const AttentionShape& shape, const MeshShape& mesh) {
  const int parts = mesh.sequence_parts(), tensor = mesh.size(Axis::kTensor), ulysses = mesh.size(Axis::kUlysses);
  std::int64_t kv_heads = 0, holders = 0;  // ranks that have heads
  for (int t = 0; t < tensor; ++t) {
    const HeadRange share = heads_of(shape.heads, shape.kv_heads, tensor, t);
    const std::int64_t group = shape.heads / shape.kv_heads;
    for (int u = 0; u < ulysses; ++u) {
      const Interval part = split_evenly(share.q.count(), ulysses, u);
      if (part.count() == 0) continue;
      ++holders;
      kv_heads += (share.q.begin + part.end - 1) / group - (share.q.begin + part.begin) / group + 1;
    }
  }
  const double heads = static_cast<double>(shape.heads) / tensor, kv = static_cast<double>(kv_heads) / tensor;
  const double queries = static_cast<double>(shape.batch * shape.seq_q) / parts;
  const double keys = static_cast<double>(shape.batch * shape.seq_kv) / parts;
  const auto d = static_cast<double>(shape.dim_qk), w = static_cast<double>(shape.dim_v);
  double bias = 0;
  if (shape.bias) {
    const auto rows = static_cast<double>((shape.bias->per_batch ? shape.batch : 1) * shape.seq_q) / parts;
    bias = rows * (shape.bias->per_head ? heads : static_cast<double>(holders) / tensor) * static_cast<double>(shape.seq_kv);
  }
  return {queries * heads * d + bias,
          queries * heads * w,
          keys * kv * d,
          keys * kv * w,
          static_cast<double>(shape.batch) * kv / ulysses * (d + w),
          static_cast<double>(size_of(shape.dtype)),
          static_cast<double>(size_of(accumulate_type(shape.dtype)))};
}

// Collects transfers; empty ones are left out.
class Lists {
 public:
  explicit Lists(const MeshShape& mesh) : mesh_(mesh) {}

  // To or from all ranks of an axis; the sizes are of the block that a rank holds of the axis' share.
  void all(Axis axis, double forward, double backward, double share = 1) {
    const double others = mesh_.size(axis) - 1;
    add(axis, others, others * share * forward, others * share * backward, false);
  }
  // Over one axis after the other, each with what the axes before have brought.
  void gathered(std::initializer_list<Axis> axes, double forward, double backward) {
    double share = 1;
    for (const Axis axis : axes) {
      all(axis, forward, backward, share);
      share *= mesh_.size(axis);
    }
  }
  void hops(Axis axis, double count, double forward, double backward) {
    add(axis, count, count * forward, count * backward, true);
  }
  void add(Axis axis, double messages, double forward, double backward, bool hops) {
    if (messages == 0 || (forward == 0 && backward == 0)) return;
    lists_.forward.push_back({axis, messages, forward, hops});
    lists_.backward.push_back({axis, messages, backward, hops});
  }
  TransferLists take() && { return std::move(lists_); }

 private:
  const MeshShape& mesh_;
  TransferLists lists_;
};

}  // namespace

std::optional<TransferLists> transfers_of(std::string_view strategy, const AttentionShape& shape, const MeshShape& mesh,
                                          const SeenRows& seen) {
  const Sizes s = sizes_of(shape, mesh);
  const double kv = (s.k + s.v) * s.storage, dkv = (s.k + s.v) * s.sum;
  const double q = s.q * s.storage, out = s.out * s.storage, dq = s.q * s.sum;
  const int inner = mesh.size(Axis::kRing), outer = mesh.size(Axis::kRingOuter);
  Lists lists(mesh);
  if (strategy == "invariant") {  // heads stay together
    MeshShape rows_alone = mesh;
    rows_alone.set(Axis::kUlysses, 1);
    rows_alone.set(Axis::kRows, mesh.size(Axis::kRows) * mesh.size(Axis::kUlysses));
    const Sizes whole = sizes_of(shape, rows_alone);
    const double keys = (whole.k + whole.v) * whole.storage, queries = (whole.q + whole.out) * whole.storage;
    lists.gathered({Axis::kUlysses, Axis::kRows, Axis::kRing, Axis::kRingOuter}, keys, keys + queries);
    return std::move(lists).take();
  }
  lists.all(Axis::kUlysses, q + kv + out, q + kv + out + dq + dkv, 1.0 / mesh.size(Axis::kUlysses));
  const auto around = [&](double forward, double backward) {
    lists.hops(Axis::kRing, static_cast<double>(outer) * (inner - 1), forward, backward);
    lists.hops(Axis::kRingOuter, outer - 1, forward, backward);
  };
  if (strategy == "ulysses") return std::move(lists).take();
  if (strategy == "ring" || strategy == "double_ring" || strategy == "hybrid" || strategy == "grid") {
    lists.all(Axis::kRows, q + out, q + out + dq);
    around(kv, kv + dkv);
  } else if (strategy == "grid_gather") {
    lists.all(Axis::kRows, q + out, q + out + dq);
    lists.gathered({Axis::kRing, Axis::kRingOuter}, kv, kv + dkv);
  } else if (strategy == "allgather") {
    lists.gathered({Axis::kRows, Axis::kRing, Axis::kRingOuter}, kv, kv + dkv);
  } else if (strategy == "tree") {
    lists.gathered({Axis::kRows, Axis::kRing, Axis::kRingOuter}, q + out, q + out + dq);
  } else if (strategy == "ring_q") {
    lists.hops(Axis::kRing, inner - 1, q + s.out * s.sum, q + out + dq);
  } else if (strategy == "fetch" || strategy == "halo") {
    const double messages = strategy == "halo" ? std::min(inner - 1, 2) : inner - 1;
    const double forward = seen.fetched * s.key_row * s.storage, back = seen.fetched * s.key_row * s.sum;
    lists.add(Axis::kRing, messages, forward, forward + back, false);
  } else {
    return std::nullopt;
  }
  return std::move(lists).take();
}

double bytes_of(const std::vector<Transfer>& transfers) {
  double sum = 0;
  for (const Transfer& transfer : transfers) sum += transfer.bytes;
  return sum;
}

std::vector<int> sample(int count, int most) {
  std::vector<int> numbers;
  if (count <= most) most = count;
  for (int i = 0; i < most; ++i)
    numbers.push_back(most == 1 ? 0 : static_cast<int>(static_cast<std::int64_t>(i) * (count - 1) / (most - 1)));
  return numbers;
}

TransferLists counted_transfers(const Strategy& strategy, const Problem& problem) {
  const Plan forward = write_plan(strategy, std::shared_ptr<const Problem>(std::shared_ptr<const Problem>(), &problem));
  const Plan gradient = backward(forward);
  TransferLists lists;
  const std::vector<int> ranks = sample(problem.mesh.ranks(), kSampledRanks);
  for (const auto& [plan, list] : {std::pair{&forward, &lists.forward}, {&gradient, &lists.backward}}) {
    for (const Step& step : plan->steps) {
      if (is_move(step.verb)) list->push_back({step.axis, 0, 0, step.verb == Verb::kRotate});
    }
    for (const int rank : ranks) {
      const RankPlan mine = make_rank_plan(*plan, rank);
      std::size_t move = 0;
      for (std::size_t i = 0; i < plan->steps.size(); ++i) {
        const Step& step = plan->steps[i];
        if (!is_move(step.verb)) continue;
        Transfer& transfer = (*list)[move++];
        int peer = problem.mesh.coordinate(rank, step.axis);
        for (const Piece& piece : mine.steps[i].receives) {
          if (piece.peer == problem.mesh.coordinate(rank, step.axis)) continue;
          if (piece.peer != std::exchange(peer, piece.peer)) transfer.messages += 1.0 / static_cast<double>(ranks.size());
          for (const Field& field :
               message_fields(step.verb, plan->values[static_cast<std::size_t>(step.out[0])].what, problem.shape)) {
            if (field.statistic) continue;
            transfer.bytes +=
                static_cast<double>(piece_bytes({&field, 1}, problem.shape.batch, piece)) / static_cast<double>(ranks.size());
          }
        }
      }
    }
  }
  return lists;
}

double visible_pairs(const CompiledMask& mask) {
  double pairs = 0;
  for (const BatchRegions& part : mask) {
    pairs += static_cast<double>(area(part.regions)) * static_cast<double>(part.batch.count());
  }
  return pairs;
}

double head_balance(const AttentionShape& shape, const MeshShape& mesh) {
  const double parts = static_cast<double>(mesh.size(Axis::kTensor)) * mesh.size(Axis::kUlysses);
  const std::int64_t share = heads_of(shape.heads, shape.kv_heads, mesh.size(Axis::kTensor), 0).q.count();
  const std::int64_t most = split_evenly(share, mesh.size(Axis::kUlysses), 0).count();
  return static_cast<double>(shape.heads) / parts / static_cast<double>(most);
}

namespace {

// Seconds of a transfer's messages on a machine, for the rank that has it worst.
double link_time(const Transfer& transfer, const MeshShape& mesh, const Machine& machine) {
  const int per_node = machine.ranks_per_node, size = mesh.size(transfer.axis);
  const int stride = size == 1 ? 1 : mesh.neighbour(0, transfer.axis, 1);
  const bool leaves =
      machine.links.between && (stride * size > per_node || per_node % (stride * size) != 0) && mesh.ranks() > per_node;
  const Link& inside = machine.links.inside;
  const auto time = [](const Link& link, double messages, double bytes, double sharers) {
    const double bandwidth = link.node_bandwidth ? std::min(link.bandwidth, *link.node_bandwidth / sharers) : link.bandwidth;
    return messages * link.latency_s + bytes / bandwidth;
  };
  if (!leaves) return time(inside, transfer.messages, transfer.bytes, std::min(per_node, mesh.ranks()));
  const Link& between = *machine.links.between;
  if (transfer.hops) return time(between, transfer.messages, transfer.bytes, std::min(stride, per_node));
  const double near = std::clamp(static_cast<double>(per_node) / stride, 1.0, static_cast<double>(size));
  const double far_share = (size - near) / (size - 1);
  return time(inside, transfer.messages * (1 - far_share), transfer.bytes * (1 - far_share), per_node) +
         time(between, transfer.messages * far_share, transfer.bytes * far_share, per_node);
}

double phase_time(const std::vector<Transfer>& transfers, double compute, const MeshShape& mesh, const Machine& machine) {
  double hops = 0, seconds = 0;
  for (const Transfer& transfer : transfers) hops += transfer.hops ? transfer.messages : 0;
  const double piece = compute / (hops + 1) + machine.kernel_latency_s;
  seconds += piece;
  for (const Transfer& transfer : transfers) {
    const double moving = link_time(transfer, mesh, machine);
    seconds += transfer.hops ? std::max(moving, transfer.messages * piece) : moving;
  }
  return seconds;
}

}  // namespace

double estimated_time(const TransferLists& transfers, const AttentionShape& shape, const MeshShape& mesh, const Work& work,
                      const Machine& machine) {
  const int ranks = mesh.sequence_parts() * mesh.size(Axis::kTensor);
  const double pairs = work.pairs * static_cast<double>(shape.heads) / ranks;
  const auto d = static_cast<double>(shape.dim_qk), v = static_cast<double>(shape.dim_v);
  const double forward = pairs * work.forward * 2 * (d + v) / machine.attend_rate(Verb::kAttend, shape.dtype);
  const double backward = pairs * work.backward * 2 * (3 * d + 2 * v) / machine.attend_rate(Verb::kAttendGrad, shape.dtype);
  return phase_time(transfers.forward, forward, mesh, machine) + phase_time(transfers.backward, backward, mesh, machine);
}

}  // namespace dattn
