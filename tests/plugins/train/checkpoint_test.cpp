// Checkpoints: written in parts and read back whole or in other parts; damage and interruption are named and passed over.
#include "plugins/train/checkpoint.h"

#include <filesystem>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/base/error.h"
#include "core/base/file.h"
#include "plugins/train/run_folder.h"

namespace dattn {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

template <class F>
std::string refusal(F&& work) {
  try {
    work();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kBadInput);
    return error.what();
  }
  return "no error";
}

class Checkpoints : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = testing::TempDir() + "/checkpoints_" + testing::UnitTest::GetInstance()->current_test_info()->name();
    fs::remove_all(folder_);
    fs::create_directories(folder_);
    for (std::int64_t i = 0; i < 24; ++i) weight_.ptr<float>()[i] = static_cast<float>(i);
    for (std::int64_t i = 0; i < 6; ++i) bias_.ptr<double>()[i] = static_cast<double>(i) / 3;
  }
  void TearDown() override { fs::remove_all(folder_); }

  // Two ranks: the weight is cut over axis 0 (rows 0..3 and 3..6), the bias is whole on the first.
  std::string write(std::int64_t step) {
    CheckpointWriter writer(folder_, step);
    writer.begin();
    const Shape global{6, 4};
    const std::vector<TensorPart> first{{"weight", weight_->slice(0, 0, 3), global, 0, 0}, {"bias", bias_, {}, 0, 0}};
    const std::vector<TensorPart> second{{"weight", weight_->slice(0, 3, 3), global, 0, 3}};
    CheckpointManifest manifest{step, "train:\n  steps: 3\n", "{\"dim\": 4}", "{}", {{"seed", "1"}}, {}};
    for (const auto& record : {writer.write_shard(0, first), writer.write_shard(1, second)}) {
      manifest.shards.push_back(ShardRecord::from_json(record.to_json()));
    }
    return writer.finish(manifest);
  }
  void damage(const std::string& path, std::size_t at_from_end) const {
    std::string text = read_file(path, "test");
    text[text.size() - at_from_end] = static_cast<char>(text[text.size() - at_from_end] ^ 1);
    write_file(path, text);
  }

  std::string folder_;
  Tensor weight_{DType::kF32, {6, 4}};
  Tensor bias_{DType::kF64, {6}};
};

TEST_F(Checkpoints, ReadBackOnAnyMesh) {
  const CheckpointReader reader(write(300));
  EXPECT_EQ(reader.path(), folder_ + "/step-00000300");
  EXPECT_FALSE(fs::exists(folder_ + "/step-00000300.tmp"));
  EXPECT_EQ(reader.manifest().step, 300);
  EXPECT_EQ(reader.manifest().config, "train:\n  steps: 3\n");
  EXPECT_EQ(reader.manifest().values.at("seed"), "1");
  EXPECT_EQ(reader.names(), (std::vector<std::string>{"bias", "weight"}));
  EXPECT_EQ(reader.shape("weight"), (Shape{6, 4}));
  const Tensor whole = reader.read("weight");
  for (std::int64_t i = 0; i < 24; ++i) EXPECT_EQ(whole.ptr<float>()[i], static_cast<float>(i));
  EXPECT_EQ(reader.read("bias").ptr<double>()[4], 4.0 / 3);
  Tensor rows(DType::kF32, {3, 4}), columns(DType::kF32, {6, 2}), none(DType::kF32, {0, 4});
  reader.read_rows("weight", 0, 2, rows);  // over both shards
  reader.read_rows("weight", 1, 1, columns);
  reader.read_rows("weight", 0, 6, none);
  for (std::int64_t i = 0; i < 12; ++i) {
    EXPECT_EQ(rows.ptr<float>()[i], static_cast<float>(8 + i));
    EXPECT_EQ(columns.ptr<float>()[i], static_cast<float>(i / 2 * 4 + 1 + i % 2));
  }
  EXPECT_THROW(reader.read_rows("weight", 0, 4, rows), Error);
  EXPECT_THAT(refusal([&] { reader.read("x"); }), HasSubstr("no tensor 'x'"));
}

TEST_F(Checkpoints, OverlappingPartsAndHoles) {
  CheckpointWriter writer(folder_, 1);
  writer.begin();
  const Shape global{6, 4};
  const std::vector<TensorPart> first{{"a", weight_->slice(0, 0, 4), global, 0, 0},
                                      {"b", weight_->slice(0, 0, 2), global, 0, 0}};
  const std::vector<TensorPart> second{{"a", weight_->slice(0, 2, 4), global, 0, 2},
                                       {"b", weight_->slice(0, 3, 3), global, 0, 3}};
  const CheckpointReader reader(
      writer.finish({1, "", "", "", {}, {writer.write_shard(0, first), writer.write_shard(1, second)}}));
  EXPECT_EQ(reader.read("a").ptr<float>()[23], 23.0f);
  EXPECT_THAT(refusal([&] { reader.read("b"); }), HasSubstr("no shard holds row 2"));
}

TEST_F(Checkpoints, AnotherModelIsRefusedByTensorAndShapes) {
  const CheckpointReader reader(write(1));
  using Expected = std::vector<CheckpointReader::Expected>;
  reader.require_model(Expected{{"weight", {6, 4}}, {"bias", {6}}});
  reader.require_model(Expected{{"bias", {6}}}, "bias");
  EXPECT_THAT(refusal([&] {
                reader.require_model(Expected{{"weight", {6, 5}}, {"bias", {6}}});
              }),
              HasSubstr("tensor 'weight' is [6, 4] there and [6, 5] in the config"));
  EXPECT_THAT(refusal([&] {
                reader.require_model(Expected{{"weight", {6, 4}}, {"gain", {6}}});
              }),
              HasSubstr("it has no tensor 'gain' [6]"));
  EXPECT_THAT(refusal([&] {
                reader.require_model(Expected{{"weight", {6, 4}}});
              }),
              HasSubstr("its tensor 'bias' [6] has no place"));
}

TEST_F(Checkpoints, DamageIsNamedAndThePreviousOneUsed) {
  write(100);
  const std::string newest = write(200);
  EXPECT_EQ(latest_checkpoint(folder_), newest);
  damage(newest + "/shard-00001.safetensors", 1);  // one bit of one weight
  EXPECT_THAT(refusal([&] { CheckpointReader reader(newest); }),
              HasSubstr("shard-00001.safetensors: damaged: its checksum is"));
  testing::internal::CaptureStderr();
  EXPECT_EQ(latest_checkpoint(folder_), folder_ + "/step-00000100");
  EXPECT_THAT(testing::internal::GetCapturedStderr(), HasSubstr("step-00000200 is damaged and passed over"));
  EXPECT_EQ(CheckpointReader(newest, CheckpointReader::Verify::kSizes).names().size(), 2u);  // sizes alone do not see it
  fs::resize_file(newest + "/shard-00001.safetensors", 100);
  EXPECT_THAT(refusal([&] { CheckpointReader reader(newest, CheckpointReader::Verify::kSizes); }),
              HasSubstr("100 bytes, the manifest states"));
  fs::remove(newest + "/shard-00001.safetensors");
  EXPECT_THAT(refusal([&] { CheckpointReader reader(newest); }), HasSubstr("shard-00001.safetensors: missing shard"));
  EXPECT_EQ(write(200), newest);  // written again, it replaces the damaged one
  EXPECT_EQ(latest_checkpoint(folder_), newest);
}

TEST_F(Checkpoints, EveryByteOfTheManifestCounts) {
  const std::string path = write(5);
  const std::string manifest = path + "/manifest.json";
  const std::string text = read_file(manifest, "test");
  int unseen = 0;
  for (std::size_t i = 0; i < text.size(); i += 3) {
    if (text[i] == ' ' || text[i] == '\n') continue;
    std::string changed = text;
    changed[i] = static_cast<char>(changed[i] ^ 1);
    write_file(manifest, changed);
    unseen += refusal([&] { CheckpointReader reader(path); }) == "no error";
  }
  EXPECT_EQ(unseen, 0);
  write_file(manifest, text.substr(0, text.size() / 2));
  EXPECT_THAT(refusal([&] { CheckpointReader reader(path); }), HasSubstr("manifest.json: damaged manifest"));
  fs::remove(manifest);
  EXPECT_THAT(refusal([&] { CheckpointReader reader(path); }), HasSubstr("manifest.json: cannot read the manifest"));
}

TEST_F(Checkpoints, InterruptedOnesAreNamed) {
  EXPECT_EQ(latest_checkpoint(folder_ + "/none"), std::nullopt);
  EXPECT_EQ(latest_checkpoint(folder_), std::nullopt);
  const std::string whole = write(100);
  CheckpointWriter unfinished(folder_, 200);
  unfinished.begin();
  unfinished.write_shard(7, std::vector<TensorPart>{{"bias", bias_, {}, 0, 0}});
  testing::internal::CaptureStderr();
  EXPECT_EQ(latest_checkpoint(folder_), whole);
  EXPECT_THAT(testing::internal::GetCapturedStderr(), HasSubstr("step-00000200.tmp was interrupted"));
  write(200);  // begin() clears what was left
  EXPECT_EQ(latest_checkpoint(folder_), folder_ + "/step-00000200");
  EXPECT_FALSE(fs::exists(folder_ + "/step-00000200/shard-00007.safetensors"));
  CheckpointWriter given_up(folder_, 300);
  given_up.begin();
  given_up.abandon();
  EXPECT_FALSE(fs::exists(folder_ + "/step-00000300.tmp"));
}

TEST_F(Checkpoints, TheNewestAreKept) {
  for (const std::int64_t step : {5, 100, 20, 123456789}) write(step);
  fs::create_directories(folder_ + "/step-00000007.tmp");
  fs::create_directories(folder_ + "/notes");
  keep_newest(folder_, 2);
  std::vector<std::string> left;
  for (const auto& entry : fs::directory_iterator(folder_)) left.push_back(entry.path().filename().string());
  EXPECT_THAT(left, testing::UnorderedElementsAre("step-00000100", "step-123456789", "notes"));
}

TEST_F(Checkpoints, AShardOutsideTheFolderIsRefused) {
  EXPECT_THAT(refusal([&] { ShardRecord::from_json(R"({"file":"../x","bytes":1,"xxh64":"0000000000000000","tensors":[]})"); }),
              HasSubstr("'../x' is no name of a shard"));
  EXPECT_THAT(refusal([&] { ShardRecord::from_json("{"); }), HasSubstr("damaged shard record"));
}

TEST_F(Checkpoints, RunFoldersAreSetAside) {
  const std::string path = folder_ + "/runs/quick";
  const RunFolder first = fresh_run_folder(path + "/");
  EXPECT_EQ(first.path, path);
  EXPECT_EQ(first.set_aside, "");
  write_file(first.metrics(), "{}\n");
  EXPECT_EQ(fresh_run_folder(path).set_aside, path + ".1");
  EXPECT_FALSE(fs::exists(first.metrics()));
  EXPECT_TRUE(fs::exists(path + ".1/metrics.jsonl"));
  write_file(first.metrics(), "{}\n");
  EXPECT_EQ(fresh_run_folder(path).set_aside, path + ".2");
  EXPECT_EQ(existing_run_folder(path).path, path);
  EXPECT_THAT(refusal([&] { existing_run_folder(folder_ + "/none"); }), HasSubstr("no such run folder"));
  write_file(folder_ + "/runs/letter.txt", "mine");
  EXPECT_THAT(refusal([&] { fresh_run_folder(folder_ + "/runs"); }), HasSubstr("holds something that is no run"));
  EXPECT_THAT(refusal([&] { fresh_run_folder(folder_ + "/runs/letter.txt"); }), HasSubstr("a file stands where"));
  EXPECT_TRUE(fs::exists(folder_ + "/runs/letter.txt"));
}

}  // namespace
}  // namespace dattn
