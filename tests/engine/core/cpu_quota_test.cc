// CPU quotas of control groups, read from made-up file trees.
#include "src/core/cpu_quota.h"

#include <gtest/gtest.h>

#include <string>

#include "src/core/thread_pool.h"
#include "tests/engine/testing/temp_dir.h"

namespace fq {
namespace {

class CpuQuota : public ::testing::Test {
 protected:
  void file(const std::string& name, const std::string& content) {
    const auto path = root_ / name;
    std::filesystem::create_directories(path.parent_path());
    testing::write_file(path, content);
  }
  int quota() const { return cgroup_cpu_quota(root_.path()); }

  testing::TempDir root_;
};

TEST_F(CpuQuota, NoControlGroupsMeansNoLimit) { EXPECT_EQ(quota(), 0); }

TEST_F(CpuQuota, Version2RoundsUpAndUnlimitedIsNoLimit) {
  file("proc/self/cgroup", "0::/job\n");
  file("sys/fs/cgroup/job/cpu.max", "max 100000\n");
  EXPECT_EQ(quota(), 0);
  file("sys/fs/cgroup/job/cpu.max", "250000 100000\n");
  EXPECT_EQ(quota(), 3);
  file("sys/fs/cgroup/job/cpu.max", "200000 100000\n");
  EXPECT_EQ(quota(), 2);
  file("sys/fs/cgroup/job/cpu.max", "1000 100000\n");
  EXPECT_EQ(quota(), 1);
}

TEST_F(CpuQuota, AnAncestorsSmallerQuotaWins) {
  file("proc/self/cgroup", "0::/slice/job\n");
  file("sys/fs/cgroup/slice/job/cpu.max", "800000 100000\n");
  file("sys/fs/cgroup/slice/cpu.max", "300000 100000\n");
  EXPECT_EQ(quota(), 3);
}

// In a container the path in proc is the host's, and the mounted root is the container's own group.
TEST_F(CpuQuota, AContainersRootCountsThoughItsPathIsTheHosts) {
  file("proc/self/cgroup", "0::/host/only/path\n");
  file("sys/fs/cgroup/cpu.max", "400000 100000\n");
  EXPECT_EQ(quota(), 4);
}

TEST_F(CpuQuota, Version1ByItsControllerAlsoWhenMountedTogether) {
  file("proc/self/cgroup", "5:cpuset:/\n4:cpuacct,cpu:/job\n3:memory:/job\n");
  file("sys/fs/cgroup/cpuacct,cpu/job/cpu.cfs_quota_us", "150000\n");
  file("sys/fs/cgroup/cpuacct,cpu/job/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(quota(), 2);
  file("sys/fs/cgroup/cpuacct,cpu/job/cpu.cfs_quota_us", "-1\n");
  EXPECT_EQ(quota(), 0);
  file("proc/self/cgroup", "1:cpu:/\n");
  file("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "500000\n");
  file("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(quota(), 5);
}

TEST_F(CpuQuota, NonsenseLimitsNothing) {
  file("proc/self/cgroup", "\n:\n0::\nx:cpu:\n0::relative\n");
  file("sys/fs/cgroup/cpu.max", "garbage\n");
  file("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "100");
  file("sys/fs/cgroup/cpu/cpu.cfs_period_us", "0");
  EXPECT_EQ(quota(), 0);
}

TEST(AvailableCores, IsAtLeastOne) { EXPECT_GE(available_cores(), 1); }

}  // namespace
}  // namespace fq
