// One rank's part of a plan: the blocks it holds, the pieces it sends and receives, the tiles it computes, and what all
// that costs. Made lazily from the plan, which is the same for every rank.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "core/attention/tile.h"
#include "parallel/plan.h"

namespace dattn {

// A stretch of rows and heads that one rank sends and another receives. Both sides list the pieces they share in the
// same order, so that a message needs no header.
struct Piece {
  int peer = 0;          // coordinate on the step's axis
  std::int64_t row = 0;  // first row in this side's block
  std::int64_t rows = 0;
  Interval heads;         // global numbers
  std::int64_t step = 1;  // from one row to the next in this side's block
};

// The tiles of a stretch of batch rows; there are some.
struct BatchTiles {
  Interval batch;
  std::vector<Tile> tiles;
};
double area(std::span<const BatchTiles> tiles);  // visible pairs of one head, over all batch rows

// What a rank attends in one step, made when it is first asked for: a rank attends one block while the next one is on its
// way, and the plan of a new mask must not wait for the tiles of all steps. Copies share what was made.
class AttendTiles {
 public:
  AttendTiles() = default;  // none
  AttendTiles(std::shared_ptr<const Problem> problem, Positions queries, Positions keys);
  const std::vector<BatchTiles>& get() const;

 private:
  struct Made {
    std::shared_ptr<const Problem> problem;
    Positions queries, keys;
    std::once_flag once;
    std::vector<BatchTiles> tiles;
  };
  std::shared_ptr<Made> made_;
};

struct RankStep {
  std::vector<Piece> sends;     // moves: from the input's block, ascending peers
  std::vector<Piece> receives;  // moves: into the output's block, ascending peers
  AttendTiles attended;         // attends
  HeadMap heads;                // attends
  double flops_of_pair = 0;     // attends: of a visible pair, with all heads

  const std::vector<BatchTiles>& tiles() const { return attended.get(); }
  double flops() const { return flops_of_pair == 0 ? 0 : flops_of_pair * area(tiles()); }
};

// Payload a rank receives from other ranks, and memory, of one plan.
struct RankCost {
  std::int64_t bytes_received = 0;  // at the type it travels in, without statistics
  std::int64_t stats_bytes = 0;     // lse and delta
  std::int64_t values_memory = 0;   // the most bytes of the plan's own values alive at once, by the list; inputs not counted
  std::int64_t peak_memory = 0;     // the most that a runner holds: values from the start of their move, and messages
  std::map<std::string, std::int64_t> received_by_verb;  // statistics included
};

struct RankPlan {
  int rank = 0;
  std::vector<Block> blocks;    // of every value
  std::vector<RankStep> steps;  // of every step
  RankCost cost;

  double flops() const;  // of all steps, whose tiles it makes
};

RankPlan make_rank_plan(const Plan& plan, int rank);
RankStep make_rank_step(const Plan& plan, std::size_t step, int rank);  // of one step only, without the rest of the plan
std::vector<BatchTiles> make_tiles(const CompiledMask& mask, const Positions& queries, const Positions& keys);
std::int64_t piece_bytes(std::span<const Field> fields, std::int64_t batch, const Piece& piece);

// Rows that two blocks share: where they stand in each, in runs of even steps in both, ordered by the first row in `a`.
struct SharedRows {
  std::int64_t row_a = 0;
  std::int64_t row_b = 0;
  std::int64_t count = 0;
  std::int64_t step_a = 1;
  std::int64_t step_b = 1;
};
std::vector<SharedRows> shared_rows(const Positions& a, const Positions& b);

// The last step that reads each value, or -1; plan outputs are read at steps.size().
std::vector<int> last_uses(const Plan& plan);
// Whether the step writes its output into the memory of its input number `index`, which no later step may read.
bool consumes(const Step& step, std::size_t index);

std::int64_t bytes_of(const Plan& plan, ValueId value, const Block& block);  // all fields
std::int64_t memory_with_inputs(const Plan& plan, const RankPlan& mine);     // cost.peak_memory, and what the caller holds

// The most bytes that a runner holds at once in the order of overlap.h, its inputs not counted: values, messages that are
// packed and unpacked, and what a type is converted through. What kernels need for themselves is theirs.
std::int64_t runner_memory(const Plan& plan, const RankPlan& mine);

}  // namespace dattn
