"""How much memory this process can still take. Refuses nothing."""

from __future__ import annotations

from pathlib import Path

_MEMORY = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))


def free_memory() -> int | None:
    """Bytes that this process can still take, by the kernel and its control group; None where neither reports it."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        limit, used = (path.read_text().strip() for path in _MEMORY)
        if limit != "max":
            found.append(int(limit) - int(used))
    except (OSError, ValueError):
        pass  # no such file on this system: what was found so far counts
    return min(found, default=None)
