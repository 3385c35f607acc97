#include "parallel/verify/blocks.h"

#include <algorithm>

namespace dattn::proof {

Blocks::Blocks(const Plan& plan)
    : plan_(plan), mesh_(plan.problem->mesh), tables_(plan.values.size()), heads_(plan.values.size()) {
  int stride = 1;
  for (std::size_t i = kAxes.size(); i-- > 0;) {
    strides_[i] = stride;
    stride *= mesh_.sizes[i];
  }
  coordinates_.resize(static_cast<std::size_t>(mesh_.ranks()));
  for (int rank = 0; rank < mesh_.ranks(); ++rank) {
    for (const Axis axis : kAxes) coordinates_[static_cast<std::size_t>(rank)][index(axis)] = mesh_.coordinate(rank, axis);
  }
  for (int part = 0; part < mesh_.sequence_parts(); ++part) {
    query_shards_.push_back(plan.problem->part_rows(false, part));
    key_shards_.push_back(plan.problem->part_rows(true, part));
  }
  for (std::size_t i = 0; i < plan.values.size(); ++i) homes_.push_back(home_of(static_cast<ValueId>(i)));
}

// A value that is placed as an earlier root is has the same home: dout is gathered as q is.
Blocks::Home Blocks::home_of(ValueId value) {
  const Value& v = plan_.values[static_cast<std::size_t>(value)];
  const Placing& placing = v.placing;
  if (placing.kind == Placing::Kind::kLike) return homes_[static_cast<std::size_t>(placing.base)];
  if (placing.kind == Placing::Kind::kRotated) {
    Home home = homes_[static_cast<std::size_t>(placing.base)];
    int& back = home.back[index(placing.axis)];
    back = around(back + placing.shift, mesh_.size(placing.axis));
    home.rotated = home.back != Home{}.back;
    return home;
  }
  std::vector<int> key{static_cast<int>(placing.kind), is_key_side(v.what) ? 1 : 0};
  if (placing.kind != Placing::Kind::kShard) key.insert(key.end(), {static_cast<int>(placing.axis), placing.shift});
  for (const ValueId from : {placing.base, placing.wanted}) {
    if (placing.kind == Placing::Kind::kShard || from == kNoValue) continue;
    const Home& home = homes_[static_cast<std::size_t>(from)];
    key.push_back(home.root);
    key.insert(key.end(), home.back.begin(), home.back.end());
  }
  return {roots_.try_emplace(std::move(key), value).first->second};
}

int Blocks::neighbour(int rank, Axis axis, int coordinate) const {
  const int size = mesh_.size(axis);
  if (coordinate < 0) coordinate += size;
  if (coordinate >= size) coordinate -= size;
  return rank + (coordinate - this->coordinate(rank, axis)) * strides_[index(axis)];
}

bool Blocks::placed_alike(ValueId a, ValueId b, Axis axis, int shift) const {
  const Home& home_a = homes_[static_cast<std::size_t>(a)];
  Home home_b = homes_[static_cast<std::size_t>(b)];
  int& back = home_b.back[index(axis)];
  back = around(back + shift, mesh_.size(axis));
  return home_a.root == home_b.root && home_a.back == home_b.back;
}

int Blocks::moved(int rank, const Home& home) const {
  if (!home.rotated) return rank;
  for (const Axis axis : kAxes) {
    if (home.back[index(axis)] != 0) rank = neighbour(rank, axis, coordinate(rank, axis) - home.back[index(axis)]);
  }
  return rank;
}

int Blocks::block(ValueId value, int rank) {
  const Home& home = homes_[static_cast<std::size_t>(value)];
  std::vector<int>& table = tables_[static_cast<std::size_t>(home.root)];
  if (table.empty()) table.assign(coordinates_.size(), -1);
  const int holder = moved(rank, home);
  int& number = table[static_cast<std::size_t>(holder)];
  if (number < 0) number = make_block(home.root, holder);
  return number;
}

int Blocks::make_block(ValueId root, int rank) {
  const Placing& placing = plan_.values[static_cast<std::size_t>(root)].placing;
  std::vector<Atom> atoms;
  if (placing.kind == Placing::Kind::kShard) {
    atoms.push_back({mesh_.sequence_index(rank), kWhole});
  } else if (placing.kind == Placing::Kind::kFetched) {
    atoms = fetched(placing, rank);
  } else {
    const int first = neighbour(rank, placing.axis, 0);  // all ranks of the axis hold the same rows
    if (first != rank) return block(root, first);
    atoms = gathered(placing, rank);
  }
  std::sort(atoms.begin(), atoms.end(), [](const Atom& a, const Atom& b) { return a.shard < b.shard; });
  blocks_.push_back(std::move(atoms));
  return static_cast<int>(blocks_.size()) - 1;
}

std::vector<Atom> Blocks::gathered(const Placing& placing, int rank) {
  std::vector<Atom> all;
  for (int i = 0; i < mesh_.size(placing.axis); ++i) {
    const std::vector<Atom>& part = atoms(block(placing.base, neighbour(rank, placing.axis, i)));
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

std::vector<Atom> Blocks::fetched(const Placing& placing, int rank) {
  const int parts = mesh_.size(placing.axis), own = coordinate(rank, placing.axis), seen = wanted(placing, rank);
  std::vector<Atom> all;
  for (int i = 0; i < parts; ++i) {
    if (!placing.comes_from(i, own, parts)) continue;
    for (const Atom& atom : atoms(block(placing.base, neighbour(rank, placing.axis, i)))) {
      const Atom part{atom.shard, both(atom.within, seen)};
      if (rows(true, part).count() > 0) all.push_back(part);
    }
  }
  return all;
}

int Blocks::wanted(const Placing& placing, int rank) {
  const Home& queries = homes_[static_cast<std::size_t>(placing.wanted)];
  const auto [found, fresh] = wanted_.try_emplace({queries.root, moved(rank, queries)}, 0);
  if (fresh) found->second = number_of(plan_.wanted(placing, rank));
  return found->second;
}

bool Blocks::Less::operator()(const std::vector<Interval>& a, const std::vector<Interval>& b) const {
  return std::lexicographical_compare(a.begin(), a.end(), b.begin(), b.end(), [](const Interval& x, const Interval& y) {
    return std::pair(x.begin, x.end) < std::pair(y.begin, y.end);
  });
}

int Blocks::number_of(std::vector<Interval> ranges) {
  const auto [found, fresh] = range_numbers_.try_emplace(std::move(ranges), static_cast<int>(ranges_.size()));
  if (fresh) ranges_.push_back(found->first);
  return found->second;
}

int Blocks::both(int within_a, int within_b) {
  if (within_a == kWhole || within_a == within_b) return within_b;
  if (within_b == kWhole) return within_a;
  const auto [found, fresh] = intersections_.try_emplace(std::minmax(within_a, within_b), 0);
  if (!fresh) return found->second;
  std::vector<Interval> shared;
  const std::span<const Interval> a = ranges(within_a), b = ranges(within_b);
  for (std::size_t i = 0, j = 0; i < a.size() && j < b.size();) {
    const Interval part{std::max(a[i].begin, b[j].begin), std::min(a[i].end, b[j].end)};
    if (part.count() > 0) shared.push_back(part);
    ++(a[i].end < b[j].end ? i : j);
  }
  return found->second = number_of(std::move(shared));
}

std::span<const Atom> Blocks::atoms_of_shard(int block, int shard) const {
  const std::vector<Atom>& all = atoms(block);
  const auto first =
      std::lower_bound(all.begin(), all.end(), shard, [](const Atom& a, int wanted) { return a.shard < wanted; });
  auto last = first;
  while (last != all.end() && last->shard == shard) ++last;
  return {first, last};
}

const Positions& Blocks::shard(bool key_side, int index) const {
  return (key_side ? key_shards_ : query_shards_)[static_cast<std::size_t>(index)];
}

Positions Blocks::rows(bool key_side, const Atom& atom) const {
  const Positions& whole = shard(key_side, atom.shard);
  return atom.within == kWhole ? whole : whole.inside(ranges(atom.within));
}

std::int64_t Blocks::row_count(ValueId value, int rank) {
  const bool key_side = is_key_side(plan_.values[static_cast<std::size_t>(value)].what);
  std::int64_t count = 0;
  for (const Atom& atom : atoms(block(value, rank)))
    count += atom.within == kWhole ? shard(key_side, atom.shard).count() : rows(key_side, atom).count();
  return count;
}

// The value that decides how heads are split: rotating and gathering change nothing.
ValueId Blocks::head_root(ValueId value) const {
  const Placing& placing = plan_.values[static_cast<std::size_t>(value)].placing;
  const bool decides = placing.kind == Placing::Kind::kShard || placing.kind == Placing::Kind::kHeadSplit;
  return decides ? value : head_root(placing.base);
}

const HeadRange& Blocks::heads(ValueId value, int rank) {
  const Home& home = homes_[static_cast<std::size_t>(value)];
  std::vector<HeadRange>& table = heads_[static_cast<std::size_t>(home.root)];
  if (table.empty()) {
    const ValueId decides = head_root(home.root);
    if (decides != home.root && heads_[static_cast<std::size_t>(decides)].empty()) heads(decides, rank);
    table = heads_[static_cast<std::size_t>(decides)];
    if (table.empty()) {
      for (int i = 0; i < ranks(); ++i) table.push_back(plan_.heads(decides, i));
    }
  }
  return table[static_cast<std::size_t>(moved(rank, home))];
}

}  // namespace dattn::proof
