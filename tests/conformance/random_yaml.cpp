// Random calls as the text of a config. Values go down as they are: what makes no sense is for the reader to refuse.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "launch/commands/planning.h"
#include "tests/conformance/random_call.h"

namespace dattn::conformance {
namespace {

std::string bound(std::int64_t value) { return value <= -kUnbounded || value >= kUnbounded ? "null" : std::to_string(value); }

std::string keys_of(const Mask& mask);

std::string map_of(const Mask& mask) { return fmt::format("{{{}}}", keys_of(mask)); }

std::string keys_of(const Mask& mask) {
  using Kind = Mask::Kind;
  std::string keys = fmt::format("kind: {}", name_of(mask.kind));
  const auto add = [&keys](const char* key, const auto& value) { keys += fmt::format(", {}: {}", key, value); };
  if (mask.align == Mask::Align::kEnd) add("align", "end");
  if (mask.within) add("within", map_of(*mask.within));
  switch (mask.kind) {
    case Kind::kWindow:
      add("left", mask.left);
      add("right", mask.right);
      break;
    case Kind::kDocuments:
      add("cu_seqlens", mask.cu_seqlens);
      if (!mask.cu_seqlens_kv.empty()) add("cu_seqlens_kv", mask.cu_seqlens_kv);
      break;
    case Kind::kPrefix: add("length", mask.length); break;
    case Kind::kGlobal:
      add("tokens", mask.tokens);
      add("window", fmt::format("{{left: {}, right: {}}}", mask.left, mask.right));
      add("causal", mask.past_only);
      break;
    case Kind::kBlocks:
      add("size", mask.size);
      add("list", fmt::format("[{}]", fmt::join(mask.list, ", ")));
      break;
    case Kind::kPadding: add("lengths", mask.lengths); break;
    case Kind::kRegions: {
      std::vector<std::string> regions;
      for (const Region& r : mask.regions) {
        regions.push_back(fmt::format("{{q: [{}, {}], k: [{}, {}], lo: {}, hi: {}}}", r.q.begin, r.q.end, r.k.begin, r.k.end,
                                      bound(r.lo), bound(r.hi)));
      }
      add("regions", fmt::format("[{}]", fmt::join(regions, ", ")));
      add("overlap", mask.overlap == Mask::Overlap::kFirst ? "first" : "refuse");
      break;
    }
    case Kind::kPerRow: {
      std::vector<std::string> rows;
      for (const Mask& row : mask.rows) rows.push_back(map_of(row));
      add("masks", fmt::format("[{}]", fmt::join(rows, ", ")));
      break;
    }
    default: break;
  }
  return keys;
}

// Ranks of a mesh that may make no sense: no overflow.
std::int64_t product(const MeshShape& mesh) {
  std::int64_t ranks = 1;
  for (const Axis axis : kAxes) {
    if (ranks < 1 << 20) ranks *= std::max(0, mesh.size(axis));
  }
  return ranks;
}

std::string_view name_of(Determinism determinism) {
  if (determinism == Determinism::kInvariant) return "invariant";
  return determinism == Determinism::kOff ? "off" : "repeatable";
}

}  // namespace

std::string RandomCall::yaml() const {
  std::string text = fmt::format("attention:\n  mask: {}\n", map_of(options.mask));
  if (options.softmax_scale) text += fmt::format("  softmax_scale: {}\n", *options.softmax_scale);
  if (options.softcap != 0) text += fmt::format("  softcap: {}\n", options.softcap);
  if (!options.alibi_slopes.empty()) text += fmt::format("  alibi_slopes: {}\n", options.alibi_slopes);
  text += fmt::format("  dropout: {{p: {}, seed: {}}}\n", options.dropout, options.dropout_seed);
  const auto size = [this](Axis axis) { return mesh.size(axis); };
  if (planned) {
    text += fmt::format("mesh: {{data: {}, tensor: {}, ranks: {}}}\nobjective: {}\n", size(Axis::kData), size(Axis::kTensor),
                        product(mesh), by_time ? "time" : "bytes");
    if (by_time) text += "machine: " DATTN_SOURCE_DIR "/configs/machines/h100_ib.yaml\n";
  } else {
    text += fmt::format("mesh: {{data: {}, tensor: {}, ulysses: {}, rows: {}, ring: {{inner: {}, outer: {}}}}}\nlayout: {}\n",
                        size(Axis::kData), size(Axis::kTensor), size(Axis::kUlysses), size(Axis::kRows), size(Axis::kRing),
                        size(Axis::kRingOuter), dattn::name_of(options.layout));
  }
  text += fmt::format("strategy: '{}'\ndtype: {}\ndeterminism: {}\n", options.strategy, dattn::name_of(shape.dtype),
                      name_of(options.determinism));
  text += fmt::format("shape: {{batch: {}, seq: {}, seq_kv: {}, heads: {}, kv_heads: {}, dim: {}, dim_v: {}", shape.batch,
                      shape.seq_q, shape.seq_kv, shape.heads, shape.kv_heads, shape.dim_qk, shape.dim_v);
  if (shape.bias) text += fmt::format(", bias: {{per_batch: {}, per_head: {}}}", shape.bias->per_batch, shape.bias->per_head);
  return text + fmt::format(", sink: {}}}\n", shape.sink);
}

RandomCall read_call(const std::string& yaml) {
  const RunConfig config = resolve_mesh(parse_config_as<RunConfig>(yaml, "random.yaml"));
  const DataShare first = data_share(config, shape_of(*config.shape, config.dtype));
  return {config.mesh.shape(), first.shape, first.options};
}

}  // namespace dattn::conformance
