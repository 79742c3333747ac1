// How much processor time the control groups of this process allow. Reads small files; any thread.
#pragma once

#include <filesystem>

namespace fq {

// The smallest CPU quota (in cores, rounded up) of the control group of this process and of its
// ancestors, cgroup v2 and v1; 0 when nothing limits it. `root` stands in for "/" in tests.
int cgroup_cpu_quota(const std::filesystem::path& root = "/");

}  // namespace fq
