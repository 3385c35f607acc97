#include "launch/topology.h"

#include <algorithm>
#include <fstream>

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace dattn {
namespace {

namespace fs = std::filesystem;

std::string first_line(const fs::path& file) {
  std::ifstream in(file);
  std::string line;
  std::getline(in, line);
  return line;
}

PciPlace place_at(std::string name, const fs::path& device) {
  PciPlace place;
  place.name = std::move(name);
  std::error_code error;
  place.device = fs::canonical(device, error);
  const std::string node = first_line(device / "numa_node");
  place.numa_node = node.empty() ? -1 : std::atoi(node.c_str());
  place.cpus = first_line(device / "local_cpulist");
  return place;
}

// As /sys writes it: lower case, four digits of domain.
std::string sysfs_address(std::string address) {
  std::transform(address.begin(), address.end(), address.begin(), [](unsigned char c) { return std::tolower(c); });
  const auto colon = address.find(':');
  return colon != std::string::npos && colon > 4 ? address.substr(colon - 4) : address;
}

// Interfaces of one class that are devices (not bridges, tunnels, loopback).
void add_interfaces(const fs::path& folder, std::vector<PciPlace>& interfaces) {
  std::error_code error;
  std::vector<fs::path> entries;
  for (const auto& entry : fs::directory_iterator(folder, error)) entries.push_back(entry.path());
  std::sort(entries.begin(), entries.end());
  for (const fs::path& entry : entries) {
    if (fs::exists(entry / "device", error)) interfaces.push_back(place_at(entry.filename().string(), entry / "device"));
  }
}

// Bridges that two devices have above them in common.
int shared_way(const fs::path& a, const fs::path& b) {
  const auto [left, right] = std::mismatch(a.begin(), a.end(), b.begin(), b.end());
  return static_cast<int>(std::distance(a.begin(), left));
}

std::vector<std::string> nearest(const PciPlace& gpu, const std::vector<PciPlace>& interfaces) {
  std::vector<std::string> names;
  int longest = 0;
  for (const PciPlace& interface : interfaces) {
    if (interface.device.empty() || interface.numa_node != gpu.numa_node) continue;
    const int shared = shared_way(gpu.device, interface.device);
    if (shared > longest) names.clear();
    if (shared >= longest) names.push_back(interface.name);
    longest = std::max(longest, shared);
  }
  return names;
}

}  // namespace

Topology read_topology(std::span<const std::string> gpus, const fs::path& sysfs) {
  Topology topology;
  add_interfaces(sysfs / "class/infiniband", topology.interfaces);
  add_interfaces(sysfs / "class/net", topology.interfaces);
  for (const std::string& gpu : gpus) {
    const std::string address = sysfs_address(gpu);
    const fs::path device = sysfs / "bus/pci/devices" / address;
    std::error_code error;
    if (!fs::exists(device, error)) continue;
    GpuPlace place{place_at(address, device), {}};
    place.nearest = nearest(place, topology.interfaces);
    topology.gpus.push_back(std::move(place));
  }
  return topology;
}

std::string text_of(const PciPlace& interface) {
  std::string text = interface.name;
  if (interface.numa_node >= 0) text += fmt::format(", NUMA node {}", interface.numa_node);
  if (!interface.cpus.empty()) text += fmt::format(", cores {}", interface.cpus);
  return text;
}

std::string text_of(const GpuPlace& gpu) {
  std::string text = text_of(static_cast<const PciPlace&>(gpu));
  if (!gpu.nearest.empty()) text += fmt::format(", nearest {}", fmt::join(gpu.nearest, " "));
  return text;
}

}  // namespace dattn
