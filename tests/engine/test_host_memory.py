"""How much host memory is free: what the system says, and what the groups around us allow."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from step1x_edit.engine.host_memory import HostMemory, lockable_share, measure

MEMINFO = "MemTotal:       64000 kB\nMemFree:  1000 kB\nMemAvailable:   32000 kB\n"
SECOND = "30 23 0:26 {inside} /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw"
FIRST = "35 31 0:32 {inside} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
KIB = 1024

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no /proc")


def a_machine(root: Path, cgroup: str = "", mount: str = "", inside: str = "/") -> Path:
    write(root / "proc/meminfo", MEMINFO)
    write(root / "proc/self/cgroup", cgroup)
    write(root / "proc/self/mountinfo", "no mount\n" + mount.format(inside=inside))
    return root


def a_group(folder: Path, limit: str, usage: int, cached: int = 0) -> None:
    """A group of the second version."""
    write(folder / "memory.max", f"{limit}\n")
    write(folder / "memory.high", "max\n")
    write(folder / "memory.current", f"{usage}\n")
    stat = f"anon 7\nfile 99\ninactive_file {cached // 2}\nactive_file {cached // 2}\n"
    write(folder / "memory.stat", stat)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_without_limits_the_system_knows_what_is_free(tmp_path: Path) -> None:
    assert measure(a_machine(tmp_path)) == HostMemory(32000 * KIB, 64000 * KIB)


def test_where_the_system_does_not_tell_nothing_is_known(tmp_path: Path) -> None:
    assert measure(tmp_path) is None
    write(tmp_path / "proc/meminfo", "MemTotal: much\n\nMemAvailable:\n")
    assert measure(tmp_path) is None


def test_a_group_leaves_what_it_allows_and_does_not_use_or_only_caches(tmp_path: Path) -> None:
    a_machine(tmp_path, "0::/shop/server\n", SECOND)
    a_group(tmp_path / "sys/fs/cgroup/shop/server", "10000000", usage=6_000_000, cached=2_000_000)

    assert measure(tmp_path) == HostMemory(6_000_000, 10_000_000)


def test_the_narrowest_of_the_groups_around_us_counts(tmp_path: Path) -> None:
    a_machine(tmp_path, "0::/shop/server\n", SECOND)
    top = tmp_path / "sys/fs/cgroup"
    a_group(top / "shop/server", "max", usage=1)
    a_group(top / "shop", "9000000", usage=5_000_000)
    a_group(top, "20000000", usage=1_000_000)

    assert measure(tmp_path) == HostMemory(4_000_000, 9_000_000)


def test_a_group_that_is_slowed_down_from_a_limit_on_has_that_limit(tmp_path: Path) -> None:
    a_machine(tmp_path, "0::/\n", SECOND)
    a_group(tmp_path / "sys/fs/cgroup", "10000000", usage=1_000_000)
    write(tmp_path / "sys/fs/cgroup/memory.high", "3000000")

    assert measure(tmp_path) == HostMemory(2_000_000, 3_000_000)


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    a_machine(tmp_path, "0::/\n", SECOND)
    a_group(tmp_path / "sys/fs/cgroup", "1000", usage=5000)

    assert measure(tmp_path) == HostMemory(0, 1000)


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        ("/docker/abc", "/docker/abc"),  # the container's own group is mounted
        ("/docker/abc", "/"),  # a path of the machine, which is not shown here
        ("/../..", "/"),  # beyond the top of our namespace
        ("/", "/"),
    ],
)
def test_a_container_finds_its_own_group(tmp_path: Path, path: str, inside: str) -> None:
    a_machine(tmp_path, f"0::{path}\n", SECOND, inside)
    a_group(tmp_path / "sys/fs/cgroup", "10000000", usage=1_000_000)

    assert measure(tmp_path) == HostMemory(9_000_000, 10_000_000)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("10000000", HostMemory(6_000_000, 10_000_000)),
        ("9223372036854771712", HostMemory(32000 * KIB, 64000 * KIB)),  # how it says "no limit"
    ],
)
def test_groups_of_the_first_version_are_read_as_well(
    tmp_path: Path, limit: str, expected: HostMemory
) -> None:
    cgroup = "9:name=systemd:/\n4:cpu,memory:/shop\n1:cpuset:/\n0::/\n"
    group = a_machine(tmp_path, cgroup, FIRST) / "sys/fs/cgroup/memory/shop"
    write(group / "memory.limit_in_bytes", limit)
    write(group / "memory.usage_in_bytes", "5000000")
    write(group / "memory.stat", "inactive_file 0\ntotal_inactive_file 1000000\n")

    assert measure(tmp_path) == expected


@pytest.mark.parametrize(
    ("release", "share"), [("6.8.0-45-generic", 0.6), ("5.15.1-microsoft-standard-WSL2", 0.4)]
)
def test_less_may_be_page_locked_under_windows(tmp_path: Path, release: str, share: float) -> None:
    write(tmp_path / "proc/sys/kernel/osrelease", release)

    assert lockable_share(tmp_path) == share


def test_this_machine_has_memory() -> None:
    found = measure()

    if sys.platform == "linux":
        assert found is not None
        assert 0 < found.available <= found.total
