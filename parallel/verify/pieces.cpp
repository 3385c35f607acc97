// Moves of several peers: what each rank sends is what the other expects, and what arrives covers the output's block,
// exactly once where it is copied, at least once where it is added up or merged.
#include <algorithm>
#include <map>
#include <numeric>
#include <utility>

#include "parallel/verify/proof.h"

namespace dattn::proof {
namespace {

class Pieces {
 public:
  Pieces(const Plan& plan, Blocks& blocks, std::size_t index, Findings& findings, const PartOfStep& part)
      : plan_(plan), blocks_(blocks), index_(index), step_(plan.steps[index]), findings_(findings), part_(part) {}

  // All groups of ranks along the axis; the first problem of each is enough.
  void check() {
    for (int rank = 0; rank < blocks_.ranks() && !findings_.full(); ++rank) {
      if (blocks_.coordinate(rank, step_.axis) != 0) continue;
      members_.clear();
      parts_.clear();
      for (int i = 0; i < plan_.problem->mesh.size(step_.axis); ++i) {
        members_.push_back(blocks_.neighbour(rank, step_.axis, i));
        parts_.push_back(part_(plan_, index_, members_.back()));
      }
      if (!messages_match()) return;
      for (std::size_t i = 0; i < members_.size(); ++i) {
        if (!covers(members_[i], parts_[i].receives)) return;
      }
    }
  }

 private:
  // Blocks with equal numbers hold equal rows.
  const Positions& rows_of(ValueId value, int rank) {
    const auto [found, fresh] = rows_.try_emplace(std::pair(value, blocks_.block(value, rank)));
    if (fresh) found->second = plan_.rows(value, rank);
    return found->second;
  }

  bool messages_match() {
    std::vector<std::size_t> sent(members_.size(), 0);
    for (std::size_t to = 0; to < members_.size(); ++to) {
      const std::vector<Piece>& receives = parts_[to].receives;
      std::size_t next = 0;
      for (std::size_t from = 0; from < members_.size(); ++from) {
        const std::vector<Piece>& sends = parts_[from].sends;
        while (true) {
          const Piece* out = front(sends, sent[from], to);
          const Piece* in = front(receives, next, from);
          if (out == nullptr && in == nullptr) break;
          if (!piece_matches(members_[from], out, members_[to], in)) return false;
          ++sent[from], ++next;
        }
      }
      if (next != receives.size()) {
        report_piece(members_[to], "expects", step_.out[0], receives[next]);
        return false;
      }
    }
    for (std::size_t from = 0; from < members_.size(); ++from) {
      if (sent[from] == parts_[from].sends.size()) continue;
      report_piece(members_[from], "sends", step_.in[0], parts_[from].sends[sent[from]]);
      return false;
    }
    return true;
  }

  static const Piece* front(const std::vector<Piece>& pieces, std::size_t at, std::size_t peer) {
    return at < pieces.size() && pieces[at].peer == static_cast<int>(peer) ? &pieces[at] : nullptr;
  }

  bool piece_matches(int from, const Piece* sent, int to, const Piece* expected) {
    if (expected == nullptr) {
      report_piece(from, "sends", step_.in[0], *sent);
      return false;
    }
    if (sent == nullptr) {
      report_piece(to, "expects", step_.out[0], *expected);
      return false;
    }
    const Positions here = rows_of(step_.in[0], from).rows(sent->row, sent->rows, sent->step);
    const Positions there = rows_of(step_.out[0], to).rows(expected->row, expected->rows, expected->step);
    if (here == there && sent->heads == expected->heads) return true;
    findings_.add(to, index_, "expects positions {} heads {} from rank {}, which sends positions {} heads {}", text_of(there),
                  text_of(expected->heads), from, text_of(here), text_of(sent->heads));
    return false;
  }

  // A piece that the other side does not know.
  void report_piece(int rank, const char* does, ValueId value, const Piece& piece) {
    const Positions rows = rows_of(value, rank).rows(piece.row, piece.rows, piece.step);
    findings_.add(rank, index_, "{} positions {} heads {} of {}, and the rank at {} on the axis does not", does, text_of(rows),
                  text_of(piece.heads), plan_.value_name(value), piece.peer);
  }

  bool copies() const {
    const What what = plan_.values[static_cast<std::size_t>(step_.out[0])].what;
    const bool gradient = what == What::kGradQuery || what == What::kGradKeyValue;
    return step_.verb != Verb::kReduceScatter && step_.verb != Verb::kCombine && !(step_.verb == Verb::kHeadToSeq && gradient);
  }

  bool covers(int rank, const std::vector<Piece>& pieces) {
    const HeadRange& held = blocks_.heads(step_.out[0], rank);
    const Interval heads = is_key_side(plan_.values[static_cast<std::size_t>(step_.out[0])].what) ? held.kv : held.q;
    std::vector<std::int64_t> cuts{heads.begin, heads.end};
    for (const Piece& piece : pieces) {
      for (const std::int64_t head : {piece.heads.begin, piece.heads.end}) {
        if (head > heads.begin && head < heads.end && std::find(cuts.begin(), cuts.end(), head) == cuts.end())
          cuts.push_back(head);
      }
    }
    std::sort(cuts.begin(), cuts.end());
    for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
      if (cuts[i] < cuts[i + 1] && !covers_heads(rank, {cuts[i], cuts[i + 1]}, pieces)) return false;
    }
    return true;
  }

  // Pieces of several rows are taken apart into runs of one step, and these are laid side by side within their residues.
  bool covers_heads(int rank, Interval heads, const std::vector<Piece>& pieces) {
    const auto has_heads = [&](const Piece& piece) { return piece.heads.begin <= heads.begin && piece.heads.end >= heads.end; };
    std::int64_t step = 1;
    for (const Piece& piece : pieces) {
      if (has_heads(piece) && piece.rows > 1) step = std::lcm(step, piece.step);
    }
    std::vector<Run> arrived;
    for (const Piece& piece : pieces) {
      if (!has_heads(piece)) continue;
      const std::int64_t parts = piece.rows > 1 ? std::min(step / piece.step, piece.rows) : 1;
      for (std::int64_t i = 0; i < parts; ++i)
        arrived.push_back({piece.row + i * piece.step, (piece.rows - i - 1) / parts + 1, step});
    }
    std::sort(arrived.begin(), arrived.end(), [step](const Run& a, const Run& b) {
      return std::pair(a.begin % step, a.begin) < std::pair(b.begin % step, b.begin);
    });
    const std::int64_t count = rows_of(step_.out[0], rank).count();
    auto run = arrived.begin();
    for (std::int64_t residue = 0; residue < std::min(step, count); ++residue) {
      std::int64_t next = residue;
      for (; run != arrived.end() && run->begin % step == residue; ++run) {
        if (!meets(rank, heads, next, *run)) return false;
        next = std::max(next, run->begin + run->count * step);
      }
      if (!meets(rank, heads, next, {residue + (count - residue + step - 1) / step * step, 0, step})) return false;
    }
    return true;
  }

  // What arrives as `run`, after all rows of its residue before `next`.
  bool meets(int rank, Interval heads, std::int64_t next, const Run& run) {
    const Positions& rows = rows_of(step_.out[0], rank);
    const bool fetched = plan_.placing(step_.in[0]).kind == Placing::Kind::kFetched;  // rows that nobody fetched get nothing
    if (run.begin > next && !(fetched && step_.verb == Verb::kReduceScatter))
      return report_rows(rank, heads, rows.rows(next, (run.begin - next) / run.step, run.step), "never arrive");
    const std::int64_t end = std::min(run.begin + run.count * run.step, next);
    if (run.begin < end && copies())
      return report_rows(rank, heads, rows.rows(run.begin, (end - run.begin) / run.step, run.step), "arrive twice");
    return true;
  }

  bool report_rows(int rank, Interval heads, const Positions& rows, const char* what) {
    findings_.add(rank, index_, "positions {} heads {} of {} {}", text_of(rows), text_of(heads), plan_.value_name(step_.out[0]),
                  what);
    return false;
  }

  const Plan& plan_;
  Blocks& blocks_;
  std::size_t index_;
  const Step& step_;
  Findings& findings_;
  const PartOfStep& part_;
  std::vector<int> members_;                           // the ranks of one group, by coordinate
  std::vector<RankStep> parts_;                        // theirs
  std::map<std::pair<ValueId, int>, Positions> rows_;  // by value and block
};

}  // namespace

void check_pieces(const Plan& plan, Blocks& blocks, Findings& findings, const PartOfStep& part) {
  for (std::size_t i = 0; i < plan.steps.size() && !findings.full(); ++i) {
    const Verb verb = plan.steps[i].verb;
    if (is_move(verb) && verb != Verb::kRotate) Pieces(plan, blocks, i, findings, part).check();
  }
}

}  // namespace dattn::proof
