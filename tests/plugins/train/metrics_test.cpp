// What a run reports: metrics lines, TensorBoard events (decoded here by hand), the picture.
#include "plugins/train/metrics.h"

#include <bit>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/base/error.h"
#include "core/base/file.h"
#include "plugins/train/plot.h"
#include "plugins/train/tensorboard.h"

namespace dattn {
namespace {

namespace fs = std::filesystem;

std::string folder() {
  const std::string path = testing::TempDir() + "/metrics_" + testing::UnitTest::GetInstance()->current_test_info()->name();
  fs::remove_all(path);
  fs::create_directories(path);
  return path;
}

TEST(MetricsLog, AppendsAndDropsWhatComesAfterTheCheckpoint) {
  const std::string path = folder() + "/metrics.jsonl";
  {
    MetricsLog log(path);
    for (int step = 1; step <= 5; ++step) log.append("{\"step\": " + std::to_string(step) + "}");
    log.append("{\"event\": \"note\"}");
    EXPECT_EQ(read_file(path, "test").size(), 5 * 12u + 18);  // flushed line by line
  }
  write_file(path, read_file(path, "test") + "{\"step\": 2, \"lo");  // cut off by a kill
  MetricsLog log(path, 3);
  log.append("{\"step\": 4, \"again\": true}");
  EXPECT_EQ(read_file(path, "test"),
            "{\"step\": 1}\n{\"step\": 2}\n{\"step\": 3}\n{\"event\": \"note\"}\n{\"step\": 4, \"again\": true}\n");
  EXPECT_THROW(log.append("{\n}"), Error);
  EXPECT_THROW(MetricsLog("/nonexistent/metrics.jsonl"), Error);
}

TEST(MetricsLog, AFreshRunStartsEmpty) {
  const std::string path = folder() + "/metrics.jsonl";
  write_file(path, "{\"step\": 1}\n");
  MetricsLog log(path);
  EXPECT_EQ(read_file(path, "test"), "");
}

TEST(TensorBoard, Crc32cOfKnownTexts) {
  EXPECT_EQ(crc32c("123456789"), 0xe3069283u);            // the catalogue's check value
  EXPECT_EQ(crc32c(std::string(32, '\0')), 0x8a9136aau);  // RFC 3720, B.4
  EXPECT_EQ(crc32c(std::string(32, '\xff')), 0x62a8ab43u);
}

// A protobuf message's fields: number -> bytes (length-delimited, fixed) or a varint's value.
struct Field {
  std::uint64_t number = 0;
  std::string bytes;
  std::uint64_t value = 0;
};

std::uint64_t varint(const std::string& text, std::size_t& at) {
  std::uint64_t value = 0;
  for (int shift = 0;; shift += 7) {
    const auto byte = static_cast<unsigned char>(text.at(at++));
    value |= std::uint64_t{byte & 0x7fu} << shift;
    if (byte < 0x80) return value;
  }
}

std::vector<Field> fields_of(const std::string& text) {
  std::vector<Field> fields;
  for (std::size_t at = 0; at < text.size();) {
    const std::uint64_t key = varint(text, at);
    Field field{key >> 3, "", 0};
    const std::uint64_t wire = key & 7;
    if (wire == 0) field.value = varint(text, at);
    const std::size_t length = wire == 1 ? 8 : wire == 5 ? 4 : wire == 2 ? varint(text, at) : 0;
    field.bytes = text.substr(at, length);
    EXPECT_EQ(field.bytes.size(), length);
    at += length;
    fields.push_back(field);
  }
  return fields;
}

std::vector<std::string> records_of(const std::string& file) {
  std::vector<std::string> records;
  const auto number = [&](std::size_t at) {
    std::uint32_t value = 0;
    std::memcpy(&value, file.data() + at, 4);
    return value;
  };
  const auto masked = [](std::string_view text) { return ((crc32c(text) >> 15) | (crc32c(text) << 17)) + 0xa282ead8u; };
  for (std::size_t at = 0; at < file.size();) {
    const std::size_t length = number(at);
    EXPECT_EQ(number(at + 8), masked(std::string_view(file).substr(at, 8)));
    records.push_back(file.substr(at + 12, length));
    EXPECT_EQ(number(at + 12 + length), masked(records.back()));
    at += 16 + length;
  }
  return records;
}

TEST(TensorBoard, EventsDecode) {
  const std::string path = folder() + "/tensorboard";
  TensorBoardWriter writer(path, 100);
  writer.scalar("loss/train", 300, 1.25);
  EXPECT_TRUE(fs::path(writer.path()).filename().string().starts_with("events.out.tfevents."));
  const auto records = records_of(read_file(writer.path(), "test"));
  ASSERT_EQ(records.size(), 3u);
  EXPECT_EQ(fields_of(records[0]).at(2).bytes, "brain.Event:2");
  const auto start = fields_of(records[1]);
  EXPECT_EQ(start.at(1).value, 101u);
  EXPECT_EQ(start.at(2).number, 7u);
  EXPECT_EQ(fields_of(start.at(2).bytes).at(0).value, 1u);
  const auto event = fields_of(records[2]);
  EXPECT_EQ(event.at(0).number, 1u);
  EXPECT_EQ(event.at(1).value, 300u);
  ASSERT_EQ(event.at(2).number, 5u);
  const auto value = fields_of(fields_of(event.at(2).bytes).at(0).bytes);
  EXPECT_EQ(value.at(0).bytes, "loss/train");
  float number = 0;
  std::memcpy(&number, value.at(1).bytes.data(), 4);
  EXPECT_EQ(number, 1.25f);
}

TEST(Plot, DrawsAPictureOrSaysWhyNot) {
  const std::string path = folder() + "/it's a loss.png";
  LossPlot plot{"quick'start", {{1, 6}, {2, 4}, {3, std::nan("")}, {4, 3}}, {{2, 4.2}, {4, 3.1}}, 3.55, 2.77};
  if (write_loss_plot(plot, path)) {
    EXPECT_EQ(read_file(path, "test").substr(1, 3), "PNG");
  } else {
    GTEST_LOG_(INFO) << "gnuplot is not installed here";
  }
  EXPECT_FALSE(fs::exists(path + ".gp"));
  EXPECT_FALSE(fs::exists(path + ".tmp"));
  EXPECT_FALSE(write_loss_plot({}, path + ".2"));
  testing::internal::CaptureStderr();
  const std::string search = std::getenv("PATH");
  setenv("PATH", "/nonexistent", 1);
  EXPECT_FALSE(write_loss_plot(plot, path));
  setenv("PATH", search.c_str(), 1);
  EXPECT_THAT(testing::internal::GetCapturedStderr(), testing::HasSubstr("gnuplot is not installed"));
}

}  // namespace
}  // namespace dattn
