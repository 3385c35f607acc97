#include "parallel/verify.h"

#include <algorithm>
#include <map>
#include <memory>

#include <fmt/format.h>

#include "core/base/error.h"
#include "parallel/rank_plan.h"

namespace dattn {
namespace {

constexpr std::size_t kMaxProblems = 20;

// Something that has been folded into a state or a gradient: attention with these rows of the other side.
struct Contribution {
  std::shared_ptr<const Positions> own;   // the rows of the state or gradient that it was folded into
  std::shared_ptr<const Positions> rows;  // key rows for states and dq, query rows for dkv
  Interval q_heads;
};
using Contributions = std::vector<Contribution>;

class Verifier {
 public:
  explicit Verifier(const Plan& plan) : plan_(plan), problem_(*plan.problem), ranks_(plan.problem->mesh.ranks()) {
    for (int rank = 0; rank < ranks_; ++rank) rank_plans_.push_back(make_rank_plan(plan, rank));
    folded_.resize(plan.values.size(), std::vector<Contributions>(static_cast<std::size_t>(ranks_)));
  }

  Verdict run() {
    for (const BatchRegions& part : problem_.mask) verdict_.pairs += area(part.regions) * part.batch.count();
    check_order();
    for (std::size_t i = 0; i < plan_.steps.size() && verdict_.problems.size() < kMaxProblems; ++i) {
      const Step& step = plan_.steps[i];
      if (is_move(step.verb)) {
        check_messages(i);
        for (int rank = 0; rank < ranks_; ++rank) check_move(i, rank);
      } else {
        for (int rank = 0; rank < ranks_; ++rank) fold(i, rank);
      }
    }
    for (const ValueId output : plan_.outputs) {
      for (int rank = 0; rank < ranks_ && verdict_.problems.size() < kMaxProblems; ++rank) check_output(output, rank);
    }
    return std::move(verdict_);
  }

 private:
  template <class... Args>
  void report(int rank, std::size_t step, fmt::format_string<Args...> format, Args&&... args) {
    if (verdict_.problems.size() >= kMaxProblems) return;
    const std::string place =
        step < plan_.steps.size() ? fmt::format("step {} {}", step, name_of(plan_.steps[step].verb)) : "at the end";
    verdict_.problems.push_back(fmt::format("rank {}, {}: {}", rank, place, fmt::format(format, std::forward<Args>(args)...)));
  }

  What what(ValueId value) const { return plan_.values[static_cast<std::size_t>(value)].what; }
  const Block& block(ValueId value, int rank) const {
    return rank_plans_[static_cast<std::size_t>(rank)].blocks[static_cast<std::size_t>(value)];
  }
  Contributions& folded(ValueId value, int rank) {
    return folded_[static_cast<std::size_t>(value)][static_cast<std::size_t>(rank)];
  }

  // Every value is written once, before it is read, and not read after its memory was given to another.
  void check_order() {
    std::vector<bool> written(plan_.values.size(), false), given_away(plan_.values.size(), false);
    for (const ValueId value : plan_.inputs) written[static_cast<std::size_t>(value)] = true;
    const auto read = [&](ValueId value, std::size_t step) {
      if (value == kNoValue) return;
      if (!written[static_cast<std::size_t>(value)])
        report(0, step, "{} is read before it is written", plan_.value_name(value));
      if (given_away[static_cast<std::size_t>(value)])
        report(0, step, "{} is read after its memory was given away", plan_.value_name(value));
    };
    for (std::size_t i = 0; i < plan_.steps.size(); ++i) {
      const Step& step = plan_.steps[i];
      for (const ValueId value : step.in) read(value, i);
      for (std::size_t j = 0; j < step.in.size(); ++j) {
        if (step.in[j] != kNoValue && consumes(step, j)) given_away[static_cast<std::size_t>(step.in[j])] = true;
      }
      for (const ValueId value : step.out) {
        if (value == kNoValue) continue;
        if (written[static_cast<std::size_t>(value)]) report(0, i, "{} is written twice", plan_.value_name(value));
        written[static_cast<std::size_t>(value)] = true;
      }
    }
    for (const ValueId value : plan_.outputs) read(value, plan_.steps.size());
  }

  // What a rank sends to each peer is what that peer expects, piece by piece and position by position.
  void check_messages(std::size_t index) {
    const Step& step = plan_.steps[index];
    const MeshShape& mesh = problem_.mesh;
    for (int rank = 0; rank < ranks_; ++rank) {
      const RankStep& mine = rank_plans_[static_cast<std::size_t>(rank)].steps[index];
      for (int peer = 0; peer < mesh.size(step.axis); ++peer) {
        const int other = mesh.neighbour(rank, step.axis, peer);
        const int own = mesh.coordinate(rank, step.axis);
        const auto sent = pieces_with(rank_plans_[static_cast<std::size_t>(other)].steps[index].sends, own);
        const auto expected = pieces_with(mine.receives, peer);
        if (sent.size() != expected.size()) {
          report(rank, index, "expects {} pieces from rank {}, which sends {}", expected.size(), other, sent.size());
          continue;
        }
        for (std::size_t i = 0; i < sent.size(); ++i) check_piece(index, rank, other, *expected[i], *sent[i]);
      }
    }
  }

  static std::vector<const Piece*> pieces_with(const std::vector<Piece>& pieces, int peer) {
    std::vector<const Piece*> selected;
    for (const Piece& piece : pieces) {
      if (piece.peer == peer) selected.push_back(&piece);
    }
    return selected;
  }

  void check_piece(std::size_t index, int rank, int other, const Piece& expected, const Piece& sent) {
    const Step& step = plan_.steps[index];
    const Positions into = block(step.out[0], rank).rows.rows(expected.row, expected.rows);
    const Positions from = block(step.in[0], other).rows.rows(sent.row, sent.rows);
    if (!(into == from) || !(expected.heads == sent.heads)) {
      report(rank, index, "expects positions {} heads [{}, {}) from rank {}, which sends {} heads [{}, {})", into.text(),
             expected.heads.begin, expected.heads.end, other, from.text(), sent.heads.begin, sent.heads.end);
    }
  }

  // The received pieces cover the output's block: exactly once where values are copied, at least once where summed.
  void check_move(std::size_t index, int rank) {
    const Step& step = plan_.steps[index];
    const Block& to = block(step.out[0], rank);
    const Interval heads = to.heads_for(what(step.out[0]));
    const std::vector<Piece>& pieces = rank_plans_[static_cast<std::size_t>(rank)].steps[index].receives;
    const What kind = what(step.out[0]);
    const bool sums = kind == What::kGradQuery || kind == What::kGradKeyValue || step.verb == Verb::kCombine;
    const bool fetched = plan_.placing(step.in[0]).kind == Placing::Kind::kFetched;  // rows that nobody fetched get nothing
    for (std::int64_t head = heads.begin; head < heads.end; ++head) {
      std::vector<Interval> rows;
      for (const Piece& piece : pieces) {
        if (head >= piece.heads.begin && head < piece.heads.end) rows.push_back({piece.row, piece.row + piece.rows});
      }
      std::sort(rows.begin(), rows.end(), [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
      std::int64_t reached = 0;
      for (const Interval& part : rows) {
        if (part.begin > reached) break;
        if (part.begin < reached && !sums) {
          report(rank, index, "head {} rows [{}, {}) of {} arrive twice", head, part.begin, std::min(part.end, reached),
                 plan_.value_name(step.out[0]));
        }
        reached = std::max(reached, part.end);
      }
      if (reached < to.rows.count() && !fetched) {
        report(rank, index, "head {} row {} (position {}) of {} never arrives", head, reached, to.rows.at(reached),
               plan_.value_name(step.out[0]));
        return;
      }
    }
    // What was folded in elsewhere comes along, from every rank that sends a piece.
    std::vector<int> sources;
    for (const Piece& piece : pieces) {
      const int source = problem_.mesh.neighbour(rank, step.axis, piece.peer);
      if (std::find(sources.begin(), sources.end(), source) == sources.end()) sources.push_back(source);
    }
    for (const int source : sources) {
      const Contributions& theirs = folded(step.in[0], source);
      folded(step.out[0], rank).insert(folded(step.out[0], rank).end(), theirs.begin(), theirs.end());
    }
  }

  void fold(std::size_t index, int rank) {
    const Step& step = plan_.steps[index];
    const auto inherit = [&](std::size_t input, std::size_t output) {
      if (input >= step.in.size() || step.in[input] == kNoValue) return;
      const Contributions& earlier = folded(step.in[input], rank);
      Contributions& now = folded(step.out[output], rank);
      now.insert(now.end(), earlier.begin(), earlier.end());
      if (!(block(step.in[input], rank).rows == block(step.out[output], rank).rows)) {
        report(rank, index, "{} holds positions {} and {} holds {}", plan_.value_name(step.in[input]),
               block(step.in[input], rank).rows.text(), plan_.value_name(step.out[output]),
               block(step.out[output], rank).rows.text());
      }
    };
    if (step.verb == Verb::kFinish) return inherit(0, 0);
    if (step.verb == Verb::kAdd) {
      inherit(0, 0);
      return inherit(1, 0);
    }
    const Block &q = block(step.in[0], rank), &kv = block(step.in[1], rank);
    check_heads(index, rank, q, kv);
    const auto queries = std::make_shared<const Positions>(q.rows), keys = std::make_shared<const Positions>(kv.rows);
    if (step.verb == Verb::kAttend) {
      inherit(2, 0);
      folded(step.out[0], rank).push_back({queries, keys, q.heads.q});
      return;
    }
    if (!(block(step.in[2], rank).rows == q.rows)) report(rank, index, "q and dout hold different positions");
    inherit(3, 0);
    inherit(4, 1);
    if (step.out[0] != kNoValue) folded(step.out[0], rank).push_back({queries, keys, q.heads.q});
    if (step.out[1] != kNoValue) folded(step.out[1], rank).push_back({keys, queries, q.heads.q});
  }

  void check_heads(std::size_t index, int rank, const Block& q, const Block& kv) {
    if (q.heads.q.count() == 0) return;
    const std::int64_t group = problem_.shape.heads / problem_.shape.kv_heads;
    const std::int64_t first = q.heads.q.begin / group, last = (q.heads.q.end - 1) / group;
    if (first < kv.heads.kv.begin || last >= kv.heads.kv.end) {
      report(rank, index, "query heads [{}, {}) need KV heads [{}, {}], but it holds [{}, {})", q.heads.q.begin, q.heads.q.end,
             first, last, kv.heads.kv.begin, kv.heads.kv.end);
    }
  }

  // The output lies where its owner wants it, and all that is visible to it was folded in exactly once.
  void check_output(ValueId output, int rank) {
    const Block& held = block(output, rank);
    const ValueId like = is_key_side(what(output)) ? plan_.inputs[1] : plan_.inputs[0];
    const Block& wanted = block(like, rank);
    if (!(held.rows == wanted.rows) || !(held.heads.q == wanted.heads.q) || !(held.heads.kv == wanted.heads.kv)) {
      report(rank, plan_.steps.size(), "{} holds positions {} but its owner holds {}", plan_.value_name(output),
             held.rows.text(), wanted.rows.text());
      return;
    }
    const Contributions& all = folded(output, rank);
    const std::int64_t group = problem_.shape.heads / problem_.shape.kv_heads;
    const bool key_side = is_key_side(what(output));
    const Interval heads = key_side ? Interval{held.heads.q.begin, held.heads.q.end} : held.heads.q;
    const Positions other = Positions::range(0, key_side ? problem_.shape.seq_q : problem_.shape.seq_kv);
    const std::int64_t expected = visible(held.rows, other, key_side);
    for (std::int64_t head = heads.begin; head < heads.end && group > 0; ++head)
      check_head(output, rank, head, all, held, expected, key_side);
  }

  std::int64_t visible(const Positions& own, const Positions& other, bool key_side) const {
    const auto& tiles = key_side ? make_tiles(problem_.mask, other, own) : make_tiles(problem_.mask, own, other);
    return area(tiles);
  }

  void check_head(ValueId output, int rank, std::int64_t head, const Contributions& all, const Block& held,
                  std::int64_t expected, bool key_side) {
    std::int64_t found = 0;
    std::vector<std::pair<Positions, const Positions*>> parts;  // own rows that are held, and rows of the other side
    for (const Contribution& part : all) {
      if (head < part.q_heads.begin || head >= part.q_heads.end) continue;
      std::vector<Run> own;
      for (const SharedRows& rows : shared_rows(held.rows, *part.own)) {
        const Positions some = held.rows.rows(rows.row_a, rows.count);
        own.insert(own.end(), some.runs().begin(), some.runs().end());
      }
      parts.emplace_back(Positions(own), part.rows.get());
      found += visible(parts.back().first, *part.rows, key_side);
    }
    for (std::size_t i = 0; i < parts.size(); ++i) {
      for (std::size_t j = 0; j < i; ++j) {
        const auto twice = shared_rows(*parts[i].second, *parts[j].second);
        if (!twice.empty() && !shared_rows(parts[i].first, parts[j].first).empty()) {
          report(rank, plan_.steps.size(), "{} head {} has folded in {} position {} twice", plan_.value_name(output), head,
                 key_side ? "query" : "key", parts[i].second->at(twice[0].row_a));
          return;
        }
      }
    }
    if (found != expected) {
      report(rank, plan_.steps.size(), "{} head {} positions {} has seen {} of {} visible pairs", plan_.value_name(output),
             head, held.rows.text(), found, expected);
    }
  }

  const Plan& plan_;
  const Problem& problem_;
  int ranks_;
  std::vector<RankPlan> rank_plans_;
  std::vector<std::vector<Contributions>> folded_;  // [value][rank]
  Verdict verdict_;
};

}  // namespace

Verdict verify(const Plan& plan) { return Verifier(plan).run(); }

}  // namespace dattn
