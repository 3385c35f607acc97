// The proof's parts are in verify/; what they share, and the order in which they run, is in verify/proof.h.
#include "parallel/verify.h"

#include <set>

#include "parallel/cost_model.h"
#include "parallel/verify/proof.h"

namespace dattn {

Verdict verify(const Plan& plan) {
  Verdict verdict;
  verdict.pairs = visible_pairs(plan.problem->mask);
  proof::Findings findings(plan);
  for (const auto check : {proof::check_form, proof::check_order, proof::check_layout}) {
    if (!findings.any()) check(plan, findings);
  }
  if (!findings.any()) {
    proof::Blocks blocks(plan);
    proof::check_steps(plan, blocks, findings);
    proof::check_pieces(plan, blocks, findings);
    // What a rank promises is made by one function for all ranks; some of them stand for all.
    const int last = blocks.ranks() - 1;
    for (const int rank : std::set<int>{0, last / 3, last / 2, last})
      proof::check_rank(plan, blocks, make_rank_plan(plan, rank), findings);
    proof::check_folds(plan, blocks, findings);
  }
  verdict.problems = std::move(findings).problems();
  return verdict;
}

Verdict require_proved(const Plan& plan, std::string_view name) {
  Verdict verdict = verify(plan);
  std::string all;
  for (const std::string& problem : verdict.problems) all += "\n  " + problem;
  ensure(verdict.ok(), "the {} plan of strategy {} is wrong:{}", name, plan.strategy, all);
  return verdict;
}

}  // namespace dattn
