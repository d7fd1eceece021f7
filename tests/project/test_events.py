"""Descriptors that a peer holds too: nothing waits on them, whatever flags and counter the peer gives them."""

from __future__ import annotations

import mmap
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import trio

from tests.kit.c_calls import c_files, without_noise
from vhostpc.backend.backend_channel import BackendChannel
from vhostpc.errors import RequestFailed
from vhostpc.transport import MessageSocket
from vhostpc.ufd import Userfaultfd
from vhostpc.virtio.event import EventKind, clear_event, event_kind, signal_event
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import BackendRequest, Request

PACKAGE = Path(__file__).resolve().parents[2] / "vhostpc"
FULL = (1 << 64) - 2
EMPTY_AND_FULL = [(flags, count) for flags in (0, os.EFD_SEMAPHORE) for count in (0, 1, FULL)]


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize(("flags", "count"), EMPTY_AND_FULL)
def test_neither_call_waits(blocking: bool, flags: int, count: int) -> None:
    fd = os.eventfd(0, flags | os.EFD_NONBLOCK)
    try:
        assert event_kind(fd) is EventKind.EVENTFD
        if count:
            os.eventfd_write(fd, count)
        os.set_blocking(fd, not blocking)
        assert clear_event(fd) == bool(count)
        signal_event(fd)
        assert clear_event(fd)
        if not flags:
            assert not clear_event(fd)
            os.set_blocking(fd, False)
            os.eventfd_write(fd, FULL)
            os.set_blocking(fd, not blocking)
        for _ in range(3):
            signal_event(fd)
        assert clear_event(fd)
    finally:
        os.close(fd)


def test_what_is_no_eventfd_is_left_alone() -> None:
    ours, theirs = os.pipe()
    try:
        signal_event(theirs)
        os.set_blocking(ours, False)
        assert len(os.read(ours, 100)) == 8  # it was said to be one
        assert not clear_event(ours)
    finally:
        os.close(ours)
        os.close(theirs)
    signal_event(ours)
    assert not clear_event(ours)


def test_no_signal_is_lost() -> None:
    """Not even where many threads make more than the kernel keeps completions of."""
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:

        def signal_often() -> None:
            for _ in range(500):
                signal_event(fd)

        threads = [threading.Thread(target=signal_often) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert os.eventfd_read(fd) == 2000
    finally:
        os.close(fd)


def test_a_peer_that_fills_it_between_two_looks() -> None:
    """It needs a few ten thousand tries to stop one that looks and then writes."""
    fd, memfd = os.eventfd(0), os.memfd_create("count")
    os.ftruncate(memfd, mmap.PAGESIZE)
    stop = threading.Event()
    with mmap.mmap(memfd, mmap.PAGESIZE) as page, memoryview(page) as raw, raw.cast("Q") as done:

        def work() -> None:
            while not stop.is_set():
                signal_event(fd)
                done[0] += 1

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        command = [sys.executable, "-m", "tests.kit.event_attacker", str(fd), str(memfd), "1"]
        subprocess.run(command, pass_fds=[fd, memfd], check=True, timeout=60)
        stop.set()
        thread.join(5)
        stuck = thread.is_alive()
        if stuck:
            clear_event(fd)  # for the other tests
            thread.join()
    os.close(fd)
    os.close(memfd)
    assert not stuck


WITHOUT_AIO = """
import os
from tests.kit.confine import deny
deny("io_setup")
from vhostpc.virtio.event import signal_event
fd = os.eventfd(0)
for _ in range(3):
    signal_event(fd)
assert os.eventfd_read(fd) == 3
os.eventfd_write(fd, (1 << 64) - 2)
signal_event(fd)
print("done")
"""


def test_a_filter_that_denies_asynchronous_calls() -> None:
    """Then a look and a write have to do."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_AIO],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("done\n", "")


@pytest.mark.ufd
def test_events_of_a_userfaultfd_that_its_process_made_blocking() -> None:
    with Userfaultfd.open() as ufd:
        os.set_blocking(ufd.fileno(), True)
        assert ufd.events() == []


async def test_a_socket_that_the_peer_made_and_makes_blocking() -> None:
    """As the back-end's channel is: both sides hold both of its ends."""
    theirs, ours = socket.socketpair()
    with theirs:
        channel = BackendChannel(ours, reply_ack=True, name="front-end")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.run)
            os.set_blocking(channel._socket._sock.fileno(), True)
            with pytest.raises(RequestFailed, match="no answer"):  # there is nothing to receive
                await channel.request(BackendRequest.CONFIG_CHANGE_MSG, timeout=0.05)
            channel.close()
    left, right = trio.socket.socketpair()
    with left, right:
        stream = MessageSocket(left)
        os.set_blocking(left.fileno(), True)
        with trio.move_on_after(0.05) as scope:  # and no room to send
            while True:
                await stream.send(vu.encode(Request.GET_FEATURES, bytes(4000)))
        assert scope.cancelled_caught


# --- what else reads and writes

#: Raw reads and writes outside event.c: of what, and why they may.
OTHERS = {
    ("pump_in.c", "read(c->fd"): "the far side of a pump: the device's own",
    ("pump_out.c", "write(c->fd"): "the far side of a pump: the device's own",
    ("ramload.c", "pread(b->fd"): "a RAM block, by an open file that nobody else holds",
    ("ramload.c", "read(l->fd"): "a file on a disk, which flags do not change",
    ("savewriter.c", "write(w->fd"): "a file on a disk, which flags do not change",
    ("ramplace.c", "pwrite(b->fd"): "a RAM block, by an open file that nobody else holds",
}
CALLS = re.compile(r"\b(p?(?:read|write)v?2?|recv\w*|send(?:to|msg|mmsg)?)\((\w+(?:->\w+)?)([^;()]*)")


def test_no_file_of_c_reads_or_writes_otherwise() -> None:
    found = set()
    for path in c_files("*.c"):
        if path.name == "event.c":
            continue
        for name, what, rest in CALLS.findall(without_noise(path.read_text())):
            if name.startswith(("recv", "send")):
                assert "MSG_DONTWAIT" in rest, f"{path.name}: {name}({what}{rest}"
            else:
                found.add((path.name, f"{name}({what}"))
    assert found == set(OTHERS)


#: The same in Python, by what the descriptor is.
PYTHON = {
    (
        "backend/medium.py",
        "os.preadv(self.fd",
    ): "a disk's file, where it does not wait (RWF_NOWAIT); or memory",
    ("backend/medium.py", "os.pwrite(self.fd"): "a disk's file, on a thread; or memory",
    ("backend/net.py", "os.write(self._links[0]"): "a tap or a socket of the bridge's own",
    ("cli/inspect.py", "os.read(sys.stdin.fileno()"): "the standard input of a command",
    ("qmp/terminal.py", "os.read(self._in"): "the terminal of a command",
    ("qmp/terminal.py", "os.write(self._out"): "the terminal of a command",
    ("migration/ends.py", "os.read(fd"): "a file on a disk, on a thread",
    ("migration/ends.py", "os.write(fd"): "a file on a disk, on a thread",
    ("frontend/share.py", "os.pread(self.fd"): "a dirty log, which is memory",
}


#: Those that somebody else is to call.
PASSED_ON = {
    ("backend/medium.py", "os.pread, self.fd"): "a disk's file, on a thread",
    (
        "migration/ends.py",
        "os.read, self.in_fd",
    ): "a migration's pipe: our end is nobody else's (docs/threads.md)",
    ("migration/ends.py", "os.write, self.out_fd"): "the same",
}


def test_no_file_of_python_reads_or_writes_otherwise() -> None:
    found = set()
    passed_on = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        here, text = str(path.relative_to(PACKAGE)), path.read_text()
        for call in re.findall(r"\bos\.(?:p?readv?|p?writev?|eventfd_\w+)\([\w.\[\]]+(?:\(\))?", text):
            found.add((here, call))
        for function in re.findall(r"\bos\.(?:p?readv?|p?writev?)\b(?!\()[\w., ]*(?=,)", text):
            passed_on.add((here, ", ".join(function.split(", ")[:2])))
        assert not re.search(r"\beventfd_(read|write)\b", text), here
    assert found == set(PYTHON)
    assert passed_on == set(PASSED_ON)
