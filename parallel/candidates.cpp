#include "parallel/candidates.h"

#include <algorithm>
#include <set>

#include <fmt/format.h>

#include "parallel/requirements.h"

namespace dattn {
namespace {

std::vector<int> divisors(int number) {
  std::vector<int> all;
  for (int i = 1; i <= number; ++i) {
    if (number % i == 0) all.push_back(i);
  }
  return all;
}

// Fewer axes first, then the plainest strategy of the mesh, then the order of the names.
int order_of(const MeshShape& mesh, std::size_t number, std::string_view strategy) {
  int axes = 0;
  for (const Axis axis : kSequenceAxes) axes += mesh.size(axis) > 1 ? 1 : 0;
  return axes * 100 + (strategy == plainest_strategy(mesh) ? 0 : 1 + static_cast<int>(number));
}

}  // namespace

bool fetches(std::string_view strategy) { return strategy == "fetch" || strategy == "halo"; }

Candidates::Candidates(const PlanRequest& request) : request_(request) {
  AttentionOptions options = request.options;
  options.layout = Layout::kZigzag;  // layout balanced is computed when it is needed, for the right number of parts
  problem_ = std::make_shared<Problem>(*make_problem(request.mesh, request.shape, options));
  wanted_ = options.determinism == Determinism::kInvariant ? "invariant" : request.options.strategy;
  pairs_ = visible_pairs(problem_->mask);
  costs_.emplace(*problem_, pairs_, request.machine);
}

void Candidates::add_all() {
  for (const MeshShape& mesh : with_heads(meshes())) add_mesh(mesh);
  tell_untried();
}

void Candidates::place(const MeshShape& mesh, Layout layout) {
  problem_->mesh = mesh;
  problem_->layout = layout;
  if (layout == Layout::kBalanced && problem_->balanced == nullptr) problem_->place_balanced();
}

std::vector<Layout> Candidates::layouts(int parts) const {
  if (request_.fixed_layout) return {request_.options.layout};
  if (parts == 1) return {Layout::kZigzag};  // the name that calls have by default
  std::vector<Layout> all{Layout::kContiguous, Layout::kZigzag, Layout::kStriped};
  if (wanted_ == "invariant") std::swap(all[0], all[1]);      // the tree of training's sums is zigzag's
  if (!costs_->sees_all()) all.push_back(Layout::kBalanced);  // else any layout is
  return all;
}

// What is left out without a look at its costs.
void Candidates::tell_untried() {
  for (const auto& [strategy, unsuited] : unsuited_) {
    const bool one = !request_.ranks;
    rejected_.push_back({one ? fmt::format("strategy {}", strategy)
                             : fmt::format("strategy {} on {} of {} meshes", strategy, unsuited.meshes, meshes_),
                         unsuited.first_reason});
  }
  if (!costs_->sees_all()) return;
  if (wanted_ == "auto")
    rejected_.push_back({"strategies fetch and halo", "the mask hides nothing: they would move what allgather moves"});
  if (!request_.fixed_layout && ranks() > outside())
    rejected_.push_back({"layout balanced", "the mask hides nothing: every layout shares it out evenly"});
}

std::vector<MeshShape> Candidates::meshes() const {
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
std::vector<MeshShape> Candidates::with_heads(std::vector<MeshShape> all) {
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
int Candidates::inner_ring(const MeshShape& mesh) const {
  if (request_.machine == nullptr) return 0;
  const int stride = mesh.size(Axis::kRows) * mesh.size(Axis::kUlysses) * mesh.size(Axis::kTensor);
  const int per_node = request_.machine->ranks_per_node, ring = mesh.size(Axis::kRing), inner = per_node / stride;
  return per_node % stride == 0 && inner > 1 && inner < ring && ring % inner == 0 ? inner : 0;
}

void Candidates::refuse(const std::string& what, const std::string& why) {
  Unsuited& unsuited = unsuited_[what];
  if (unsuited.meshes++ == 0) unsuited.first_reason = why;
}

void Candidates::add_mesh(const MeshShape& mesh) {
  ++meshes_;
  seen_.clear();
  for (const Strategy& strategy : strategies()) {
    if (wanted_ == "auto" ? !strategy.automatic : wanted_ != strategy.name) continue;
    place(mesh, Layout::kContiguous);
    const bool halo = strategy.name == "halo";  // whose reach is looked at below, layout by layout
    const Support support = halo ? uses(*problem_, "halo", {Axis::kRing, Axis::kUlysses}) : strategy.accepts(*problem_);
    if (!support.ok) {
      refuse(std::string(strategy.name), support.why);
      continue;
    }
    attempt(fmt::format("{} on {}", strategy.name, mesh.text()), [&] {
      if (fetches(strategy.name)) {
        add_fetches(mesh, strategy);
        return;
      }
      Draft draft = draft_of(mesh, strategy, Layout::kContiguous);
      for (const Layout layout : layouts(mesh.sequence_parts())) {
        draft.candidate.layout = layout;
        drafts_.push_back(draft);
        ++draft.place;
      }
    });
  }
}

// What they move depends on the layout.
void Candidates::add_fetches(const MeshShape& mesh, const Strategy& strategy) {
  const bool named = request_.options.strategy == strategy.name;
  if (costs_->sees_all() && !named) return;
  int place = 0;
  std::vector<Layout> beyond;
  for (const Layout layout : layouts(mesh.sequence_parts())) {
    Draft draft = draft_of(mesh, strategy, layout);
    draft.place = place++;
    if (strategy.name == "halo" && !draft.seen.neighbours_only)
      beyond.push_back(layout);
    else
      drafts_.push_back(std::move(draft));
  }
  const std::string name(strategy.name), why = "queries see keys beyond the neighbours on the ring axis";
  if (static_cast<int>(beyond.size()) == place) {
    refuse(name, why);
    return;
  }
  for (const Layout layout : beyond) refuse(fmt::format("{} in layout {}", name, name_of(layout)), why);
}

Draft Candidates::draft_of(const MeshShape& mesh, const Strategy& strategy, Layout layout) {
  place(mesh, layout);
  Draft draft;
  draft.candidate.strategy = strategy.name;
  draft.candidate.mesh = mesh;
  draft.candidate.layout = layout;
  if (fetches(strategy.name)) {
    if (!seen_.contains(layout)) seen_[layout] = seen_rows(*problem_);
    draft.seen = seen_[layout];
  }
  auto transfers = transfers_of(strategy.name, request_.shape, mesh, draft.seen);
  draft.transfers = transfers ? std::move(*transfers) : counted_transfers(strategy, *problem_);
  draft.candidate.forward_bytes = bytes_of(draft.transfers.forward);
  draft.candidate.backward_bytes = bytes_of(draft.transfers.backward);
  draft.candidate.balance = draft.heads = head_balance(request_.shape, mesh);
  draft.order = order_of(mesh, static_cast<std::size_t>(&strategy - strategies().data()), strategy.name);
  set_time(draft, {});
  return draft;
}

// What waits and tiles cost decides between layouts and between times only.
void Candidates::settle(Draft& draft) {
  Candidate& candidate = draft.candidate;
  place(candidate.mesh, candidate.layout);
  const bool balance_alone = request_.machine == nullptr && request_.fixed_layout;
  const LayoutWork work = balance_alone ? LayoutWork{costs_->balance(candidate.strategy)} : costs_->work(candidate.strategy);
  candidate.balance = draft.heads * work.balance;
  candidate.in_step = work.in_step;
  candidate.worked = work.worked;
  set_time(draft, work);
  draft.settled = true;
}

void Candidates::set_time(Draft& draft, const LayoutWork& work) const {
  if (request_.machine == nullptr) return;
  const double balance = draft.candidate.balance;
  const Work slowest{pairs_, work.worked / (balance * work.in_step), work.worked_backward / (balance * work.in_step_backward)};
  draft.candidate.time_s = estimated_time(draft.transfers, request_.shape, draft.candidate.mesh, slowest, *request_.machine);
}

}  // namespace dattn
