// The strict reader: every refusal names its place; what is read back from the writer is equal.
#include "core/config/config.h"

#include <array>
#include <filesystem>
#include <functional>
#include <map>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/base/error.h"
#include "core/base/file.h"

namespace dattn {
namespace {

using testing::HasSubstr;

enum class Colour { kRed, kDarkGreen };

struct Inner {
  std::int64_t steps = 300;
  std::optional<double> scale;
  std::vector<std::int64_t> list{1, 2};
  std::shared_ptr<Inner> within;
};

struct Outer {
  std::string strategy = "auto";
  bool tied = true;
  int ring = 1;
  double rate = 0.1;
  Colour colour = Colour::kRed;
  Inner inner;
  std::vector<Inner> many;
};

template <class V>
void describe(V& v, Inner& c) {
  v("steps", c.steps, "optimizer steps");
  v("scale", c.scale, "a factor | or none");
  v("list", c.list, "some integers");
  v("within", c.within, "the same again");
}

void check(const Inner& c, const ConfigCheck& at) { at.require("steps", c.steps >= 1, "must be at least {}", 1); }

template <class V>
void describe(V& v, Outer& c) {
  v("strategy", c.strategy, "a word");
  v("tied", c.tied, "a switch");
  v("ring", c.ring, "ranks");
  v("rate", c.rate, "a rate");
  v("colour", c.colour, "a name");
  v("inner", c.inner, "a section");
  v("many", c.many, "sections");
}

}  // namespace

template <>
struct ConfigNames<Colour> {
  static constexpr std::array<std::pair<std::string_view, Colour>, 2> kAll{
      {{"red", Colour::kRed}, {"dark_green", Colour::kDarkGreen}}};
};

namespace {

Outer read(const std::string& text, const std::vector<std::string>& overrides = {}) {
  return parse_config_as<Outer>(text, "t.yaml", overrides);
}

std::string message_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kBadInput);
    return error.what();
  }
  return "no error";
}

std::string refusal(const std::string& text, const std::vector<std::string>& overrides = {}) {
  return message_of([&] { read(text, overrides); });
}

TEST(Config, ReadsEveryType) {
  const Outer c = read(
      "strategy: ring\ntied: false\nring: -3\nrate: 1e-3\ncolour: dark_green\n"
      "inner: {steps: 9007199254740993, scale: 2, list: [5], within: {steps: 7}}\nmany:\n  - {steps: 4}\n  - {list: []}\n");
  EXPECT_EQ(c.strategy, "ring");
  EXPECT_FALSE(c.tied);
  EXPECT_EQ(c.ring, -3);
  EXPECT_EQ(c.rate, 1e-3);
  EXPECT_EQ(c.colour, Colour::kDarkGreen);
  EXPECT_EQ(c.inner.steps, 9007199254740993);  // not a double
  EXPECT_EQ(c.inner.scale, 2.0);
  EXPECT_EQ(c.inner.list, std::vector<std::int64_t>{5});
  EXPECT_EQ(c.inner.within->steps, 7);
  ASSERT_EQ(c.many.size(), 2u);
  EXPECT_EQ(c.many[0].steps, 4);
  EXPECT_TRUE(c.many[1].list.empty());
}

TEST(Config, AbsentKeysKeepTheirDefaults) {
  const Outer c = read("ring: 2");
  EXPECT_EQ(c.strategy, "auto");
  EXPECT_EQ(c.inner.steps, 300);
  EXPECT_FALSE(c.inner.scale);
  EXPECT_EQ(read("inner: {scale: null}").inner.scale, std::nullopt);
}

struct Refusal {
  const char* text;
  const char* message;
};

class Refused : public testing::TestWithParam<Refusal> {};

TEST_P(Refused, NamesThePlace) { EXPECT_THAT(refusal(GetParam().text), HasSubstr(GetParam().message)); }

INSTANTIATE_TEST_SUITE_P(
    Config, Refused,
    testing::Values(
        Refusal{"ring: 2\n  \nstratgy: ring", "t.yaml:3:1: unknown key 'stratgy' (did you mean 'strategy'?)"},
        Refusal{"inner:\n  stesp: 3", "t.yaml:2:3: unknown key 'stesp' in 'inner' (did you mean 'steps'?)"},
        Refusal{"xyzzyplugh: 3", "unknown key 'xyzzyplugh'; known: strategy, tied, ring, rate, colour, inner, many"},
        Refusal{"ring: 2\nring: 3", "t.yaml:2:1: duplicate key 'ring'"},
        Refusal{"inner: {steps: 1, \"steps\": 2}", "t.yaml:1:19: duplicate key 'steps'"},
        Refusal{"inner: &x {steps: 1}", "t.yaml:1:8: anchors"}, Refusal{"strategy: &x ring\n", "t.yaml:1:11: anchors"},
        Refusal{"inner: &x {steps: 1}\nmany: [*x]", "anchors"}, Refusal{"many: [*x]", "t.yaml:1:8"},
        Refusal{"ring: !!int 3", "t.yaml:1:7: tags"}, Refusal{"inner: !thing {steps: 3}", "tags ('!thing')"},
        Refusal{"ring: 2\n---\nring: 3", "second document"},
        Refusal{"ring: two", "t.yaml:1:7: ring needs an integer, not 'two'"},
        Refusal{"ring: 2.0", "ring needs an integer, not '2.0'"}, Refusal{"ring: '2'", "ring needs an integer"},
        Refusal{"ring: 0x10", "needs an integer"}, Refusal{"ring: [2]", "ring needs an integer, not a list"},
        Refusal{"ring:", "ring needs an integer, not nothing"},
        Refusal{"ring: 2147483648", "ring is 2147483648, which does not lie in [-2147483648, 2147483647]"},
        Refusal{"inner: {steps: 9223372036854775808}", "inner.steps is 9223372036854775808, which does not lie in"},
        Refusal{"rate: .nan", "rate needs a finite number, not '.nan'"},
        Refusal{"rate: nan", "rate needs a finite number, not 'nan'"},
        Refusal{"rate: -inf", "rate needs a finite number, not '-inf'"},
        Refusal{"rate: 1e999", "rate is 1e999, which no double holds"},
        Refusal{"rate: fast", "rate needs a finite number, not 'fast'"},
        Refusal{"tied: yes", "tied needs true or false, not 'yes'"}, Refusal{"tied: 'true'", "tied needs true or false"},
        Refusal{"strategy: {a: 1}", "strategy needs text, not a map"},
        Refusal{"colour: green", "colour is 'green', not one of: red, dark_green"},
        Refusal{"inner: 3", "t.yaml:1:8: inner needs a map, not '3'"}, Refusal{"inner: [1]", "inner needs a map, not a list"},
        Refusal{"many: {steps: 1}", "many needs a list, not a map"},
        Refusal{"many: [{steps: 1}, {setps: 2}]", "t.yaml:1:21: unknown key 'setps' in 'many[1]'"},
        Refusal{"inner: {list: [1, x]}", "inner.list[1] needs an integer, not 'x'"},
        Refusal{"inner: {steps: 0}", "t.yaml:1:16: inner.steps is '0'; it must be at least 1"},
        Refusal{"just text", "the config needs a map, not 'just text'"}, Refusal{"- 1", "the config needs a map, not a list"},
        Refusal{"? [1, 2]\n: 3", "a key must be a word"}, Refusal{"ring: [1, 2", "t.yaml:"},
        Refusal{"ring: 1\n\ttied: true", "t.yaml:"}, Refusal{"ring: \"abc", "t.yaml:"}));

TEST(Config, RefusesDeepNestingAndLongTexts) {
  const std::string deep(100, '[');
  EXPECT_THAT(refusal("inner: " + deep), HasSubstr("nested deeper than 32 levels"));
  std::string dashes;
  for (int i = 0; i < 100000; ++i) dashes += "- ";
  EXPECT_THAT(refusal(dashes), HasSubstr("t.yaml:1:"));
  EXPECT_THAT(refusal(std::string(kMaxConfigBytes + 1, '#')), HasSubstr("at most 1048576"));
  EXPECT_THAT(refusal(std::string("ring: 1\0", 8)), HasSubstr("zero byte"));
}

TEST(Config, FilesThatCannotBeRead) {
  const std::string folder = testing::TempDir();
  EXPECT_THAT(message_of([&] { load_config<Outer>(folder + "/none.yaml"); }),
              HasSubstr("none.yaml: cannot read the config: No such"));
  EXPECT_THAT(message_of([&] { load_config<Outer>(folder); }), HasSubstr("is a folder"));
  const std::string path = folder + "/empty.yaml";
  write_file(path, "# nothing here\n");
  EXPECT_THAT(message_of([&] { load_config<Outer>(path); }), HasSubstr("empty.yaml:1:1: the config is empty"));
  write_file(path, "ring: 4");
  EXPECT_EQ(load_config<Outer>(path, {"tied=false"}).ring, 4);
  std::filesystem::remove(path);
}

TEST(Config, OverridesReplaceAndMake) {
  const Outer c = read("inner: {steps: 3, list: [9]}", {"inner.steps=5", "ring=7", "many=[{steps: 2}]", "inner.within.steps=8",
                                                        "inner.steps=6", "strategy=a=b"});
  EXPECT_EQ(c.inner.steps, 6);
  EXPECT_EQ(c.inner.list, std::vector<std::int64_t>{9});
  EXPECT_EQ(c.ring, 7);
  EXPECT_EQ(c.many.at(0).steps, 2);
  EXPECT_EQ(c.inner.within->steps, 8);
  EXPECT_EQ(c.strategy, "a=b");
}

TEST(Config, OverridesAreCheckedAlike) {
  EXPECT_THAT(refusal("ring: 1", {"inner.stpes=3"}),
              HasSubstr("--set inner.stpes: unknown key 'stpes' in 'inner' (did you mean"));
  EXPECT_THAT(refusal("ring: 1", {"ring=x"}), testing::StartsWith("--set ring: ring needs an integer, not 'x'"));
  EXPECT_THAT(refusal("ring: 1", {"inner.steps=0"}), HasSubstr("--set inner.steps: inner.steps is '0'; it must be at least 1"));
  EXPECT_THAT(refusal("ring: 1", {"ring.a=3"}), HasSubstr("--set ring.a: ring needs an integer, not a map"));
  EXPECT_THAT(refusal("ring: 1", {"ring"}), HasSubstr("write --set key=value"));
  EXPECT_THAT(refusal("ring: 1", {"=3"}), HasSubstr("write --set key=value"));
  EXPECT_THAT(refusal("ring: 1", {"inner..steps=3"}), HasSubstr("write --set key=value"));
  EXPECT_THAT(refusal("ring: 1", {"ring="}), HasSubstr("--set ring: ring needs an integer, not nothing"));
  EXPECT_THAT(refusal("ring: 1", {"ring=1\ntied: false"}), HasSubstr("one line"));
  EXPECT_THAT(refusal("ring: 1", {"ring=&a 3"}), HasSubstr("--set ring: anchors"));
  EXPECT_THAT(refusal("ring: 1", {"ring=[1"}), testing::StartsWith("--set ring: "));
}

TEST(Config, WhatIsWrittenReadsBack) {
  Outer c;
  c.strategy = "with: \"quotes\"\n, # and a colon";
  c.rate = 0.1 + 0.2;
  c.colour = Colour::kDarkGreen;
  c.inner.scale = 1e-300;
  c.inner.within = std::make_shared<Inner>();
  c.inner.within->list.clear();
  c.many.resize(2);
  const std::string yaml = to_yaml(to_node(c));
  const Outer back = read(yaml);
  EXPECT_EQ(back.strategy, c.strategy);
  EXPECT_EQ(back.rate, c.rate);
  EXPECT_EQ(back.colour, c.colour);
  EXPECT_EQ(back.inner.scale, c.inner.scale);
  EXPECT_TRUE(back.inner.within->list.empty());
  EXPECT_EQ(back.many.size(), 2u);
  EXPECT_EQ(to_yaml(to_node(back)), yaml);
  EXPECT_EQ(to_json(to_node(read(to_json(to_node(c))))), to_json(to_node(c)));  // JSON is YAML
  for (const char* word :
       {"true", "null", "~", "3", "1e5", "", " ", "-", "no", ".inf", "a b", "\xc3\xa9", "#", "&a", "*a", "!t", "\x01"}) {
    c.strategy = word;
    EXPECT_EQ(read(to_yaml(to_node(c))).strategy, word);
  }
}

TEST(Config, SchemaListsEveryKeyOnce) {
  const auto rows = schema_of<Outer>();
  std::map<std::string, const SchemaRow*> by_key;
  for (const SchemaRow& row : rows) EXPECT_TRUE(by_key.emplace(row.key, &row).second) << row.key;
  ASSERT_TRUE(by_key.count("inner.steps") && by_key.count("many[].list") && by_key.count("colour"));
  EXPECT_EQ(by_key["inner.steps"]->value, "300");
  EXPECT_EQ(by_key["inner.scale"]->type, "number or null");
  EXPECT_EQ(by_key["colour"]->type, "one of: red, dark_green");
  EXPECT_EQ(by_key["colour"]->value, "\"red\"");
  EXPECT_FALSE(by_key.count("inner.within.within.steps"));  // a struct inside itself is shown once
  EXPECT_THAT(schema_page("T", "I", rows), HasSubstr("| `inner.scale` | number or null |  | a factor \\| or none |"));
}

TEST(Config, NearestNeedsToBeNear) {
  EXPECT_EQ(nearest("stratgy", {"steps", "strategy"}), "strategy");
  EXPECT_EQ(nearest("tset", {"test", "rest"}), "test");
  EXPECT_EQ(nearest("zzz", {"test", "rest"}), "");
}

}  // namespace
}  // namespace dattn
