"""Waiting times: percentiles of the histograms that C keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vhostpc._native import lib


@dataclass(frozen=True, slots=True)
class Waits:
    """The number and length of waits: nanoseconds, accurate to 25 %. The owner knows whose they are, and when."""

    count: int
    p50_ns: int
    p99_ns: int
    longest_ns: int


def waits_of(histogram: Any, longest_ns: int) -> Waits:
    """Percentiles of a C histogram: the upper end of the bucket that holds them, at most the longest."""
    counts = list(histogram)
    total = sum(counts)

    def percentile(share: float) -> int:
        want, seen = share * total, 0
        for i, n in enumerate(counts):
            seen += n
            if n and seen >= want:
                return min(lib.vpc_histogram_floor(i + 1), longest_ns)
        return 0

    return Waits(total, percentile(0.5), percentile(0.99), longest_ns)
