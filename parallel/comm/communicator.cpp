// The default collectives, made of exchanges. n bytes, P ranks; bytes received by a rank:
//
//   all_reduce      2 n (P-1)/P   one contiguous segment per rank: reduce-scatter in rank order, then all-gather
//                   n (P-1)       below kShort: everybody sends everything and sums alike, one round instead of two
//   reduce_scatter  own (P-1)     every rank sends each other rank its slot; P-1 pieces are added in rank order
//   all_gather      n - own       direct: one round
//   broadcast       n             a binomial tree of log2 P rounds when short, scatter and all-gather otherwise
//   barrier         log2 P        dissemination (Hensgen, Finkel, Manber, 1988)
#include "parallel/comm/communicator.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "core/tensor/host_memory.h"

namespace dattn {
namespace {

constexpr std::int64_t kShort = 4096;  // bytes: below, a message costs its latency and not its length

struct SumOf {
  template <class Acc>
  static Acc join(Acc a, Acc b) {
    return a + b;
  }
};

struct MaxOf {
  template <class Acc>
  static Acc join(Acc a, Acc b) {
    return a > b || std::isnan(a) ? a : b;
  }
};

// out[i] = join over ranks r, in order, of pieces[r][i]; out may be one of the pieces.
template <class Join, class T>
void join_in_rank_order(const std::vector<const std::byte*>& pieces, T* out, std::int64_t count) {
  using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
  constexpr std::int64_t kBlock = 1024;  // a block of accumulators stays in the first-level cache
  Acc sums[kBlock];
  for (std::int64_t begin = 0; begin < count; begin += kBlock) {
    const std::int64_t length = std::min(kBlock, count - begin);
    for (std::size_t r = 0; r < pieces.size(); ++r) {
      const T* piece = reinterpret_cast<const T*>(pieces[r]) + begin;
      for (std::int64_t i = 0; i < length; ++i) {
        const Acc value = static_cast<Acc>(piece[i]);
        sums[i] = r == 0 ? value : Join::join(sums[i], value);
      }
    }
    for (std::int64_t i = 0; i < length; ++i) out[begin + i] = static_cast<T>(sums[i]);
  }
}

template <class Join>
void join_on_host(const std::vector<const std::byte*>& pieces, void* out, DType dtype, std::int64_t count) {
  dispatch_float(dtype, [&](auto zero) { join_in_rank_order<Join>(pieces, static_cast<decltype(zero)*>(out), count); });
}

// The same bits: in the accumulator type, rounded once.
template <class Join>
void join_on_device(const std::vector<const std::byte*>& pieces, const TensorView& out) {
  const auto piece = [&](std::size_t r) {
    return TensorView(const_cast<std::byte*>(pieces[r]), out.dtype, Shape{out.elements()}, out.device);
  };
  constexpr bool kSums = std::is_same_v<Join, SumOf>;
  const Tensor joined = to_dtype(piece(0), kSums ? accumulate_type(out.dtype) : out.dtype);
  for (std::size_t r = 1; r < pieces.size(); ++r) kSums ? add(piece(r), joined) : take_maximum(piece(r), joined);
  copy(joined, TensorView(out.data, out.dtype, Shape{out.elements()}, out.device));
}

// out: contiguous, one of the pieces or not.
template <class Join>
void join_pieces(const std::vector<const std::byte*>& pieces, const TensorView& out) {
  if (out.elements() == 0) return;
  if (out.device.is_cuda()) return join_on_device<Join>(pieces, out);
  join_on_host<Join>(pieces, out.data, out.dtype, out.elements());
}

// Memory for what arrives, where `like` lies.
class Scratch {
 public:
  Scratch(const TensorView& like, std::size_t bytes) {
    if (like.device.is_cuda()) {
      const DeviceScope scope(like.device);
      tensor_ = Tensor::uninitialized(DType::kBF16, Shape{static_cast<std::int64_t>(bytes + 1) / 2});
    } else {
      bytes_ = HostBytes(bytes);
    }
  }
  std::byte* data() { return tensor_.defined() ? tensor_.ptr<std::byte>() : bytes_.data(); }

 private:
  HostBytes bytes_;
  Tensor tensor_;
};

void check_reducible(const TensorView& data, const OpLabel& label) {
  ensure(data.contiguous(), "{}: a tensor to be reduced must be contiguous, this one has strides", label.verb);
  ensure(data.dtype != DType::kI32, "{}: only floating types are reduced, not {}", label.verb, name_of(data.dtype));
}

struct Segments {
  std::vector<std::int64_t> begin;  // in elements, one more than ranks

  Segments(std::span<const std::int64_t> counts) : begin(counts.size() + 1) {
    for (std::size_t r = 0; r < counts.size(); ++r) begin[r + 1] = begin[r] + counts[r];
  }
  std::int64_t count(int r) const { return begin[static_cast<std::size_t>(r) + 1] - begin[static_cast<std::size_t>(r)]; }
  std::byte* at(const TensorView& all, int r) const {
    return all.ptr<std::byte>() + begin[static_cast<std::size_t>(r)] * size_of(all.dtype);
  }
};

std::vector<std::int64_t> even_counts(std::int64_t elements, int ranks) {
  std::vector<std::int64_t> counts;
  for (int r = 0; r < ranks; ++r) counts.push_back(elements * (r + 1) / ranks - elements * r / ranks);
  return counts;
}

void check_counts(const Communicator& comm, const TensorView& all, std::span<const std::int64_t> counts, const OpLabel& label) {
  std::int64_t sum = 0;
  for (const std::int64_t count : counts) sum += count;
  ensure(std::cmp_equal(counts.size(), comm.size()), "{}: {} counts for {} ranks", label.verb, counts.size(), comm.size());
  ensure(sum == all.elements(), "{}: the counts add up to {} elements but the tensor has {}", label.verb, sum, all.elements());
  ensure(all.contiguous(), "{}: the tensor must be contiguous", label.verb);
}

std::size_t as_size(std::int64_t bytes) { return static_cast<std::size_t>(bytes); }

// Receives what every rank sends of segment `mine`, joins it in rank order into `out` (which may be the segment).
template <class Join>
void reduce_segments(Communicator& comm, const TensorView& all, const Segments& segments, const TensorView& out,
                     const OpLabel& label) {
  const int me = comm.rank();
  const std::int64_t bytes = segments.count(me) * size_of(all.dtype);
  Scratch arrived(all, as_size(bytes * (comm.size() - 1)));
  std::vector<SendPart> sends;
  std::vector<RecvPart> receives;
  std::vector<const std::byte*> pieces;
  std::byte* next = arrived.data();
  for (int r = 0; r < comm.size(); ++r) {
    pieces.push_back(r == me ? segments.at(all, me) : next);
    if (r == me) continue;
    sends.push_back({r, segments.at(all, r), as_size(segments.count(r) * size_of(all.dtype)), all.device});
    receives.push_back({r, next, as_size(bytes), all.device});
    next += bytes;
  }
  comm.exchange(sends, receives, label);
  join_pieces<Join>(pieces, out);
}

// Every rank sends everything: one round, and each rank computes the same sums in the same order.
template <class Join>
void reduce_short(Communicator& comm, const TensorView& data, const OpLabel& label) {
  const std::size_t bytes = as_size(data.bytes());
  Scratch all(data, bytes * static_cast<std::size_t>(comm.size()));
  std::vector<SendPart> sends;
  std::vector<RecvPart> receives;
  std::vector<const std::byte*> pieces;
  for (int r = 0; r < comm.size(); ++r) {
    std::byte* slot = all.data() + bytes * static_cast<std::size_t>(r);
    pieces.push_back(slot);
    sends.push_back({r, data.data, bytes, data.device});
    receives.push_back({r, slot, bytes, data.device});
  }
  comm.exchange(sends, receives, label);
  join_pieces<Join>(pieces, data);
}

template <class Join>
void all_reduce(Communicator& comm, const TensorView& data, const OpLabel& label) {
  check_reducible(data, label);
  if (comm.size() == 1 || data.elements() == 0) return;
  if (data.bytes() <= kShort) return reduce_short<Join>(comm, data, label);
  const std::vector<std::int64_t> counts = even_counts(data.elements(), comm.size());
  const Segments segments(counts);
  const TensorView own(segments.at(data, comm.rank()), data.dtype, Shape{segments.count(comm.rank())}, data.device);
  reduce_segments<Join>(comm, data, segments, own, label);
  comm.all_gather(data, counts, label);
}

// Rank r (counted from the root) receives from r without its lowest set bit, then serves r + 1, r + 2, r + 4, ..
void broadcast_tree(Communicator& comm, std::span<std::byte> data, int root, const OpLabel& label) {
  const int size = comm.size();
  const int place = (comm.rank() - root + size) % size;
  int reach = 1;
  while (reach < size && (place & reach) == 0) reach *= 2;
  if (place != 0) {
    const RecvPart from{(place - reach + root) % size, data.data(), data.size()};
    comm.exchange({}, {&from, 1}, label);
  }
  std::vector<SendPart> sends;
  for (int step = reach / 2; step > 0; step /= 2) {
    if (place + step < size) sends.push_back({(place + step + root) % size, data.data(), data.size()});
  }
  if (!sends.empty()) comm.exchange(sends, {}, label);
}

void broadcast_scattered(Communicator& comm, std::span<std::byte> data, int root, const OpLabel& label) {
  // Segments are counted in 4-byte words, the last few bytes go with the tree.
  const auto words = static_cast<std::int64_t>(data.size() / 4);
  const TensorView view(data.data(), DType::kI32, Shape{words});
  const std::vector<std::int64_t> counts = even_counts(words, comm.size());
  const Segments segments(counts);
  const auto bytes_of = [&](int r) { return as_size(segments.count(r) * 4); };
  if (comm.rank() == root) {
    std::vector<SendPart> sends;
    for (int r = 0; r < comm.size(); ++r) {
      if (r != root) sends.push_back({r, segments.at(view, r), bytes_of(r)});
    }
    comm.exchange(sends, {}, label);
  } else {
    const RecvPart from{root, segments.at(view, comm.rank()), bytes_of(comm.rank())};
    comm.exchange({}, {&from, 1}, label);
  }
  comm.all_gather(view, counts, label);
  if (data.size() % 4 != 0) broadcast_tree(comm, data.subspan(as_size(words * 4)), root, label);
}

}  // namespace

void Communicator::all_reduce_sum(const TensorView& data, const OpLabel& label) { all_reduce<SumOf>(*this, data, label); }
void Communicator::all_reduce_max(const TensorView& data, const OpLabel& label) { all_reduce<MaxOf>(*this, data, label); }

void Communicator::broadcast(std::span<std::byte> data, int root, const OpLabel& label) {
  ensure(root >= 0 && root < size(), "{}: root {} of {} ranks", label.verb, root, size());
  if (size() == 1 || data.empty()) return;
  if (std::cmp_less_equal(data.size(), kShort * size())) return broadcast_tree(*this, data, root, label);
  broadcast_scattered(*this, data, root, label);
}

void Communicator::all_gather(const TensorView& all, std::span<const std::int64_t> counts, const OpLabel& label) {
  check_counts(*this, all, counts, label);
  if (size() == 1) return;
  const Segments segments(counts);
  const auto bytes_of = [&](int r) { return as_size(segments.count(r) * size_of(all.dtype)); };
  std::vector<SendPart> sends;
  std::vector<RecvPart> receives;
  for (int r = 0; r < size(); ++r) {
    if (r == rank()) continue;
    sends.push_back({r, segments.at(all, rank()), bytes_of(rank()), all.device});
    receives.push_back({r, segments.at(all, r), bytes_of(r), all.device});
  }
  exchange(sends, receives, label);
}

void Communicator::reduce_scatter_sum(const TensorView& all, std::span<const std::int64_t> counts, const TensorView& own,
                                      const OpLabel& label) {
  check_reducible(all, label);
  check_reducible(own, label);
  check_counts(*this, all, counts, label);
  const Segments segments(counts);
  ensure(own.elements() == segments.count(rank()) && own.dtype == all.dtype,
         "{}: rank {} owns {} elements of {} but the result has {} of {}", label.verb, rank(), segments.count(rank()),
         name_of(all.dtype), own.elements(), name_of(own.dtype));
  if (size() > 1) return reduce_segments<SumOf>(*this, all, segments, own, label);
  if (own.data != all.data) copy(all.reshape(own.shape), own);
}

void Communicator::barrier(const OpLabel& label) {
  std::byte out{}, in{};
  for (int distance = 1; distance < size(); distance *= 2) {
    const SendPart to{(rank() + distance) % size(), &out, 1};
    const RecvPart from{(rank() - distance + size()) % size(), &in, 1};
    exchange({&to, 1}, {&from, 1}, label);
  }
}

std::vector<std::string> Communicator::gather_strings(const std::string& mine, const OpLabel& label) {
  if (size() == 1) return {mine};
  const auto ranks = static_cast<std::size_t>(size());
  std::vector<std::uint64_t> lengths(ranks, mine.size());
  const std::uint64_t length = mine.size();
  std::vector<SendPart> sends;
  std::vector<RecvPart> receives;
  for (std::size_t r = 0; r < ranks; ++r) {
    sends.push_back({static_cast<int>(r), &length, sizeof length});
    receives.push_back({static_cast<int>(r), &lengths[r], sizeof length});
  }
  exchange(sends, receives, label);

  std::vector<std::string> all(ranks);
  for (std::size_t r = 0; r < ranks; ++r) {
    all[r].resize(lengths[r]);
    sends[r] = {static_cast<int>(r), mine.data(), mine.size()};
    receives[r] = {static_cast<int>(r), all[r].data(), all[r].size()};
  }
  exchange(sends, receives, label);
  return all;
}

std::unique_ptr<Communicator> whole_group(Communicator& world, std::string_view name) {
  std::vector<int> everyone(static_cast<std::size_t>(world.size()));
  std::iota(everyone.begin(), everyone.end(), 0);
  return world.split(everyone, name);
}

std::unique_ptr<Communicator> whole_group(Communicator& world) { return whole_group(world, world.name()); }

}  // namespace dattn
