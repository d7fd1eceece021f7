"""Benchmarks: ratios of two things run in turn on one machine. ``python -m bench`` runs them."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "bench"
