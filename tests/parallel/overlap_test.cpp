// The order that actions_of() predicts is the order in which a runner starts moves, waits for them and computes.
#include "parallel/overlap.h"

#include <map>

#include <gtest/gtest.h>

#include "parallel/comm/thread.h"
#include "parallel/run.h"
#include "tests/parallel/plan_run.h"
#include "tests/parallel/small_machine.h"

namespace dattn {
namespace {

using Log = std::shared_ptr<std::vector<Action>>;

// Notes the steps of a plan that are started and waited for.
class Recorder : public Communicator {
 public:
  Recorder(Communicator& inner, Log log) : inner_(inner), log_(std::move(log)) {}
  Recorder(std::unique_ptr<Communicator> inner, Log log) : owned_(std::move(inner)), inner_(*owned_), log_(std::move(log)) {}

  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  std::string_view name() const override { return inner_.name(); }
  Ticket start(std::span<const SendPart> sends, std::span<const RecvPart> receives, const OpLabel& label) override {
    log_->push_back({Action::Kind::kStart, static_cast<std::size_t>(label.step)});
    const Ticket ticket = inner_.start(sends, receives, label);
    steps_[ticket] = static_cast<std::size_t>(label.step);
    return ticket;
  }
  void wait(Ticket ticket) override {
    log_->push_back({Action::Kind::kWait, steps_.at(ticket)});
    inner_.wait(ticket);
  }
  std::unique_ptr<Communicator> split(std::span<const int> ranks, std::string_view name) override {
    return std::make_unique<Recorder>(inner_.split(ranks, name), log_);
  }
  void abort(const std::string& reason) noexcept override { inner_.abort(reason); }

 private:
  std::unique_ptr<Communicator> owned_;
  Communicator& inner_;
  Log log_;
  std::map<Ticket, std::size_t> steps_;
};

// Computes nothing; notes the next attend of the plan.
class Counter : public AttentionKernel {
 public:
  Counter(const Plan& plan, Log log) : log_(std::move(log)) {
    for (std::size_t i = 0; i < plan.steps.size(); ++i) {
      if (plan.steps[i].verb == Verb::kAttend || plan.steps[i].verb == Verb::kAttendGrad) attends_.push_back(i);
    }
  }
  std::string_view name() const override { return "counter"; }
  Support supports(const AttendTraits&) const override { return {}; }
  void attend(const AttendArgs&) const override { note(); }
  void attend_grad(const AttendGradArgs&) const override { note(); }

 private:
  void note() const { log_->push_back({Action::Kind::kCompute, attends_.at(next_++)}); }

  Log log_;
  std::vector<std::size_t> attends_;
  mutable std::size_t next_ = 0;
};

std::vector<Action> recorded(const Plan& plan, Communicator& world) {
  const auto log = std::make_shared<std::vector<Action>>();
  Recorder recorder(world, log);
  const Mesh mesh(recorder, plan.problem->mesh);
  const RankPlan mine = make_rank_plan(plan, world.rank());
  const Counter kernel(plan, log);
  const PlanInputs inputs(plan, mine);
  Runner(plan, mine, mesh, kernel).run(inputs.views, {});
  return *log;
}

std::vector<Action> predicted(const Plan& plan) {
  std::vector<Action> actions;
  for (const Action& action : actions_of(plan)) {
    const Verb verb = plan.steps[action.step].verb;
    if (is_move(verb) || verb == Verb::kAttend || verb == Verb::kAttendGrad) actions.push_back(action);
  }
  return actions;
}

std::string text(const std::vector<Action>& actions) {
  std::string text;
  for (const Action& action : actions) {
    text += (action.kind == Action::Kind::kStart  ? " start "
             : action.kind == Action::Kind::kWait ? " wait "
                                                  : " compute ") +
            std::to_string(action.step);
  }
  return text;
}

TEST(Overlap, ARingSendsOnBeforeItComputes) {
  const Plan plan = plan_of("ring", mesh_of(3), 12);
  EXPECT_EQ(text(actions_of(plan)), " start 1 compute 0 wait 1 start 3 compute 2 wait 3 compute 4 compute 5");
}

void expect_as_predicted(const Plan& plan) {
  run_thread_ranks(plan.problem->mesh.ranks(), {}, [&](Communicator& world) {
    EXPECT_EQ(text(recorded(plan, world)), text(predicted(plan))) << plan.strategy << " on rank " << world.rank();
  });
}

// The second attend writes into the memory that the rotation sends from.
TEST(Overlap, MemoryIsWrittenOnceItWasSent) {
  PlanBuilder builder("by hand", plan_of("ring", mesh_of(3), 12).problem);
  const ValueId state = builder.attend(builder.q(), builder.kv());
  builder.rotate(state, Axis::kRing);
  const ValueId more = builder.attend(builder.q(), builder.kv(), state);
  const ValueId result = builder.finish(more);
  const Plan plan = std::move(builder).build(result);
  EXPECT_EQ(text(actions_of(plan)), " compute 0 start 1 wait 1 compute 2 compute 3");
  expect_as_predicted(plan);
}

TEST(Overlap, TheRunnerDoesWhatIsPredicted) {
  for (const auto& [strategy, mesh] :
       {std::pair{"ring", mesh_of(2)}, std::pair{"ring", mesh_of(4)}, std::pair{"allgather", mesh_of(3)},
        std::pair{"ulysses", mesh_of(1, 4)}, std::pair{"hybrid", mesh_of(3, 2)}}) {
    const Plan forward = plan_of(strategy, mesh, 24), gradient = backward(forward);
    expect_as_predicted(forward);
    expect_as_predicted(gradient);
  }
}

TEST(Overlap, EveryStepOnce) {
  const Plan plan = backward(plan_of("hybrid", mesh_of(4, 2), 64));
  std::map<std::pair<Action::Kind, std::size_t>, int> count;
  for (const Action& action : actions_of(plan)) ++count[{action.kind, action.step}];
  for (std::size_t i = 0; i < plan.steps.size(); ++i) {
    const bool move = is_move(plan.steps[i].verb);
    EXPECT_EQ((count[{Action::Kind::kStart, i}]), move ? 1 : 0);
    EXPECT_EQ((count[{Action::Kind::kWait, i}]), move ? 1 : 0);
    EXPECT_EQ((count[{Action::Kind::kCompute, i}]), move ? 0 : 1);
  }
}

}  // namespace
}  // namespace dattn
