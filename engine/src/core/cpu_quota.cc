// Control group quotas, as `proc/self/cgroup` and `sys/fs/cgroup` show them. A file that is missing
// or that says something unexpected limits nothing: counting cores must not fail.
#include "src/core/cpu_quota.h"

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <string>
#include <string_view>

namespace fq {
namespace {

namespace fs = std::filesystem;

// Cores that `quota` microseconds in each `period` amount to; 0 (no limit) for what makes no sense.
int cores_of(int64_t quota, int64_t period) {
  if (quota <= 0 || period <= 0) return 0;
  return static_cast<int>(std::clamp<int64_t>((quota - 1) / period + 1, 1, 1 << 20));
}

int64_t read_number(const fs::path& path) {
  std::ifstream file(path);
  int64_t value = 0;
  return file >> value ? value : 0;
}

int quota_v2(const fs::path& group) {
  std::ifstream file(group / "cpu.max");  // "max 100000" or "150000 100000"
  int64_t quota = 0, period = 0;
  return file >> quota >> period ? cores_of(quota, period) : 0;
}

int quota_v1(const fs::path& group) {
  return cores_of(read_number(group / "cpu.cfs_quota_us"),
                  read_number(group / "cpu.cfs_period_us"));
}

// Smallest quota of `group` (an absolute path inside the hierarchy) and its ancestors. A container
// often sees its own group mounted as the hierarchy's root while proc names the host's path: the
// walk then ends at the root, which counts.
int smallest_quota(const fs::path& hierarchy, std::string group, int (*quota)(const fs::path&)) {
  int smallest = 0;
  while (true) {
    const int here = quota(hierarchy / fs::path(group).relative_path());
    if (here > 0) smallest = smallest == 0 ? here : std::min(smallest, here);
    const size_t slash = group.find_last_of('/');
    if (slash == std::string::npos) return smallest;
    group.resize(slash);
  }
}

bool lists(std::string_view controllers, std::string_view wanted) {
  while (true) {
    const size_t comma = controllers.find(',');
    if (controllers.substr(0, comma) == wanted) return true;
    if (comma == std::string_view::npos) return false;
    controllers.remove_prefix(comma + 1);
  }
}

}  // namespace

int cgroup_cpu_quota(const fs::path& root) {
  const fs::path mounts = root / "sys/fs/cgroup";
  std::ifstream groups(root / "proc/self/cgroup");
  int smallest = 0;
  const auto limit = [&smallest](int cores) {
    if (cores > 0) smallest = smallest == 0 ? cores : std::min(smallest, cores);
  };
  for (std::string line; std::getline(groups, line);) {  // "hierarchy-id:controllers:path"
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string group = line.substr(second + 1);
    if (controllers.empty()) {
      limit(smallest_quota(mounts, group, quota_v2));
      limit(smallest_quota(mounts / "unified", group, quota_v2));  // hybrid systems mount v2 here
    } else if (lists(controllers, "cpu")) {
      limit(smallest_quota(mounts / "cpu", group, quota_v1));
      if (controllers != "cpu") limit(smallest_quota(mounts / controllers, group, quota_v1));
    }
  }
  return smallest;
}

}  // namespace fq
