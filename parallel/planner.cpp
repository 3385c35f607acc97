#include "parallel/planner.h"

#include <algorithm>
#include <cmath>
#include <limits>
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
constexpr double kNearlyAsGood = 1.02;  // times the best cost: there a balance that is kMoreEven times better decides
constexpr double kMoreEven = 1.05;
constexpr double kAlike = 0.04;         // shares of work that differ by less count as equal
constexpr double kClearlyFewer = 0.7;   // of the bytes: what is held all at once must come down to
constexpr std::size_t kLookedAt = 32;   // by bytes: candidates whose work is compared
constexpr std::size_t kSimulated = 4;   // meshes and strategies that are simulated; then the best one's other layouts,
constexpr double kMaySurprise = 1.25;   // estimated to take no longer than so many times its time
constexpr int kPlannedRanks = 32;       // whose memory is worked out, as long as
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
    for (std::size_t i = 0; i < drafts_.size(); ++i) {
      settle_best_from(i);
      const Candidate& candidate = drafts_[i].candidate;
      std::optional<Plan> plan;
      if (reaches(candidate) && attempt(candidate.text(), [&] { plan = plan_of(candidate); })) return *plan;
    }
    refuse();
  }

  Candidate assess(const MeshShape& mesh, const Strategy& strategy) {
    Draft draft = draft_of(mesh, strategy, request_.options.layout);
    settle(draft);
    return draft.candidate;
  }

 private:
  // Candidates, the best first.
  void order_drafts() {
    add_all();
    sort();
    refuse_what_holds_all();
    double most = std::numeric_limits<double>::infinity();  // seconds: what takes longer even at its best need not be settled
    for (std::size_t i = 0; i < drafts_.size(); ++i) {
      if (by_time() ? drafts_[i].candidate.time_s > most : i >= kLookedAt) break;
      settle(drafts_[i]);
      if (!quick_to_simulate(request_.shape, ranks())) most = std::min(most, kNearlyAsGood * drafts_[i].candidate.time_s);
    }
    refuse_uneven_rows();
    sort();
    if (!drafts_.empty()) settle_best_from(0);
    prefer_even();
  }

  // By time, or by bytes and, among equals, by work; then what is plainer.
  auto key(const Draft& draft) const {
    const Candidate& c = draft.candidate;
    return std::tuple(by_time() ? c.time_s : 0.0, std::llround(c.forward_bytes / draft.heads),
                      std::llround(c.backward_bytes / draft.heads), work_class(c), draft.order, draft.place);
  }
  long long work_class(const Candidate& c) const {
    if (by_time()) return 0;
    return std::llround(std::log(c.time_s > 0 ? c.time_s : 1 / (c.balance * c.in_step)) / kAlike);
  }
  // Bytes: of the rank with most heads.
  double cost(const Draft& draft) const {
    return by_time() ? draft.candidate.time_s : draft.candidate.forward_bytes / draft.heads;
  }

  void sort(std::size_t from = 0) {
    std::stable_sort(drafts_.begin() + static_cast<std::ptrdiff_t>(from), drafts_.end(),
                     [this](const Draft& a, const Draft& b) { return key(a) < key(b); });
  }

  // Those that are not settled look better than they are.
  void settle_best_from(std::size_t i) {
    while (!drafts_[i].settled) {
      const Candidate first = drafts_[i].candidate;
      for (Draft& draft : drafts_) {
        if (!draft.settled && alike_but_layout(draft.candidate, first)) settle(draft);
      }
      sort(i);
    }
  }

  static bool alike_but_layout(const Candidate& a, const Candidate& b) { return a.mesh == b.mesh && a.strategy == b.strategy; }

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

  // Told once for each strategy and layout. What it costs by time, the time says.
  void refuse_uneven_rows() {
    if (by_time()) return;
    double best = 0;
    for (const Draft& draft : drafts_) best = draft.settled ? std::max(best, draft.candidate.balance) : best;
    std::set<std::pair<std::string, Layout>> told;
    drop([&](const Draft& draft) {
      const Candidate& candidate = draft.candidate;
      if (!draft.settled || candidate.balance >= kIdleShare * best) return false;
      if (told.insert({candidate.strategy, candidate.layout}).second)
        rejected_.push_back({candidate.text(), fmt::format("the slowest rank has {:.1f} times the mean work (best: {:.1f})",
                                                           1 / candidate.balance, 1 / best)});
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

  // The simulated ones come first.
  void simulate_best() {
    std::vector<Draft> simulated, others;
    const auto known = [&](const Draft& draft) {
      return std::any_of(simulated.begin(), simulated.end(),
                         [&](const Draft& one) { return alike_but_layout(one.candidate, draft.candidate); });
    };
    for (Draft& draft : drafts_) {
      if (simulated.size() == kSimulated || known(draft))
        others.push_back(std::move(draft));
      else if (simulate(draft.candidate))
        simulated.push_back(std::move(draft));
    }
    const auto faster = [this](const Draft& a, const Draft& b) { return key(a) < key(b); };
    std::stable_sort(simulated.begin(), simulated.end(), faster);
    const Candidate best = simulated.empty() ? Candidate() : simulated[0].candidate;
    drafts_.clear();
    for (Draft& draft : others) {
      const bool may_surprise = alike_but_layout(draft.candidate, best) && draft.candidate.time_s <= kMaySurprise * best.time_s;
      if (!may_surprise)
        drafts_.push_back(std::move(draft));
      else if (simulate(draft.candidate))
        simulated.push_back(std::move(draft));
    }
    std::stable_sort(simulated.begin(), simulated.end(), faster);
    drafts_.insert(drafts_.begin(), simulated.begin(), simulated.end());
  }

  bool simulate(Candidate& candidate) {
    return attempt(candidate.text(), [&] {
      const Plan forward = plan_of(candidate);
      candidate.time_s = simulated_time(forward, backward(forward), *request_.machine);
      candidate.simulated = true;
    });
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
    std::vector<Candidate> best, too_large;
    for (std::size_t i = 0; i < drafts_.size(); ++i) {
      settle_best_from(i);
      Candidate& candidate = drafts_[i].candidate;
      if (!best.empty() && request_.ranks && candidate.mesh == best[0].mesh) continue;
      const bool holds_as_much = std::any_of(too_large.begin(), too_large.end(), [&](const Candidate& one) {
        return alike_but_layout(one, candidate) && !fetches(one.strategy);  // layouts give a rank equally many rows
      });
      if (holds_as_much || !reaches(candidate)) continue;
      if (!attempt(candidate.text(), [&] { set_memory(candidate); })) continue;
      if (request_.memory_bytes > 0 && candidate.peak_memory > request_.memory_bytes) {
        rejected_.push_back({candidate.text(), fmt::format("needs {} bytes of memory, a rank has {}", candidate.peak_memory,
                                                           request_.memory_bytes)});
        too_large.push_back(candidate);
        continue;
      }
      best.push_back(candidate);
      if (best.size() == 2) break;
    }
    if (best.empty()) refuse();
    Choice choice;
    choice.objective = request_.objective;
    choice.chosen = best[0];
    if (best.size() > 1) choice.runner_up = best[1];
    choice.layouts = in_every_layout(best[0]);
    choice.layout_reason = tell_layouts(choice);
    tell_costlier(best);
    choice.rejected = std::move(rejected_);
    choice.lower_bound_bytes = lower_bound_bytes(request_.shape, best[0].mesh);
    choice.ratio = ratio_over(choice.chosen.forward_bytes, choice.lower_bound_bytes);
    return choice;
  }

  // The choice first.
  std::vector<Candidate> in_every_layout(const Candidate& chosen) {
    std::vector<Candidate> all{chosen};
    for (const Layout layout : layouts(chosen.mesh.sequence_parts())) {
      if (layout == chosen.layout) continue;
      const auto known = std::find_if(drafts_.begin(), drafts_.end(), [&](const Draft& draft) {
        return alike_but_layout(draft.candidate, chosen) && draft.candidate.layout == layout;
      });
      if (known != drafts_.end()) {
        if (!known->settled) settle(*known);
        all.push_back(known->candidate);
        continue;
      }
      if (fetches(chosen.strategy)) continue;  // those that it can take are among the candidates
      Draft draft = draft_of(chosen.mesh, find_strategy(chosen.strategy), layout);
      settle(draft);
      all.push_back(draft.candidate);
    }
    return all;
  }

  // What it costs to be laid out so.
  std::string layout_costs(const Candidate& c) const {
    std::string text = by_time() ? fmt::format("{:.4g} ms{}, ", c.time_s * 1e3, c.simulated ? " simulated" : "") : "";
    if (fetches(c.strategy)) text += fmt::format("{:.0f} bytes forward, ", c.forward_bytes);
    text += fmt::format("balance {:.3f}", c.balance);
    if (c.in_step < 0.9995) text += fmt::format(", {:.3f} of it in step around the ring", c.in_step);
    if (c.worked > 1.0005) text += fmt::format(", tiles of {:.2f} times the visible pairs", c.worked);
    return text;
  }

  // Why the choice has its layout; every other one is refused with its costs.
  std::string tell_layouts(const Choice& choice) {
    const Candidate& chosen = choice.chosen;
    if (request_.fixed_layout) return "it is given";
    if (chosen.mesh.sequence_parts() == 1) return "one rank holds all positions";
    bool alike = true;
    for (std::size_t i = 1; i < choice.layouts.size(); ++i) {
      const Candidate& other = choice.layouts[i];
      const bool costs_as_much = by_time() ? other.time_s <= kNearlyAsGood * chosen.time_s
                                           : std::llround(other.forward_bytes) == std::llround(chosen.forward_bytes) &&
                                                 work_class(other) == work_class(chosen);
      alike = alike && costs_as_much;
      const std::string why = costs_as_much ? fmt::format("no better than {}", name_of(chosen.layout)) : "costs more";
      if (!choice.runner_up || choice.runner_up->text() != other.text())
        rejected_.push_back({other.text(), fmt::format("{}: {}; {} has {}", why, layout_costs(other), name_of(chosen.layout),
                                                       layout_costs(chosen))});
    }
    const std::string costs = layout_costs(chosen);
    if (choice.layouts.size() == 1) return fmt::format("the only one that suits: {}", costs);
    if (alike) return fmt::format("all are alike here, and of equals it has the fewest pieces: {}", costs);
    return fmt::format("{}: {}", by_time() ? "fastest" : fetches(chosen.strategy) ? "fewest bytes" : "most even work", costs);
  }

  // Of all that could run and was not taken, as one.
  void tell_costlier(const std::vector<Candidate>& best) {
    std::size_t count = 0;
    const Draft* cheapest = nullptr;
    for (const Draft& draft : drafts_) {
      const std::string text = draft.candidate.text();
      if (std::any_of(best.begin(), best.end(), [&](const Candidate& taken) { return taken.text() == text; })) continue;
      if (!request_.fixed_layout && alike_but_layout(draft.candidate, best[0])) continue;  // told already
      if (count++ == 0) cheapest = &draft;
    }
    if (cheapest == nullptr) return;
    const Candidate& next = cheapest->candidate;
    const std::string costs =
        by_time() ? fmt::format("would take {}{:.4g} ms, the best {:.4g}", cheapest->settled ? "" : "at least ",
                                next.time_s * 1e3, best[0].time_s * 1e3)
                  : fmt::format("receives {:.0f} bytes forward and {:.0f} backward, the best {:.0f} and {:.0f}",
                                next.forward_bytes, next.backward_bytes, best[0].forward_bytes, best[0].backward_bytes);
    rejected_.push_back(
        {fmt::format("{} more candidates", count),
         fmt::format("no better: the first of them, {}, {}; {}", next.text(), costs,
                     by_time() ? best[0].simulated ? fmt::format("the best {} were simulated", kSimulated) : "all by estimate"
                               : fmt::format("the work of the best {} was compared", kLookedAt))});
  }

  [[noreturn]] void refuse() const {
    std::string all;
    for (const Rejected& one : rejected_) all += fmt::format("\n  {}: {}", one.what, one.why);
    fail(ErrorCode::kBadInput, "no plan for {} ranks with strategy {} and layout {} is left:{}", ranks(),
         request_.options.strategy, request_.fixed_layout ? name_of(request_.options.layout) : "any",
         all.empty() ? " no mesh suits the strategy; use strategy auto" : all);
  }
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
