// The attention section: each mask kind becomes the mask it names; keys of another kind are refused.
#include "core/config/attention_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/base/error.h"

namespace dattn {
namespace {

using testing::HasSubstr;

AttentionConfig read(const std::string& text) { return parse_config_as<AttentionConfig>(text, "a.yaml"); }

std::string refusal(const std::string& text) {
  try {
    read(text);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(AttentionConfig, EveryKind) {
  EXPECT_EQ(read("").mask.kind, Mask::Kind::kCausal);
  EXPECT_EQ(to_mask(read("mask: {kind: full}").mask, 8, 8).kind, Mask::Kind::kFull);
  const Mask window = to_mask(read("mask: {kind: window, left: 3, right: 0}\nsoftmax_scale: 0.125").mask, 8, 8);
  EXPECT_EQ(window.left, 3);
  EXPECT_EQ(window.right, 0);
  EXPECT_EQ(to_mask(read("mask: {kind: window, left: 3}").mask, 8, 8).right, -1);
  const Mask documents = to_mask(read("mask: {kind: documents, cu_seqlens: [0, 3, 8], within: {kind: causal}}").mask, 8, 8);
  EXPECT_EQ(documents.cu_seqlens, (std::vector<std::int64_t>{0, 3, 8}));
  EXPECT_EQ(documents.within->kind, Mask::Kind::kCausal);
  EXPECT_EQ(area(compile(documents, 8, 8)), 6 + 15);
  EXPECT_EQ(read("softmax_scale: 0.125").softmax_scale, 0.125);
}

TEST(AttentionConfig, RegionsWithOpenEnds) {
  const auto config =
      read("mask: {kind: regions, regions: [{q: [0, 4], k: [0, 4], lo: -2, hi: 0}, {q: [4, null], lo: null}, {q: [2, 2]}]}");
  const Mask mask = to_mask(config.mask, 8, 6);
  ASSERT_EQ(mask.regions.size(), 3u);
  EXPECT_EQ(mask.regions[0], (Region{{0, 4}, {0, 4}, -2, 0}));
  EXPECT_EQ(mask.regions[1], (Region{{4, 8}, {0, 6}, -kUnbounded, kUnbounded}));
  EXPECT_EQ(mask.regions[2].q.count(), 0);
  EXPECT_EQ(area(compile(mask, 8, 6)), 3 + 2 + 3 + 1 + 4 * 6);
  EXPECT_EQ(to_mask(read("mask: {kind: regions, regions: []}").mask, 8, 6).regions.size(), 0u);
}

TEST(AttentionConfig, WritesAndReadsBack) {
  const std::string text = "mask: {kind: regions, regions: [{q: [4, null], lo: -3}]}";
  EXPECT_EQ(to_yaml(to_node(read(to_yaml(to_node(read(text)))))), to_yaml(to_node(read(text))));
}

TEST(AttentionConfig, Refusals) {
  EXPECT_THAT(refusal("mask: {kind: causal, left: 3}"),
              HasSubstr("a.yaml:1:28: mask.left is '3'; it belongs to mask kind window, but mask.kind is causal"));
  EXPECT_THAT(refusal("mask: {kind: window, cu_seqlens: [0, 1]}"), HasSubstr("mask.cu_seqlens belongs to mask kind documents"));
  EXPECT_THAT(refusal("mask: {kind: casual}"), HasSubstr("mask.kind is 'casual', not one of: full, causal, window"));
  EXPECT_THAT(refusal("mask: {kind: window, left: -2}"), HasSubstr("mask.left is '-2'"));
  EXPECT_THAT(refusal("mask: {kind: documents}"), HasSubstr("cu_seqlens is missing"));
  EXPECT_THAT(refusal("mask: {kind: documents, cu_seqlens: [0, 5, 3]}"), HasSubstr("entry 1 is 5 and entry 2 is 3"));
  EXPECT_THAT(refusal("mask: {kind: documents, cu_seqlens: [1, 5]}"), HasSubstr("must start at 0"));
  EXPECT_THAT(refusal("mask: {kind: documents, cu_seqlens: [0, 5], within: {kind: documents, cu_seqlens: [0, 5]}}"),
              HasSubstr("inside documents use full, causal or window"));
  EXPECT_THAT(refusal("mask: {kind: regions}"), HasSubstr("regions is missing"));
  EXPECT_THAT(refusal("mask: {kind: regions, regions: [{q: [4, 2]}]}"), HasSubstr("mask.regions[0].q is [4, 2]"));
  EXPECT_THAT(refusal("mask: {kind: regions, regions: [{q: [4]}]}"), HasSubstr("needs [begin, end]"));
  EXPECT_THAT(refusal("mask: {kind: regions, regions: [{lo: -9223372036854775807}]}"), HasSubstr("write null for no bound"));
  EXPECT_THAT(refusal("softmax_scale: 0"), HasSubstr("must be greater than 0"));
}

}  // namespace
}  // namespace dattn
