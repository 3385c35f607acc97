// Random calls, sensible and not: each is planned and proved, or refused with a text that says what is wrong. Nothing else may
// happen: no other error, no crash, nothing that takes long.
//   DATTN_SWEEP=full  100,000 calls in place of 2,000      DATTN_CALLS=n  n calls      DATTN_SEED=n  other calls
#include <chrono>
#include <cstdlib>
#include <iostream>
#include <map>
#include <mutex>
#include <regex>
#include <thread>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "core/base/error.h"
#include "parallel/message.h"
#include "parallel/strategy.h"
#include "parallel/verify.h"
#include "tests/conformance/random_call.h"
#include "tests/conformance/sweep.h"

namespace dattn::conformance {
namespace {

constexpr double kMostSeconds = 10;  // of one call; most take a millisecond
constexpr int kProvedRanks = 64;     // larger meshes, which only numbers that make no sense give, are planned and not proved

struct Tally {
  std::mutex mutex;
  std::size_t planned = 0, proved = 0;
  std::map<std::string, std::size_t> refused;  // by the first words of the reason
  double slowest_s = 0;
  std::string slowest;
};

// The reason without its numbers.
std::string reason_class(std::string text) {
  text = std::regex_replace(text, std::regex("^[^ ]*:[0-9]+:[0-9]+: "), "config: ");
  text = std::regex_replace(text, std::regex("'[^']*'|\\([^ ]*|-?[0-9.]+(e[+0-9]+)?"), "#");
  std::size_t end = 0;
  for (int words = 0; words < 6 && end != std::string::npos; ++words) end = text.find(' ', end + 1);
  return text.substr(0, end);
}

void expect_clear(const Error& error, const std::string& what) {
  static const std::regex kKeyOrValue("[0-9]|'|attention|mask|mesh|strategy|layout|shape|dtype");
  const std::string text = error.what();
  EXPECT_EQ(error.code(), ErrorCode::kBadInput) << text << "\n" << what;
  EXPECT_TRUE(std::regex_search(text, kKeyOrValue)) << "the refusal names no key and no value: '" << text << "'\n" << what;
}

// Bytes received are the sum of the pieces that come from others; over all ranks as much is sent as is received.
void expect_sums(const Plan& plan, const std::string& what) {
  const MeshShape& mesh = plan.problem->mesh;
  const AttentionShape& shape = plan.problem->shape;
  std::int64_t sent = 0, received = 0;
  for (int rank = 0; rank < mesh.ranks(); rank += mesh.ranks() <= 8 ? 1 : std::max(1, mesh.ranks() - 1)) {
    const RankPlan mine = make_rank_plan(plan, rank);
    std::int64_t of_rank = 0;
    for (std::size_t i = 0; i < plan.steps.size(); ++i) {
      const Step& step = plan.steps[i];
      if (!is_move(step.verb)) continue;
      const auto fields = message_fields(step.verb, plan.values[static_cast<std::size_t>(step.out[0])].what, shape);
      const int own = mesh.coordinate(rank, step.axis);
      const auto bytes = [&](const Piece& piece) {
        return piece.peer == own ? 0 : message_bytes(fields, shape.batch, std::span(&piece, 1));
      };
      for (const Piece& piece : mine.steps[i].sends) sent += bytes(piece);
      for (const Piece& piece : mine.steps[i].receives) of_rank += bytes(piece);
    }
    EXPECT_EQ(of_rank, mine.cost.bytes_received + mine.cost.stats_bytes) << "rank " << rank << "\n" << what;
    EXPECT_GE(mine.cost.peak_memory, 0) << what;
    EXPECT_GE(mine.flops(), 0) << what;
    received += of_rank;
  }
  if (mesh.ranks() <= 8) {
    EXPECT_EQ(sent, received) << what;
  }
}

void expect_proved(const Plan& plan, const std::string& what) {
  const Verdict verdict = verify(plan);
  EXPECT_TRUE(verdict.ok()) << verdict.problems[0] << "\n" << what;
  expect_sums(plan, what);
}

void judge(const RandomCall& call, bool as_text, Tally& tally) {
  const bool from_text = (as_text || call.planned) && call.shape.dtype != DType::kF64;  // which configs lack
  const std::string what = call.yaml();
  const auto start = std::chrono::steady_clock::now();
  std::string refusal;
  bool proved = false;
  try {
    const RandomCall asked = from_text ? read_call(what) : call;
    const Plan forward = make_plan(asked.mesh, asked.shape, asked.options);
    const Plan gradient = backward(forward);
    proved = forward.problem->mesh.ranks() <= kProvedRanks;
    if (proved) {
      expect_proved(forward, what);
      expect_proved(gradient, what);
    }
  } catch (const Error& error) {
    refusal = error.what();
    expect_clear(error, what);
  } catch (const std::exception& error) {
    ADD_FAILURE() << "an exception that is no Error: " << error.what() << "\n" << what;
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  EXPECT_LT(seconds, kMostSeconds) << what;
  const std::lock_guard lock(tally.mutex);
  if (seconds > tally.slowest_s) tally.slowest_s = seconds, tally.slowest = what;
  tally.proved += proved ? 1 : 0;
  if (refusal.empty()) {
    ++tally.planned;
  } else {
    ++tally.refused[reason_class(refusal)];
  }
}

std::size_t calls_wanted() {
  if (const char* calls = std::getenv("DATTN_CALLS")) return std::strtoull(calls, nullptr, 10);
  return full_sweep() ? 100'000 : 2'000;
}

TEST(Planning, RandomCallsArePlannedAndProvedOrRefusedClearly) {
  const std::size_t count = calls_wanted();
  const std::uint64_t seed = sweep_seed();
  Tally tally;
  constexpr std::size_t kThreads = 2;
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      RandomCalls calls(seed + t, kAnyCalls);
      for (std::size_t i = t; i < count; i += kThreads) judge(calls.next(), i % 3 == 0, tally);
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::cout << fmt::format("seed {}: {} of {} calls planned, {} proved, slowest {:.2f} s ({}); refused:\n", seed, tally.planned,
                           count, tally.proved, tally.slowest_s, tally.slowest.substr(0, 2000));
  for (const auto& [reason, times] : tally.refused) std::cout << fmt::format("{:7}  {}\n", times, reason);
  EXPECT_GE(tally.planned, count * 6 / 10) << "the calls are refused before anything is tested";
  EXPECT_GE(tally.proved, tally.planned * 9 / 10);
  EXPECT_GE(tally.refused.size(), 20u) << "few kinds of nonsense are drawn";
}

}  // namespace
}  // namespace dattn::conformance
