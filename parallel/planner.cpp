#include "parallel/planner.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <tuple>

#include <fmt/format.h>

#include "core/base/error.h"
#include "parallel/candidates.h"
#include "parallel/lower_bound.h"
#include "parallel/rank_plan.h"
#include "parallel/simulate.h"

namespace dattn {
namespace {

constexpr double kIdleShare = 0.5;      // a balance below this share of the best one is refused
constexpr double kEvenEnough = 0.95;    // a balance that ends the search for a layout
constexpr double kNearlyAsGood = 1.02;  // times the best cost: there a balance that is kMoreEven times better decides
constexpr double kMoreEven = 1.05;
constexpr double kClearlyFewer = 0.7;                                // of the bytes: what is held all at once must come down to
constexpr std::size_t kLookedAtForBytes = 8, kLookedAtForTime = 32;  // candidates whose layouts are compared
constexpr std::size_t kSimulated = 4;                                // candidates that are simulated
constexpr int kPlannedRanks = 32;                                    // whose memory is worked out, as long as
constexpr int kPlannedWork = 3 * 4096;  // their number times that of all ranks, or of steps, is so small

// Holds everything it is sent at once, where those that pass blocks around hold two.
bool holds_all(const Draft& draft) { return fetches(draft.candidate.strategy) || draft.candidate.strategy == "tree"; }

// Compares candidates and takes the best.
class Planner : private Candidates {
 public:
  explicit Planner(const PlanRequest& request) : Candidates(request) {}

  Choice choose() {
    order_drafts();
    if (by_time() && quick_to_simulate(request_.shape, ranks())) simulate_best();
    return pick();
  }

  Plan best_plan() {
    order_drafts();
    for (Draft& draft : drafts_) {
      if (!draft.settled) settle(draft);
      std::optional<Plan> plan;
      if (reaches(draft.candidate) && attempt(draft.candidate.text(), [&] { plan = plan_of(draft.candidate); })) return *plan;
    }
    refuse();
  }

  Candidate assess(const MeshShape& mesh, const Strategy& strategy) {
    Draft draft = draft_of(mesh, strategy, request_.options.layout);
    draft.candidate.balance = draft.heads * balance_of(strategy.name);
    set_time(draft);
    return draft.candidate;
  }

 private:
  // Candidates, the best first.
  void order_drafts() {
    add_all();
    sort();
    refuse_what_holds_all();
    for (std::size_t i = 0; i < drafts_.size() && i < looked_at(); ++i) settle(drafts_[i]);
    refuse_uneven_rows();
    sort();
    prefer_even();
  }
  std::size_t looked_at() const { return by_time() ? kLookedAtForTime : kLookedAtForBytes; }

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

  // With bytes as objective, what is held all at once must be clearly less than whole blocks, on the rank with most work.
  // Drafts are sorted.
  void refuse_what_holds_all() {
    if (by_time() || request_.options.strategy != "auto") return;
    const auto whole = std::find_if(drafts_.begin(), drafts_.end(), [](const Draft& draft) { return !holds_all(draft); });
    if (whole == drafts_.end() || cost(*whole) == 0) return;
    const double most = kClearlyFewer * cost(*whole);
    std::set<std::string> told;
    for (Draft& draft : drafts_) {
      if (holds_all(draft) && cost(draft) <= most) settle(draft);
    }
    drop([&](const Draft& draft) {
      if (!holds_all(draft) || (draft.settled && draft.candidate.forward_bytes <= most * draft.candidate.balance)) return false;
      if (!told.insert(draft.candidate.strategy).second) return true;
      const std::string uneven = draft.settled ? fmt::format(" at balance {:.2f}", draft.candidate.balance) : "";
      rejected_.push_back({draft.candidate.text(),
                           fmt::format("receives {:.0f} % of the bytes of the best that moves whole blocks{}, and holds all it "
                                       "receives at once; name the strategy to have it",
                                       cost(draft) / most * kClearlyFewer * 100, uneven)});
      return true;
    });
  }

  // Takes the layout that shares out the work best: the first that does so well enough.
  void settle(Draft& draft) {
    Candidate& candidate = draft.candidate;
    const std::vector<Layout> all =
        fetches(candidate.strategy) ? std::vector<Layout>{candidate.layout} : layouts(candidate.mesh.sequence_parts());
    double best = -1;
    auto layout = all.begin();
    while (layout != all.end() && best < kEvenEnough) {
      place(candidate.mesh, *layout);
      const double balance = balance_of(candidate.strategy);
      if (balance > best) best = balance, candidate.layout = *layout;
      ++layout;
    }
    draft.untried.assign(layout, all.end());
    candidate.balance = draft.heads * best;
    draft.settled = true;
    set_time(draft);
  }

  // Of the problem as it is placed.
  double balance_of(std::string_view strategy) {
    const auto key = std::tuple(problem_->mesh.sizes, problem_->layout, sharing_of(strategy));
    const auto known = balances_.find(key);
    if (known != balances_.end()) return known->second;
    return balances_[key] = row_balance(strategy, *problem_, pairs_);
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

  // Whether halo's edges hold all that is seen; other strategies were asked when they became candidates.
  bool reaches(const Candidate& candidate) {
    if (candidate.strategy != "halo") return true;
    place(candidate.mesh, candidate.layout);
    return find_strategy("halo").accepts(*problem_).ok;
  }

  void set_memory(Candidate& candidate) {
    const Plan forward = plan_of(candidate);
    for (const Plan& plan : {forward, backward(forward)}) {
      const int ranks = candidate.mesh.ranks(), work = std::max(ranks, static_cast<int>(plan.steps.size()));
      for (const int rank : sample(ranks, std::clamp(kPlannedWork / work, 1, kPlannedRanks)))
        candidate.peak_memory = std::max(candidate.peak_memory, memory_with_inputs(plan, make_rank_plan(plan, rank)));
    }
  }

  // The first two that fit, of different meshes where those are free.
  Choice pick() {
    std::vector<Candidate> best;
    for (Draft& draft : drafts_) {
      if (!draft.settled) settle(draft);
      Candidate& candidate = draft.candidate;
      if (!best.empty() && request_.ranks && candidate.mesh == best[0].mesh) continue;
      if (!reaches(candidate)) continue;
      if (!attempt(candidate.text(), [&] { set_memory(candidate); })) continue;
      if (request_.memory_bytes > 0 && candidate.peak_memory > request_.memory_bytes) {
        rejected_.push_back({candidate.text(), fmt::format("needs {} bytes of memory, a rank has {}", candidate.peak_memory,
                                                           request_.memory_bytes)});
        continue;
      }
      if (best.empty()) tell_untried_layouts(draft);
      best.push_back(candidate);
      if (best.size() == 2) break;
    }
    if (best.empty()) refuse();
    tell_costlier(best);
    Choice choice{
        request_.objective, best[0], std::nullopt, std::move(rejected_), lower_bound_bytes(request_.shape, best[0].mesh), 1};
    if (best.size() > 1) choice.runner_up = best[1];
    choice.ratio = ratio_over(choice.chosen.forward_bytes, choice.lower_bound_bytes);
    return choice;
  }

  // Of the choice.
  void tell_untried_layouts(const Draft& chosen) {
    if (chosen.untried.empty()) return;
    std::string names;
    for (const Layout layout : chosen.untried) names += fmt::format("{}{}", names.empty() ? "" : ", ", name_of(layout));
    const Candidate& candidate = chosen.candidate;
    rejected_.push_back(
        {fmt::format("layout{} {}", chosen.untried.size() > 1 ? "s" : "", names),
         fmt::format("not tried: with {} the mean rank has {:.3f} of the work of the slowest, and layouts are compared by that "
                     "until one reaches {}; name the layout to have it",
                     name_of(candidate.layout), candidate.balance / chosen.heads, kEvenEnough)});
  }

  // Of all that could run and was not taken, as one.
  void tell_costlier(const std::vector<Candidate>& best) {
    std::size_t count = 0;
    const Draft* cheapest = nullptr;
    for (const Draft& draft : drafts_) {
      const std::string text = draft.candidate.text();
      if (std::any_of(best.begin(), best.end(), [&](const Candidate& taken) { return taken.text() == text; })) continue;
      if (count++ == 0) cheapest = &draft;
    }
    if (cheapest == nullptr) return;
    const Candidate& next = cheapest->candidate;
    const std::string costs =
        by_time() ? fmt::format("would take {:.4g} ms, the best {:.4g}", next.time_s * 1e3, best[0].time_s * 1e3)
                  : fmt::format("receives {:.0f} bytes forward and {:.0f} backward, the best {:.0f} and {:.0f}",
                                next.forward_bytes, next.backward_bytes, best[0].forward_bytes, best[0].backward_bytes);
    rejected_.push_back(
        {fmt::format("{} more candidates", count),
         fmt::format("no better: the first of them, {}, {}; layouts were compared for the best {} in closed form{}",
                     next.text(), costs, looked_at(),
                     best[0].simulated ? fmt::format(", and the best {} simulated", kSimulated) : "")});
  }

  [[noreturn]] void refuse() const {
    std::string all;
    for (const Rejected& one : rejected_) all += fmt::format("\n  {}: {}", one.what, one.why);
    fail(ErrorCode::kBadInput, "no plan for {} ranks with strategy {} and layout {} is left:{}", ranks(),
         request_.options.strategy, request_.fixed_layout ? name_of(request_.options.layout) : "any",
         all.empty() ? " no mesh suits the strategy; use strategy auto" : all);
  }

  std::map<std::tuple<std::array<int, kAxes.size()>, Layout, Sharing>, double> balances_;
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

Plan make_auto_plan(const MeshShape& mesh, const AttentionShape& shape, const AttentionOptions& options) {
  mesh.require_valid();
  if (mesh.sequence_parts() == 1) return write_plan(find_strategy(plainest_strategy(mesh)), make_problem(mesh, shape, options));
  PlanRequest request;
  request.shape = shape;
  request.options = options;
  request.mesh = mesh;
  request.fixed_layout = true;
  return Planner(request).best_plan();
}

Candidate assess(const PlanRequest& request, const MeshShape& mesh, const std::string& strategy) {
  return Planner(request).assess(mesh, find_strategy(strategy));
}

double ratio_over(double bytes, double lower_bound) {
  if (lower_bound <= 0) return bytes <= 0 ? 1 : INFINITY;
  return bytes / lower_bound;
}

}  // namespace dattn
