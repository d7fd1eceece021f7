"""The monitor beside those of real QEMUs: the same bytes to both, and the same answers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.fake_endpoint import FakeEndpoint
from tests.kit.qmp_wire import Wire, client, ours, qemu
from tests.qemu import peers
from tests.wire.test_wire_qmp import BROKEN
from vhostpc.dialect import DIALECTS, Compat
from vhostpc.migration.options import SUPPORTED
from vhostpc.qmp.commands import COMMANDS, schema
from vhostpc.qmp.events import Events

pytestmark = pytest.mark.qemu
ALL = tuple(DIALECTS)


@contextlib.asynccontextmanager
async def beside(
    compat: Compat, tmp_path: Path, *, incoming: bool = False
) -> AsyncIterator[tuple[Wire, Wire]]:
    """QEMU's monitor and ours."""
    more = ("-incoming", "defer") if incoming else ()
    async with (
        qemu(compat, *more) as theirs,
        ours(FakeEndpoint(compat, incoming=incoming), tmp_path),
        client(tmp_path) as own,
    ):
        yield theirs, own


def spread(entries: list[dict[str, Any]], name: str) -> Any:
    """A type with the names of other types replaced by what they are."""
    by_name = {entry["name"]: entry for entry in entries}

    def open_up(what: str) -> Any:
        told = {key: value for key, value in by_name[what].items() if key != "name"}
        if "members" in told and told["meta-type"] != "enum":
            told["members"] = sorted(
                ({**m, "type": open_up(m["type"])} for m in told["members"]), key=lambda m: str(m)
            )
        if "variants" in told:
            told["variants"] = [{**v, "type": open_up(v["type"])} for v in told["variants"]]
        if "element-type" in told:
            told["element-type"] = open_up(told["element-type"])
        return told

    return open_up(name)


@pytest.mark.parametrize("compat", ALL)
async def test_arguments_in_the_schema_are_qemus(compat: Compat) -> None:
    async with qemu(compat) as wire:
        await wire.ready()
        theirs = (await wire.command("query-qmp-schema"))["return"]
    mine = schema(DIALECTS[compat])
    types = {entry["name"]: entry for entry in mine}
    real = {entry["name"]: entry for entry in theirs}
    for name in COMMANDS:
        if name.startswith("x-vhostpc-"):
            continue  # our own
        assert spread(mine, types[name]["arg-type"]) == spread(theirs, real[name]["arg-type"]), name
        assert types[name].get("allow-oob") == real[name].get("allow-oob"), name
    for name in ("MIGRATION", "MIGRATION_PASS", "STOP", "RESUME", "SHUTDOWN"):
        assert spread(mine, types[name]["arg-type"]) == spread(theirs, real[name]["arg-type"]), name
    for name in ("query-version", "query-status", "query-migrate-parameters", "query-migrate-capabilities"):
        assert spread(mine, types[name]["ret-type"]) == spread(theirs, real[name]["ret-type"]), name
    # Not every field of query-migrate is told here; those that are have QEMU's types.
    told = spread(theirs, real["query-migrate"]["ret-type"])["members"]
    for member in spread(mine, types["query-migrate"]["ret-type"])["members"]:
        assert member in told, member


def execute(name: str, arguments: Any = None, **more: Any) -> str:
    return json.dumps({"execute": name, **({} if arguments is None else {"arguments": arguments}), **more})


UNIX = {"transport": "socket", "type": "unix", "path": "/x"}


def one_channel(addr: Any, kind: str = "main") -> dict[str, Any]:
    return {"channels": [{"channel-type": kind, "addr": addr}]}


WRONG = [
    execute("nope"),
    '{"exec":"x"}',
    '{"execute":5}',
    "[1]",
    "5 ",
    '"x" ',
    execute("query-status", x=1),
    execute("query-status", []),
    execute("query-status", {"a": 1}),
    execute("query-status", id={"a": [1, None]}),
    execute("query-status", id=None),
    execute("nope", id="x"),
    "{'execute':'query-status'}",
    '{"execute":"query-status","exec-oob":"x"}',
    '{"exec-oob":"query-status"}',
    '{"arguments":{}}',
    execute("qmp_capabilities"),
    execute("qmp_capabilities", {"enable": ["x"]}),
    execute("qmp_capabilities", {"enable": 5}),
    execute("migrate"),
    *(
        execute("migrate", {"uri": uri})
        for uri in (
            *(5, "bogus", "", "tcp", "TCP:a:1", "tcp:", "tcp:x", "tcp:[::1]", "tcp:1.2.3.4:", "unix:"),
            *("tcp:127.0.0.1:1,to=x", "fd:", "fd:nofd", "fd:77", "fd:7x", "file:/x,offset=abc", "vsock:1"),
            *("file:/x,offset=-5", "tcp:127.0.0.1:1,ipv4=x", "tcp:127.0.0.1:1,keep-alive-count=x"),
        )
    ),
    execute("migrate", {"uri": "unix:/nonexistent/x", "resume": True}),
    execute("migrate", {"uri": "unix:/x", "zap": 1}),
    execute("migrate", {"uri": "unix:/x", "detach": 1}),
    execute("migrate", {"channels": []}),
    execute("migrate", one_channel({"transport": "socket", "type": "inet", "host": "h"})),
    execute("migrate", one_channel(UNIX, "bogus")),
    execute("migrate", {"uri": "unix:/x", **one_channel(UNIX)}),
    execute("migrate", one_channel({"transport": "nope"})),
    execute("migrate", one_channel({"transport": "file", "filename": "x"})),
    execute("migrate", one_channel({**UNIX, "host": "h"})),
    execute("migrate", {"channels": 5}),
    execute("migrate-incoming"),
    execute("migrate-incoming", {"uri": "unix:/x"}),
    execute("migrate_cancel"),
    execute("migrate-start-postcopy"),
    execute("migrate-set-capabilities"),
    *(
        execute("migrate-set-capabilities", {"capabilities": what})
        for what in (
            *(5, [5], [{"capability": "nope", "state": True}], [{"capability": "events"}], []),
            [{"capability": "events", "state": 1}],
            [{"capability": "events", "state": True, "zz": 1}],
        )
    ),
    *(
        execute("migrate-set-parameters", what)
        for what in (
            *({}, {"bogus": 1}, {"downtime-limit": 1.5}, {"downtime-limit": 1 << 64}, {"max-bandwidth": -1}),
            *({"tls-creds": 5}, {"tls-creds": None}, {"multifd-compression": "q"}, {"downtime-limit": "x"}),
            *({"multifd-channels": -1}, {"multifd-channels": 300}, {"multifd-channels": 1.5}),
            *({"x-checkpoint-delay": -1}, {"x-checkpoint-delay": 1 << 32}, {"mode": 5}, {"mode": "x"}),
            *({"block-bitmap-mapping": [{"node-name": "a"}]}, {"cpu-throttle-tailslow": 1}),
            {"max-bandwidth": 7, "downtime-limit": 9999999},
            {"cpu-throttle-initial": 50, "max-cpu-throttle": 40},
        )
    ),
    execute("query-migrate-parameters"),
    execute("query-migrate-capabilities"),
    execute("getfd"),
    execute("getfd", {"fdname": "x"}),
    execute("getfd", {"fdname": "5x"}),
    execute("getfd", {"fdname": 5}),
    execute("closefd", {"fdname": "x"}),
    execute("human-monitor-command"),
    *(
        execute("human-monitor-command", {"command-line": "help stop", "cpu-index": n})
        for n in (7, -5, "x", 1.5, 1 << 63)
    ),
    execute("query-status"),
]


@pytest.mark.parametrize("compat", ALL)
@pytest.mark.parametrize("oob", [False, True], ids=["plain", "oob"])
async def test_wrong_commands_get_qemus_answers(compat: Compat, oob: bool, tmp_path: Path) -> None:
    async with beside(compat, tmp_path) as (theirs, own):
        for wire in (theirs, own):
            await wire.reply()
        # The newest says at which line and column what is no JSON begins.
        broken = ["@\n"] if compat in peers.VERSIONS else []
        for text in (execute("nope"), '{"exec-oob":"qmp_capabilities"}', *broken):
            assert await own.ask(text) == await theirs.ask(text), text
        for wire in (theirs, own):
            assert await wire.command("qmp_capabilities", enable=["oob"] if oob else []) == {"return": {}}
        for text in WRONG:
            assert await own.ask(text) == await theirs.ask(text), text


@pytest.mark.parametrize("compat", peers.VERSIONS)
async def test_what_is_no_json_gets_qemus_answers(compat: Compat, tmp_path: Path) -> None:
    async with beside(compat, tmp_path) as (theirs, own):
        for wire in (theirs, own):
            await wire.ready()
        for data, expected in BROKEN:
            for wire in (theirs, own):
                await wire.send(data + b'\n{"execute":"query-migrate","id":"end"}')
                found = []
                while "id" not in (reply := await wire.reply()):
                    found.append(reply["error"]["desc"])
                assert found == expected, (data, wire is own)


# Values at and beyond the borders.
LIMITS: dict[str, list[Any]] = {
    "announce-initial": [-1, 100000, 100001],
    "announce-max": [100001],
    "announce-rounds": [1001, 1000],
    "announce-step": [10001, 0],
    "throttle-trigger-threshold": [0, 101],
    "cpu-throttle-initial": [0, 100],
    "cpu-throttle-increment": [0, 100],
    "max-cpu-throttle": [1, 100],
    "max-bandwidth": [(1 << 64) - 1],
    "avail-switchover-bandwidth": [1 << 63],
    "downtime-limit": [2000001, 2000000, -1],
    "x-checkpoint-delay": [1 << 31],
    "multifd-channels": [0, 256],
    "xbzrle-cache-size": [1, 5000, 4096, 1 << 63],
    "multifd-zlib-level": [10, 300],
    "multifd-zstd-level": [21],
    "multifd-qatzip-level": [10, 0],
    "x-vcpu-dirty-limit-period": [0, 1001],
    "vcpu-dirty-limit": [0, 1 << 62],
    "zero-page-detection": ["legacy", "x"],
    "tls-hostname": ["x"],
    "compress-level": [10],
    "compress-threads": [0, 256],
    "decompress-threads": [0],
    "x-rdma-chunk-size": [0, 1 << 19, 1 << 20, 3 << 20, 1 << 30, 1 << 31, "x"],
    "cpr-exec-command": [["a", "b c"], [], "x", [5]],
}


@pytest.mark.parametrize("compat", ALL)
async def test_limits_of_parameters_are_qemus(compat: Compat, tmp_path: Path) -> None:
    async with beside(compat, tmp_path) as (theirs, own):
        for wire in (theirs, own):
            await wire.ready()
        for name, values in LIMITS.items():
            for value in values:
                text = execute("migrate-set-parameters", {name: value})
                assert await own.ask(text) == await theirs.ask(text), text
        text = execute("query-migrate-parameters")
        assert await own.ask(text) == await theirs.ask(text)


@pytest.mark.parametrize("compat", ALL)
async def test_refused_capabilities_are_refused_in_qemus_words(compat: Compat, tmp_path: Path) -> None:
    """Where QEMU refuses we say the same; where it accepts what we do not do, we refuse too."""
    async with beside(compat, tmp_path) as (theirs, own):
        for wire in (theirs, own):
            await wire.ready()
        for one in DIALECTS[compat].capabilities:
            for other in DIALECTS[compat].capabilities:
                both = [{"capability": name, "state": True} for name in (one, other)]
                off = [{"capability": name, "state": False} for name in DIALECTS[compat].capabilities]
                real = await theirs.command("migrate-set-capabilities", capabilities=both)
                mine = await own.command("migrate-set-capabilities", capabilities=both)
                if "error" in real or {one, other} <= SUPPORTED:
                    assert mine == real, (one, other)
                else:
                    assert mine["error"]["class"] == "GenericError", (one, other)
                    assert "does not accept value" in mine["error"]["desc"]
                for wire in (theirs, own):
                    assert await wire.command("migrate-set-capabilities", capabilities=off) == {"return": {}}


@pytest.mark.parametrize("compat", ALL)
async def test_preempt_behind_migrate_incoming(compat: Compat, tmp_path: Path) -> None:
    wanted = [{"capability": name, "state": True} for name in ("postcopy-ram", "postcopy-preempt")]
    async with beside(compat, tmp_path, incoming=True) as (theirs, own):
        for number, wire in enumerate((theirs, own)):
            await wire.ready()
            uri = f"unix:{tmp_path}/in{number}"
            assert await wire.command("migrate-incoming", uri=uri) == {"return": {}}
        text = execute("migrate-set-capabilities", {"capabilities": wanted})
        assert await own.ask(text) == await theirs.ask(text)


@pytest.mark.parametrize("compat", ALL)
async def test_a_destination_answers_as_qemu(compat: Compat, tmp_path: Path) -> None:
    async with beside(compat, tmp_path, incoming=True) as (theirs, own):
        for wire in (theirs, own):
            await wire.ready()
        for text in (
            execute("query-status"),
            execute("migrate", {"uri": "unix:/x"}),
            execute("migrate-incoming", {"uri": "bogus"}),
            execute("migrate-start-postcopy"),
            execute("query-migrate"),
        ):
            assert await own.ask(text) == await theirs.ask(text), text


@pytest.mark.parametrize("compat", ALL)
async def test_stop_cont_and_quit_as_qemu(compat: Compat, tmp_path: Path) -> None:
    async with beside(compat, tmp_path) as (theirs, own):
        told = []
        for wire in (theirs, own):
            await wire.ready()
            seen: list[Any] = []
            for name in ("stop", "cont", "query-status", "cont", "stop", "query-status", "quit"):
                await wire.send(execute(name).encode())
                while True:
                    found = await wire.message()
                    assert found is not None
                    stamp = found.pop("timestamp", None)
                    assert (stamp is not None) == ("event" in found)
                    seen.append(found)
                    if "event" not in found:
                        break
            assert await wire.message() is None
            told.append(seen)
        assert told[0] == told[1]


def test_events_need_the_capability() -> None:
    endpoint = FakeEndpoint()
    heard: list[str] = []
    events = Events(endpoint.options)
    events.listen(lambda message: heard.append(message["event"]))
    events.migration_pass(1)
    endpoint.options.set_capabilities([("events", True)], busy=False)
    events.migration_pass(2)
    events.stop()
    assert heard == ["MIGRATION_PASS", "STOP"]


# As both versions read them: QEMU 7.2 also takes a suffix behind a hexadecimal number, and none before its point.
NUMBERS = [
    *("0", "00", "1", "+5k", "1.5", "1.5m", "1.", "1.k", "1e", "1e3", "0x10", "0x1b", "0xffffffffffffffff"),
    *("0x10000000000000000", "18446744073709551615", "18446744073709551615b", "18446744073709551616"),
    *("99999999999999999999", "17592186044416", "8796093022207", "8796093022208", "16e", "15e", "16383p"),
    *("9223372036854775807", "9223372036854775808", "1kb", "1q", "0x", "x", "nan", "1" + "0" * 30, "1..5"),
    *("9007199254740993b", "1.1b", "4,5", "010", "08"),
]

LINES = [
    *("info migrate_capabilities", "info migrate_parameters", "info status", "stop", "cont", "info status"),
    *("bogus", "info bogus", "", "  ", "q5", "help bogus", "help stop", "help cont", "help quit"),
    *("help info migrate", "help migrate_set_capability", "? migrate_cancel", "help migrate_incoming"),
    *("help migrate_set_parameter", "help info status", "c", "s", "info status"),
    *("migrate_set_capability", "migrate_set_capability events", "migrate_set_capability events foo"),
    *("migrate_set_capability bogus on", "migrate_set_capability events on extra"),
    *("migrate_set_capability postcopy-ram on", "migrate_set_capability x-ignore-shared on"),
    *("migrate_set_parameter", "migrate_set_parameter bogus 5", "migrate_set_parameter downtime-limit abc"),
    *("migrate_set_parameter max-bandwidth 5", "info migrate_parameters"),
    *("migrate_set_parameter max-bandwidth 1k", "migrate_set_parameter downtime-limit 9999999"),
    *("migrate_set_parameter cpu-throttle-tailslow on", "migrate_set_parameter cpu-throttle-tailslow x"),
    *("migrate_set_parameter xbzrle-cache-size 1", "migrate_set_parameter multifd-channels 300"),
    *("migrate_set_parameter x-rdma-chunk-size 2", "migrate_set_parameter cpr-exec-command /bin/x"),
    *(
        "info migrate_parameters",
        "migrate",
        "migrate -x foo",
        "migrate -d",
        "migrate -d bogus",
        "migrate_cancel",
    ),
    *(
        "help info migrate",
        "info migrate -x",
        "migrate_cancel x",
        "migrate_incoming",
        "migrate_incoming unix:/x",
        "info migrate x",
        "stop 5",
    ),
    *('migrate_set_capability "postcopy-ram" off', "info migrate_capabilities"),
    # Strings in quotes, their escapes, and what is none.
    *('migrate_set_capability "events on', 'migrate_set_capability events "on"', 'migrate_set_capability "'),
    *(
        r'migrate_set_capability "e\vents" on',
        r'migrate_set_capability "ev\x65nts" on',
        r'migrate -d "exec:\q"',
    ),
    *(r'migrate_set_parameter tls-hostname "a\nb\"c\\d\'"', "info migrate_parameters"),
    *(r'migrate_set_parameter tls-hostname "a\"', 'migrate_set_parameter "" 5', 'migrate_incoming "unix:'),
    *('migrate "unix:/x', r'migrate "unix:\t"', 'migrate ""', 'migrate "-d" bogus', r'migrate_incoming "\z"'),
    *(
        'migrate_set_parameter tls-hostname a"b"',
        "info migrate_parameters",
        'migrate_set_parameter tls-hostname "',
    ),
    *('migrate_set_parameter tls-hostname "a"b', "migrate_set_parameter tls-hostname 'a b'", '"', '"stop"'),
    *('migrate_set_parameter tls-hostname ""', 'stop "', 'stop ""', 'info "status"', 'help "', 'help "stop"'),
    # Options stand in their order; names end at a slash; hints say what was typed.
    *("migrate -dr", "migrate -r -d unix:/nowhere/x", "migrate -d -r unix:/nowhere/x", "migrate -xyz foo"),
    *(
        "migrate - foo",
        "migrate -d -d bogus",
        "migrate unix:/x -d",
        "migrate -dbogus",
        "  migrate",
        " migrate  ",
    ),
    *("stop/5", "stop /5", "info/ status", "info status/x", "info   bogus x", "  bogus x", "  stop x"),
    *("help stop x", "help info bogus", "help info status x"),
    # Numbers.
    *(
        line
        for number in NUMBERS
        for name in ("max-bandwidth", "max-postcopy-bandwidth", "xbzrle-cache-size", "multifd-channels")
        for line in (f"migrate_set_parameter {name} {number}", "info migrate_parameters")
    ),
]


@pytest.mark.parametrize("compat", ALL)
async def test_the_text_monitor_words_things_as_qemu(compat: Compat, tmp_path: Path) -> None:
    async with beside(compat, tmp_path) as (theirs, own):
        for wire in (theirs, own):
            await wire.ready()
        for line in LINES:
            assert await own.hmp(line) == await theirs.hmp(line), line
