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

std::string mask_text(const std::string& mask) { return to_mask(read("mask: {kind: " + mask + "}").mask, 8, 8).text(); }

TEST(AttentionConfig, EveryKindBecomesTheMaskItNames) {
  EXPECT_EQ(mask_text("causal, align: end"), "causal(align end)");
  EXPECT_EQ(mask_text("causal, align: start"), "causal");
  EXPECT_EQ(mask_text("causal_bottom_right"), "causal_bottom_right");
  EXPECT_EQ(mask_text("window, right: 2, align: end"), "window(left -1, right 2, align end)");
  EXPECT_EQ(mask_text("prefix, length: 3"), "prefix(3)");
  EXPECT_EQ(mask_text("global, tokens: 2, window: {left: 3}"), "global(2, left 3, right -1)");
  EXPECT_EQ(mask_text("global, tokens: 2, window: {left: 3, right: 0}, causal: true"), "global(2, left 3, right 0, causal)");
  EXPECT_EQ(mask_text("padding, lengths: [3, 8], within: {kind: window, left: 1}"),
            "padding(2 rows, window(left 1, right -1))");
  EXPECT_EQ(mask_text("padding, lengths: [3, 8]"), "padding(2 rows, full)");
  EXPECT_EQ(mask_text("regions, regions: [{q: [0, 4]}, {k: [2, 4]}], overlap: first"), "regions(2, overlap first)");
  EXPECT_EQ(mask_text("per_row, masks: [{kind: full}, {kind: prefix, length: 2}]"), "per_row(2 rows)");
}

TEST(AttentionConfig, ListsArriveWhole) {
  const Mask blocks = to_mask(read("mask: {kind: blocks, size: 4, list: [[0, 0], [1, 0]]}").mask, 8, 8);
  EXPECT_EQ(blocks.size, 4);
  EXPECT_EQ(blocks.list, (std::vector<Mask::BlockPair>{{0, 0}, {1, 0}}));
  const std::string packed = "mask: {kind: documents, cu_seqlens: [0, 3, 8], cu_seqlens_kv: [0, 5, 6], within: ";
  const Mask documents = to_mask(read(packed + "{kind: causal, align: end}}").mask, 8, 8);
  EXPECT_EQ(documents.cu_seqlens_kv, (std::vector<std::int64_t>{0, 5, 6}));
  EXPECT_EQ(area(compile(documents, 8, 8)), 3 + 4 + 5 + 1);
  EXPECT_EQ(to_mask(read("mask: {kind: padding, lengths: [3, 8]}").mask, 8, 8).lengths, (std::vector<std::int64_t>{3, 8}));
  const Mask rows = to_mask(read("mask: {kind: per_row, masks: [{kind: full}, {kind: prefix, length: 2}]}").mask, 8, 8);
  ASSERT_EQ(rows.rows.size(), 2u);
  EXPECT_EQ(rows.rows[1].length, 2);
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
  for (const std::string text :
       {"kind: regions, regions: [{q: [4, null], lo: -3}], overlap: first", "kind: window, left: 3, align: end",
        "kind: global, tokens: 2, window: {left: 3}, causal: false", "kind: blocks, size: 4, list: [[0, 0], [1, 0]]",
        "kind: per_row, masks: [{kind: full}, {kind: documents, cu_seqlens: [0, 8], within: {kind: full}}]",
        "kind: padding, lengths: [2, 4]"}) {
    const std::string yaml = to_yaml(to_node(read("mask: {" + text + "}")));
    EXPECT_EQ(to_yaml(to_node(read(yaml))), yaml);
    EXPECT_EQ(to_mask(read(yaml).mask, 8, 8).text(), to_mask(read("mask: {" + text + "}").mask, 8, 8).text());
  }
}

TEST(AttentionConfig, Refusals) {
  EXPECT_THAT(refusal("mask: {kind: causal, left: 3}"),
              HasSubstr("a.yaml:1:28: mask.left is '3'; it belongs to mask kind window, but mask.kind is causal"));
  EXPECT_THAT(refusal("mask: {kind: window, cu_seqlens: [0, 1]}"), HasSubstr("mask.cu_seqlens belongs to mask kind documents"));
  EXPECT_THAT(refusal("mask: {kind: casual}"),
              HasSubstr("mask.kind is 'casual', not one of: full, causal, causal_bottom_right, window"));
  EXPECT_THAT(refusal("mask: {kind: window, left: -2}"), HasSubstr("mask.left is '-2'"));
  EXPECT_THAT(refusal("mask: {kind: documents}"), HasSubstr("cu_seqlens is missing"));
  EXPECT_THAT(refusal("mask: {kind: documents, cu_seqlens: [0, 5, 3]}"), HasSubstr("entry 1 is 5 and entry 2 is 3"));
  EXPECT_THAT(refusal("mask: {kind: documents, cu_seqlens: [1, 5]}"), HasSubstr("must start at 0"));
  EXPECT_THAT(refusal("mask: {kind: documents, cu_seqlens: [0, 5], within: {kind: documents, cu_seqlens: [0, 5]}}"),
              HasSubstr("mask.within has kind documents; inside documents use full, causal, causal_bottom_right or window"));
  EXPECT_THAT(refusal("mask: {kind: causal, within: {kind: full}}"),
              HasSubstr("mask.within belongs to mask kind documents and padding, but mask.kind is causal"));
  EXPECT_THAT(refusal("mask: {kind: documents, cu_seqlens: [0, 5], align: end}"),
              HasSubstr("mask.align is 'end'; it belongs to mask kind causal and window, but mask.kind is documents"));
  EXPECT_THAT(refusal("mask: {kind: full, causal: true}"), HasSubstr("it belongs to mask kind global, but mask.kind is full"));
  EXPECT_THAT(refusal("mask: {kind: causal, align: middle}"), HasSubstr("mask.align is 'middle', not one of: start, end"));
  EXPECT_THAT(refusal("mask: {kind: documents, cu_seqlens: [0, 5], cu_seqlens_kv: [0, 4, 5]}"),
              HasSubstr("mask.cu_seqlens_kv has 3 entries and cu_seqlens 2"));
  EXPECT_THAT(refusal("mask: {kind: documents, cu_seqlens: [0, 5], cu_seqlens_kv: [1, 5]}"),
              HasSubstr("mask.cu_seqlens_kv must start at 0"));
  EXPECT_THAT(refusal("mask: {kind: prefix}"), HasSubstr("mask.length is missing"));
  EXPECT_THAT(refusal("mask: {kind: prefix, length: -1}"), HasSubstr("mask.length is '-1'; it must lie in [0,"));
  EXPECT_THAT(refusal("mask: {kind: global, window: {left: 1}}"), HasSubstr("mask.tokens is missing"));
  EXPECT_THAT(refusal("mask: {kind: global, tokens: 1}"), HasSubstr("mask.window is missing"));
  EXPECT_THAT(refusal("mask: {kind: global, tokens: 1, window: {left: -2}}"), HasSubstr("mask.window.left is '-2'"));
  EXPECT_THAT(refusal("mask: {kind: global, tokens: 1, window: {left: 2}, causal: 1}"), HasSubstr("true or false"));
  EXPECT_THAT(refusal("mask: {kind: blocks, list: []}"), HasSubstr("mask.size is missing"));
  EXPECT_THAT(refusal("mask: {kind: blocks, size: 4}"), HasSubstr("mask.list is missing"));
  EXPECT_THAT(refusal("mask: {kind: blocks, size: 0, list: []}"), HasSubstr("mask.size is '0'; it must lie in [1,"));
  EXPECT_THAT(refusal("mask: {kind: blocks, size: 4, list: [[0, 0], [1]]}"), HasSubstr("entry 1 is a list of 1"));
  EXPECT_THAT(refusal("mask: {kind: padding}"), HasSubstr("mask.lengths is missing"));
  EXPECT_THAT(refusal("mask: {kind: padding, lengths: [3, -1]}"), HasSubstr("mask.lengths has entry 1 = -1"));
  EXPECT_THAT(refusal("mask: {kind: per_row}"), HasSubstr("mask.masks is missing"));
  EXPECT_THAT(refusal("mask: {kind: per_row, masks: [{kind: full}, {kind: padding, lengths: [3]}]}"),
              HasSubstr("mask.masks has entry 1 of kind padding; use kinds other than padding and per_row"));
  EXPECT_THAT(refusal("mask: {kind: per_row, masks: [{kind: full, left: 2}]}"), HasSubstr("mask.masks[0].left is '2'"));
  EXPECT_THAT(refusal("mask: {kind: regions, regions: [], overlap: last}"), HasSubstr("not one of: refuse, first"));
  EXPECT_THAT(refusal("mask: {kind: regions}"), HasSubstr("regions is missing"));
  EXPECT_THAT(refusal("mask: {kind: regions, regions: [{q: [4, 2]}]}"), HasSubstr("mask.regions[0].q is [4, 2]"));
  EXPECT_THAT(refusal("mask: {kind: regions, regions: [{q: [4]}]}"), HasSubstr("needs [begin, end]"));
  EXPECT_THAT(refusal("mask: {kind: regions, regions: [{lo: -9223372036854775807}]}"), HasSubstr("write null for no bound"));
  EXPECT_THAT(refusal("softmax_scale: 0"), HasSubstr("must be greater than 0"));
}

}  // namespace
}  // namespace dattn
