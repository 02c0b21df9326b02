"""How many CPUs this process may use: its affinity, and the share of time that its group has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cpus(root: Path = ROOT, membership: Path = MEMBERSHIP) -> tuple[int, str]:
    """The number, at least 1, and what limits it, for people.

    Args:
        root: Where the control groups are mounted.
        membership: Lists the groups of this process.
    """
    if hasattr(os, "sched_getaffinity"):
        count, reason = len(os.sched_getaffinity(0)), "the CPUs that the process may run on"
    else:
        count, reason = os.cpu_count() or 1, "the machine's CPUs"
    quotas = [each for group in _groups(root, membership) if (each := _quota(group)) is not None]
    if quotas and math.ceil(min(quotas)) < count:
        share = min(quotas)
        return max(1, math.ceil(share)), f"the control group has the time of {share:g} CPUs"
    return count, reason


def _groups(root: Path, membership: Path) -> Iterator[Path]:
    """Directories of the groups that limit this process's CPU time, and of their parents."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # no control groups here
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if not controllers:  # version 2; beside version 1 it is mounted one level down
            tops = [root, root / "unified"]
        elif "cpu" in controllers.split(","):
            tops = [root / controllers, root / "cpu"]
        else:
            continue
        # Within a container the names may be those of the host: the top is the container's then.
        path = PurePosixPath(name.lstrip("/"))
        for top in tops:
            yield from (top / each for each in (path, *path.parents))


def _quota(group: Path) -> float | None:
    """CPUs' worth of time that a group has; None: no limit is set there."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (group / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
        if quota == "max" or int(quota) <= 0:
            return None
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # absent, or in a form unknown here
        return None
