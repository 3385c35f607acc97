// The formulas of docs/ALGORITHMS.md, forward and backward, against what plans count: bytes and statistics exactly, as means
// over the ranks, memory up to the statistics in it. A formula that changes there changes here.
#include <algorithm>
#include <functional>
#include <string>

#include <gtest/gtest.h>

#include "parallel/plan.h"
#include "parallel/rank_plan.h"
#include "parallel/strategy.h"
#include "tests/parallel/mesh_of.h"

namespace dattn {
namespace {

constexpr std::int64_t kBatch = 2, kDim = 64;

// The letters of the page.
struct Letters {
  int u = 1, a = 1, b = 1;  // ulysses, rows, ring (with ring_outer)
  double h = 8, k = 2, e = 2;
  double kk = 2;  // K': KV heads after replication to u

  double t() const { return a * b; }
  double p() const { return u * t(); }
  double turned() const { return (u - 1.0) / u; }  // of an all-to-all
};

// What a rank receives, or holds, of B S D / P: elements of the storage type and of fp32; of B S / P: statistics, fp32.
struct Amount {
  double storage = 0, sums = 0, statistics = 0;

  double bytes(double e) const { return storage * e + sums * 4; }
  Amount operator+(const Amount& other) const {
    return {storage + other.storage, sums + other.sums, statistics + other.statistics};
  }
};

using Formula = std::function<Amount(const Letters&)>;

struct Formulas {
  Formula forward, backward;                // received
  Formula forward_memory, backward_memory;  // held at the worst moment, inputs not counted, statistics left out
};

Amount turn_forward(const Letters& l) { return {(2 * l.h + 2 * l.kk) * l.turned(), 0, l.h * l.turned()}; }
Amount turn_backward(const Letters& l) {
  return {(2 * l.h + 2 * l.kk) * l.turned(), (l.h + 2 * l.kk) * l.turned(), 2 * l.h * l.turned()};
}

// kv of t ranks, and its gradient, inside ulysses.
Formulas moving_kv(Formula forward_memory, Formula backward_memory) {
  return {[](const Letters& l) { return turn_forward(l) + Amount{2 * l.kk * (l.t() - 1)}; },
          [](const Letters& l) {
            return turn_backward(l) + Amount{2 * l.kk * (l.t() - 1), 2 * l.kk * (l.t() - 1)};
          },
          std::move(forward_memory), std::move(backward_memory)};
}

Formulas ring() {
  return moving_kv(
      [](const Letters& l) {
        return Amount{4 * l.k, l.h};
      },
      [](const Letters& l) {
        return Amount{2 * l.k, l.h + 4 * l.k};
      });
}

Formulas double_ring() {
  return moving_kv(
      [](const Letters& l) {
        return Amount{6 * l.k, l.h};
      },
      [](const Letters& l) {
        return Amount{4 * l.k, l.h + 8 * l.k};
      });
}

Formulas allgather() {
  return moving_kv(
      [](const Letters& l) {
        return Amount{2 * l.k * l.b, l.h};
      },
      [](const Letters& l) {
        return Amount{2 * l.k * l.b, l.h + 2 * l.k * l.b};
      });
}

Formulas hybrid() {
  return moving_kv(
      [](const Letters& l) {
        return Amount{l.h + 4 * l.kk, l.h};
      },
      [](const Letters& l) {
        return Amount{2 * l.h + 4 * l.kk, l.h + 4 * l.kk};
      });
}

Formulas ulysses() {
  return {turn_forward, turn_backward,
          [](const Letters& l) {
            return Amount{l.h + 2 * l.kk, l.h};
          },
          [](const Letters& l) {
            return Amount{2 * l.h + 2 * l.kk, l.h + 2 * l.kk};
          }};
}

Formulas ring_q() {
  return {[](const Letters& l) {
            return Amount{l.h * (l.b - 1), l.h * (l.b - 1), l.h * (l.b - 1)};
          },
          [](const Letters& l) {
            return Amount{2 * l.h * (l.b - 1), l.h * (l.b - 1), 2 * l.h * (l.b - 1)};
          },
          [](const Letters& l) {
            return Amount{l.h, 3 * l.h};
          },
          [](const Letters& l) {
            return Amount{2 * l.h, 2 * l.h + 2 * l.k};
          }};
}

Formulas grid() {
  return {[](const Letters& l) {
            return turn_forward(l) + Amount{2 * l.h * (l.a - 1) + 2 * l.kk * (l.b - 1), 0, l.h * (l.a - 1)};
          },
          [](const Letters& l) {
            return turn_backward(l) + Amount{2 * l.h * (l.a - 1) + 2 * l.kk * (l.b - 1), l.h * (l.a - 1) + 2 * l.kk * (l.b - 1),
                                             2 * l.h * (l.a - 1)};
          },
          [](const Letters& l) {
            return Amount{l.a * l.h + 4 * l.k, l.a * l.h};
          },
          [](const Letters& l) {
            return Amount{2 * l.a * l.h + 2 * l.k, l.a * l.h + 4 * l.k};
          }};
}

Formulas grid_gather() {
  Formulas formulas = grid();
  formulas.forward_memory = [](const Letters& l) { return Amount{l.a * l.h + 2 * l.k * l.b, l.a * l.h}; };
  formulas.backward_memory = [](const Letters& l) { return Amount{2 * l.a * l.h + 2 * l.k * l.b, l.a * l.h + 2 * l.k * l.b}; };
  return formulas;
}

Formulas invariant() {
  return {[](const Letters& l) { return Amount{2 * l.k * (l.p() - 1)}; },
          [](const Letters& l) {
            return Amount{2 * l.k * (l.p() - 1) + 2 * l.h * (l.p() - 1), 0, 2 * l.h * (l.p() - 1)};
          },
          [](const Letters& l) {
            return Amount{2 * l.k * l.p(), l.h};
          },
          [](const Letters& l) {
            return Amount{2 * l.h * l.p(), l.h + 2 * l.k};
          }};
}

Formulas tree() {
  return {[](const Letters& l) {
            return turn_forward(l) + Amount{2 * l.h * (l.t() - 1), 0, l.h * (l.t() - 1)};
          },
          [](const Letters& l) {
            return turn_backward(l) + Amount{2 * l.h * (l.t() - 1), l.h * (l.t() - 1), 2 * l.h * (l.t() - 1)};
          },
          [](const Letters& l) {
            return Amount{l.b * l.h, l.b * l.h};
          },
          [](const Letters& l) {
            return Amount{2 * l.b * l.h, l.b * l.h + 2 * l.k};
          }};
}

struct Counted {
  double bytes = 0, statistics = 0, memory = 0;  // means over the ranks
};

Counted counted(const Plan& plan) {
  const int ranks = plan.problem->mesh.ranks();
  Counted mean;
  for (int rank = 0; rank < ranks; ++rank) {
    const RankCost cost = make_rank_plan(plan, rank).cost;
    mean.bytes += static_cast<double>(cost.bytes_received) / ranks;
    mean.statistics += static_cast<double>(cost.stats_bytes) / ranks;
    mean.memory += static_cast<double>(cost.values_memory) / ranks;
  }
  return mean;
}

struct Case {
  const char* strategy;
  Formulas formulas;
  MeshShape mesh;
  bool has_memory = false;  // of the sort of mesh that the page gives memory for
};

std::vector<Case> cases() {
  const auto mesh = [](int ring, int ulysses = 1, int rows = 1, int outer = 1) {
    return mesh_of(1, ring, ulysses, 1, rows, outer);
  };
  return {{"ring", ring(), mesh(2)},
          {"ring", ring(), mesh(4), true},
          {"ring", ring(), mesh(8), true},
          {"ring_q", ring_q(), mesh(2)},
          {"ring_q", ring_q(), mesh(4), true},
          {"ring_q", ring_q(), mesh(8), true},
          {"double_ring", double_ring(), mesh(2, 1, 1, 2)},
          {"double_ring", double_ring(), mesh(4, 1, 1, 4), true},
          {"allgather", allgather(), mesh(4), true},
          {"allgather", allgather(), mesh(8), true},
          {"allgather", allgather(), mesh(2, 2, 2, 2)},
          {"ulysses", ulysses(), mesh(1, 2), true},
          {"ulysses", ulysses(), mesh(1, 4), true},
          {"ulysses", ulysses(), mesh(1, 8), true},
          {"hybrid", hybrid(), mesh(2, 2)},
          {"hybrid", hybrid(), mesh(4, 4), true},
          {"hybrid", hybrid(), mesh(2, 4, 1, 2)},
          {"grid", grid(), mesh(2, 1, 2)},
          {"grid", grid(), mesh(4, 1, 2), true},
          {"grid", grid(), mesh(4, 1, 4), true},
          {"grid", grid(), mesh(2, 4, 2, 2)},
          {"grid_gather", grid_gather(), mesh(2, 1, 2)},
          {"grid_gather", grid_gather(), mesh(4, 1, 4), true},
          {"grid_gather", grid_gather(), mesh(2, 4, 2, 2)},
          {"invariant", invariant(), mesh(4), true},
          {"invariant", invariant(), mesh(1, 8), true},
          {"invariant", invariant(), mesh(2, 2, 2)},
          {"tree", tree(), mesh(4), true},
          {"tree", tree(), mesh(8), true},
          {"tree", tree(), mesh(2, 2, 2, 2)}};
}

void expect_counted(const Plan& plan, const Amount& moved, const Amount* held, const Letters& l, std::int64_t seq) {
  const Counted mean = counted(plan);
  const double rows = static_cast<double>(kBatch * seq) / l.p();
  EXPECT_DOUBLE_EQ(mean.bytes, rows * kDim * moved.bytes(l.e));
  EXPECT_DOUBLE_EQ(mean.statistics, rows * 4 * moved.statistics);
  if (held == nullptr) return;
  const double memory = rows * kDim * held->bytes(l.e);
  EXPECT_GE(mean.memory, memory);
  EXPECT_LT(mean.memory, 1.04 * memory);
}

TEST(Algorithms, BytesAndMemoryAreThoseOfThePage) {
  const std::int64_t seq = 1024;
  for (const Case& one : cases()) {
    for (const DType dtype : {DType::kBF16, DType::kF32}) {
      for (const std::int64_t kv_heads : {2, 8}) {
        AttentionOptions options;
        options.strategy = one.strategy;
        options.mask = Mask::full();
        const Plan plan = make_plan(one.mesh, {kBatch, seq, seq, 8, kv_heads, kDim, kDim, dtype}, options);
        const int u = one.mesh.size(Axis::kUlysses);
        const Letters l{u,
                        one.mesh.size(Axis::kRows),
                        one.mesh.size(Axis::kRing) * one.mesh.size(Axis::kRingOuter),
                        8,
                        static_cast<double>(kv_heads),
                        static_cast<double>(size_of(dtype)),
                        static_cast<double>(std::max<std::int64_t>(kv_heads, u))};
        const Amount held = one.formulas.forward_memory(l), held_backward = one.formulas.backward_memory(l);
        SCOPED_TRACE(plan.strategy + ", " + one.mesh.text() + ", KV heads " + std::to_string(kv_heads) + ", " +
                     std::string(name_of(dtype)));
        {
          SCOPED_TRACE("forward");
          expect_counted(plan, one.formulas.forward(l), one.has_memory ? &held : nullptr, l, seq);
        }
        SCOPED_TRACE("backward");
        expect_counted(backward(plan), one.formulas.backward(l), one.has_memory ? &held_backward : nullptr, l, seq);
      }
    }
  }
}

// Key positions that a rank fetches, as a mean: all others' under a full mask, 3/4 of them under a causal one in layout
// zigzag, `left` of every rank but the first under a window.
TEST(Algorithms, FetchAndHaloMoveTheKeysThatAreSeen) {
  const std::int64_t seq = 1024;
  const double left = 20, kv_heads = 2;
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const int ranks : {4, 8}) {
      const double others = static_cast<double>(seq) * (ranks - 1) / ranks;
      const auto expect_keys = [&](const char* strategy, const Mask& mask, Layout layout, double keys) {
        AttentionOptions options;
        options.strategy = strategy;
        options.mask = mask;
        options.layout = layout;
        const Plan plan = make_plan(mesh_of(1, ranks, 1, 1), {kBatch, seq, seq, 8, 2, kDim, kDim, dtype}, options);
        const double elements = 2 * kv_heads * kBatch * kDim * keys;
        const Counted forward = counted(plan), gradient = counted(backward(plan));
        EXPECT_DOUBLE_EQ(forward.bytes, elements * static_cast<double>(size_of(dtype))) << strategy;
        EXPECT_DOUBLE_EQ(gradient.bytes, elements * static_cast<double>(size_of(dtype) + 4)) << strategy;
        EXPECT_EQ(forward.statistics + gradient.statistics, 0) << strategy;
        if (ranks < 8) return;  // too few keys are fetched for them to set the worst moment of every rank's backward
        const double n = static_cast<double>(kBatch * seq * kDim) / ranks, e = static_cast<double>(size_of(dtype));
        const double held = elements * e + 8 * n * 4;
        const double held_backward = std::max(elements * (e + 4) + 8 * n * 4, (8 + 4 * kv_heads) * n * 4);
        for (const auto& [counted, formula] : {std::pair{forward.memory, held}, std::pair{gradient.memory, held_backward}}) {
          EXPECT_GE(counted, formula) << strategy;
          EXPECT_LT(counted, 1.04 * formula) << strategy;
        }
      };
      const Mask window = Mask::window(static_cast<std::int64_t>(left), 0);
      expect_keys("fetch", Mask::full(), Layout::kZigzag, others);
      expect_keys("fetch", Mask::causal(), Layout::kZigzag, others * 3 / 4);
      expect_keys("fetch", window, Layout::kContiguous, left * (ranks - 1) / ranks);
      expect_keys("halo", window, Layout::kContiguous, left * (ranks - 1) / ranks);
      expect_keys("halo", window, Layout::kZigzag, left * (2 * ranks - 2) / ranks);
    }
  }
}

}  // namespace
}  // namespace dattn
