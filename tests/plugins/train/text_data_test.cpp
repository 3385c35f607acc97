// The text as data: alphabet, split, windows that depend on (seed, step, row) only, and the n-gram models.
#include "plugins/train/text_data.h"

#include <cmath>
#include <filesystem>
#include <set>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/base/error.h"
#include "core/base/file.h"
#include "plugins/train/ngram.h"

namespace dattn {
namespace {

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

std::string digits(std::size_t count) {
  std::string text;
  for (std::size_t i = 0; i < count; ++i) text += static_cast<char>('0' + i % 10);
  return text;
}

TEST(Alphabet, HoldsTheBytesThatOccur) {
  const Alphabet alphabet = Alphabet::of(std::string("banana\0\xff", 8));
  EXPECT_EQ(alphabet.size(), 5);
  EXPECT_EQ(alphabet.encode(std::string("\0ab\xff", 4)), (std::vector<std::int32_t>{0, 1, 2, 4}));
  EXPECT_EQ(alphabet.decode(std::vector<std::int32_t>{3, 1}), "na");
  EXPECT_EQ(Alphabet::from_json(alphabet.to_json(), "x"), alphabet);
  EXPECT_THAT(refusal([&] { alphabet.encode("bac"); }), HasSubstr("'c' at position 2"));
  EXPECT_THAT(refusal([&] { alphabet.encode("\n"); }), HasSubstr("byte 0x0a at position 0"));
  EXPECT_THAT(refusal([&] { alphabet.decode(5); }), HasSubstr("symbol 5"));
  EXPECT_THAT(refusal([&] { Alphabet::from_json("{\"bytes\": [3, 2]}", "x.json"); }),
              HasSubstr("x.json: the alphabet is damaged"));
  EXPECT_THAT(refusal([&] { Alphabet::from_json("{\"bytes\": [300]}", "x.json"); }), HasSubstr("damaged"));
  EXPECT_THAT(refusal([&] { Alphabet::from_json("nonsense", "x.json"); }), HasSubstr("damaged"));
}

TEST(TextData, SplitsAndCutsWindows) {
  const TextData data = TextData::of(digits(1000), {.held_out = 0.1, .seq_len = 8}, "t");
  EXPECT_EQ(data.train().size(), 900u);
  EXPECT_EQ(data.held_out().size(), 100u);
  EXPECT_EQ(data.held_out_windows(8), 12);  // 96 targets, the first symbol is context only
  for (std::int64_t i = 0; i < 12; ++i) {
    const auto window = data.held_out_window(i, 8);
    ASSERT_EQ(window.size(), 9u);
    EXPECT_EQ(window[0], i * 8 % 10);
  }
  EXPECT_THROW(data.held_out_window(12, 8), Error);
  EXPECT_EQ(data.held_out_windows(99), 1);
  EXPECT_EQ(data.held_out_windows(100), 0);
}

TEST(TextData, WindowsDependOnSeedStepAndRowOnly) {
  std::string text;
  for (int i = 0; i < 5000; ++i) text += static_cast<char>(i * 7919 % 251);
  const TextData data = TextData::of(text, {.held_out = 0.1, .seq_len = 16}, "t");
  EXPECT_EQ(data.train_window(1, 5, 3, 16), data.train_window(1, 5, 3, 16));
  EXPECT_EQ(data.train_window(1, 5, 3, 16).size(), 17u);
  std::set<std::vector<std::int32_t>> distinct;
  for (std::uint64_t seed = 0; seed < 3; ++seed) {
    for (std::int64_t step = 0; step < 4; ++step) {
      for (std::int64_t row = 0; row < 4; ++row) distinct.insert(data.train_window(seed, step, row, 16));
    }
  }
  EXPECT_GE(distinct.size(), 42u);  // 48 draws of 4484 windows, of which 251 differ
}

// Every start is drawn, the first and the last too, about equally often; nothing held out is ever seen.
TEST(TextData, StartsAreUniform) {
  std::string text;
  for (int i = 0; i < 64; ++i) text += static_cast<char>(i);
  const TextData data = TextData::of(text, {.held_out = 0.25, .seq_len = 8}, "t");
  std::vector<int> counts(48 - 8, 0);
  constexpr int kDraws = 40000;
  for (int step = 0; step < kDraws; ++step) {
    const auto window = data.train_window(7, step, 0, 8);
    ASSERT_LT(window.back(), 48);
    ++counts.at(static_cast<std::size_t>(window.front()));
  }
  for (const int count : counts) EXPECT_NEAR(count, kDraws / 40, 5 * std::sqrt(kDraws / 40.0));
}

TEST(TextData, Refusals) {
  const TextOptions options{.held_out = 0.1, .seq_len = 8};
  EXPECT_THAT(refusal([&] { TextData::load("", options); }), HasSubstr("data.path is not set"));
  EXPECT_THAT(refusal([&] { TextData::load("no/such.txt", options); }),
              HasSubstr("no/such.txt: cannot read the training text"));
  EXPECT_THAT(refusal([&] { TextData::load(testing::TempDir(), options); }), HasSubstr("is a folder"));
  EXPECT_THAT(refusal([&] { TextData::of("", options, "e.txt"); }), HasSubstr("e.txt: the training text is empty"));
  EXPECT_THAT(refusal([&] { TextData::of("12345678", options, "s.txt"); }),
              HasSubstr("s.txt: 8 characters to train on, but train.seq_len 8 needs 9"));
  EXPECT_THAT(refusal([&] { TextData::of(digits(80), options, "s.txt"); }), HasSubstr("8 characters held out"));
  EXPECT_EQ(TextData::of("123456789", {.held_out = 0, .seq_len = 8}, "s.txt").train_window(1, 1, 1, 8).size(), 9u);
  const Alphabet letters = Alphabet::of("abc");
  EXPECT_THAT(refusal([&] { TextData::of(digits(1000), options, "d.txt", &letters); }),
              HasSubstr("not in the checkpoint's alphabet of 3"));
}

TEST(TextData, LoadsAFile) {
  const std::string path = testing::TempDir() + "/text_data_test.txt";
  write_file(path, digits(200));
  const TextData data = TextData::load(path, {.held_out = 0.1, .seq_len = 4});
  EXPECT_EQ(data.alphabet().size(), 10);
  EXPECT_EQ(data.checksum(), TextData::of(digits(200), {.held_out = 0.1, .seq_len = 4}, "t").checksum());
  std::filesystem::remove(path);
}

TEST(Ngram, HandCounted) {
  const std::vector<std::uint8_t> train{0, 1, 0, 1, 0, 0}, held{0, 1, 0};
  // order 1: counts 4 and 2 of 6; order 2: after 0: one 0, two 1; after 1: two 0. smoothing 1, 2 symbols.
  EXPECT_NEAR(ngram_bits(train, held, 2, 1, 1.0), -(2 * std::log2(5.0 / 8) + std::log2(3.0 / 8)) / 3, 1e-12);
  EXPECT_NEAR(ngram_bits(train, held, 2, 2, 1.0), -(std::log2(3.0 / 5) + std::log2(3.0 / 4)) / 2, 1e-12);
  EXPECT_NEAR(ngram_bits(train, held, 2, 3, 1.0), -std::log2(3.0 / 4), 1e-12);  // after 01: two 0
  EXPECT_THROW(ngram_bits(train, held, 2, 4), Error);
  EXPECT_THROW(ngram_bits(train, std::vector<std::uint8_t>{0}, 2, 2), Error);
}

}  // namespace
}  // namespace dattn
