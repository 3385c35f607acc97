// What a value has folded in, on one rank: found by following the plan back from the value to the attends, rank by rank.
#pragma once

#include <vector>

#include "parallel/verify/proof.h"

namespace dattn::proof {

// One attend whose piece reaches the value, cut down to what reaches it.
struct Leaf {
  std::size_t step = 0;
  int rank = 0;         // that attends
  int other = 0;        // block of the other side: keys for queries, queries for keys
  int within = kWhole;  // of the value's own shard
  Interval heads;       // query heads
};

class Folds {
 public:
  Folds(const Plan& plan, Blocks& blocks);

  // The leaves of the rank's shard of the value, or false where they are too many to be right.
  bool collect(ValueId value, int rank, int shard, Interval query_heads);
  const std::vector<Leaf>& leaves() const { return leaves_; }

  const Step* writer(ValueId value) const;  // null: an input
  // Finds an attend, on any rank, of these two shards for the query head.
  bool find_attend(bool key_side, int shard, int other_shard, std::int64_t head, std::size_t& step, int& rank);

 private:
  struct Part {
    ValueId value = kNoValue;
    int rank = 0;
    int within = kWhole;
    Interval heads;
  };

  void follow(Part part);
  Part behind(const Part& part, const Step& step);
  void add_leaf(const Part& part, std::size_t step, bool key_side);
  void spread(const Part& part, const Step& step);
  bool key_side(ValueId value) const { return is_key_side(plan_.values[static_cast<std::size_t>(value)].what); }

  const Plan& plan_;
  Blocks& blocks_;
  std::int64_t group_;                // query heads of a KV head
  std::vector<std::size_t> writers_;  // step that writes each value
  int shard_ = 0;
  std::vector<Part> pending_;
  std::vector<Leaf> leaves_;
  std::int64_t visits_ = 0;
};

}  // namespace dattn::proof
