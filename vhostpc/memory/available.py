"""How much memory this computer has left."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")


def available_memory() -> int:
    """Bytes that are available, with swap: MemAvailable and SwapFree (proc_meminfo(5))."""
    found = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    return sum(int(found[name].split()[0]) << 10 for name in ("MemAvailable", "SwapFree") if name in found)
