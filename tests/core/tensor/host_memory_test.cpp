// Blocks are used again and never make a process hold more than it once needed. Sizes are prime multiples of a page, which no
// other test's tensors have.
#include "core/tensor/host_memory.h"

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "core/base/error.h"
#include "core/tensor/tensor.h"

namespace dattn {
namespace {

constexpr std::int64_t kBytes = 1009 * 4096;

#if !defined(__SANITIZE_ADDRESS__)
TEST(HostMemory, AFreedBlockIsUsedAgain) {
  void* first = allocate_on_host(kBytes);
  std::memset(first, 1, kBytes);
  const std::int64_t kept_before = host_memory().kept;
  free_on_host(first, kBytes);
  EXPECT_GE(host_memory().kept, kept_before + kBytes);
  void* about_as_large = allocate_on_host(kBytes - 4096);
  EXPECT_EQ(about_as_large, first);
  EXPECT_EQ(host_memory().kept, kept_before);
  void* another = allocate_on_host(kBytes);
  EXPECT_NE(another, first);
  free_on_host(another, kBytes);
  free_on_host(about_as_large, kBytes - 4096);
}

// Tensors of ever other sizes, one at a time: what is kept and in use stays below what was in use at once.
TEST(HostMemory, KeepsNoMoreThanWasInUse) {
  std::vector<void*> many;
  for (int i = 0; i < 8; ++i) many.push_back(allocate_on_host(kBytes));
  EXPECT_GE(host_memory().used, 8 * kBytes);
  for (void* memory : many) free_on_host(memory, kBytes);
  const HostMemory before = host_memory();
  EXPECT_GE(before.kept, 8 * kBytes);
  for (std::int64_t bytes = kBytes; bytes < 6 * kBytes; bytes += kBytes / 3) {
    void* memory = allocate_on_host(bytes);
    const HostMemory now = host_memory();
    EXPECT_GE(now.used, before.used + bytes);
    EXPECT_LE(now.used + now.kept, before.most_used);
    free_on_host(memory, bytes);
    EXPECT_EQ(host_memory().used, before.used);
    EXPECT_LE(host_memory().used + host_memory().kept, before.most_used);
  }
}

TEST(HostMemory, WhatIsFreedOnOneThreadServesAnother) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([t] {
      for (int i = 0; i < 200; ++i) {
        const std::int64_t bytes = 40000 + 10000 * ((i + t) % 7);
        auto* memory = static_cast<unsigned char*>(allocate_on_host(bytes));
        std::memset(memory, t, static_cast<std::size_t>(bytes));
        EXPECT_EQ(memory[bytes / 2], t);
        EXPECT_EQ(memory[bytes - 1], t);
        free_on_host(memory, bytes);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}
#endif

TEST(HostMemory, IsAligned) {
  for (const std::int64_t bytes : {std::int64_t{0}, std::int64_t{1}, std::int64_t{65}, std::int64_t{40001}, 3 * kBytes}) {
    void* memory = allocate_on_host(bytes);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory) % kHostAlignment, 0u) << bytes;
    std::memset(memory, 0, static_cast<std::size_t>(bytes));
    free_on_host(memory, bytes);
  }
}

#if !defined(__SANITIZE_ADDRESS__)  // which ends the program there
TEST(HostMemory, SaysWhatDidNotFit) {
  try {
    allocate_on_host(std::int64_t{1} << 60);
    FAIL() << "an exbibyte was allocated";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("a tensor of 1152921504606846976 bytes"), std::string::npos) << error.what();
  }
  EXPECT_NO_THROW(Tensor(DType::kF32, {1 << 20}));
}
#endif

}  // namespace
}  // namespace dattn
