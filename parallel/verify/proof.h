// The parts of verify(plan), in the order in which they run. Each adds what it finds wrong; the first three must find
// nothing before the later ones may run.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "parallel/rank_plan.h"
#include "parallel/verify/blocks.h"

namespace dattn::proof {

inline constexpr int kEveryRank = -1;
inline constexpr std::size_t kNoStep = SIZE_MAX;

// The problems found so far, as text that begins with rank, step and verb.
class Findings {
 public:
  explicit Findings(const Plan& plan) : plan_(plan) {}

  template <class... Args>
  void add(int rank, std::size_t step, fmt::format_string<Args...> format, Args&&... args) {
    if (!full()) problems_.push_back(place(rank, step) + fmt::format(format, std::forward<Args>(args)...));
  }
  bool full() const { return problems_.size() >= 20; }
  bool any() const { return !problems_.empty(); }
  std::vector<std::string> problems() && { return std::move(problems_); }

 private:
  std::string place(int rank, std::size_t step) const;

  const Plan& plan_;
  std::vector<std::string> problems_;
};

std::string text_of(const Positions& rows);                          // positions, of long lists the first ones
std::string text_of(const Interval& heads);                          // "[0, 4)"
Positions missing_from(const Positions& held, const Positions& in);  // the held positions that the other list lacks

void check_form(const Plan& plan, Findings& findings);    // numbers in range, each verb with values of its kinds
void check_order(const Plan& plan, Findings& findings);   // written once, then read, not after the memory was given away
void check_layout(const Plan& plan, Findings& findings);  // the shards hold each position once
std::string partition_fault(const std::vector<Positions>& parts, std::int64_t length);  // empty: each of [0, length) once

void check_steps(const Plan& plan, Blocks& blocks, Findings& findings);  // rotations and computations: blocks that match
// Moves of several peers, piece by piece; part: a rank's messages in a step, which tests break.
using PartOfStep = std::function<RankStep(const Plan& plan, std::size_t step, int rank)>;
void check_pieces(const Plan& plan, Blocks& blocks, Findings& findings, const PartOfStep& part = make_rank_step);
void check_rank(const Plan& plan, Blocks& blocks, const RankPlan& mine, Findings& findings);  // its memory and messages
void check_folds(const Plan& plan, Blocks& blocks, Findings& findings);  // each visible pair once, at its owner

}  // namespace dattn::proof
