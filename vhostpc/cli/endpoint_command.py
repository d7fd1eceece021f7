"""``vhostpc endpoint``: the machine at one end of migrations, driven by QEMU's monitor commands."""

from __future__ import annotations

import contextlib
import gc
import math
import re
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import trio

from vhostpc.cli.common import (
    Failure,
    common_options,
    complete_file,
    ending_signals,
    need_descriptors,
    start_logging,
)
from vhostpc.dialect import DEFAULT, DIALECTS, Compat
from vhostpc.endpoint import LINK_TIMEOUT, Endpoint, Links
from vhostpc.endpoint.recovery import advice
from vhostpc.errors import GuestMemoryError, is_foreseen, sentence
from vhostpc.guest.own_machine import Block, Spec, open_machine
from vhostpc.logs import rationed_logger
from vhostpc.migration import uri
from vhostpc.migration.held import HeldMachine
from vhostpc.migration.left import NAME as NOTE
from vhostpc.migration.left import LeftMachine, Note, Notes
from vhostpc.migration.machine import Machine
from vhostpc.migration.options import Options
from vhostpc.migration.outgoing import After
from vhostpc.pages.dirty import DirtyWay
from vhostpc.pages.ramfiles import RamFiles
from vhostpc.qmp import Events, Monitor, sizes
from vhostpc.qmp.screen import Screen, shared
from vhostpc.qmp.terminal import TextMonitor
from vhostpc.units import TARGET_PAGE, in_units

log = rationed_logger(__name__)

DEFER, STDIO = "defer", "stdio"
TRACED_FAULTS = 1 << 16
MOST_A_SECOND = 1_000_000_000
MOST_SECONDS = 32767
"""The kernel's limit of keep-alive times (tcp(7))."""


def size(text: str) -> int:
    """Bytes from a size in QEMU's notation: 256M, 1.5G, 268435456, 0x10000000; and 256MB."""
    try:
        found = sizes.size(re.sub(r"(?i)(?<=[0-9.][kmgtpe])b$", "", text.strip()))
    except sizes.TooLarge:
        found = -1 if text.strip().startswith("-") else 1 << 64
    except ValueError:
        found = -1
    if found < 0:
        hexadecimal = re.match(r"(?i)\s*\+?0x", text) is not None
        why = " (a hexadecimal number is whole bytes, without a unit)" if hexadecimal else ""
        raise click.BadParameter(f"{text!r} is not a size such as 256M or 1.5G{why}")
    if found >> 63:
        raise click.BadParameter(f"{text!r} is more than the largest file size, 2^63 - 1 bytes")
    return found


class Seconds(click.FloatRange):
    """A number, but not NaN, which passes every range check."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if math.isnan(found):
            self.fail(f"{value!r} is not a number", param, ctx)
        return found


def blocks(_: click.Context, __: click.Parameter, given: Sequence[str]) -> list[Block]:
    """``NAME=SIZE[,page=SIZE]``, each name once."""
    found: dict[str, Block] = {}
    for text in given:
        first, *rest = text.split(",")
        name, equals, length = first.partition("=")
        if not equals or not 0 < len(name.encode()) < 256:
            raise click.BadParameter(f"{text!r} is not NAME=SIZE[,page=SIZE]")
        page = TARGET_PAGE
        for option in rest:
            key, equals, value = option.partition("=")
            if key != "page":
                raise click.BadParameter(f"{option!r} is not page=SIZE")
            page = size(value)
        ram = Block(name, size(length), page)
        if page < TARGET_PAGE or page & (page - 1):
            raise click.BadParameter(
                f"page={value}: the size of a host page must be a power of two, at least 4 KiB, not {in_units(page)}"
            )
        if ram.length == 0 or ram.length % page:
            raise click.BadParameter(
                f"{text!r}: {in_units(ram.length)} is not a whole number of pages of {in_units(page)}"
            )
        if name in found:
            raise click.BadParameter(f"there are two blocks {name!r}")
        found[name] = ram
    return list(found.values())


def unix_path(_: click.Context, __: click.Parameter, text: str | None) -> str | None:
    """``unix:PATH``."""
    if text is None:
        return None
    scheme, colon, path = text.partition(":")
    if scheme != "unix" or not colon or not path:
        raise click.BadParameter(f"{text!r} is not unix:PATH")
    return path.partition(",")[0]


def monitor_place(context: click.Context, parameter: click.Parameter, text: str | None) -> str | None:
    """``stdio`` or ``unix:PATH``, with a path of any form."""
    return text if text in (None, STDIO) else f"unix:{unix_path(context, parameter, text)}"


async def until_told(endpoint: Endpoint, events: Events, signals: AsyncIterator[int]) -> None:
    """A signal ends the program as QEMU's does; a second one of the kind ends it at once."""
    async for number in signals:
        signal.signal(number, signal.SIG_DFL)
        events.shutdown("host-signal")
        endpoint.quit(signal.Signals(number).name)
        return


async def serve(
    endpoint: Endpoint,
    events: Events,
    qmp: str | None,
    monitor: str | None,
    incoming: str | None,
    screen: Screen | None = None,
) -> None:
    """Serve the endpoint and its monitors until it is told to quit."""
    with trio.open_signal_receiver(*ending_signals()) as signals:
        async with contextlib.AsyncExitStack() as stack:
            if qmp is not None:
                await stack.enter_async_context(Monitor(endpoint, events).listening(qmp))
            text = TextMonitor(endpoint, events)
            if monitor is not None and monitor != STDIO:
                await stack.enter_async_context(text.listening(monitor.removeprefix("unix:")))
            nursery = await stack.enter_async_context(trio.open_nursery())
            nursery.start_soon(until_told, endpoint, events, signals)
            await nursery.start(endpoint.serve)
            if monitor == STDIO:
                nursery.start_soon(text.serve_stdio, 0, 1, screen)
            if incoming not in (None, DEFER):
                assert incoming is not None
                address = uri.parse_address(incoming, endpoint.options.dialect, incoming=True)
                await endpoint.incoming(address, exit_on_error=True)
            log.info("ready on %s", ", ".join(p for p in (qmp, monitor) if p))
            await endpoint.ended()
            nursery.cancel_scope.cancel()


@dataclass
class RamDir:
    """``--ram-dir``: the memory's files, and the note that a killed process has left there."""

    files: RamFiles
    notes: Notes
    note: Note | None

    @classmethod
    def at(cls, folders: Sequence[Path], ram: Sequence[Block]) -> RamDir:
        """Raises GuestMemoryError."""
        files = RamFiles(*folders)
        try:
            notes = Notes(files)
            note = notes.read()
            if note is not None and ram:
                wanted = [(b.name, b.length, b.page_size) for b in ram]
                if wanted != [(b.name, b.length, b.page_size) for b in note.blocks]:
                    raise GuestMemoryError(
                        f"{folders[0]} holds the memory of another machine: its RAM is not as in --ram"
                    )
        except BaseException:
            files.close()
            raise
        return cls(files, notes, note)


@contextlib.asynccontextmanager
async def left(note: Note, files: RamFiles) -> AsyncIterator[Machine]:
    """What another process has left of a machine."""
    with LeftMachine(note, files) as machine:
        yield machine


@contextlib.asynccontextmanager
async def held(ram: Sequence[Block], files: RamFiles | None = None) -> AsyncIterator[Machine]:
    """The expected machine, whose named blocks must have the given sizes."""
    with HeldMachine(
        page_sizes={block.name: block.page_size for block in ram},
        lengths={block.name: block.length for block in ram},
        files=files,
    ) as machine:
        yield machine


@dataclass(frozen=True)
class Given:
    """What the command line says of an endpoint, whose machine is made apart from it."""

    options: Options
    qmp: str | None = None
    monitor: str | None = None
    incoming: str | None = None
    stopped: bool = False
    after: After = field(default_factory=After)
    trace: int = 0
    spin_us: int = 0
    links: Links = field(default_factory=Links)
    ram_dir: RamDir | None = None
    screen: Screen | None = None


async def run(open_it: contextlib.AbstractAsyncContextManager[Machine], given: Given) -> BaseException | None:
    """Create the machine and serve it; returns why an expected machine did not arrive, None if all is well."""
    events, ram_dir, incoming = Events(given.options), given.ram_dir, given.incoming
    is_left = ram_dir is not None and ram_dir.note is not None
    if ram_dir is not None and ram_dir.note is not None and ram_dir.note.preempt:
        given.options.on |= {
            "postcopy-ram",
            "postcopy-preempt",
        }  # a migration in progress lets nobody set them
    async with contextlib.AsyncExitStack() as stack:
        with contextlib.ExitStack() as unless_made:
            if ram_dir is not None and not is_left:
                unless_made.callback(ram_dir.files.remove)
            machine = await stack.enter_async_context(open_it)
            unless_made.pop_all()
        if is_left:
            log.warning(
                "postcopy-paused: this process has the memory of a machine whose process was killed in postcopy; "
                "nothing else of it: %s",
                advice("source"),
            )
        elif incoming is None and not given.stopped:
            await machine.cont()
        served = Endpoint(
            machine,
            given.options,
            events,
            incoming=incoming is not None and not is_left,
            autostart=not given.stopped,
            after=given.after,
            trace=given.trace,
            spin_us=given.spin_us,
            links=given.links,
            notes=None if ram_dir is None else ram_dir.notes,
            left=is_left,
        )
        await serve(served, events, given.qmp, given.monitor, None if is_left else incoming, given.screen)
    if ram_dir is not None:
        if served.owes_pages:
            log.warning("the memory stays in %s: a destination needs it", ram_dir.files.folder)
        else:
            ram_dir.files.remove()
            ram_dir.notes.remove()
    return served.error


@click.command()
@click.option("--qmp", callback=unix_path, metavar="unix:PATH", help="Serve QMP on a unix socket.")
@click.option(
    "--monitor",
    callback=monitor_place,
    metavar="stdio|unix:PATH",
    help="Serve the text monitor on the terminal, or on a unix socket.",
)
@click.option(
    "--ram",
    multiple=True,
    callback=blocks,
    metavar="NAME=SIZE[,page=SIZE]",
    help="A RAM block; page: the size of its host pages, 2M for huge ones.  [default of page: 4K]",
)
@click.option(
    "--vcpus", type=click.IntRange(1, 64), metavar="N", help="vCPUs of a machine of its own.  [default: 1]"
)
@click.option(
    "--backend",
    multiple=True,
    shell_complete=complete_file,
    metavar="SOCKET",
    help="A network device of a machine of its own: the socket of its vhost-user back-end.",
)
@click.option(
    "--backend-timeout",
    type=Seconds(min=0.1),
    default=10,
    show_default=True,
    metavar="SECONDS",
    help="Longest time for a back-end's answer.",
)
@click.option(
    "--backend-reconnect",
    type=Seconds(min=0.01),
    metavar="SECONDS",
    help="Connect again to a back-end that is gone, once in so many seconds, also in mid-postcopy.",
)
@click.option(
    "--vcpu-writes",
    type=click.IntRange(0, MOST_A_SECOND),
    default=1000,
    show_default=True,
    metavar="N",
    help="Pages that each vCPU rewrites per second.",
)
@click.option(
    "--vcpu-checks",
    type=click.IntRange(0, MOST_A_SECOND),
    default=20000,
    show_default=True,
    metavar="N",
    help="Pages that each vCPU reads and checks per second.",
)
@click.option(
    "--dirty-tracking",
    type=click.Choice(["wp-async", "wp-sync"]),
    help="How writes are detected while it migrates away.  [default: the best that the kernel has]",
)
@click.option(
    "--trace-faults",
    is_flag=True,
    help="Record the last 65536 answered page faults individually (x-vhostpc-trace).",
)
@click.option(
    "--spin-us",
    type=click.IntRange(0, 1_000_000),
    default=0,
    show_default=True,
    metavar="N",
    help="Keep polling for N microseconds after each fault and each page of a postcopy before sleeping: occupies "
    "up to two cores, and only helps where these are idle.",
)
@click.option(
    "--incoming", metavar="URI|defer", help="Wait for a machine from there, or for migrate-incoming."
)
@click.option(
    "--compat",
    type=click.Choice(list(DIALECTS)),
    default=DEFAULT,
    show_default=True,
    help="The QEMU version whose behaviour is followed.",
)
@click.option("-S", "--stopped", is_flag=True, help="Start with the machine stopped; cont starts it.")
@click.option(
    "--postcopy-after-seconds",
    type=Seconds(min=0),
    metavar="N",
    help="Switch a precopy to postcopy automatically after N seconds.",
)
@click.option(
    "--postcopy-after-passes",
    type=click.IntRange(min=1),
    metavar="N",
    help="Switch a precopy to postcopy automatically after N passes.",
)
@click.option(
    "--link-timeout",
    type=Seconds(min=0, max=MOST_SECONDS),
    default=LINK_TIMEOUT,
    show_default=True,
    metavar="SECONDS",
    help="Seconds of silence, while something is outstanding, after which a connection counts as lost; 0: never.",
)
@click.option(
    "--recover-for",
    type=Seconds(min=0, max=MOST_SECONDS),
    default=0,
    show_default=True,
    metavar="SECONDS",
    help="Recover a paused postcopy automatically: connect again, or listen again, at the same address for this long.",
)
@click.option(
    "--ram-dir",
    type=click.Path(file_okay=False, path_type=Path),
    multiple=True,
    metavar="DIR",
    help="Keep guest memory in files there (tmpfs; for huge pages one more, on hugetlbfs): a source that is killed in "
    "postcopy can be replaced by another process with the same folder.",
)
@common_options
def endpoint(
    qmp: str | None,
    monitor: str | None,
    ram: list[Block],
    vcpus: int | None,
    backend: tuple[str, ...],
    backend_timeout: float,
    backend_reconnect: float | None,
    vcpu_writes: int,
    vcpu_checks: int,
    dirty_tracking: str | None,
    trace_faults: bool,
    spin_us: int,
    incoming: str | None,
    compat: Compat,
    stopped: bool,
    postcopy_after_seconds: float | None,
    postcopy_after_passes: int | None,
    link_timeout: float,
    recover_for: float,
    ram_dir: tuple[Path, ...],
) -> int:
    """Play one end of a migration: run a machine of its own, or receive one, hold it, and send it on.

    With --incoming and neither --vcpus nor --backend it holds a machine from QEMU unchanged; --ram then only sets the
    sizes of its blocks. Otherwise it has a machine of its own, which needs --ram; with --incoming that is empty until
    one arrives. The monitor's commands are QEMU's. SIGTERM, SIGINT, SIGHUP and the monitor's quit end it with code 0;
    a machine that fails to arrive ends it with 1.
    """
    if qmp is None and monitor is None:
        raise click.UsageError("give --qmp or --monitor: without one, nobody can control it")
    own = incoming is None or vcpus is not None or bool(backend)
    if own and not ram and not any((folder / NOTE).exists() for folder in ram_dir):
        raise click.UsageError(
            "give --ram for a machine of its own, or --incoming alone to hold one that arrives"
        )
    spec = Spec(
        ram,
        vcpus or 1,
        backend,
        writes=vcpu_writes,
        checks=vcpu_checks,
        tracking=DirtyWay(dirty_tracking) if dirty_tracking else None,
        timeout=backend_timeout,
        reconnect=backend_reconnect,
    )
    screen = shared(sys.stderr) if monitor == STDIO else None
    start_logging(screen)
    need_descriptors()
    open_it: contextlib.AbstractAsyncContextManager[Machine]
    try:
        kept = RamDir.at(ram_dir, ram) if ram_dir else None
    except GuestMemoryError as e:
        raise Failure(str(e)) from None
    files = None if kept is None else kept.files
    options = Options(compat)
    if kept is not None and kept.note is not None:
        open_it = left(kept.note, kept.files)
        # Its migration is under way, in which nobody can set them.
        options = Options(compat, on={"events", "postcopy-ram"})
    else:
        open_it = open_machine(spec, empty=incoming is not None, files=files) if own else held(ram, files)
    given = Given(
        options,
        qmp,
        monitor,
        incoming,
        stopped,
        After(postcopy_after_seconds, postcopy_after_passes),
        TRACED_FAULTS if trace_faults else 0,
        spin_us,
        Links(link_timeout, recover_for),
        kept,
        screen,
    )
    # Modules stay: a collection, such as that at the end of a migration, need not look through them each time.
    gc.freeze()
    try:
        error = trio.run(run, open_it, given)
    finally:
        if kept is not None:
            kept.files.close()
    if error is not None:
        what = sentence(error) if is_foreseen(error) else "failed"
        raise Failure(f"the machine did not arrive: {what}")
    return 0
