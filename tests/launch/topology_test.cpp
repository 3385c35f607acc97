#include "launch/topology.h"

#include <unistd.h>

#include <array>
#include <fstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace dattn::test {
namespace {

namespace fs = std::filesystem;

// A host of two sockets: a GPU and an InfiniBand adapter under one switch, another adapter on the same socket, a second GPU
// and an Ethernet adapter on the other one.
class FakeSysfs : public testing::Test {
 protected:
  void SetUp() override {
    fs::remove_all(root_);
    device("pci0000:16/0000:16:01.0/0000:17:00.0", 0, "0-31");
    device("pci0000:16/0000:16:01.0/0000:18:00.0", 0, "0-31");
    device("pci0000:30/0000:30:00.0", 0, "0-31");
    device("pci0000:80/0000:80:00.0", 1, "32-63");
    device("pci0000:80/0000:80:05.0", 1, "32-63");
    pci("0000:17:00.0", "pci0000:16/0000:16:01.0/0000:17:00.0");
    pci("0000:80:00.0", "pci0000:80/0000:80:00.0");
    interface("infiniband/mlx5_0", "pci0000:16/0000:16:01.0/0000:18:00.0");
    interface("infiniband/mlx5_1", "pci0000:30/0000:30:00.0");
    interface("net/eth0", "pci0000:80/0000:80:05.0");
    fs::create_directories(root_ / "class/net/lo");
  }
  void TearDown() override { fs::remove_all(root_); }

  void device(const std::string& path, int node, const std::string& cpus) const {
    const fs::path folder = root_ / "devices" / path;
    fs::create_directories(folder);
    std::ofstream(folder / "numa_node") << node << "\n";
    std::ofstream(folder / "local_cpulist") << cpus << "\n";
  }
  void pci(const std::string& address, const std::string& path) const {
    fs::create_directories(root_ / "bus/pci/devices");
    fs::create_directory_symlink(root_ / "devices" / path, root_ / "bus/pci/devices" / address);
  }
  void interface(const std::string& name, const std::string& path) const {
    fs::create_directories(root_ / "class" / name);
    fs::create_directory_symlink(root_ / "devices" / path, root_ / "class" / name / "device");
  }

  fs::path root_ = testing::TempDir() + "fake_sysfs_" + std::to_string(::getpid());  // tests run side by side
};

TEST_F(FakeSysfs, GpusAndTheInterfacesNearestToThem) {
  const std::array<std::string, 3> gpus{"0000:17:00.0", "00000000:80:00.0", "0000:99:00.0"};
  const Topology topology = read_topology(gpus, root_);
  ASSERT_EQ(topology.gpus.size(), 2U);
  EXPECT_EQ(text_of(topology.gpus[0]), "0000:17:00.0, NUMA node 0, cores 0-31, nearest mlx5_0");
  EXPECT_EQ(text_of(topology.gpus[1]), "0000:80:00.0, NUMA node 1, cores 32-63, nearest eth0");
  ASSERT_EQ(topology.interfaces.size(), 3U);
  EXPECT_EQ(text_of(topology.interfaces[1]), "mlx5_1, NUMA node 0, cores 0-31");
}

TEST_F(FakeSysfs, MachineWithoutAnySaysNothing) {
  const std::array<std::string, 1> gpus{"0000:1B:00.0"};
  const Topology topology = read_topology(gpus, root_ / "nowhere");
  EXPECT_TRUE(topology.gpus.empty());
  EXPECT_TRUE(topology.interfaces.empty());
}

}  // namespace
}  // namespace dattn::test
