"""libblkio, which has rust-vmm's kind of front-end, drives our disk."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest

from tests.peers import blkio_child
from tests.peers.packages import libblkio
from tests.qemu.backend import disk
from tests.qemu.peers import REPO
from tests.qemu.proc import child

CAPACITY = 4 << 20


@pytest.mark.parametrize(
    ("queues", "size", "options"), [(1, 256, ()), (2, 1024, ()), (2, 64, ("--ring-size", "64"))]
)
async def test_disk(queues: int, size: int, options: tuple[str, ...], tmp_path: Path) -> None:
    """What it writes is in the file and read back; it takes what the disk says of queues, rings and segments."""
    file, content = tmp_path / "disk", tmp_path / "content"
    content.write_bytes(random.Random(size).randbytes(blkio_child.BLOCK * 24))
    file.touch()
    os.truncate(file, CAPACITY)
    argv = [sys.executable, "-m", "tests.peers.blkio_child", str(libblkio())]
    async with disk("disk", file, tmp_path, ("--queues", "2", *options)) as back:
        argv += [str(back.path), str(queues), str(size), str(content)]
        async with child("libblkio", argv, cwd=str(REPO)) as program:
            assert await program.wait() == 0, program.tail()
            await program.drained()
        await back.process.err.find("disconnected")
        assert back.complaints() == []
    said = dict(line.split() for line in program.out.lines if " " in line)
    segments = (int(options[1]) if options else 64) - 2  # with the request's head and status
    assert said == {
        "capacity": str(CAPACITY),
        "max-queues": "2",
        "max-queue-size": said["max-queue-size"],
        "max-segments": str(segments),
        "request-alignment": "512",
        "max-mem-regions": "509",
        "same": "True",
    }
    assert int(said["max-queue-size"]) >= size
    assert program.out.lines[-1] == "ended"
    assert file.read_bytes() == content.read_bytes().ljust(CAPACITY, b"\0")
