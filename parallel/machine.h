// A machine, as the simulator sees it: what a rank computes and remembers, and what the links between ranks carry. Read
// from a YAML file (configs/machines, keys in configs/machines/SCHEMA.md). Units: seconds, bytes, bytes/s, FLOP/s.
//
// Rank r is on node r / ranks_per_node. Every rank has, inside its node and between nodes, one way out and one way in,
// each of the link's bandwidth.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/attention/tile.h"
#include "core/base/dtype.h"
#include "core/config/config.h"
#include "parallel/plan.h"

namespace dattn {

struct Rates {  // peak FLOP/s of one rank, by storage type
  double fp32 = 0;
  double bf16 = 0;
};

// A kernel's unit of work: a band that touches a tile pays for all its pairs; with `clipped` the last tiles end with the band.
struct TileSize {
  std::int64_t rows = 1;
  std::int64_t keys = 1;
  bool clipped = false;
};

struct Link {
  double latency_s = 0;
  double bandwidth = 0;                  // of one rank and one direction
  std::optional<double> node_bandwidth;  // of all ranks of a node together and one direction
};

struct Links {
  Link inside;
  std::optional<Link> between;
};

struct Machine {
  std::string name = "machine";
  int ranks_per_node = 1;
  std::int64_t memory_bytes = 0;
  Rates flops;
  double attend_of_peak = 0.7;
  double attend_grad_of_peak = 0.5;
  double memory_bandwidth = 0;
  double kernel_latency_s = 0;
  std::optional<TileSize> tile, grad_tile;
  Links links;

  int node_of(int rank) const { return rank / ranks_per_node; }
  // FLOP/s that attend or attend_grad reaches. Throws Error(kBadInput) for storage types without a rate.
  double attend_rate(Verb verb, DType storage) const;
  // Pairs that attend's or attend_grad's kernel works on where `tiles` are visible: those of all tiles that a band touches,
  // counted from the band's own first row and key, exactly; without a tile the visible pairs.
  std::int64_t worked_pairs(Verb verb, std::span<const Tile> tiles) const;
};

Machine load_machine(const std::string& path);

struct LinkSample {  // a message that was timed
  double bytes = 0;
  double seconds = 0;
};
// The line t = latency + bytes / bandwidth with the least squares of relative errors; latency at least 0.
Link fit_link(const std::vector<LinkSample>& samples);

template <class V>
void describe(V& v, Rates& c) {
  v("fp32", c.fp32, "fp32 storage");
  v("bf16", c.bf16, "bf16 and fp16 storage, sums in fp32; dense, not the rate of sparse matrices");
}

template <class V>
void describe(V& v, TileSize& c) {
  v("rows", c.rows, "query rows");
  v("keys", c.keys, "key rows");
  v("clipped", c.clipped,
    "whether the last rows and keys of a band cost no more than their own pairs (CPUs), not a whole tile");
}

template <class V>
void describe(V& v, Link& c) {
  v("latency_s", c.latency_s, "seconds from a message's start until its first byte arrives");
  v("bandwidth", c.bandwidth, "bytes/s of one rank in one direction");
  v("node_bandwidth", c.node_bandwidth, "bytes/s of all ranks of a node in one direction; absent = each has its own");
}

template <class V>
void describe(V& v, Links& c) {
  v("inside", c.inside, "between ranks of one node");
  v("between", c.between, "between ranks of two nodes; absent = the machine is one node");
}

template <class V>
void describe(V& v, Machine& c) {
  v("name", c.name, "what tables call it");
  v("ranks_per_node", c.ranks_per_node, "rank r is on node r / ranks_per_node");
  v("memory_bytes", c.memory_bytes, "memory of one rank");
  v("flops", c.flops, "peak FLOP/s of one rank");
  v("attend_of_peak", c.attend_of_peak, "share of the peak that the forward attention kernel reaches");
  v("attend_grad_of_peak", c.attend_grad_of_peak, "share of the peak that the backward attention kernel reaches");
  v("memory_bandwidth", c.memory_bandwidth, "bytes/s that one rank reads and writes in its memory");
  v("kernel_latency_s", c.kernel_latency_s, "seconds that every computation takes beside its work");
  v("tile", c.tile, "the forward kernel's tile: partly visible tiles cost whole ones; absent = only visible pairs cost");
  v("grad_tile", c.grad_tile, "the backward kernel's tile; absent = that of the forward kernel");
  v("links", c.links, "what joins the ranks");
}

void check(const Rates& c, const ConfigCheck& at);
void check(const TileSize& c, const ConfigCheck& at);
void check(const Link& c, const ConfigCheck& at);
void check(const Machine& c, const ConfigCheck& at);

std::string machine_schema();  // the text of configs/machines/SCHEMA.md

}  // namespace dattn
