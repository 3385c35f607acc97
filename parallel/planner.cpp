#include "parallel/planner.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <tuple>

#include <fmt/format.h>

#include "core/base/error.h"
#include "parallel/cost_model.h"
#include "parallel/lower_bound.h"
#include "parallel/rank_plan.h"
#include "parallel/simulate.h"

namespace dattn {
namespace {

constexpr double kIdleShare = 0.5;      // a balance below this share of the best one is refused
constexpr double kEvenEnough = 0.95;    // a balance that ends the search for a layout
constexpr double kNearlyAsGood = 1.02;  // times the best cost: there a balance that is kMoreEven times better decides
constexpr double kMoreEven = 1.05;
constexpr double kClearlyFewer = 0.7;  // of the bytes: what fetched keys, all held at once, must come down to
constexpr std::size_t kLookedAtForBytes = 8, kLookedAtForTime = 32;  // candidates whose layouts are compared
constexpr std::size_t kSimulated = 4;                                // candidates that are simulated
constexpr int kBalancedParts = 512;  // layouts striped and balanced are tried on meshes of at most so many parts

// A candidate on the way: costs in closed form first; layout, memory and a simulation when it comes to that.
struct Draft {
  Candidate candidate;
  TransferLists transfers;
  SeenRows seen;
  double heads = 1;  // balance of the heads alone
  int order = 0;     // lower first where costs are equal
  bool settled = false;
};

bool fetches(const Draft& draft) { return draft.candidate.strategy == "fetch" || draft.candidate.strategy == "halo"; }

std::vector<int> divisors(int number) {
  std::vector<int> all;
  for (int i = 1; i <= number; ++i) {
    if (number % i == 0) all.push_back(i);
  }
  return all;
}

// Fewer axes first, then what auto stands for on the mesh, then the order of the names.
int order_of(const MeshShape& mesh, std::size_t number, std::string_view strategy) {
  int axes = 0;
  for (const Axis axis : kSequenceAxes) axes += mesh.size(axis) > 1 ? 1 : 0;
  return axes * 100 + (strategy == choose_strategy(mesh) ? 0 : 1 + static_cast<int>(number));
}

class Planner {
 public:
  explicit Planner(const PlanRequest& request) : request_(request) {
    AttentionOptions options = request.options;
    options.layout = Layout::kZigzag;  // layout balanced is computed when it is needed, for the right number of parts
    problem_ = std::make_shared<Problem>(*make_problem(request.mesh, request.shape, options));
    wanted_ = options.determinism == Determinism::kInvariant ? "invariant" : request.options.strategy;
    pairs_ = visible_pairs(problem_->mask);
    sees_all_ = pairs_ == static_cast<double>(request.shape.batch) * static_cast<double>(request.shape.seq_q) *
                              static_cast<double>(request.shape.seq_kv);
  }

  Choice choose() {
    for (const MeshShape& mesh : with_heads(meshes())) add_mesh(mesh);
    sort();
    const std::size_t looked_at = by_time() ? kLookedAtForTime : kLookedAtForBytes;
    refuse_fetches();
    for (std::size_t i = 0; i < drafts_.size() && i < looked_at; ++i) settle(drafts_[i]);
    refuse_uneven_rows();
    sort();
    prefer_even();
    if (by_time() && quick_to_simulate(request_.shape, ranks())) simulate_best();
    return pick();
  }

  Candidate assess(const MeshShape& mesh, const Strategy& strategy) {
    Draft draft = draft_of(mesh, strategy, request_.options.layout);
    draft.candidate.balance = draft.heads * row_balance(strategy.name, *problem_, pairs_);
    set_time(draft);
    return draft.candidate;
  }

 private:
  bool by_time() const { return request_.objective == Objective::kTime; }
  int ranks() const { return request_.ranks.value_or(request_.mesh.ranks()); }
  int outside() const { return request_.mesh.size(Axis::kData) * request_.mesh.size(Axis::kTensor); }

  // The one problem that all candidates share, put on a mesh with a layout.
  void place(const MeshShape& mesh, Layout layout) {
    problem_->mesh = mesh;
    problem_->layout = layout;
    if (layout == Layout::kBalanced && problem_->balanced.empty())
      problem_->balanced = balanced_positions(problem_->mask, problem_->shape.seq_q, mesh.sequence_parts());
  }

  std::vector<Layout> layouts(int parts) const {
    if (request_.fixed_layout) return {request_.options.layout};
    if (parts > kBalancedParts) return {Layout::kZigzag, Layout::kContiguous};
    return {Layout::kZigzag, Layout::kContiguous, Layout::kStriped, Layout::kBalanced};
  }

  std::vector<MeshShape> meshes() const {
    if (!request_.ranks) return {request_.mesh};
    require(ranks() % outside() == 0, "mesh.ranks {} is no multiple of data {} x tensor {}; use one, for example {}", ranks(),
            request_.mesh.size(Axis::kData), request_.mesh.size(Axis::kTensor), (ranks() / outside() + 1) * outside());
    std::vector<MeshShape> all;
    const int parts = ranks() / outside();
    for (const int ulysses : divisors(parts)) {
      for (const int rows : divisors(parts / ulysses)) {
        MeshShape mesh = request_.mesh;
        mesh.set(Axis::kUlysses, ulysses);
        mesh.set(Axis::kRows, rows);
        mesh.set(Axis::kRing, parts / ulysses / rows);
        all.push_back(mesh);
        const int inner = inner_ring(mesh);
        if (inner == 0) continue;
        mesh.set(Axis::kRingOuter, mesh.size(Axis::kRing) / inner);
        mesh.set(Axis::kRing, inner);
        all.push_back(mesh);
      }
    }
    return all;
  }

  // Those on which every rank has a head, where there are some.
  std::vector<MeshShape> with_heads(std::vector<MeshShape> all) {
    const std::int64_t heads = request_.shape.heads;
    const auto idles = [&](const MeshShape& mesh) {
      return mesh.size(Axis::kUlysses) * mesh.size(Axis::kTensor) > heads && mesh.size(Axis::kUlysses) > 1;
    };
    if (std::all_of(all.begin(), all.end(), idles)) return all;
    std::set<int> told;
    for (const MeshShape& mesh : all) {
      const int ulysses = mesh.size(Axis::kUlysses), tensor = mesh.size(Axis::kTensor);
      if (!idles(mesh) || !told.insert(ulysses).second) continue;
      const std::string inside = tensor == 1 ? "" : fmt::format(" for it and tensor {}", tensor);
      rejected_.push_back({fmt::format("ulysses {}", ulysses),
                           fmt::format("only {} query heads{}; ranks without heads would idle", heads, inside)});
    }
    all.erase(std::remove_if(all.begin(), all.end(), idles), all.end());
    return all;
  }

  // Ranks of the ring that share a node, where that cuts the ring into rings; else 0.
  int inner_ring(const MeshShape& mesh) const {
    if (request_.machine == nullptr) return 0;
    const int stride = mesh.size(Axis::kRows) * mesh.size(Axis::kUlysses) * mesh.size(Axis::kTensor);
    const int per_node = request_.machine->ranks_per_node, ring = mesh.size(Axis::kRing), inner = per_node / stride;
    return per_node % stride == 0 && inner > 1 && inner < ring && ring % inner == 0 ? inner : 0;
  }

  void add_mesh(const MeshShape& mesh) {
    for (const Strategy& strategy : strategies()) {
      if (wanted_ == "auto" ? !strategy.automatic : wanted_ != strategy.name) continue;
      if (strategy.name != "halo") {  // whose reach is looked at below, layout by layout
        place(mesh, Layout::kContiguous);
        const Support support = strategy.accepts(*problem_);
        if (!support.ok && !request_.ranks) rejected_.push_back({fmt::format("strategy {}", strategy.name), support.why});
        if (!support.ok) continue;
      }
      attempt(fmt::format("{} on {}", strategy.name, mesh.text()), [&] {
        if (strategy.name == "fetch" || strategy.name == "halo") {
          add_fetches(mesh, strategy);
        } else {
          drafts_.push_back(draft_of(mesh, strategy, layouts(mesh.sequence_parts())[0]));
        }
      });
    }
  }

  // Does what may find out that a candidate cannot be planned; then that is a reason to reject it.
  template <class Body>
  bool attempt(const std::string& what, const Body& body) {
    try {
      body();
      return true;
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kBadInput) throw;
      rejected_.push_back({what, error.what()});
      return false;
    }
  }

  // What these move depends on the layout. Strides of positions see every key that one of them sees.
  void add_fetches(const MeshShape& mesh, const Strategy& strategy) {
    const bool named = request_.options.strategy == strategy.name;
    if (sees_all_ && !named) return;
    if (!uses(*problem_, strategy.name, {Axis::kRing, Axis::kUlysses}).ok) return;
    for (const Layout layout : layouts(mesh.sequence_parts())) {
      if (layout == Layout::kStriped && !request_.fixed_layout && !named) continue;
      Draft draft = draft_of(mesh, strategy, layout);
      if (strategy.name != "halo" || draft.seen.neighbours_only) drafts_.push_back(std::move(draft));
    }
  }

  Draft draft_of(const MeshShape& mesh, const Strategy& strategy, Layout layout) {
    place(mesh, layout);
    Draft draft;
    draft.candidate.strategy = strategy.name;
    draft.candidate.mesh = mesh;
    draft.candidate.layout = layout;
    if (fetches(draft)) draft.seen = seen_rows(*problem_);
    auto transfers = transfers_of(strategy.name, request_.shape, mesh, draft.seen);
    draft.transfers = transfers ? std::move(*transfers) : counted_transfers(strategy, *problem_);
    draft.candidate.forward_bytes = bytes_of(draft.transfers.forward);
    draft.candidate.backward_bytes = bytes_of(draft.transfers.backward);
    draft.candidate.balance = draft.heads = head_balance(request_.shape, mesh);
    draft.order = order_of(mesh, static_cast<std::size_t>(&strategy - strategies().data()), strategy.name);
    set_time(draft);
    return draft;
  }

  void set_time(Draft& draft) const {
    if (request_.machine == nullptr) return;
    const Work work{pairs_, draft.candidate.balance};
    draft.candidate.time_s = estimated_time(draft.transfers, request_.shape, draft.candidate.mesh, work, *request_.machine);
  }

  auto key(const Draft& draft) const {
    const Candidate& c = draft.candidate;
    return std::tuple(by_time() ? c.time_s : 0.0, std::llround(c.forward_bytes / draft.heads),
                      std::llround(c.backward_bytes / draft.heads), draft.order);
  }
  // Bytes: of the rank with most heads.
  double cost(const Draft& draft) const {
    return by_time() ? draft.candidate.time_s : draft.candidate.forward_bytes / draft.heads;
  }

  void sort() {
    std::stable_sort(drafts_.begin(), drafts_.end(), [this](const Draft& a, const Draft& b) { return key(a) < key(b); });
  }

  template <class Bad>
  void drop(const Bad& bad) {
    drafts_.erase(std::remove_if(drafts_.begin(), drafts_.end(), bad), drafts_.end());
  }

  // With bytes as objective, fetched keys must be clearly fewer than whole blocks, on the rank with most work. Drafts are
  // sorted.
  void refuse_fetches() {
    if (by_time() || request_.options.strategy != "auto") return;
    const auto whole = std::find_if(drafts_.begin(), drafts_.end(), [](const Draft& draft) { return !fetches(draft); });
    if (whole == drafts_.end()) return;
    const double most = kClearlyFewer * cost(*whole);
    bool told = false;
    for (Draft& draft : drafts_) {
      if (fetches(draft) && cost(draft) <= most) settle(draft);
    }
    drop([&](const Draft& draft) {
      if (!fetches(draft) || (draft.settled && draft.candidate.forward_bytes <= most * draft.candidate.balance)) return false;
      if (std::exchange(told, true)) return true;
      const std::string uneven = draft.settled ? fmt::format(" at balance {:.2f}", draft.candidate.balance) : "";
      rejected_.push_back({draft.candidate.text(),
                           fmt::format("receives {:.0f} % of the bytes of the best that moves whole blocks{}, and holds all "
                                       "fetched keys at once; name the strategy to have it",
                                       cost(draft) / most * kClearlyFewer * 100, uneven)});
      return true;
    });
  }

  // Takes the layout that shares out the work best: the first that does so well enough.
  void settle(Draft& draft) {
    Candidate& candidate = draft.candidate;
    const std::vector<Layout> all =
        fetches(draft) ? std::vector<Layout>{candidate.layout} : layouts(candidate.mesh.sequence_parts());
    double best = -1;
    for (const Layout layout : all) {
      place(candidate.mesh, layout);
      const double balance = row_balance(candidate.strategy, *problem_, pairs_);
      if (balance > best) best = balance, candidate.layout = layout;
      if (balance >= kEvenEnough) break;
    }
    candidate.balance = draft.heads * best;
    draft.settled = true;
    set_time(draft);
  }

  void refuse_uneven_rows() {
    double best = 0;
    for (const Draft& draft : drafts_) best = draft.settled ? std::max(best, draft.candidate.balance) : best;
    drop([&](const Draft& draft) {
      if (!draft.settled || draft.candidate.balance >= kIdleShare * best) return false;
      rejected_.push_back({draft.candidate.text(), fmt::format("the slowest rank has {:.1f} times the mean work (best: {:.1f})",
                                                               1 / draft.candidate.balance, 1 / best)});
      return true;
    });
  }

  void prefer_even() {
    if (drafts_.empty()) return;
    auto best = drafts_.begin();
    for (auto draft = best; draft != drafts_.end() && cost(*draft) <= kNearlyAsGood * cost(drafts_[0]); ++draft) {
      if (draft->settled && draft->candidate.balance > kMoreEven * best->candidate.balance) best = draft;
    }
    std::rotate(drafts_.begin(), best, best + 1);
  }

  Plan plan_of(const Candidate& candidate) {
    place(candidate.mesh, candidate.layout);
    return write_plan(find_strategy(candidate.strategy), std::make_shared<Problem>(*problem_));
  }

  void simulate_best() {
    std::size_t count = 0;
    while (count < std::min(kSimulated, drafts_.size())) {
      Candidate& candidate = drafts_[count].candidate;
      const bool planned = attempt(candidate.text(), [&] {
        const Plan forward = plan_of(candidate);
        candidate.time_s = simulated_time(forward, backward(forward), *request_.machine);
        candidate.simulated = true;
      });
      if (planned)
        ++count;
      else
        drafts_.erase(drafts_.begin() + static_cast<std::ptrdiff_t>(count));
    }
    std::stable_sort(drafts_.begin(), drafts_.begin() + static_cast<std::ptrdiff_t>(count),
                     [this](const Draft& a, const Draft& b) { return key(a) < key(b); });
  }

  void set_memory(Candidate& candidate) {
    const Plan forward = plan_of(candidate);
    for (const Plan& plan : {forward, backward(forward)}) {
      const RankPlan mine = make_rank_plan(plan, 0);
      std::int64_t bytes = mine.cost.peak_memory;
      for (const ValueId value : plan.inputs) bytes += bytes_of(plan, value, mine.blocks[static_cast<std::size_t>(value)]);
      candidate.peak_memory = std::max(candidate.peak_memory, bytes);
    }
  }

  // The first two that fit, of different meshes where those are free.
  Choice pick() {
    std::vector<Candidate> best;
    for (Draft& draft : drafts_) {
      if (!draft.settled) settle(draft);
      Candidate& candidate = draft.candidate;
      if (!best.empty() && request_.ranks && candidate.mesh == best[0].mesh) continue;
      if (candidate.strategy == "halo") {
        place(candidate.mesh, candidate.layout);
        if (!find_strategy("halo").accepts(*problem_).ok) continue;
      }
      if (!attempt(candidate.text(), [&] { set_memory(candidate); })) continue;
      if (request_.memory_bytes > 0 && candidate.peak_memory > request_.memory_bytes) {
        rejected_.push_back({candidate.text(), fmt::format("needs {} bytes of memory, a rank has {}", candidate.peak_memory,
                                                           request_.memory_bytes)});
        continue;
      }
      best.push_back(candidate);
      if (best.size() == 2) break;
    }
    if (best.empty()) refuse();
    Choice choice{best[0], std::nullopt, std::move(rejected_), lower_bound_bytes(request_.shape, best[0].mesh), 1};
    if (best.size() > 1) choice.runner_up = best[1];
    choice.ratio = ratio_over(choice.chosen.forward_bytes, choice.lower_bound_bytes);
    return choice;
  }

  [[noreturn]] void refuse() const {
    std::string all;
    for (const Rejected& one : rejected_) all += fmt::format("\n  {}: {}", one.what, one.why);
    fail(ErrorCode::kBadInput, "no plan for {} ranks with strategy {} and layout {} is left:{}", ranks(),
         request_.options.strategy, request_.fixed_layout ? name_of(request_.options.layout) : "any",
         all.empty() ? " no mesh suits the strategy; use strategy auto" : all);
  }

  const PlanRequest& request_;
  std::shared_ptr<Problem> problem_;
  std::string wanted_;  // strategy: auto, or the only one to consider
  double pairs_ = 0;
  bool sees_all_ = false;
  std::vector<Draft> drafts_;
  std::vector<Rejected> rejected_;
};

void check_request(const PlanRequest& request) {
  require(request.objective == Objective::kBytes || request.machine != nullptr,
          "objective time needs the machine that it is to be fast on; give machine: FILE, or use objective: bytes");
  require(!request.ranks || *request.ranks >= 1, "mesh.ranks is {}; use at least 1", request.ranks.value_or(0));
  const int ranks = request.ranks.value_or(request.mesh.ranks());
  const Machine* machine = request.machine;
  require(machine == nullptr || machine->links.between.has_value() || ranks <= machine->ranks_per_node,
          "the mesh has {} ranks but machine {} is one node of {}; give links.between or use a smaller mesh", ranks,
          machine ? machine->name : "", machine ? machine->ranks_per_node : 0);
  if (request.options.strategy != "auto") find_strategy(request.options.strategy);
}

}  // namespace

std::string Candidate::text() const { return fmt::format("{} on {}, layout {}", strategy, mesh.text(), name_of(layout)); }

Choice plan_attention(const PlanRequest& request) {
  check_request(request);
  return Planner(request).choose();
}

Candidate assess(const PlanRequest& request, const MeshShape& mesh, const std::string& strategy) {
  return Planner(request).assess(mesh, find_strategy(strategy));
}

double ratio_over(double bytes, double lower_bound) {
  if (lower_bound <= 0) return bytes <= 0 ? 1 : INFINITY;
  return bytes / lower_bound;
}

}  // namespace dattn
