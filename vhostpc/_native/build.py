"""Builds ``vhostpc._native._vpc`` with cffi in API mode.

Each header holds plain declarations between two marker lines; that text is the cdef and the C files
include the same header, so the two cannot drift.
"""

from __future__ import annotations

import os
from pathlib import Path

import cffi

HERE = Path(__file__).resolve().parent
# One header per subject; later ones use the types of earlier ones.
HEADERS = [
    *("vpc_thread.h", "vpc_event.h", "memory/vpc_supply.h", "memory/vpc_gm.h", "ufd/vpc_uffd.h"),
    *("virtio/vpc_ring.h", "virtio/vpc_inflight.h", "virtio/vpc_pump.h"),
    *("pages/vpc_ram.h", "pages/vpc_fault.h", "pages/vpc_load.h"),
    *("pages/vpc_scan.h", "pages/vpc_save.h", "pages/vpc_dirty.h"),
    *("frontend/vpc_far.h", "frontend/vpc_driver.h", "guest/vpc_vcpu.h"),
]
BEGIN, END = "/* cdef begin */", "/* cdef end */"


def cdef_text(header: str) -> str:
    text = (HERE / header).read_text()
    return text.split(BEGIN, 1)[1].split(END, 1)[0]


def sources() -> list[str]:
    """The C files, relative to the folder that setuptools builds in."""
    return sorted(os.path.relpath(p, Path.cwd()) for p in HERE.rglob("*.c") if not p.name.startswith("_vpc"))


ffibuilder = cffi.FFI()
for name in HEADERS:
    ffibuilder.cdef(cdef_text(name))

flags = ["-std=gnu11", "-O2", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"]
link = ["-pthread"]
if os.environ.get("VHOSTPC_SANITIZE"):
    flags += ["-g", "-O1", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"]
    link += ["-fsanitize=address,undefined"]

ffibuilder.set_source(
    "vhostpc._native._vpc",
    "".join(f'#include "{h}"\n' for h in HEADERS),
    sources=sources(),
    include_dirs=[str(HERE)],
    extra_compile_args=flags,
    # pthread_exit loads libgcc_s at its first use, and ends the process where there is no memory for that: so now.
    extra_link_args=[*link, "-Wl,--no-as-needed", "-lgcc_s"],
    py_limited_api=True,
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
