// A plan: what an attention call over a mesh does, as a value. It is a list of a few verbs over values that are written
// once; the same list holds for every rank, with the rank as a parameter, so a plan of thousands of ranks is small. A
// plan can be printed, proved (verify.h), costed (rank_plan.h) and run (run.h); backward(plan) derives the gradient's
// plan, so a strategy is written once.
//
//   ring of 3:   s0 = attend(q, kv)          backward:   kv1 = rotate(kv)
//                kv1 = rotate(kv)                        g1 = attend_grad(q, kv1)      (dq, dkv of rank r-1's block)
//                s1 = attend(q, kv1, s0)                 kv2 = rotate(kv1), h1 = rotate(g1)
//                kv2 = rotate(kv1)                       g2 = attend_grad(q, kv2) + h1
//                s2 = attend(q, kv2, s1)                 home = rotate(g2)             (overlaps with the own block:)
//                out = finish(s2)                        dkv = attend_grad(q, kv) + home
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "parallel/attention.h"

namespace dattn {

enum class Verb {
  kAttend,         // (q, kv [, state]) -> state
  kFinish,         // state -> result: out in storage type, lse
  kAttendGrad,     // (q, kv, grad_out, dq or none, dkv or none) -> (dq, dkv), added to those given; one may be unwanted
  kAdd,            // (a, b) -> a + b, in a's memory; states are merged
  kRotate,         // to the rank `shift` further along the axis, cyclically
  kGather,         // every rank of the axis gets the rows of all
  kFetch,          // every rank of the axis gets the key rows that its queries see and other ranks hold
  kReduceScatter,  // the adjoint of gather and fetch: every rank gets the sum of its own rows
  kCombine,        // states of gathered rows: every rank gets its own rows, merged over the axis in rank order
  kSeqToHead,      // all-to-all: rows of all ranks of the axis, this rank's share of the heads
  kHeadToSeq       // the way back; heads held by several ranks are summed
};
std::string_view name_of(Verb verb);
constexpr bool is_move(Verb verb) { return verb >= Verb::kRotate; }

enum class What { kQuery, kKeyValue, kState, kResult, kGradOut, kGradQuery, kGradKeyValue };
std::string_view name_of(What what);
constexpr bool is_key_side(What what) { return what == What::kKeyValue || what == What::kGradKeyValue; }

using ValueId = int;
inline constexpr ValueId kNoValue = -1;

// Where a value's rows and heads are, on any rank: relative to another value, so that nothing is stored per rank.
struct Placing {
  enum class Kind { kShard, kRotated, kGathered, kFetched, kHeadSplit, kLike };
  Kind kind = Kind::kShard;
  ValueId base = kNoValue;
  Axis axis = Axis::kRing;
  int shift = 0;              // kRotated: this rank holds what the rank `shift` earlier on the axis holds of base;
                              // kFetched: only from that rank; 0 = from all
  ValueId wanted = kNoValue;  // kFetched: the queries that see the rows

  bool comes_from(int peer, int own, int parts) const;  // kFetched, by coordinates on the axis
};

struct Value {
  What what = What::kQuery;
  Placing placing;
};

struct Step {
  Verb verb = Verb::kAttend;
  std::vector<ValueId> in;
  std::vector<ValueId> out;
  Axis axis = Axis::kRing;  // moves
  int shift = 0;            // rotate
};

// What is computed, on which mesh. Shared by a plan and its backward plan.
struct Problem {
  AttentionShape shape;  // batch: of one data coordinate
  double scale = 1.0;
  double softcap = 0;
  std::vector<double> alibi_slopes;
  AttentionDropout dropout;  // but for stream and batch_begin, which each call brings
  bool repeatable = true;    // a rank's sums have one order, whatever the kernel
  bool invariant = false;    // whole key and query blocks in global order, folded in that order
  CompiledMask mask;
  std::string mask_text;
  Layout layout = Layout::kZigzag;
  MeshShape mesh;
  std::shared_ptr<const std::vector<Positions>> balanced;  // layout balanced: rows of every place along the sequence

  void place_balanced();                                // sets `balanced`, of the mask and the mesh
  Positions part_rows(bool key_side, int part) const;   // what the layout gives to a place along the sequence
  Positions shard_rows(bool key_side, int rank) const;  // and to a rank
};

// The rows and heads a rank holds of a value.
struct Block {
  Positions rows;  // query or key positions, by the value's side
  HeadRange heads;

  const Interval& heads_for(What what) const { return is_key_side(what) ? heads.kv : heads.q; }
};

// One tensor of a value: [B, rows, heads, width]. Statistics (lse, delta) are [B, H, S] in accumulator type and counted apart.
struct Field {
  std::string_view name;
  DType dtype = DType::kF32;
  std::int64_t width = 1;  // last axis; 1 for statistics
  bool statistic = false;
  bool one_batch = false;  // one for all batch rows: B = 1
  bool one_head = false;   // one for all heads: heads = 1, where any are held
};
Shape field_shape(const Field& field, std::int64_t batch, std::int64_t rows, std::int64_t heads);
std::vector<Field> fields_of(What what, const AttentionShape& shape);
// The fields as a move carries them: states that are combined travel with out in the storage type.
std::vector<Field> message_fields(Verb verb, What what, const AttentionShape& shape);

struct Plan {
  std::string strategy;
  std::shared_ptr<const Problem> problem;
  std::vector<Value> values;
  std::vector<Step> steps;
  std::vector<ValueId> inputs;   // forward: q, kv; backward: q, kv, grad_out
  std::vector<ValueId> outputs;  // forward: result; backward: dq, dkv

  Block block(ValueId value, int rank) const;
  Positions rows(ValueId value, int rank) const;                         // of its block
  HeadRange heads(ValueId value, int rank) const;                        // of its block
  const Placing& placing(ValueId value) const;                           // where it is placed like another value, that one's
  std::vector<Interval> wanted(const Placing& fetched, int rank) const;  // the keys that the rank's queries see
  std::string value_name(ValueId value) const;                           // "kv2"
  std::string text() const;                                              // one line a step
};

Plan backward(const Plan& forward);

// How strategies write plans. Moves over an axis of one rank return their argument.
class PlanBuilder {
 public:
  PlanBuilder(std::string strategy, std::shared_ptr<const Problem> problem);

  ValueId q() const { return 0; }
  ValueId kv() const { return 1; }
  int size(Axis axis) const { return plan_.problem->mesh.size(axis); }

  ValueId attend(ValueId q, ValueId kv, ValueId state = kNoValue);
  ValueId rotate(ValueId value, Axis axis, int shift = 1);
  ValueId gather(ValueId value, Axis axis);
  ValueId gather_sequence(ValueId value);                         // over all sequence axes: every row, in order
  ValueId fetch(ValueId kv, ValueId q, Axis axis, int from = 0);  // from: the rank that many places earlier, or 0 for all
  ValueId combine(ValueId state, Axis axis, ValueId like);        // to the rows of `like`
  ValueId add(ValueId a, ValueId b);
  ValueId seq_to_head(ValueId value, Axis axis);
  ValueId finish(ValueId state);
  ValueId head_to_seq(ValueId result, Axis axis, ValueId like);  // to the rows and heads of `like`
  Plan build(ValueId result) &&;

 private:
  friend class BackwardBuilder;
  ValueId add_value(What what, Placing placing);
  void add_step(Verb verb, std::vector<ValueId> in, std::vector<ValueId> out, Axis axis = Axis::kRing, int shift = 0);
  ValueId move(Verb verb, ValueId value, Axis axis, int shift, Placing placing);

  Plan plan_;
};

}  // namespace dattn
