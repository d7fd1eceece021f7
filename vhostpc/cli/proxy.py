"""``vhostpc proxy``: stands between the two ends of a migration, tells what passes, and breaks it where told."""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence

import click
import trio

from vhostpc.cli.common import DONE, Failure, common_options, ending_signals, need_descriptors, start_logging
from vhostpc.cli.streams import let_stdout_go
from vhostpc.errors import MigrationRefused
from vhostpc.logs import rationed_logger
from vhostpc.proxy.between import SEEDS, open_proxy, socket_address
from vhostpc.proxy.faults import ACTIONS, OPTIONS, BadFault, Fault, parse_fault
from vhostpc.proxy.points import POINTS, Point, Takes
from vhostpc.proxy.timeline import Event

log = rationed_logger(__name__)

FOLD = 1.0
"""Seconds of requests and parts of RAM that are told of in one line, at most."""
_SHOWN = {
    Takes.NOTHING: "{}",
    Takes.COUNT: "{}[=N]",
    Takes.VALUE: "{}=VALUE",
    Takes.NAME: "{}=NAME",
    Takes.BYTES: "{}=N",
    Takes.SECONDS: "{}=SECONDS",
}


class Lines:
    """Prints events as they come; requests and parts of RAM are summed up unless ``each``."""

    def __init__(self, write: Callable[[Event], None], *, each: bool) -> None:
        self._write = write
        self._each = each
        self._first = self._last = Event(0, "ram")
        self._pages: Counter[str] = Counter()
        self._count: Counter[str] = Counter()

    def tell(self, event: Event) -> None:
        if self._each or event.name not in ("request", "round"):
            self.flush()
            self._write(event)
            return
        if self._count and (
            event.connection != self._last.connection or event.time - self._first.time >= FOLD
        ):
            self.flush()
        if not self._count:
            self._first = event
        self._last = event
        self._count[event.name] += 1
        self._pages.update(event.details.get("pages", {}))

    async def keep_up(self) -> None:
        """Print sums that nothing follows, too."""
        while True:
            await trio.sleep(FOLD)
            if self._count and time.monotonic() - self._last.time >= FOLD:
                self.flush()

    def flush(self) -> None:
        """Print what was summed up."""
        if not self._count:
            return
        details = {
            "rounds": self._count["round"],
            "pages": dict(self._pages),
            "requests": self._count["request"],
        }
        last = self._last
        self._pages.clear()
        self._count.clear()
        self._write(Event(last.time, "ram", last.connection, details=details))


class Output:
    """Standard output. A migration goes on when its reader has gone."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._begin: float | None = None

    def write(self, event: Event) -> None:
        if self._begin is None:
            self._begin = event.time
        text = json.dumps(event.as_json()) if self._as_json else in_words(event, event.time - self._begin)
        try:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            let_stdout_go()


def in_words(event: Event, seconds: float) -> str:
    """A line for people."""
    arrow = {"forward": "->", "back": "<-"}.get(event.way, "")
    where = f"#{event.connection}" if event.connection else ""
    offset = str(event.offset) if event.offset >= 0 else ""
    more = "  ".join(f"{key} {_plain(value)}" for key, value in event.details.items())
    return f"{seconds:10.6f}  {where:>3} {arrow:2} {offset:>11}  {event.name:<16}  {more}".rstrip()


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {count}" for name, count in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


class WithTables(click.Command):
    """A command whose help ends with the tables of faults."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Actions"):
            formatter.write_dl([(_action(name), text) for name, text in ACTIONS.items()])
        with formatter.section("Points"):
            formatter.write_dl(
                [(_SHOWN[point.takes].format(point.name), about(point)) for point in POINTS.values()]
            )
        with formatter.section("Options of a fault"):
            formatter.write_dl(
                [(name if name == "alone" else f"{name}=", text) for name, text in OPTIONS.items()]
            )


def _action(name: str) -> str:
    return {
        "hold": "hold[=SECONDS]",
        "delay": "delay=SECONDS",
        "lag": "lag=SECONDS",
        "corrupt": "corrupt[=FIELD]",
    }.get(name, name)


def about(point: Point) -> str:
    """A point's row: direction, meaning, fields."""
    way = "" if point.way.value == "both" else f"{point.way}: "
    return f"{way}{point.words}" + (f" (fields: {', '.join(point.fields)})" if point.fields else "")


async def until_told(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    """A signal ends the program in order; a second one of the kind at once."""
    async for number in signals:
        signal.signal(number, signal.SIG_DFL)
        log.info("ended by %s", signal.Signals(number).name)
        scope.cancel()
        return


async def run(listen_at: str, target: str, faults: list[Fault], seed: int, lines: Lines) -> list[Fault]:
    """Until a signal; returns the faults that were not done."""
    pending: list[Fault] = faults
    with trio.open_signal_receiver(*ending_signals()) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(until_told, signals, nursery.cancel_scope)
            nursery.start_soon(lines.keep_up)
            async with open_proxy(listen_at, target, faults, seed=seed, tell=lines.tell, keep=False) as proxy:
                log.info("ready on %s", proxy.uri)
                try:
                    await trio.sleep_forever()
                finally:
                    pending = proxy.pending
    return pending


def _address(context: click.Context, parameter: click.Parameter, text: str) -> str:
    try:
        socket_address(text, incoming=parameter.name == "listen_at")
    except (MigrationRefused, BadFault) as error:
        raise click.BadParameter(str(error)) from None
    return text


@click.command(cls=WithTables)
@click.argument("listen_at", metavar="LISTEN", callback=_address)
@click.argument("target", metavar="TARGET", callback=_address)
@click.option(
    "--fault",
    "faults",
    multiple=True,
    metavar="SPEC",
    help="What to do, and where: ACTION[=ARGUMENT]@POINT[=VALUE][,OPTION=VALUE]... Several are done in order. Numbers "
    "may be ranges, such as page=100..900.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, SEEDS - 1),
    metavar="N",
    help="Draw from ranges with this seed.  [default: a random one, which is printed]",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print each event as a JSON object in a line, for programs."
)
@click.option("--each", is_flag=True, help="Print each page request and each part of RAM, not their sums.")
@common_options
def proxy(
    listen_at: str, target: str, faults: Sequence[str], seed: int | None, as_json: bool, each: bool
) -> int:
    """Carry the connections of a migration from LISTEN to TARGET, print what passes, and break it where told.

    Both are addresses as QEMU writes them, tcp:HOST:PORT or unix:PATH: the source migrates to LISTEN, the destination
    listens at TARGET. Any number of connections is carried, one migration after the other, recoveries too. SIGTERM,
    SIGINT and SIGHUP end it, with code 0, or 1 if a fault was not done.

    \b
    vhostpc proxy tcp::4444 tcp:far:4444 --fault cut@request=20 --fault cut@bitmap,at=middle
    """
    if socket_address(listen_at, incoming=True) == socket_address(target, incoming=False):
        raise click.UsageError(f"LISTEN and TARGET are the same, {target}")
    seed = random.SystemRandom().randrange(SEEDS) if seed is None else seed
    rng = random.Random(seed)
    try:
        parsed = [parse_fault(text, rng) for text in faults]
    except BadFault as error:
        raise click.BadParameter(str(error), param_hint="--fault") from None
    start_logging()
    need_descriptors()
    output = Output(as_json=as_json)
    lines = Lines(output.write, each=each)
    pending = trio.run(run, listen_at, target, parsed, seed, lines)
    lines.flush()
    if pending:
        raise Failure(f"not done: {', '.join(map(str, pending))}")
    return DONE
