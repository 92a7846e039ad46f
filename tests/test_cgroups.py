"""The limits of control groups, read from files as kernels with either version of control groups write them."""

import pytest

from ffcv_ops import cgroups
from ffcv_ops.cgroups import available_bytes, cpu_quota


def test_available_memory_is_within_a_machine():
    assert 1 << 20 < available_bytes() < 1 << 50


@pytest.mark.parametrize(
    "files",
    [
        {
            "/proc/self/cgroup": "0::/slurm/job_7/step_0\n",
            "/sys/fs/cgroup/slurm/job_7/memory.max": "64000\n",
            "/sys/fs/cgroup/slurm/job_7/memory.current": "60000\n",
            "/sys/fs/cgroup/slurm/job_7/memory.stat": "anon 10000\ninactive_file 20000\nactive_file 30000\n",
            "/sys/fs/cgroup/slurm/memory.max": "max\n",
        },
        {
            "/proc/self/cgroup": "7:memory:/slurm/job_7\n4:cpu,cpuacct:/\n",
            "/sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes": "64000\n",
            "/sys/fs/cgroup/memory/slurm/job_7/memory.usage_in_bytes": "60000\n",
            "/sys/fs/cgroup/memory/slurm/job_7/memory.stat": "total_inactive_file 20000\ntotal_active_file 30000\n",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes": "100000\n",
        },
    ],
    ids=["version 2", "version 1"],
)
def test_a_scheduler_limits_memory(monkeypatch, files):
    monkeypatch.setattr(cgroups, "read", lambda path: files.get(str(path), ""))
    assert available_bytes() == 64000 - 60000 + 50000


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"/proc/self/cgroup": "0::/job/step\n", "/sys/fs/cgroup/job/cpu.max": "150000 100000\n"}, 1.5),
        ({"/proc/self/cgroup": "0::/job\n", "/sys/fs/cgroup/job/cpu.max": "max 100000\n"}, None),
        ({"/proc/self/cgroup": "0::/../gone\n", "/sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        (
            {
                "/proc/self/cgroup": "9:memory:/job\n4:cpu,cpuacct:/job\n1:name=systemd:/\n",
                "/sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "300000\n",
                "/sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
    ],
)
def test_a_scheduler_limits_cpu_time(monkeypatch, files, quota):
    monkeypatch.setattr(cgroups, "read", lambda path: files.get(str(path), ""))
    assert cpu_quota() == quota
