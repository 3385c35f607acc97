#include "tests/parallel/plan_faults.h"

#include <algorithm>
#include <utility>

#include "parallel/rank_plan.h"
#include "parallel/verify/proof.h"

namespace dattn {
namespace {

using Plans = std::vector<Plan>;

What what(const Plan& plan, ValueId value) { return plan.values[static_cast<std::size_t>(value)].what; }
bool attends(const Step& step) { return step.verb == Verb::kAttend || step.verb == Verb::kAttendGrad; }

// One variant for every step that takes the change: change(plan, step index) says whether it does.
template <class Change>
Plans at_each_step(const Plan& plan, const Change& change) {
  Plans all;
  for (std::size_t i = 0; i < plan.steps.size(); ++i) {
    Plan broken = plan;
    if (change(broken, i)) all.push_back(std::move(broken));
  }
  return all;
}

void replace_reads(Plan& plan, ValueId value, ValueId instead) {
  for (Step& step : plan.steps) std::replace(step.in.begin(), step.in.end(), value, instead);
  std::replace(plan.outputs.begin(), plan.outputs.end(), value, instead);
}

void erase_step(Plan& plan, std::size_t index) { plan.steps.erase(plan.steps.begin() + static_cast<std::ptrdiff_t>(index)); }

// Without the step; who read its output reads `instead`.
bool drop(Plan& plan, std::size_t index, ValueId instead) {
  const ValueId out = plan.steps[index].out[0];
  erase_step(plan, index);
  replace_reads(plan, out, instead);
  return true;
}

bool same_blocks(const Plan& plan, ValueId a, ValueId b) {
  for (int rank = 0; rank < plan.problem->mesh.ranks(); ++rank) {
    const Block x = plan.block(a, rank), y = plan.block(b, rank);
    if (!(x.rows == y.rows) || !(x.heads_for(what(plan, a)) == y.heads_for(what(plan, b)))) return false;
  }
  return true;
}

FaultKind dropped_move(std::string name, Verb verb) {
  return {std::move(name), "", [verb](const Plan& plan) {
            return at_each_step(
                plan, [verb](Plan& p, std::size_t i) { return p.steps[i].verb == verb && drop(p, i, p.steps[i].in[0]); });
          }};
}

// Another operand of the same kind, held by nobody like the right one.
FaultKind wrong_operand(std::string name, std::size_t input) {
  return {std::move(name), "", [input](const Plan& plan) {
            Plans all;
            for (std::size_t i = 0; i < plan.steps.size(); ++i) {
              if (!attends(plan.steps[i]) || input >= plan.steps[i].in.size()) continue;
              const ValueId right = plan.steps[i].in[input];
              for (ValueId other = 0; other < static_cast<ValueId>(plan.values.size()); ++other) {
                if (what(plan, other) != what(plan, right) || same_blocks(plan, other, right)) continue;
                all.push_back(plan);
                all.back().steps[i].in[input] = other;
              }
            }
            return all;
          }};
}

// Moves and placings that disagree.
void append_moves(std::vector<FaultKind>& all) {
  all.push_back({"WrongShift", "holds|lacks|moves by", [](const Plan& plan) {
                   return at_each_step(plan, [](Plan& p, std::size_t i) {
                     p.steps[i].shift += 1;
                     return p.steps[i].verb == Verb::kRotate;
                   });
                 }});
  all.push_back({"WrongDirection", "holds|lacks", [](const Plan& plan) {
                   return at_each_step(plan, [](Plan& p, std::size_t i) {
                     Step& step = p.steps[i];
                     step.shift = -step.shift;
                     return step.verb == Verb::kRotate && 2 * step.shift % p.problem->mesh.size(step.axis) != 0;
                   });
                 }});
  all.push_back({"MovesNowhere", "back to where it is", [](const Plan& plan) {
                   return at_each_step(plan, [](Plan& p, std::size_t i) {
                     p.steps[i].shift = p.problem->mesh.size(p.steps[i].axis);
                     return p.steps[i].verb == Verb::kRotate;
                   });
                 }});
  all.push_back({"WrongAxis", "", [](const Plan& plan) {
                   Plans broken;
                   for (std::size_t i = 0; i < plan.steps.size(); ++i) {
                     for (const Axis axis : kSequenceAxes) {
                       if (!is_move(plan.steps[i].verb) || axis == plan.steps[i].axis) continue;
                       broken.push_back(plan);
                       broken.back().steps[i].axis = axis;
                     }
                   }
                   return broken;
                 }});
  all.push_back({"RotatesTwice", "holds|lacks", [](const Plan& plan) {
                   return at_each_step(plan, [](Plan& p, std::size_t i) {
                     const Step step = p.steps[i];
                     if (step.verb != Verb::kRotate) return false;
                     p.values.push_back(p.values[static_cast<std::size_t>(step.out[0])]);
                     const auto again = static_cast<ValueId>(p.values.size()) - 1;
                     replace_reads(p, step.out[0], again);
                     Step second = step;
                     second.in = step.out;
                     second.out = {again};
                     p.steps.insert(p.steps.begin() + static_cast<std::ptrdiff_t>(i) + 1, second);
                     return true;
                   });
                 }});
  all.push_back({"SumIsCopied", "arrive twice|never arrive", [](const Plan& plan) {
                   return at_each_step(plan, [](Plan& p, std::size_t i) {
                     const Verb verb = std::exchange(p.steps[i].verb, Verb::kGather);
                     const Placing& from = p.placing(p.steps[i].in[0]);
                     if (from.kind == Placing::Kind::kFetched && from.shift != 0) return false;  // one rank's: nothing to sum
                     return verb == Verb::kCombine || verb == Verb::kReduceScatter;
                   });
                 }});
  all.push_back({"FetchesFromTheWrongRank", "never|twice", [](const Plan& plan) {
                   return at_each_step(plan, [](Plan& p, std::size_t i) {
                     Step& step = p.steps[i];
                     Placing& placing = p.values[static_cast<std::size_t>(step.out[0])].placing;
                     const int parts = p.problem->mesh.size(step.axis);
                     if (step.verb != Verb::kFetch || parts < 3) return false;
                     placing.shift = step.shift = step.shift == 0 ? 1 : around(step.shift + 1, parts) == 0 ? 1 : step.shift + 1;
                     return true;
                   });
                 }});
  all.push_back({"FetchIsNotPlacedSo", "not placed as it is fetched", [](const Plan& plan) {
                   return at_each_step(plan, [](Plan& p, std::size_t i) {
                     p.steps[i].shift += 1;
                     return p.steps[i].verb == Verb::kFetch;
                   });
                 }});
  all.push_back({"FetchesForOtherQueries", "", [](const Plan& plan) {
                   Plans broken;
                   for (std::size_t v = 0; v < plan.values.size(); ++v) {
                     if (plan.values[v].placing.kind != Placing::Kind::kFetched) continue;
                     const auto fetched = static_cast<ValueId>(v);
                     for (ValueId other = 0; other < fetched; ++other) {
                       Plan changed = plan;
                       changed.values[v].placing.wanted = other;
                       if (what(plan, other) != What::kQuery) continue;
                       bool lacks = false;  // only keys too few are wrong
                       for (int rank = 0; rank < plan.problem->mesh.ranks(); ++rank)
                         lacks |= proof::missing_from(plan.rows(fetched, rank), changed.rows(fetched, rank)).count() > 0;
                       if (lacks) broken.push_back(std::move(changed));
                     }
                   }
                   return broken;
                 }});
  all.push_back({"PlacedElsewhere", "", [](const Plan& plan) {
                   Plans broken;
                   for (std::size_t v = 0; v < plan.values.size(); ++v) {
                     if (plan.values[v].placing.kind == Placing::Kind::kShard) continue;
                     if (std::find(plan.inputs.begin(), plan.inputs.end(), static_cast<ValueId>(v)) != plan.inputs.end())
                       continue;
                     for (const int kind : {0, 1, 2}) {
                       Plan changed = plan;
                       Placing& placing = changed.values[v].placing;
                       if (kind == 0) placing.shift += 1;
                       if (kind == 1) placing.axis = placing.axis == Axis::kRing ? Axis::kUlysses : Axis::kRing;
                       if (kind == 2) placing = {Placing::Kind::kLike, plan.inputs[is_key_side(plan.values[v].what) ? 1 : 0]};
                       Plan both = plan;  // the two placings side by side
                       both.values.push_back(changed.values[v]);
                       if (!same_blocks(both, static_cast<ValueId>(v), static_cast<ValueId>(plan.values.size())))
                         broken.push_back(std::move(changed));
                     }
                   }
                   return broken;
                 }});
}

// Attends and sums that are lost or done again.
void append_folds(std::vector<FaultKind>& all) {
  all.push_back({"DroppedAttend", "never", [](const Plan& plan) {
                   return at_each_step(plan, [](Plan& p, std::size_t i) {
                     return p.steps[i].verb == Verb::kAttend && p.steps[i].in.size() > 2 && drop(p, i, p.steps[i].in[2]);
                   });
                 }});
  all.push_back({"ForgottenState", "never.*does not get here", [](const Plan& plan) {
                   return at_each_step(plan, [](Plan& p, std::size_t i) {
                     if (p.steps[i].verb != Verb::kAttend || p.steps[i].in.size() < 3) return false;
                     p.steps[i].in.pop_back();
                     return true;
                   });
                 }});
  all.push_back({"AttendsAgain", "twice", [](const Plan& plan) {
                   return at_each_step(plan, [](Plan& p, std::size_t i) {
                     Step again = p.steps[i];
                     if (again.verb != Verb::kAttend) return false;
                     p.values.push_back(p.values[static_cast<std::size_t>(again.out[0])]);
                     const auto sum = static_cast<ValueId>(p.values.size()) - 1;
                     replace_reads(p, again.out[0], sum);
                     again.in = {again.in[0], again.in[1], again.out[0]};
                     again.out = {sum};
                     p.steps.insert(p.steps.begin() + static_cast<std::ptrdiff_t>(i) + 1, again);
                     return true;
                   });
                 }});
  all.push_back({"LostSummand", "never", [](const Plan& plan) {
                   Plans broken;
                   for (const std::size_t kept : {0, 1}) {
                     const Plans more = at_each_step(plan, [kept](Plan& p, std::size_t i) {
                       return p.steps[i].verb == Verb::kAdd && drop(p, i, p.steps[i].in[kept]);
                     });
                     broken.insert(broken.end(), more.begin(), more.end());
                   }
                   return broken;
                 }});
  all.push_back({"AddsToItself", "read and overwritten in one step", [](const Plan& plan) {
                   return at_each_step(plan, [](Plan& p, std::size_t i) {
                     if (p.steps[i].verb != Verb::kAdd) return false;
                     p.steps[i].in[1] = p.steps[i].in[0];
                     return true;
                   });
                 }});
  // The second summand may be read again: once more into the next sum of its kind and block.
  all.push_back({"AddedTwice", "twice", [](const Plan& plan) {
                   return at_each_step(plan, [](Plan& p, std::size_t i) {
                     const Step step = p.steps[i];
                     if (step.verb != Verb::kAdd) return false;
                     p.values.push_back(p.values[static_cast<std::size_t>(step.out[0])]);
                     const auto sum = static_cast<ValueId>(p.values.size()) - 1;
                     replace_reads(p, step.out[0], sum);
                     p.steps.insert(p.steps.begin() + static_cast<std::ptrdiff_t>(i) + 1,
                                    Step{Verb::kAdd, {step.out[0], step.in[1]}, {sum}});
                     return true;
                   });
                 }});
  for (const std::size_t input : {3, 4}) {
    all.push_back({input == 3 ? "ForgottenQueryGradient" : "ForgottenKeyGradient", "never", [input](const Plan& plan) {
                     return at_each_step(plan, [input](Plan& p, std::size_t i) {
                       if (p.steps[i].verb != Verb::kAttendGrad || p.steps[i].in[input] == kNoValue) return false;
                       p.steps[i].in[input] = kNoValue;
                       return true;
                     });
                   }});
  }
  all.push_back(wrong_operand("OtherQueries", 0));
  all.push_back(wrong_operand("OtherKeys", 1));
  all.push_back(wrong_operand("OtherOutputGradient", 2));
  all.push_back(dropped_move("DroppedRotate", Verb::kRotate));
  all.push_back(dropped_move("DroppedGather", Verb::kGather));
  all.push_back(dropped_move("DroppedFetch", Verb::kFetch));
  all.push_back(dropped_move("DroppedReduceScatter", Verb::kReduceScatter));
  all.push_back(dropped_move("DroppedCombine", Verb::kCombine));
  all.push_back(dropped_move("DroppedSeqToHead", Verb::kSeqToHead));
  all.push_back(dropped_move("DroppedHeadToSeq", Verb::kHeadToSeq));
}

// Order, memory, and ends of the plan.
void append_order(std::vector<FaultKind>& all) {
  all.push_back({"LostStep", "before it is written", [](const Plan& plan) {
                   return at_each_step(plan, [](Plan& p, std::size_t i) {
                     erase_step(p, i);
                     return true;
                   });
                 }});
  all.push_back({"ReadsBeforeWriting", "before it is written", [](const Plan& plan) {
                   return at_each_step(plan, [](Plan& p, std::size_t i) {
                     if (i + 1 >= p.steps.size()) return false;
                     const std::vector<ValueId>& reads = p.steps[i + 1].in;
                     const bool needs = std::any_of(p.steps[i].out.begin(), p.steps[i].out.end(), [&](ValueId out) {
                       return out != kNoValue && std::find(reads.begin(), reads.end(), out) != reads.end();
                     });
                     std::swap(p.steps[i], p.steps[i + 1]);
                     return needs;
                   });
                 }});
  all.push_back({"WritesTwice", "written twice|not placed as it is fetched", [](const Plan& plan) {
                   return at_each_step(plan, [](Plan& p, std::size_t i) {
                     if (p.steps[i].out[0] == kNoValue) return false;
                     for (std::size_t before = 0; before < i; ++before) {
                       if (p.steps[before].out[0] == kNoValue) continue;
                       if (what(p, p.steps[before].out[0]) != what(p, p.steps[i].out[0])) continue;
                       p.steps[i].out[0] = p.steps[before].out[0];
                       return true;
                     }
                     return false;
                   });
                 }});
  // A reader comes after the step that has taken the memory.
  all.push_back({"EarlyOverwrite", "memory was given away", [](const Plan& plan) {
                   Plans broken;
                   for (std::size_t taker = 0; taker < plan.steps.size(); ++taker) {
                     for (std::size_t j = 0; j < plan.steps[taker].in.size(); ++j) {
                       const ValueId taken = plan.steps[taker].in[j];
                       if (taken == kNoValue || !consumes(plan.steps[taker], j)) continue;
                       broken.push_back(plan);  // read once more, by a move that nobody waits for
                       Plan& p = broken.back();
                       p.values.push_back({what(p, taken), {Placing::Kind::kGathered, taken, Axis::kRing}});
                       p.steps.insert(p.steps.begin() + static_cast<std::ptrdiff_t>(taker) + 1,
                                      Step{Verb::kGather, {taken}, {static_cast<ValueId>(p.values.size()) - 1}});
                     }
                   }
                   return broken;
                 }});
  all.push_back({"UnknownValue", "is no value|does not exist",
                 [](const Plan& plan) {
                   return at_each_step(plan, [](Plan& p, std::size_t i) {
                     (i % 2 == 0 ? p.steps[i].in : p.steps[i].out)[0] = static_cast<ValueId>(p.values.size());
                     return true;
                   });
                 },
                 true});
  all.push_back({"WrongKind", "does not take",
                 [](const Plan& plan) {
                   return at_each_step(plan, [](Plan& p, std::size_t i) {
                     if (!attends(p.steps[i])) return false;
                     std::swap(p.steps[i].in[0], p.steps[i].in[1]);
                     return true;
                   });
                 },
                 true});
  all.push_back({"WrongOutput", "", [](const Plan& plan) {
                   Plans broken;
                   for (std::size_t i = 0; i < plan.outputs.size(); ++i) {
                     for (ValueId other = 0; other < static_cast<ValueId>(plan.values.size()); ++other) {
                       if (other == plan.outputs[i] || what(plan, other) != what(plan, plan.outputs[i])) continue;
                       broken.push_back(plan);
                       broken.back().outputs[i] = other;
                     }
                   }
                   return broken;
                 }});
  all.push_back({"MissingOutput", "inputs and",
                 [](const Plan& plan) {
                   Plan broken = plan;
                   broken.outputs.pop_back();
                   return Plans{broken};
                 },
                 true});
}

}  // namespace

const std::vector<FaultKind>& fault_kinds() {
  static const std::vector<FaultKind> kinds = [] {
    std::vector<FaultKind> all;
    append_moves(all);
    append_folds(all);
    append_order(all);
    return all;
  }();
  return kinds;
}

}  // namespace dattn
