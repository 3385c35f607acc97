// What the tests of the C interface share: tensors with memory of their own, ranks as threads, one attention call on any mesh.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "plugins/c/dattn.h"

namespace dattn::test {

inline constexpr dattn_dtype kFp32{DATTN_FLOAT, 32, 1};

struct HostTensor {
  std::vector<std::int64_t> shape;
  std::vector<float> values;
  dattn_tensor tensor{};

  explicit HostTensor(std::vector<std::int64_t> extents) : shape(std::move(extents)) {
    std::int64_t count = 1;
    for (const std::int64_t extent : shape) count *= extent;
    values.assign(static_cast<std::size_t>(count), 0.0f);
    bind();
  }
  HostTensor(HostTensor&& other) noexcept : shape(std::move(other.shape)), values(std::move(other.values)) { bind(); }
  HostTensor& operator=(HostTensor&& other) noexcept {
    shape = std::move(other.shape);
    values = std::move(other.values);
    bind();
    return *this;
  }

  static HostTensor random(std::vector<std::int64_t> extents, int which) {
    HostTensor made(std::move(extents));
    for (std::size_t i = 0; i < made.values.size(); ++i) {
      made.values[i] = static_cast<float>(std::sin(0.37 * static_cast<double>(i + 1) * (which + 1)) + 0.1 * which);
    }
    return made;
  }
  const dattn_tensor* operator&() const { return &tensor; }  // NOLINT: what every call takes

 private:
  void bind() {
    tensor.data = values.data();
    tensor.device = {DATTN_CPU, 0};
    tensor.ndim = static_cast<std::int32_t>(shape.size());
    tensor.dtype = kFp32;
    tensor.shape = shape.data();
  }
};

inline double difference(const HostTensor& a, const HostTensor& b) {
  if (a.shape != b.shape) return INFINITY;
  double most = 0;
  for (std::size_t i = 0; i < a.values.size(); ++i) {
    if (a.values[i] == b.values[i]) continue;  // infinities too
    most = std::max(most, static_cast<double>(std::abs(a.values[i] - b.values[i])));
    if (std::isnan(a.values[i]) || std::isnan(b.values[i])) return INFINITY;
  }
  return most;
}

template <class Struct>
Struct sized() {
  Struct made{};
  made.struct_size = sizeof made;
  return made;
}

#define DATTN_OK_OR_FAIL(call) ASSERT_EQ(call, DATTN_OK) << dattn_last_error()

// A handle that destroys itself.
template <class T, void (*Destroy)(T*)>
struct Handle {
  T* held = nullptr;

  Handle() = default;
  explicit Handle(T* taken) : held(taken) {}
  Handle(Handle&& other) noexcept : held(std::exchange(other.held, nullptr)) {}
  ~Handle() { Destroy(held); }
  T** operator&() { return &held; }     // NOLINT: where a call writes it
  operator T*() const { return held; }  // NOLINT
};
using ContextHandle = Handle<dattn_context, dattn_context_destroy>;
using CommHandle = Handle<dattn_comm, dattn_comm_destroy>;
using MeshHandle = Handle<dattn_mesh, dattn_mesh_destroy>;
using PlanHandle = Handle<dattn_plan, dattn_plan_destroy>;
using ShardingHandle = Handle<dattn_sharding, dattn_sharding_destroy>;
using CacheHandle = Handle<dattn_cache, dattn_cache_destroy>;

// Runs body(comm) on each of these communicators, a thread each; they are destroyed at its end.
inline void on_threads(std::vector<dattn_comm*> comms, const std::function<void(dattn_comm*)>& body) {
  std::vector<std::thread> threads;
  for (dattn_comm* comm : comms) {
    threads.emplace_back([&body, comm] {
      body(comm);
      dattn_comm_destroy(comm);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

inline std::vector<dattn_comm*> thread_ranks(dattn_context* context, int ranks, double timeout_s = 20) {
  std::vector<dattn_comm*> comms(static_cast<std::size_t>(ranks));
  auto options = sized<dattn_comm_options>();
  options.timeout_s = timeout_s;
  EXPECT_EQ(dattn_comm_threads(context, ranks, &options, comms.data()), DATTN_OK) << dattn_last_error();
  return comms;
}

}  // namespace dattn::test
