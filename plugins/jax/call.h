// What one attention call is to the handlers: the call site, written down when XLA compiles it, and a request, which is one
// rank's execution of it.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "plugins/c/dattn.h"

namespace dattn::jax {

// How a request ended: a status of the C interface and, unless it is DATTN_OK, its message.
struct Outcome {
  dattn_status status = DATTN_OK;
  std::string message = {};
};

Outcome outcome_of(dattn_status status);  // with this thread's last message
Outcome refused(std::string message);     // DATTN_BAD_INPUT

// A custom call in a compiled program; its address tells call sites apart. Attributes of the call, as dattn.jax writes them.
struct CallSite {
  bool backward = false;
  bool bias = false, sink = false;
  dattn_mesh_options mesh{};
  int ranks = 1;  // of the mesh
  int threads = 0;
  double timeout_s = 0;
  std::int64_t seq_q = 0, seq_kv = 0;  // of the whole sequence
  std::string attention, layout, strategy, determinism;
  std::string key;  // all of the above but `backward`
};

// A dense row-major array of XLA's.
struct ArrayWindow {
  void* data = nullptr;
  dattn_dtype dtype{};
  std::vector<std::int64_t> shape;
};

// Arrays: q, k, v [B, S, heads, dim]; bias [B or 1, H or 1, S, seq_kv] and sink [H] where the site has them; backward: out,
// lse [B, H, S], dout. Results: out, lse; backward: dq, dk, dv and, where the site has them, dbias, dsink. S counts the rows of
// the array, of which a rank may hold fewer: the last are padding.
struct CallRequest {
  const CallSite* site = nullptr;
  std::vector<ArrayWindow> arrays, results;
  int rank = 0;
  std::int64_t group = 0;  // which of the sets of ranks that make this call side by side
  std::int64_t run = 0;    // which execution of the program
  std::int64_t batch_coordinate = 0;
  std::uint64_t dropout_stream = 0;
  dattn_device device{DATTN_CPU, 0};
  std::vector<std::int32_t> devices = {};  // of all ranks of the call; 0 on the cpu
  void* stream = nullptr;
  std::function<void(Outcome)> done = {};  // called once, on any thread; it may block
};

// A plan of one rank, and how many rows the rank holds.
struct PlannedCall {
  dattn_plan* plan = nullptr;
  dattn_plan_info info{};
};

// The plan that a request needs; equal keys, equal plans.
std::string plan_key(const CallRequest& request);
Outcome make_plan(dattn_mesh* mesh, const CallRequest& request, PlannedCall& planned);
Outcome execute(const PlannedCall& planned, const CallRequest& request);

}  // namespace dattn::jax
