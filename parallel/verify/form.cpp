// What any plan must be before its blocks can be looked at: numbers in range, verbs with values of their kinds, an order
// in which values are written before they are read, and a layout that holds each position once.
#include <algorithm>

#include <fmt/format.h>

#include "parallel/verify/proof.h"

namespace dattn::proof {
namespace {

class Form {
 public:
  Form(const Plan& plan, Findings& findings) : plan_(plan), findings_(findings) {}

  void check() {
    for (std::size_t i = 0; i < plan_.steps.size(); ++i) check_numbers(i, plan_.steps[i]);
    check_ends();
    if (findings_.any()) return;
    for (std::size_t i = 0; i < plan_.values.size(); ++i) check_placing(static_cast<ValueId>(i));
    if (findings_.any()) return;
    for (std::size_t i = 0; i < plan_.steps.size(); ++i) check_verb(i, plan_.steps[i]);
  }

 private:
  bool is_value(ValueId value) const { return value >= 0 && static_cast<std::size_t>(value) < plan_.values.size(); }
  static bool is_axis(Axis axis) { return std::find(kAxes.begin(), kAxes.end(), axis) != kAxes.end(); }
  What what(ValueId value) const { return plan_.values[static_cast<std::size_t>(value)].what; }

  void check_numbers(std::size_t index, const Step& step) {
    if (!is_axis(step.axis)) findings_.add(kEveryRank, index, "there is no axis {}", static_cast<int>(step.axis));
    for (std::size_t j = 0; j < step.in.size(); ++j) {
      const bool may_lack = step.verb == Verb::kAttendGrad && j >= 3 && step.in[j] == kNoValue;
      if (!may_lack && !is_value(step.in[j])) findings_.add(kEveryRank, index, "input {} is no value: {}", j, step.in[j]);
    }
    for (std::size_t j = 0; j < step.out.size(); ++j) {  // a gradient that is not wanted has no output, and collects nothing
      const bool unwanted = step.verb == Verb::kAttendGrad && step.out[j] == kNoValue && step.in[j + 3] == kNoValue &&
                            step.out[1 - j] != kNoValue;
      if (!unwanted && !is_value(step.out[j]))
        findings_.add(kEveryRank, index, "it writes value {}, which does not exist", step.out[j]);
    }
  }

  // The inputs are shards of q, kv and, in a backward plan, grad_out; the outputs are the result, or dq and dkv.
  void check_ends() {
    const auto kinds = [this](const std::vector<ValueId>& values) {
      std::vector<What> all;
      for (const ValueId value : values) {
        if (is_value(value)) all.push_back(what(value));
      }
      return all;
    };
    using Kinds = std::vector<What>;
    const Kinds in = kinds(plan_.inputs), out = kinds(plan_.outputs);
    const bool forward = in == Kinds{What::kQuery, What::kKeyValue} && out == Kinds{What::kResult};
    const bool gradient =
        in == Kinds{What::kQuery, What::kKeyValue, What::kGradOut} && out == Kinds{What::kGradQuery, What::kGradKeyValue};
    if (!forward && !gradient) {
      return findings_.add(kEveryRank, kNoStep,
                           "the plan has {} inputs and {} outputs; a forward plan makes out of q and kv, a "
                           "backward plan dq and dkv of q, kv and dout",
                           plan_.inputs.size(), plan_.outputs.size());
    }
    for (const ValueId value : plan_.inputs) {
      const Placing& placing = plan_.values[static_cast<std::size_t>(value)].placing;
      const bool like_q = placing.kind == Placing::Kind::kLike && placing.base == plan_.inputs[0] && value != placing.base;
      if (placing.kind != Placing::Kind::kShard && !like_q)
        findings_.add(kEveryRank, kNoStep, "input {} is no shard", plan_.value_name(value));
    }
  }

  void check_placing(ValueId value) {
    const Value& v = plan_.values[static_cast<std::size_t>(value)];
    const Placing& placing = v.placing;
    const std::size_t step = writer(value);
    if (placing.kind == Placing::Kind::kShard) return;
    if (placing.base < 0 || placing.base >= value)
      return findings_.add(kEveryRank, step, "{} is placed by a value that comes later", plan_.value_name(value));
    if (!is_axis(placing.axis)) return findings_.add(kEveryRank, step, "there is no axis {}", static_cast<int>(placing.axis));
    if (is_key_side(v.what) != is_key_side(what(placing.base))) {
      return findings_.add(kEveryRank, step, "{} is placed by {}, of the other side of the attention", plan_.value_name(value),
                           plan_.value_name(placing.base));
    }
    if (placing.kind != Placing::Kind::kFetched) return;
    if (placing.wanted < 0 || placing.wanted >= value || is_key_side(what(placing.wanted)) || !is_key_side(v.what))
      findings_.add(kEveryRank, step, "{} is fetched, but not as keys for queries", plan_.value_name(value));
  }

  std::size_t writer(ValueId value) const {
    for (std::size_t i = 0; i < plan_.steps.size(); ++i) {
      if (std::find(plan_.steps[i].out.begin(), plan_.steps[i].out.end(), value) != plan_.steps[i].out.end()) return i;
    }
    return kNoStep;
  }

  void check_verb(std::size_t index, const Step& step) {
    std::vector<What> in, out;
    for (const ValueId value : step.in) in.push_back(value == kNoValue ? What::kQuery : what(value));
    for (const ValueId value : step.out) out.push_back(value == kNoValue ? What::kQuery : what(value));
    if (step.verb == Verb::kAttendGrad) {  // gradients that it lacks stand for themselves
      for (std::size_t j = 3; j < in.size(); ++j) {
        if (step.in[j] == kNoValue) in[j] = j == 3 ? What::kGradQuery : What::kGradKeyValue;
      }
      for (std::size_t j = 0; j < out.size(); ++j) {
        if (step.out[j] == kNoValue) out[j] = j == 0 ? What::kGradQuery : What::kGradKeyValue;
      }
    }
    if (!takes(step.verb, in, out)) {
      std::string names;
      for (const ValueId value : step.in) names += fmt::format("{}{}", names.empty() ? "" : ", ", plan_.value_name(value));
      return findings_.add(kEveryRank, index, "it does not take ({})", names);
    }
    if (step.verb == Verb::kRotate && step.shift % plan_.problem->mesh.size(step.axis) == 0) {
      findings_.add(kEveryRank, index, "{} moves by {} on {} ranks, back to where it is (positions {} on rank 0)",
                    plan_.value_name(step.in[0]), step.shift, plan_.problem->mesh.size(step.axis),
                    text_of(plan_.rows(step.in[0], 0)));
    }
    if (step.verb != Verb::kFetch) return;
    const Placing& placing = plan_.values[static_cast<std::size_t>(step.out[0])].placing;
    const bool as_placed = placing.kind == Placing::Kind::kFetched && placing.base == step.in[0] && placing.axis == step.axis &&
                           placing.shift == step.shift;
    if (as_placed) return;
    findings_.add(kEveryRank, index, "{} is not placed as it is fetched (positions {} on rank 0)",
                  plan_.value_name(step.out[0]), text_of(plan_.rows(step.out[0], 0)));
  }

  static bool takes(Verb verb, const std::vector<What>& in, const std::vector<What>& out) {
    using Kinds = std::vector<What>;
    const bool gradient = in.empty() ? false : in[0] == What::kGradQuery || in[0] == What::kGradKeyValue;
    const bool state = !in.empty() && in[0] == What::kState, result = !in.empty() && in[0] == What::kResult;
    switch (verb) {
      case Verb::kAttend:
        return (in == Kinds{What::kQuery, What::kKeyValue} || in == Kinds{What::kQuery, What::kKeyValue, What::kState}) &&
               out == Kinds{What::kState};
      case Verb::kFinish: return in == Kinds{What::kState} && out == Kinds{What::kResult};
      case Verb::kAttendGrad:
        return in == Kinds{What::kQuery, What::kKeyValue, What::kGradOut, What::kGradQuery, What::kGradKeyValue} &&
               out == Kinds{What::kGradQuery, What::kGradKeyValue};
      case Verb::kAdd: return in.size() == 2 && in[0] == in[1] && out == Kinds{in[0]} && (state || gradient);
      default: break;
    }
    if (in.size() != 1 || out != in) return false;
    if (verb == Verb::kFetch) return in[0] == What::kKeyValue;
    if (verb == Verb::kCombine) return state;
    if (verb == Verb::kReduceScatter) return gradient;
    return verb != Verb::kHeadToSeq || gradient || result;
  }

  const Plan& plan_;
  Findings& findings_;
};

}  // namespace

std::string Findings::place(int rank, std::size_t step) const {
  const std::string who = rank == kEveryRank ? "every rank" : fmt::format("rank {}", rank);
  if (step >= plan_.steps.size()) return fmt::format("{}, at the end: ", who);
  return fmt::format("{}, step {} {}: ", who, step, name_of(plan_.steps[step].verb));
}

std::string text_of(const Positions& rows) {
  constexpr std::size_t kShown = 4;
  if (rows.runs().size() <= kShown) return rows.text();
  const std::vector<Run> first(rows.runs().begin(), rows.runs().begin() + kShown);
  return fmt::format("{} and {} more runs", Positions(first).text(), rows.runs().size() - kShown);
}

std::string text_of(const Interval& heads) { return fmt::format("[{}, {})", heads.begin, heads.end); }

Positions missing_from(const Positions& held, const Positions& in) {
  std::vector<Interval> found;
  for (const SharedRows& rows : shared_rows(held, in)) {
    if (rows.step_a == 1) {
      found.push_back({rows.row_a, rows.row_a + rows.count});
    } else {
      for (std::int64_t i = 0; i < rows.count; ++i)
        found.push_back({rows.row_a + i * rows.step_a, rows.row_a + i * rows.step_a + 1});
    }
  }
  std::sort(found.begin(), found.end(), [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  std::vector<Run> runs;
  std::int64_t next = 0;
  found.push_back({held.count(), held.count()});
  for (const Interval& part : found) {
    if (part.begin > next) {
      const Positions gap = held.rows(next, part.begin - next);
      runs.insert(runs.end(), gap.runs().begin(), gap.runs().end());
    }
    next = std::max(next, part.end);
  }
  return Positions(runs);
}

void check_form(const Plan& plan, Findings& findings) { Form(plan, findings).check(); }

void check_order(const Plan& plan, Findings& findings) {
  std::vector<bool> written(plan.values.size(), false), given_away(plan.values.size(), false);
  for (const ValueId value : plan.inputs) written[static_cast<std::size_t>(value)] = true;
  const auto problem = [&](std::size_t step, ValueId value, const char* what) {
    findings.add(kEveryRank, step, "{} {} (positions {} on rank 0)", plan.value_name(value), what,
                 text_of(plan.rows(value, 0)));
  };
  const auto read = [&](ValueId value, std::size_t step) {
    if (value == kNoValue) return;
    if (!written[static_cast<std::size_t>(value)]) problem(step, value, "is read before it is written");
    if (given_away[static_cast<std::size_t>(value)]) problem(step, value, "is read after its memory was given away");
  };
  for (std::size_t i = 0; i < plan.steps.size(); ++i) {
    const Step& step = plan.steps[i];
    for (const ValueId value : step.in) read(value, i);
    for (std::size_t j = 0; j < step.in.size(); ++j) {
      const ValueId value = step.in[j];
      if (value == kNoValue || !consumes(step, j)) continue;
      given_away[static_cast<std::size_t>(value)] = true;
      if (std::count(step.in.begin(), step.in.end(), value) > 1) problem(i, value, "is read and overwritten in one step");
    }
    for (const ValueId value : step.out) {
      if (value == kNoValue) continue;
      if (written[static_cast<std::size_t>(value)]) problem(i, value, "is written twice");
      written[static_cast<std::size_t>(value)] = true;
    }
  }
  for (const ValueId value : plan.outputs) read(value, kNoStep);
}

// Runs of one step are compared within their residue; where steps differ, strided runs are taken one position at a time.
std::string partition_fault(const std::vector<Positions>& parts, std::int64_t length) {
  std::int64_t step = 1;
  bool equal = true;
  for (const Positions& part : parts) {
    for (const Run& run : part.runs()) {
      if (run.count == 1) continue;
      equal = equal && (step == 1 || run.step == 1 || run.step == step);
      step = std::max(step, run.step);
    }
  }
  if (!equal) step = 1;
  std::vector<Run> all;  // in units of `step`, by residue
  for (const Positions& part : parts) {
    for (const Run& run : part.runs()) {
      if (run.count == 1 || run.step == step) {
        all.push_back(run);
      } else {
        for (std::int64_t row = 0; row < run.count; ++row) all.push_back({run.at(row), 1, 1});
      }
    }
  }
  const auto key = [step](const Run& run) { return std::pair(run.begin % step, run.begin); };
  std::sort(all.begin(), all.end(), [&](const Run& a, const Run& b) { return key(a) < key(b); });
  auto run = all.begin();
  for (std::int64_t residue = 0; residue < std::min(step, length); ++residue) {
    std::int64_t next = residue;
    for (; run != all.end() && run->begin % step == residue; ++run) {
      if (run->begin < next) return fmt::format("position {} is held twice", run->begin);
      if (run->begin > next) return fmt::format("position {} is held by nobody", next);
      next = run->begin + run->count * step;
    }
    if (next < length) return fmt::format("position {} is held by nobody", next);
    if (next >= length + step) return fmt::format("position {} lies past the end {}", next - step, length);
  }
  return run == all.end() ? "" : fmt::format("position {} lies past the end {}", run->begin, length);
}

void check_layout(const Plan& plan, Findings& findings) {
  const Problem& problem = *plan.problem;
  const int parts = problem.mesh.sequence_parts();
  for (const bool key_side : {false, true}) {
    const std::int64_t length = key_side ? problem.shape.seq_kv : problem.shape.seq_q;
    std::vector<Positions> shards;
    for (int i = 0; i < parts; ++i) shards.push_back(problem.part_rows(key_side, i));
    const std::string fault = partition_fault(shards, length);
    if (!fault.empty())
      findings.add(kEveryRank, kNoStep, "layout {}: {} {}", name_of(problem.layout), key_side ? "key" : "query", fault);
  }
}

}  // namespace dattn::proof
