// Checkpoints: a folder of safetensors shards and a manifest with sizes and xxHash64 checksums.
//
//   RUN/checkpoints/step-00000300/{shard-00000.safetensors, .., manifest.json}      whole
//   RUN/checkpoints/step-00000400.tmp/...                                           being written, or interrupted
//
// Collective, without knowing ranks; `all` and `one` say who calls, B is a barrier of the caller:
//   CheckpointWriter writer(folder, step);      all
//   writer.begin();                             one      B
//   record = writer.write_shard(index, parts);  all, indices distinct; records (to_json) are gathered on the one
//   writer.finish(manifest);                    one      B
// Files and folders are synced before the rename that makes the checkpoint exist.
//
// Tensors are stored by their global names and shapes: a part says which rows of which axis it holds, so a checkpoint
// can be read on another mesh than it was written on.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/tensor/safetensors.h"

namespace dattn {

// Rows [begin, begin + view.size(axis)) of one axis of a global tensor. Parts of one tensor may overlap (replicas) but must
// cover it. The default is the whole tensor.
struct TensorPart {
  std::string name;
  TensorView view;
  Shape global;  // no axes: view.shape, the tensor is whole
  int axis = 0;
  std::int64_t begin = 0;
};

struct PartRecord {
  std::string name;
  std::string stored;  // its name inside the shard: NAME, or NAME@begin for a part
  Shape global;
  int axis = 0;
  std::int64_t begin = 0;
  std::int64_t count = 0;
};

struct ShardRecord {
  std::string file;
  std::uint64_t bytes = 0;
  std::uint64_t checksum = 0;  // xxHash64 of the file
  std::vector<PartRecord> parts;

  std::string to_json() const;
  static ShardRecord from_json(std::string_view text);  // throws Error(kBadInput)
};

struct CheckpointManifest {
  std::int64_t step = 0;                      // optimizer steps done
  std::string config;                         // the resolved config, YAML
  std::string model;                          // what the tensors belong to, in words or JSON; shown in messages
  std::string alphabet;                       // Alphabet::to_json
  std::map<std::string, std::string> values;  // cursor of the data and whatever else the loop wants back
  std::vector<ShardRecord> shards;
};

class CheckpointWriter {
 public:
  CheckpointWriter(std::string folder, std::int64_t step);

  void begin();  // makes an empty temporary folder; removes what an interrupted run left of this step
  // Throws Error(kSystem) (disk full, no permission); the shard's own file is then gone.
  ShardRecord write_shard(int index, std::span<const TensorPart> parts);
  std::string finish(const CheckpointManifest& manifest);  // returns the checkpoint's folder
  void abandon() noexcept;                                 // removes the temporary folder

 private:
  std::string folder_;
  std::int64_t step_;
  std::string temporary_;
  std::string final_;
};

// Files under `checkpoint` are mapped; views are valid as long as the reader.
class CheckpointReader {
 public:
  enum class Verify { kChecksums, kSizes };  // kSizes: where another rank has just verified the checksums
  // Throws Error(kBadInput) naming the file and both values for anything missing, truncated or altered.
  explicit CheckpointReader(const std::string& checkpoint, Verify verify = Verify::kChecksums);

  const std::string& path() const { return path_; }
  const CheckpointManifest& manifest() const { return manifest_; }
  bool has(std::string_view name) const { return parts_.count(std::string(name)) > 0; }
  std::vector<std::string> names() const;
  Shape shape(std::string_view name) const;  // global; throws Error(kBadInput) for an unknown name
  DType dtype(std::string_view name) const;

  // The whole tensor: a view on the file where one part holds it all.
  Tensor read(std::string_view name) const;
  // Copies rows [begin, begin + to.size(axis)) of `axis` to `to`, from whichever parts hold them; converts floating types.
  void read_rows(std::string_view name, int axis, std::int64_t begin, const TensorView& to) const;

  struct Expected {
    std::string name;
    Shape global;
  };
  // Throws Error(kBadInput) naming the first tensor that is missing or has another shape, with both shapes, unless the
  // checkpoint is of the same model. `prefix` limits what is looked at ("" = all); tensors left over are refused as well.
  void require_model(std::span<const Expected> expected, std::string_view prefix = "") const;

 private:
  struct Located {
    PartRecord part;
    std::size_t shard = 0;
  };
  const std::vector<Located>& parts_of(std::string_view name) const;

  std::string path_;
  CheckpointManifest manifest_;
  std::vector<SafetensorsFile> shards_;
  std::map<std::string, std::vector<Located>> parts_;
};

// The newest whole checkpoint of a folder, every checksum verified; nothing where there is none. Interrupted and damaged ones
// are named in a warning (log) and passed over.
std::optional<std::string> latest_checkpoint(const std::string& folder);

// Removes all but the newest `keep` (>= 1) whole folders, oldest first, and interrupted ones older than the newest.
void keep_newest(const std::string& folder, std::int64_t keep);

}  // namespace dattn
