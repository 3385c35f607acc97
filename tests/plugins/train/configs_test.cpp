// Every file under configs/ is read, strictly, and what it asks for can be built.
#include <filesystem>

#include <gtest/gtest.h>

#include "core/nn/model_config.h"
#include "launch/run_config.h"

namespace dattn {
namespace {

TEST(Configs, AreReadAndCanBeBuilt) {
  const auto root = std::filesystem::path(DATTN_SOURCE_DIR);
  int files = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(root / "configs")) {
    if (entry.path().extension() != ".yaml" || entry.path().parent_path().filename() == "machines") continue;
    ++files;
    SCOPED_TRACE(entry.path().string());
    RunConfig config;
    ASSERT_NO_THROW(config = load_config<RunConfig>(entry.path().string()));
    EXPECT_NO_THROW(resolve(config.model));
    EXPECT_TRUE(config.shape.has_value() || !config.data.path.empty()) << "neither a shape to plan nor a text to train on";
    EXPECT_LE(config.train.seq_len, config.model.position == "learned" ? config.model.max_seq : kMaxPosition);
    EXPECT_EQ(to_yaml(to_node(config)), to_yaml(to_node(parse_config_as<RunConfig>(to_yaml(to_node(config)), "resolved"))));
  }
  EXPECT_GE(files, 8);
}

}  // namespace
}  // namespace dattn
