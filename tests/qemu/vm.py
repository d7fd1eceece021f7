"""A QEMU of either version with a checking guest: started, watched, migrated."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import trio

from tests.qemu import guest, peers
from tests.qemu.link import Link, link
from tests.qemu.net import FAR_IP, FAR_MAC, GUEST_IP, GUEST_MAC
from tests.qemu.proc import Child, Lines, child, unwrapped
from tests.qemu.qmp import Qmp

# Not vhost_user_* and postcopy_* as a whole: those have a line for every page placed.
TRACES = (
    "vhost_user_read",
    "vhost_user_write",
    "vhost_user_postcopy_listen",
    "vhost_user_postcopy_fault_*",
    "vhost_user_postcopy_end_*",
    "vhost_user_set_mem_table_*",
    "qemu_announce_self_iter",
)
# A page that a back-end missed was found: one line each, at the destination.
RESOLVED = "vhost_user_postcopy_fault_handler_found"
# The guest's network, on its kernel's command line.
NETWORK = f"vm.ip={GUEST_IP} vm.peer={FAR_IP} vm.peer_mac={FAR_MAC}"
# What QEMU prints on stderr in a healthy run (missing host features, old machine types, the end by signal).
HARMLESS = re.compile(
    r"terminating on signal|TCG doesn't support requested feature|Machine type '[^']*' is deprecated|^$"
)


@dataclass(frozen=True)
class Memory:
    """Guest RAM: where it lives, its page size, its size in MiB."""

    backend: Literal["memfd", "file"] = "memfd"
    huge: bool = False
    size: int = 256

    @property
    def page(self) -> int:
        """Bytes of a host page."""
        return 2 << 20 if self.huge else 4096

    def argv(self) -> list[str]:
        common = f"id=mem,size={self.size}M,share=on"
        if self.backend == "memfd":
            huge = ",hugetlb=on,hugetlbsize=2M" if self.huge else ""
            text = f"memory-backend-memfd,{common}{huge}"
        else:
            # A folder as mem-path: QEMU makes a file without a name there, so nothing stays behind.
            text = f"memory-backend-file,{common},mem-path=/dev/shm"
        return ["-object", text, "-machine", "pc,memory-backend=mem", "-m", f"{self.size}M"]


@dataclass(frozen=True)
class VhostUser:
    """The guest's NIC is served by a vhost-user back-end that listens at ``path``."""

    path: Path
    queues: int = 1
    rx_size: int = 256  # entries of a receive ring
    chardev: str = ""  # more options of the socket

    def argv(self) -> list[str]:
        netdev = f"vhost-user,id=n0,chardev=vu,queues={self.queues}"
        device = f"virtio-net-pci,netdev=n0,mac={GUEST_MAC},romfile=,rx_queue_size={self.rx_size}"
        if self.queues > 1:
            device += ",mq=on"
        smp = ["-smp", str(self.queues)]  # the guest uses a pair of queues for each processor
        # vectors=0: QEMU 7.2 crashes when a vhost-user NIC starts under TCG with MSI-X.
        device += ",vectors=0"
        link = f"socket,id=vu,path={self.path}{self.chardev}"
        return ["-chardev", link, "-netdev", netdev, "-device", device, *smp]

    def words(self) -> str:
        return f"{NETWORK} vm.queues={self.queues}"


@dataclass(frozen=True)
class Tap:
    """The guest's NIC is served by QEMU itself through a tap; ``inside`` enters the tap's namespace."""

    name: str
    inside: tuple[str, ...]

    def argv(self) -> list[str]:
        netdev = f"tap,id=n0,ifname={self.name},script=no,downscript=no"
        return ["-netdev", netdev, "-device", f"virtio-net-pci,netdev=n0,mac={GUEST_MAC},romfile=,vectors=0"]

    def words(self) -> str:
        return NETWORK


@dataclass(frozen=True)
class Disk:
    """The guest has a disk, served by a vhost-user back-end that listens at ``path``."""

    path: Path
    queues: int = 2
    chardev: str = ""  # more options of the socket
    threads: int = 0  # of the guest's checker, which then does not pause
    sectors: bool = False  # its sectors say their number: the guest only reads

    def argv(self) -> list[str]:
        device = f"vhost-user-blk-pci,chardev=vu,num-queues={self.queues},vectors=0"
        link = f"socket,id=vu,path={self.path}{self.chardev}"
        # A queue for each processor.
        return ["-chardev", link, "-device", device, "-smp", str(self.queues)]

    def words(self) -> str:
        if self.sectors:
            return "vm.disk=sectors"
        return f"vm.disk_threads={self.threads}" if self.threads else ""


@dataclass(frozen=True)
class Bare:
    """The guest has neither NIC nor disk."""

    def argv(self) -> list[str]:
        return []

    def words(self) -> str:
        return ""


@dataclass(frozen=True)
class Spec:
    """What both ends of a migration have in common."""

    qemu: peers.Qemu
    memory: Memory = field(default_factory=Memory)
    extra: tuple[str, ...] = ()


class Talking(Protocol):
    """A running guest that is told things, and says things, by its serial line: of QEMU, or another."""

    process: Child

    @property
    def serial(self) -> Lines: ...


class Vm:
    """A running QEMU: ``qmp``, ``serial`` (the guest's lines), ``trace_file``."""

    def __init__(self, name: str, process: Child, qmp: Qmp, trace_file: Path, spec: Spec) -> None:
        self.name = name
        self.process = process
        self.qmp = qmp
        self.trace_file = trace_file
        self.spec = spec

    @property
    def serial(self) -> Lines:
        return self.process.out

    def traces(self, event: str) -> int:
        """How often QEMU's trace shows that event so far."""
        with contextlib.suppress(FileNotFoundError):
            return sum(event in line for line in self.trace_file.read_text(errors="replace").splitlines())
        return 0

    def complaints(self) -> list[str]:
        """What QEMU said on stderr beside the harmless."""
        return [line for line in self.process.err.lines if not HARMLESS.search(line)]

    async def booted(self) -> str:
        """Wait until the guest's checker beats; its nonce."""
        found = await self.serial.find(r"mem ([0-9a-f]{16}) beat=", limit=120)
        return found.group(1)

    async def beat(self, nonce: str, more: int = 1) -> None:
        """Wait for ``more`` further beats of the checker, of that very guest, without a bad page."""
        at = len(self.serial)
        for _ in range(more):
            found = await self.serial.find(r"mem ([0-9a-f]{16}) beat=.* bad=(\d+)", at)
            at = self.serial.lines.index(found.string, at) + 1
            assert found.group(1) == nonce, f"another guest: {found.string}, not {nonce}"
            assert found.group(2) == "0", found.string

    async def sweep(self) -> int:
        """Have the guest check all its pages; how many were bad."""
        at = len(self.serial)
        await self.process.send(f"sweep s{at}\n")
        found = await self.serial.find(rf"sweep s{at} pages=\d+ bad=(\d+)", at, limit=120)
        return int(found.group(1))

    async def save_ram(self, path: Path) -> None:
        """Write all RAM below 3 GiB to a file."""
        size = self.spec.memory.size << 20
        await self.qmp.command("pmemsave", limit=120, val=0, size=size, filename=str(path))

    async def quit(self) -> None:
        await self.process.stop()


@contextlib.asynccontextmanager
async def vm(
    spec: Spec,
    name: str,
    device: VhostUser | Tap | Disk | Bare,
    tmp_path: Path,
    *,
    incoming: bool = False,
    oob: bool = False,
) -> AsyncIterator[Vm]:
    """Start a QEMU for the length of a block; with ``incoming`` it waits for ``migrate-incoming``, with ``oob`` it
    takes commands out of band."""
    kernel = peers.kernel()
    ours, theirs = socket.socketpair()
    trace_file = tmp_path / f"{name}.trace"
    append = f"console=ttyS0 quiet panic=-1 {device.words()}"
    if spec.memory.huge:
        append += " vm.checks=1 vm.pause=150 vm.holes=1500"
    argv: list[str] = [*device.inside] if isinstance(device, Tap) else []
    argv += [*spec.qemu.argv, "-name", name, "-nodefaults", "-no-user-config", "-display", "none"]
    argv += ["-accel", "tcg", *spec.memory.argv(), "-no-reboot"]
    argv += ["-kernel", str(kernel.image), "-initrd", str(guest.initrd(kernel)), "-append", append]
    argv += ["-chardev", "stdio,id=serial,signal=off", "-serial", "chardev:serial"]
    argv += ["-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-qmp", "chardev:qmp"]
    argv += [word for event in TRACES for word in ("-trace", event)]
    argv += ["-msg", "timestamp=on", "-D", str(trace_file), *device.argv(), *spec.extra]
    if incoming:
        argv += ["-incoming", "defer"]
    async with child(name, argv, env=spec.qemu.env, pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as stream:
            qmp = Qmp(stream, name)
            with unwrapped():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(qmp.run)
                    await qmp.handshake(oob=oob)
                    yield Vm(name, process, qmp, trace_file, spec)
                    nursery.cancel_scope.cancel()


# Migration

Hook = Callable[[], Awaitable[None]]
OnLink = Callable[[Link], Awaitable[None]]


@dataclass(frozen=True)
class Moved:
    """How a migration went: the share of RAM that had not been sent when the guest was stopped for
    postcopy (0 in precopy), and ``query-migrate`` of the source at its end."""

    remaining: float
    info: dict[str, Any]


async def prepare(src: Vm, dst: Vm, uri: str, capabilities: Sequence[str]) -> None:
    """Set capabilities on both sides and let the destination listen."""
    wanted = [{"capability": name, "state": True} for name in ("events", *capabilities)]
    for side in (dst, src):
        await side.qmp.command("migrate-set-capabilities", capabilities=wanted)
    await dst.qmp.command("migrate-incoming", uri=uri)


async def _completed(side: Vm, since: int, limit: float) -> None:
    """Wait for the migration's end on one side; any status but ``completed`` is a failure."""
    at = since
    with trio.fail_after(limit):
        while True:
            event = await side.qmp.event("MIGRATION", at, limit)
            at = side.qmp.events.index(event, at) + 1
            status = event["data"]["status"]
            if status == "completed":
                return
            if status in ("failed", "cancelled", "postcopy-paused"):
                raise AssertionError(
                    f"{side.name}: migration {status}: {await side.qmp.command('query-migrate')}"
                )


async def migrate_precopy(
    src: Vm, dst: Vm, tmp_path: Path, *, on_stop: Hook | None = None, resumes: bool = True
) -> Moved:
    """Move the guest by precopy; ``on_stop`` runs when the source has stopped the guest.

    ``resumes``: false if the destination was started with ``-S``, so that the guest stays stopped there.
    """
    uri = f"unix:{tmp_path}/{dst.name}.incoming"
    await prepare(src, dst, uri, ())
    since = (len(src.qmp.events), len(dst.qmp.events))
    await src.qmp.command("migrate", uri=uri)
    await src.qmp.event("STOP", since[0], limit=120)
    if on_stop:
        await on_stop()
    for side, at in zip((src, dst), since, strict=True):
        await _completed(side, at, 60)
    if resumes:
        await dst.qmp.event("RESUME", since[1])
    return Moved(0.0, await src.qmp.command("query-migrate"))


async def migrate_postcopy(
    src: Vm,
    dst: Vm,
    tmp_path: Path,
    *,
    capabilities: Sequence[str] = (),
    on_stop: Hook | None = None,
    during: Hook | None = None,
    on_link: OnLink | None = None,
    record: Path | None = None,
) -> Moved:
    """Move the guest by postcopy, switched as soon as the first pass has begun, so most of RAM remains.

    Until ``during`` returns, the link brings little more than what is asked for, so that the guest and its
    devices meet absent pages; then the rest goes at full speed.  ``on_stop`` runs when the source has stopped
    the guest.  ``on_link`` runs before ``during`` and may lose the link, see :func:`lose_and_recover`.
    ``record``: a folder for the bytes of both ways, see :class:`~tests.qemu.link.Link`.
    """
    source_path, target_path = tmp_path / f"{dst.name}.link", tmp_path / f"{dst.name}.incoming"
    await prepare(src, dst, f"unix:{target_path}", ("postcopy-ram", *capabilities))
    # Slow before the switch; after it nothing but the link holds QEMU up.
    await src.qmp.command("migrate-set-parameters", max_bandwidth=4 << 20, max_postcopy_bandwidth=0)
    since = (len(src.qmp.events), len(dst.qmp.events))
    async with link(source_path, target_path, src.spec.memory.page, record) as relay:
        await src.qmp.command("migrate", uri=relay.uri)
        await src.qmp.event("MIGRATION", since[0], status="active")
        relay.hold()
        await src.qmp.command("migrate-start-postcopy")
        await src.qmp.event("STOP", since[0])
        if on_stop:
            await on_stop()
        await src.qmp.event("MIGRATION", since[0], status="postcopy-active")
        ram = (await src.qmp.command("query-migrate"))["ram"]
        await dst.qmp.event("RESUME", since[1])
        if on_link:
            await on_link(relay)
        if during:
            await during()
        relay.open()
        for side, at in zip((src, dst), since, strict=True):
            await _completed(side, _behind_pauses(side, at), 120)
    return Moved(ram["remaining"] / ram["total"], await src.qmp.command("query-migrate"))


def _behind_pauses(side: Vm, since: int) -> int:
    """The number of the event behind the last pause since then."""
    paused = {"event": "MIGRATION", "data": {"status": "postcopy-paused"}}
    found = [i for i, e in enumerate(side.qmp.events) if i >= since and paused.items() <= e.items()]
    return found[-1] + 1 if found else since


async def lose_and_recover(src: Vm, dst: Vm, relay: Link) -> tuple[float, float]:
    """Lose the link in postcopy, and recover by the two commands that a person types.

    Seconds until both ends were paused, and until both went on.
    """
    since = [(side, len(side.qmp.events)) for side in (src, dst)]
    begin = trio.current_time()
    relay.lose()
    for side, at in since:
        await side.qmp.event("MIGRATION", at, status="postcopy-paused")
    paused = trio.current_time() - begin
    relay.target = relay.target.with_name(f"{dst.name}.again{since[1][1]}")
    await dst.qmp.command("migrate-recover", uri=f"unix:{relay.target}")
    await src.qmp.command("migrate", uri=relay.uri, resume=True)
    for side, at in since:
        await side.qmp.event("MIGRATION", at, status="postcopy-active")
    return paused, trio.current_time() - begin
