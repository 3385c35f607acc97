// configs/SCHEMA.md is made from the structs; this test says when it is no longer current, and, with DATTN_UPDATE=1,
// writes it.
#include <cstdlib>
#include <filesystem>

#include <gtest/gtest.h>

#include "core/base/file.h"
#include "launch/run_config.h"

namespace dattn {
namespace {

TEST(Schema, CommittedPageIsCurrent) {
  const auto root = std::filesystem::path(DATTN_SOURCE_DIR);
  const std::string path = (root / "configs" / "SCHEMA.md").string();
  const std::string page = run_config_schema();
  if (std::getenv("DATTN_UPDATE") != nullptr) write_file(path, page);
  EXPECT_EQ(read_file(path, "schema page"), page) << "run dattn_plugins_tests --gtest_filter=Schema.* with DATTN_UPDATE=1";
}

TEST(Schema, DefaultsReadBack) {
  const std::string yaml = to_yaml(to_node(RunConfig{}));
  EXPECT_EQ(to_yaml(to_node(parse_config_as<RunConfig>(yaml, "defaults"))), yaml);
}

TEST(Schema, AWholeConfig) {
  const auto config = parse_config_as<RunConfig>(
      "attention: {mask: {kind: causal}, softmax_scale: 0.125}\nmesh: {data: 1, tensor: 1, ulysses: 2, ring: 2}\n"
      "layout: zigzag\nstrategy: auto\ndtype: bf16\ndata: {path: a.txt}\ntrain: {steps: 300, batch: 8, seq_len: 512, seed: "
      "1}\n",
      "t.yaml", {"mesh.ring=4"});
  EXPECT_EQ(config.mesh.shape().ranks(), 8);
  EXPECT_EQ(config.dtype, DType::kBF16);
  EXPECT_EQ(config.train.seq_len, 512);
}

TEST(Schema, RanksStandInPlaceOfAxes) {
  const auto config = parse_config_as<RunConfig>("mesh: {ranks: 8, tensor: 2}\nobjective: bytes\n", "t.yaml");
  EXPECT_EQ(config.mesh.job_ranks(), 8);
  EXPECT_THROW(config.mesh.shape(), Error);  // not planned yet
  for (const char* bad : {"mesh: {ranks: 8, ulysses: 2}", "mesh: {ranks: 8, rows: 2}", "mesh: {ranks: 8, ring: 2}",
                          "mesh: {ranks: 6, data: 4}", "mesh: {ranks: 0}", "objective: time"}) {
    EXPECT_THROW(parse_config_as<RunConfig>(bad, "t.yaml"), Error) << bad;
  }
}

}  // namespace
}  // namespace dattn
