// Where devices and network interfaces are plugged in, as Linux tells it under /sys: NUMA nodes, the cores beside them, and
// which interface is nearest to which GPU. What a rank is best bound to.
#pragma once

#include <filesystem>
#include <span>
#include <string>
#include <vector>

namespace dattn {

struct PciPlace {
  std::string name;              // PCI address of a GPU, name of an interface
  int numa_node = -1;            // -1: not known, or the machine has only one
  std::string cpus;              // "0-31,64-95"
  std::filesystem::path device;  // its folder, whose path names the bridges above it
};

struct GpuPlace : PciPlace {
  std::vector<std::string> nearest;  // interfaces that share most of the way to it; none where there are none on its node
};

struct Topology {
  std::vector<GpuPlace> gpus;
  std::vector<PciPlace> interfaces;  // InfiniBand ("mlx5_0") and physical network ones ("eth0")
};

// gpus: PCI addresses as CUDA and nvidia-smi write them ("0000:1B:00.0", "00000000:1B:00.0"). What cannot be read is left out.
Topology read_topology(std::span<const std::string> gpus, const std::filesystem::path& sysfs = "/sys");

std::string text_of(const GpuPlace& gpu);  // "0000:1b:00.0, NUMA node 0, cores 0-31, nearest mlx5_0"
std::string text_of(const PciPlace& interface);

}  // namespace dattn
