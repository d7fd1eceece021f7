"""Our C under the sanitizers, without Python: how the drivers of this folder are built, and run.

``python -m tests.native TIMES`` runs all of them that many times as long as the tests do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parent.parent / "vhostpc" / "_native"


@dataclass(frozen=True)
class Program:
    """A driver, the sanitizers that it is built with, and the files of ours that it drives, below ``_native/``."""

    name: str
    sanitize: str
    files: tuple[str, ...]
    #: Functions of the C library that the driver has its own of, and calls by ``__real_``.
    wraps: tuple[str, ...] = ()

    def build(self, folder: Path) -> Path:
        """Compile into ``folder``; returns the program."""
        program = folder / self.name
        sources = [HERE / f"{self.name}.c", *(NATIVE / f"{name}.c" for name in self.files)]
        flags = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-pthread"]
        flags += [f"-fsanitize={self.sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
        if self.sanitize == "thread":
            flags.append("-Wno-tsan")  # fences are for weaker processors; it does not look at them
        flags += [f"-Wl,--wrap={name}" for name in self.wraps]
        subprocess.run(["gcc", *flags, f"-I{NATIVE}", "-o", program, *sources], check=True)
        return program


MEMORY = (
    "event",
    *(f"memory/{name}" for name in ("gm", "view", "supply", "ask", "touch", "ahead", "guard", "replace")),
)
RINGS = (*MEMORY, *(f"virtio/{name}" for name in ("vq", "walk", "call", "chain", "inflight")))
PAGES = (
    *("event", "memory/replace", "ufd/uffd"),
    *(f"pages/{name}" for name in ("fault", "waiters", "blocktime", "outbox", "ram", "local", "present")),
    *(f"pages/{name}" for name in ("ramload", "ramplace", "delta")),
)

AHEAD = Program("ahead", "thread", ("event", "memory/ahead"), wraps=("pthread_create",))
FLIP = Program("flip", "address,undefined", (*RINGS, "virtio/pump", "virtio/pump_in", "virtio/pump_out"))
GUARD = Program("guard", "address,undefined", MEMORY)
MAPS = Program("maps", "undefined", MEMORY)
# Step by step: what the address sanitizer adds would be most of the steps.
RESTART = Program("restart", "undefined", RINGS)
FAULTS = Program("faults", "thread", PAGES, wraps=("realloc",))
LOADS = Program("loads", "address,undefined", PAGES)
VCPUS = Program("vcpus", "thread", (*PAGES, "pages/dirty", "guest/vcpu"))
STATE = Program(
    "state", "address,undefined", (*PAGES, "frontend/driver", "frontend/driverstate", "frontend/frame")
)


def run(program: Path, *args: object, timeout: float = 540) -> dict[str, int]:
    """Run it; returns the numbers of its last line. Raises AssertionError with what a sanitizer said."""
    words = output(program, *args, timeout=timeout).split()
    return {name: int(value) for name, value in zip(words[::2], words[1::2], strict=True)}


def output(program: Path, *args: object, data: bytes = b"", timeout: float = 540) -> str:
    """Run it with ``data`` on stdin; returns what it says. Raises AssertionError with what a sanitizer said."""
    # Without random addresses: the thread sanitizer's layout does not go with all that kernels choose.
    command = [shutil.which("setarch") or "setarch", os.uname().machine, "-R", str(program), *map(str, args)]
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1"}
    done = subprocess.run(command, input=data, capture_output=True, timeout=timeout, env=env, check=False)
    said = done.stderr[-6000:].decode(errors="replace")
    assert done.returncode == 0, f"{program.name} {args} ended with {done.returncode}:\n{said}"
    return done.stdout.decode()
