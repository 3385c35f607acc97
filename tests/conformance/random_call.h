// Random attention calls, as a user may ask for them: any mask, mesh, strategy, layout, type and term, and, where wanted,
// numbers and combinations that make no sense.
#pragma once

#include <random>
#include <string>
#include <vector>

#include "parallel/attention.h"

namespace dattn::conformance {

struct RandomCall {
  MeshShape mesh;
  AttentionShape shape;
  AttentionOptions options;
  bool planned = false;  // the planner shapes the sequence axes, of as many ranks as the mesh has, and picks a layout
  bool by_time = false;  // for a machine

  // The same as a config of the command: keys as an attacker might write them.
  std::string yaml() const;
};

// The call that such a text asks for, on the mesh that the planner makes of it; of several data coordinates the first one's.
RandomCall read_call(const std::string& yaml);

struct CallLimits {
  int ranks = 8;
  std::int64_t seq = 150;
  std::int64_t dim = 40;
  bool long_sequences = false;  // some of many documents, some of up to 10^9 positions, on few ranks
  bool planner = false;         // a part leaves the mesh to the planner
  bool nonsense = false;        // a part of the calls has wrong numbers here and there
};
inline constexpr CallLimits kAnyCalls{.ranks = 64, .dim = 256, .long_sequences = true, .planner = true, .nonsense = true};

// The calls of one seed, one after the other.
class RandomCalls {
 public:
  RandomCalls(std::uint64_t seed, const CallLimits& limits);
  RandomCall next();

 private:
  struct Writer {
    std::string strategy;
    std::vector<Axis> axes;  // that it has a use for
  };
  static constexpr int kOddPercent = 6;  // of the numbers of a call that makes no sense
  enum class Size { kSmall, kMedium, kLong };

  std::int64_t pick(std::int64_t from, std::int64_t to);
  bool chance(int percent);
  template <class List>
  auto choose(const List& list) {
    return list[static_cast<std::size_t>(pick(0, std::ssize(list) - 1))];
  }
  // The number, or, in a call that makes no sense, now and then another one: far out, or just beside `edge`.
  std::int64_t odd(std::int64_t number, std::int64_t edge);
  double odd_real(double number);
  std::int64_t length();

  MeshShape some_mesh(const Writer& writer);
  AttentionOptions some_options(const AttentionShape& shape);
  Mask some_mask(const AttentionShape& shape);
  Mask row_mask(std::int64_t seq_q, std::int64_t seq_kv);  // of a kind that is the same for all batch rows
  Mask band();
  std::vector<std::int64_t> boundaries(std::int64_t length, std::int64_t count);
  Mask documents(std::int64_t seq_q, std::int64_t seq_kv);
  Mask blocks(std::int64_t seq_q, std::int64_t seq_kv);
  Mask regions(std::int64_t seq_q, std::int64_t seq_kv);

  std::mt19937_64 random_;
  CallLimits limits_;
  std::vector<Writer> writers_;
  Size size_ = Size::kSmall;  // of this call
  bool nonsense_ = false;
};

}  // namespace dattn::conformance
