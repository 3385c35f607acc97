// Each visible pair once, at its owner: for every output, rank and share of the heads, the leaves that reach it are laid
// over the shards of the other side. Whole shards are ticked off; what is left must be invisible; shards that were seen in
// part are cut into cells, each of which must be covered once where it is visible.
#include <algorithm>
#include <optional>
#include <utility>

#include "parallel/verify/folds.h"

namespace dattn::proof {
namespace {

class Visible {
 public:
  Visible(const Plan& plan, Blocks& blocks, Findings& findings, ValueId output)
      : plan_(plan),
        problem_(*plan.problem),
        blocks_(blocks),
        findings_(findings),
        folds_(plan, blocks),
        output_(output),
        key_side_(is_key_side(plan.values[static_cast<std::size_t>(output)].what)),
        owner_(plan.inputs[key_side_ ? 1 : 0]),
        ticked_(static_cast<std::size_t>(blocks.shards()), kNone) {}

  void prove() {
    if (!lies_at_its_owner()) return;
    for (int rank = 0; rank < blocks_.ranks() && !findings_.full(); ++rank) {
      rank_ = rank;
      shard_ = blocks_.atoms(blocks_.block(owner_, rank))[0].shard;
      near_.reset();
      said_never_ = said_twice_ = false;
      const Interval heads = blocks_.heads(owner_, rank).q;
      if (heads.count() == 0 || blocks_.shard(key_side_, shard_).count() == 0) continue;
      if (!folds_.collect(output_, rank, shard_, heads)) {
        findings_.add(rank, step_of_output(), "{} positions {} fold in some piece again and again", plan_.value_name(output_),
                      text_of(blocks_.shard(key_side_, shard_)));
        continue;
      }
      prove_rank(heads);
    }
  }

 private:
  static constexpr int kNone = -1;

  // Rows of the own shard that have met rows of a shard of the other side.
  struct Cover {
    int shard = 0;
    int own = kWhole;    // ranges of the own shard
    int other = kWhole;  // ranges of the other shard
    int leaf = 0;
  };

  bool lies_at_its_owner() {
    if (blocks_.placed_alike(output_, owner_)) return true;
    for (int rank = 0; rank < blocks_.ranks(); ++rank) {
      const Block held = plan_.block(output_, rank), wanted = plan_.block(owner_, rank);
      const Interval heads = held.heads_for(what()), wanted_heads = wanted.heads_for(what());
      if (held.rows == wanted.rows && heads == wanted_heads) continue;
      findings_.add(rank, step_of_output(), "{} holds positions {} heads {}, but its owner holds positions {} heads {}",
                    plan_.value_name(output_), text_of(held.rows), text_of(heads), text_of(wanted.rows), text_of(wanted_heads));
      return false;
    }
    return true;
  }

  What what() const { return plan_.values[static_cast<std::size_t>(output_)].what; }
  std::size_t step_of_output() const {
    const Step* step = folds_.writer(output_);
    return step == nullptr ? kNoStep : static_cast<std::size_t>(step - plan_.steps.data());
  }

  // Heads that the same leaves have are proved together.
  void prove_rank(Interval heads) {
    std::vector<std::int64_t> cuts{heads.begin, heads.end};
    Interval last = heads;
    for (const Leaf& leaf : folds_.leaves()) {
      if (leaf.heads == last) continue;
      last = leaf.heads;
      for (const std::int64_t head : {last.begin, last.end}) {
        if (std::find(cuts.begin(), cuts.end(), head) == cuts.end()) cuts.push_back(head);
      }
    }
    std::sort(cuts.begin(), cuts.end());
    for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
      prove_heads({cuts[i], cuts[i + 1]});
      if (said_never_ || said_twice_) return;  // the first share that is wrong is enough
    }
  }

  void prove_heads(Interval heads) {
    heads_ = heads;
    std::fill(ticked_.begin(), ticked_.end(), kNone);
    partly_.clear();
    std::size_t ticks = 0;
    for (std::size_t i = 0; i < folds_.leaves().size(); ++i) {
      const Leaf& leaf = folds_.leaves()[i];
      if (leaf.heads.begin > heads.begin || leaf.heads.end < heads.end) continue;
      for (const Atom& atom : blocks_.atoms(leaf.other)) {
        int& tick = ticked_[static_cast<std::size_t>(atom.shard)];
        if (tick == kNone && leaf.within == kWhole && atom.within == kWhole) {
          tick = static_cast<int>(i);
          ++ticks;
        } else {
          partly_.push_back({atom.shard, leaf.within, atom.within, static_cast<int>(i)});
        }
      }
    }
    if (ticks == ticked_.size() && partly_.empty()) return;
    std::stable_sort(partly_.begin(), partly_.end(), [](const Cover& a, const Cover& b) { return a.shard < b.shard; });
    auto cover = partly_.begin();
    for (int shard = 0; shard < blocks_.shards(); ++shard) {
      covers_.clear();
      const int tick = ticked_[static_cast<std::size_t>(shard)];
      if (tick != kNone) covers_.push_back({shard, kWhole, kWhole, tick});
      for (; cover != partly_.end() && cover->shard == shard; ++cover) covers_.push_back(*cover);
      if (!areas_agree(shard)) check_cells(shard);
    }
  }

  // Most shards have one cover or none, and then areas decide.
  bool areas_agree(int shard) {
    const auto visible = [&](int own, int other) {
      return tiles(blocks_.rows(key_side_, {shard_, own}), blocks_.rows(!key_side_, {shard, other}));
    };
    if (covers_.size() > 1) return false;
    if (covers_.empty()) return visible(kWhole, kWhole).empty();
    const Cover& only = covers_[0];
    if (only.own == kWhole && only.other == kWhole) return true;
    const auto some = visible(only.own, only.other), all = visible(kWhole, kWhole);
    return std::equal(some.begin(), some.end(), all.begin(), all.end(), [](const BatchTiles& a, const BatchTiles& b) {
      return a.batch.begin == b.batch.begin && area(a.tiles) == area(b.tiles);
    });
  }

  void check_cells(int shard) {
    const std::vector<std::int64_t> own_cuts = cuts(true), other_cuts = cuts(false);
    for (std::size_t i = 0; i + 1 < own_cuts.size(); ++i) {
      const Interval own{own_cuts[i], own_cuts[i + 1]};
      const Positions own_rows = blocks_.shard(key_side_, shard_).inside({&own, 1});
      for (std::size_t j = 0; own_rows.count() > 0 && j + 1 < other_cuts.size(); ++j) {
        const Interval other{other_cuts[j], other_cuts[j + 1]};
        std::vector<const Cover*> over;
        for (const Cover& cover : covers_) {
          if (holds(cover.own, own.begin) && holds(cover.other, other.begin)) over.push_back(&cover);
        }
        if (over.size() == 1) continue;
        const std::vector<BatchTiles> wrong = tiles(own_rows, blocks_.shard(!key_side_, shard).inside({&other, 1}));
        if (!wrong.empty()) report(shard, wrong[0].tiles[0], over);
      }
    }
  }

  std::vector<std::int64_t> cuts(bool own) const {
    const bool key_side = own == key_side_;
    std::vector<std::int64_t> all{0, key_side ? problem_.shape.seq_kv : problem_.shape.seq_q};
    for (const Cover& cover : covers_) {
      const int within = own ? cover.own : cover.other;
      if (within == kWhole) continue;
      for (const Interval& range : blocks_.ranges(within)) all.insert(all.end(), {range.begin, range.end});
    }
    std::sort(all.begin(), all.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
    return all;
  }

  bool holds(int within, std::int64_t position) const {
    if (within == kWhole) return true;
    const std::span<const Interval> ranges = blocks_.ranges(within);
    return std::any_of(ranges.begin(), ranges.end(),
                       [&](const Interval& range) { return position >= range.begin && position < range.end; });
  }

  std::vector<BatchTiles> tiles(const Positions& own, const Positions& other) {
    if (!near_) near_ = mask_near(blocks_.shard(key_side_, shard_));
    return key_side_ ? make_tiles(*near_, other, own) : make_tiles(*near_, own, other);
  }

  // The regions that touch the rows: a mask of many documents has few of them.
  CompiledMask mask_near(const Positions& own) const {
    CompiledMask near;
    for (const BatchRegions& part : problem_.mask) {
      std::vector<Region> touching;
      for (const Region& region : part.regions) {
        const Interval& side = key_side_ ? region.k : region.q;
        if (own.inside({&side, 1}).count() > 0) touching.push_back(region);
      }
      near.push_back({part.batch, std::move(touching)});
    }
    return near;
  }

  // A tile of pairs that no leaf covers, or several; the first of each kind on a rank.
  void report(int shard, const Tile& tile, const std::vector<const Cover*>& over) {
    if (std::exchange(over.empty() ? said_never_ : said_twice_, true)) return;
    const std::string queries = text_of(Positions({{tile.q_position, tile.rows.q.count(), tile.q_step}}));
    const std::string keys = text_of(Positions({{tile.k_position, tile.rows.k.count(), tile.k_step}}));
    const std::string name = plan_.value_name(output_);
    const std::string pairs = key_side_ ? fmt::format("positions {} are seen by query positions {}", keys, queries)
                                        : fmt::format("positions {} see key positions {}", queries, keys);
    if (!over.empty()) {
      const auto leaf = [&](std::size_t i) { return &folds_.leaves()[static_cast<std::size_t>(over[i]->leaf)]; };
      const auto [before_it, it] = leaf(0)->step <= leaf(1)->step ? std::pair(leaf(0), leaf(1)) : std::pair(leaf(1), leaf(0));
      const Leaf &first = *before_it, &again = *it;
      const std::string made = plan_.value_name(plan_.steps[again.step].out[key_side_ ? 1 : 0]);
      const std::string before = first.step == again.step && first.rank == again.rank
                                     ? "one attend arrives over two ways"
                                     : fmt::format("before in step {} on rank {}", first.step, first.rank);
      return findings_.add(again.rank, again.step, "{} {} twice, {}; heads {} of {} on rank {}", made, pairs, before,
                           text_of(heads_), name, rank_);
    }
    std::size_t step = 0;
    int rank = 0;
    const bool lost = folds_.find_attend(key_side_, shard_, shard, heads_.begin, step, rank);
    findings_.add(rank_, step_of_output(), "{} {} never, heads {}; {}", name, pairs, text_of(heads_),
                  lost ? fmt::format("what step {} attends on rank {} does not get here", step, rank) : "no step attends them");
  }

  const Plan& plan_;
  const Problem& problem_;
  Blocks& blocks_;
  Findings& findings_;
  Folds folds_;
  ValueId output_;
  bool key_side_;
  ValueId owner_;  // the input that the output lies like
  int rank_ = 0;
  int shard_ = 0;                                 // the rank's own
  bool said_never_ = false, said_twice_ = false;  // of this rank
  Interval heads_;
  std::vector<int> ticked_;    // by shard of the other side: the first leaf that has the whole of it
  std::vector<Cover> partly_;  // all else
  std::vector<Cover> covers_;  // of one shard
  std::optional<CompiledMask> near_;
};

}  // namespace

void check_folds(const Plan& plan, Blocks& blocks, Findings& findings) {
  for (const ValueId output : plan.outputs) Visible(plan, blocks, findings, output).prove();
}

}  // namespace dattn::proof
