// Fault seeding: verify() finds every broken plan, and says where.
#include <algorithm>
#include <map>
#include <regex>

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "parallel/strategy.h"
#include "parallel/verify.h"
#include "parallel/verify/proof.h"
#include "tests/parallel/plan_faults.h"

namespace dattn {
namespace {

struct Setting {
  std::string strategy;
  std::array<int, 4> sizes;  // of ring_outer, ring, rows, ulysses
  Mask mask = Mask::causal();
};

const std::vector<Setting> kSettings{{"ring", {1, 4, 1, 1}},        {"ring_q", {1, 4, 1, 1}},
                                     {"double_ring", {2, 3, 1, 1}}, {"allgather", {1, 3, 1, 2}},
                                     {"ulysses", {1, 1, 1, 3}},     {"hybrid", {1, 3, 1, 2}},
                                     {"grid", {1, 3, 2, 2}},        {"grid", {2, 2, 2, 1}},
                                     {"grid_gather", {1, 3, 2, 2}}, {"invariant", {1, 2, 1, 2}},
                                     {"tree", {1, 2, 2, 1}},        {"tree", {2, 1, 1, 2}},
                                     {"halo", {1, 3, 1, 2}},        {"halo", {1, 4, 1, 2}, Mask::window(5, 4)},
                                     {"fetch", {1, 3, 1, 1}},       {"fetch", {1, 4, 1, 2}, Mask::window(9, 9)}};

Plan plan_of(const Setting& setting, const AttentionShape& shape, AttentionOptions options) {
  MeshShape mesh;
  for (std::size_t i = 0; i < kSequenceAxes.size(); ++i) mesh.set(kSequenceAxes[i], setting.sizes[i]);
  options.strategy = setting.strategy;
  return make_plan(mesh, shape, options);
}

Plan small_plan_of(const Setting& setting) {
  AttentionOptions options;
  options.mask = setting.mask;
  return plan_of(setting, {1, 53, 53, 6, 3, 8, 8, DType::kF32}, options);
}

const std::regex kPlace("(rank [0-9]+|every rank), (step [0-9]+ [a-z_]+|at the end): .*");

bool one_matches(const Verdict& verdict, const std::string& expression) {
  const std::regex wanted(expression);
  return std::any_of(verdict.problems.begin(), verdict.problems.end(),
                     [&](const std::string& problem) { return std::regex_search(problem, wanted); });
}

std::string first_problem(const Plan& plan) {
  const Verdict verdict = verify(plan);
  return verdict.ok() ? "none" : verdict.problems[0];
}

class FaultSeeding : public testing::TestWithParam<FaultKind> {};

TEST_P(FaultSeeding, IsFoundInEveryStrategy) {
  int seeded = 0;
  for (const Setting& setting : kSettings) {
    const Plan forward = small_plan_of(setting);
    for (const Plan& right : {forward, backward(forward)}) {
      ASSERT_TRUE(verify(right).ok()) << right.text() << first_problem(right);
      for (const Plan& broken : GetParam().variants(right)) {
        ++seeded;
        const Verdict verdict = verify(broken);
        ASSERT_FALSE(verdict.ok()) << setting.strategy << " on " << broken.problem->mesh.text() << "\n" << broken.text();
        for (const std::string& problem : verdict.problems) EXPECT_TRUE(std::regex_match(problem, kPlace)) << problem;
        EXPECT_TRUE(GetParam().formal || one_matches(verdict, "positions ([\\[0-9]|none)")) << verdict.problems[0];
        EXPECT_TRUE(one_matches(verdict, GetParam().says)) << "wanted: " << GetParam().says << "\ngot: " << verdict.problems[0];
      }
    }
  }
  EXPECT_GT(seeded, 0);
  RecordProperty("broken_plans", seeded);
}

INSTANTIATE_TEST_SUITE_P(Kinds, FaultSeeding, testing::ValuesIn(fault_kinds()),
                         [](const auto& kind) { return kind.param.name; });

TEST(FaultSeeding, NamesRankStepAndSmallestRange) {
  Plan plan = plan_of({"ring", {1, 4, 1, 1}}, {1, 64, 64, 2, 2, 8, 8, DType::kF32}, {});  // shards of two chunks of 8
  const Plan right = plan;
  ASSERT_EQ(plan.steps[4].verb, Verb::kAttend);
  plan.steps[4].in[1] = plan.steps[2].in[1];  // the second hop's keys once more instead of the third's
  const std::vector<std::string> problems = verify(plan).problems;
  ASSERT_GE(problems.size(), 2U);
  EXPECT_EQ(problems[0],
            "rank 0, step 7 finish: out positions [56,64) see key positions [16,24) never, heads [0, 2); no step "
            "attends them");
  EXPECT_EQ(problems[1],
            "rank 0, step 4 attend: state2 positions [56,64) see key positions [24,32) twice, before in step 2 on "
            "rank 0; heads [0, 2) of out on rank 0");
  plan = right;
  plan.steps[3].shift = 2;
  EXPECT_EQ(first_problem(plan), "rank 0, step 3 rotate: kv2 holds positions [16,24) [40,48) where kv1 on rank 2 does not");
  plan = right;
  plan.steps[2].in.pop_back();
  EXPECT_EQ(
      first_problem(plan),
      "rank 0, step 7 finish: out positions [0,8) see key positions [0,8) never, heads [0, 2); what step 0 attends on rank "
      "0 does not get here");
}

// Any one fault of any kind, anywhere in any plan in which each pair of shards has visible pairs.
RC_GTEST_PROP(FaultSeeding, AnySingleFaultIsFound, ()) {
  Setting setting = *rc::gen::elementOf(kSettings);
  if (setting.strategy == "halo") setting.sizes[1] = 3;  // neighbours are all there are
  const bool striped = *rc::gen::arbitrary<bool>(), full = *rc::gen::arbitrary<bool>();
  AttentionOptions options;
  options.mask = full ? Mask::full() : Mask::causal();
  options.layout = striped ? Layout::kStriped : full && *rc::gen::arbitrary<bool>() ? Layout::kContiguous : Layout::kZigzag;
  const std::int64_t length = *rc::gen::inRange<std::int64_t>(40, 90), group = *rc::gen::inRange<std::int64_t>(1, 4);
  const std::int64_t kv_heads = *rc::gen::inRange<std::int64_t>(3, 5);
  const Plan forward = plan_of(setting, {1, length, length, group * kv_heads, kv_heads, 8, 8, DType::kF32}, options);
  const Plan right = *rc::gen::arbitrary<bool>() ? backward(forward) : forward;
  RC_ASSERT(verify(right).ok());
  const std::vector<Plan> broken = (*rc::gen::elementOf(fault_kinds())).variants(right);
  RC_PRE(!broken.empty());
  const Plan& one = broken[static_cast<std::size_t>(*rc::gen::inRange<int>(0, static_cast<int>(broken.size())))];
  RC_LOG(one.text());
  RC_ASSERT(!verify(one).ok());
}

// Faults that no change of a plan can make: in what is worked out of it.
TEST(FaultSeeding, BrokenPromisesOfARankAreFound) {
  const Plan plan = plan_of({"ring", {1, 4, 1, 1}}, {1, 64, 64, 2, 2, 8, 8, DType::kF32}, {});
  const auto problems_of = [&](const std::function<void(RankPlan&)>& change) {
    RankPlan mine = make_rank_plan(plan, 2);
    change(mine);
    proof::Findings findings(plan);
    proof::Blocks blocks(plan);
    proof::check_rank(plan, blocks, mine, findings);
    return std::move(findings).problems();
  };
  EXPECT_TRUE(problems_of([](RankPlan&) {}).empty());
  const std::vector<std::function<void(RankPlan&)>> forgetting{
      [](RankPlan& mine) { mine.cost.values_memory -= 1; },
      [](RankPlan& mine) { mine.cost.peak_memory = mine.cost.values_memory - 1; }};
  for (const auto& change : forgetting) {
    const auto memory = problems_of(change);
    ASSERT_EQ(memory.size(), 1U);
    EXPECT_NE(memory[0].find("rank 2, step 3 rotate: the values alive need"), std::string::npos) << memory[0];
  }
  const std::string message = "rank 2, step 1 rotate: its messages are not the whole of kv (positions [16,24) [40,48))";
  const std::vector<std::string> wanted{message};
  EXPECT_EQ(problems_of([](RankPlan& mine) { mine.steps[1].sends.clear(); }), wanted);
  EXPECT_EQ(problems_of([](RankPlan& mine) { mine.steps[1].sends[0].peer = 1; }), wanted);
  EXPECT_EQ(problems_of([](RankPlan& mine) { mine.steps[1].receives[0].rows -= 1; }), wanted);
  EXPECT_EQ(problems_of([](RankPlan& mine) { mine.steps[1].receives[0].heads.end -= 1; }), wanted);
}

// The first of a rank's pieces of several rows that goes to another rank; the number of pieces where there is none.
std::size_t breakable(const std::vector<Piece>& pieces, int own) {
  const auto goes = [own](const Piece& piece) { return piece.peer != own && piece.rows > 1; };
  return static_cast<std::size_t>(std::find_if(pieces.begin(), pieces.end(), goes) - pieces.begin());
}

// One piece of one message, on one rank, in every move of every strategy: to the wrong peer, of wrong rows or heads, or lost.
TEST(FaultSeeding, BrokenMessagesAreFoundInEveryStrategy) {
  using Change = std::function<void(std::vector<Piece>&, std::size_t)>;
  std::map<std::string, int> seeded;
  for (const Setting& setting : kSettings) {
    const Plan forward = small_plan_of(setting);
    for (const Plan& plan : {forward, backward(forward)}) {
      for (std::size_t i = 0; i < plan.steps.size(); ++i) {
        const Step& step = plan.steps[i];
        const int parts = plan.problem->mesh.size(step.axis), rank = plan.problem->mesh.neighbour(0, step.axis, 1);
        if (!is_move(step.verb)) continue;
        const RankStep right = make_rank_step(plan, i, rank);
        const std::size_t at = breakable(right.sends, 1);
        if (at == right.sends.size()) continue;
        const Piece& sent = right.sends[at];
        const auto problems_of = [&](const Change& change) {
          proof::Findings findings(plan);
          proof::Blocks blocks(plan);
          if (step.verb == Verb::kRotate) {
            RankPlan mine = make_rank_plan(plan, rank);
            change(mine.steps[i].sends, at);
            proof::check_rank(plan, blocks, mine, findings);
          } else {
            proof::check_pieces(plan, blocks, findings, [&](const Plan& of, std::size_t number, int on) {
              RankStep part = make_rank_step(of, number, on);
              if (number == i && on == rank) change(part.sends, at);
              return part;
            });
          }
          return std::move(findings).problems();
        };
        const int to = plan.problem->mesh.neighbour(rank, step.axis, sent.peer);
        const auto rows = [&](const Piece& piece) {
          return proof::text_of(plan.rows(step.in[0], rank).rows(piece.row, piece.rows, piece.step));
        };
        const std::string sender = fmt::format("rank {}, step {} {}: ", rank, i, name_of(step.verb));
        const std::string receiver = fmt::format("rank {}, step {} {}: ", to, i, name_of(step.verb));
        const std::string lost =
            step.verb == Verb::kRotate
                ? fmt::format("{}its messages are not the whole of {} (positions {})", sender, plan.value_name(step.in[0]),
                              proof::text_of(plan.rows(step.in[0], rank)))
                : fmt::format("{}expects positions {} heads {}", receiver, rows(sent), proof::text_of(sent.heads));
        const auto wrong = [&](const Piece& piece) {
          if (step.verb == Verb::kRotate) return lost;
          return fmt::format("{} from rank {}, which sends positions {} heads {}", lost, rank, rows(piece),
                             proof::text_of(piece.heads));
        };
        const auto expect = [&](const std::string& problem, const Change& change) {
          const std::vector<std::string> problems = problems_of(change);
          ASSERT_EQ(problems.size(), 1U) << setting.strategy << " on " << plan.problem->mesh.text() << ": " << problem;
          EXPECT_EQ(problems[0].substr(0, problem.size()), problem) << setting.strategy;
          ++seeded[setting.strategy];
        };
        Piece fewer = sent, later = sent, no_head = sent;
        fewer.rows -= 1;
        later.row += later.step, later.rows -= 1;
        no_head.heads.end -= 1;
        for (const Piece& piece : {fewer, later, no_head})
          expect(wrong(piece), [&](std::vector<Piece>& sends, std::size_t one) { sends[one] = piece; });
        expect(lost, [](std::vector<Piece>& sends, std::size_t one) {
          sends.erase(sends.begin() + static_cast<std::ptrdiff_t>(one));
        });
        if (parts > 2)
          expect(step.verb == Verb::kRotate ? lost : "rank ",
                 [&](std::vector<Piece>& sends, std::size_t one) { sends[one].peer = around(sent.peer + 1, parts); });
      }
    }
  }
  for (const Setting& setting : kSettings) EXPECT_GE(seeded[setting.strategy], 8) << setting.strategy;
}

TEST(FaultSeeding, BrokenLayoutsAreFound) {
  using proof::partition_fault;
  const auto range = Positions::range;
  EXPECT_EQ(partition_fault({range(4, 8), range(0, 4)}, 8), "");
  EXPECT_EQ(partition_fault({range(0, 5), range(4, 8)}, 8), "position 4 is held twice");
  EXPECT_EQ(partition_fault({range(0, 3), range(4, 8)}, 8), "position 3 is held by nobody");
  EXPECT_EQ(partition_fault({range(0, 7)}, 8), "position 7 is held by nobody");
  EXPECT_EQ(partition_fault({range(0, 9)}, 8), "position 8 lies past the end 8");
  const Positions even({{0, 4, 2}}), odd({{1, 4, 2}}), late({{3, 3, 2}});
  EXPECT_EQ(partition_fault({even, odd}, 8), "");
  EXPECT_EQ(partition_fault({even, late}, 8), "position 1 is held by nobody");
  EXPECT_EQ(partition_fault({even, odd, range(5, 6)}, 8), "position 5 is held twice");
  EXPECT_EQ(partition_fault({Positions({{0, 3, 3}}), Positions({{1, 3, 2}}), range(2, 3), range(4, 5), range(7, 8)}, 8),
            "position 3 is held twice");
  EXPECT_EQ(partition_fault({}, 0), "");
}

}  // namespace
}  // namespace dattn
