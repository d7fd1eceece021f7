"""``vhostpc inspect`` on files, pipes and sockets, whole and broken."""

from __future__ import annotations

import json
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit import streams
from tests.kit.streams import h
from vhostpc.wire.migration import elements as el

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vhostpc", "inspect", *arguments]


def inspect(*arguments: str, data: bytes | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(*arguments), cwd=ROOT, input=data, capture_output=True, timeout=60, check=False
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_precopy_in_words(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(streams.PRECOPY)
    done = inspect(str(path))
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split(maxsplit=2) for line in done.stdout.splitlines()[:8]]
    assert rows == [
        ["0", "header", "QEVM, version 3"],
        ["8", "configuration", "machine toyvm"],
        ["18", "start", "section 7, ram version 4"],
        ["35", "blocks", "2 of 16 KiB in all"],
        ["82", "ram", "2 RAM sections, the last one: 2 data, 2 zero pages"],
        ["8354", "device", "section 9, clk instance 0 version 1: 4 bytes"],
        ["8380", "end", "end of the stream"],
        [
            "8381",
            "description",
            "157 bytes of JSON about 1 device section, all with the lengths that it gives",
        ],
    ]
    assert "  ram0  12 KiB: 2 data, 1 zero pages\n  rom0  4 KiB: 1 zero pages\n" in done.stdout
    assert done.stdout.endswith("\nNothing wrong.\n")


def test_postcopy_in_json_from_a_pipe() -> None:
    done = inspect("-", "--json", data=streams.POSTCOPY + b"more")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] is None
    assert found["trailing"] == 4
    assert [(e["offset"], e.get("name", e["kind"])) for e in found["elements"]] == [
        (0, "header"), (8, "configuration"), (18, "OPEN_RETURN_PATH"), (23, "PING"), (32, "POSTCOPY_ADVISE"),
        (53, "ram"), (70, "blocks"), (117, "ram"), (4253, "POSTCOPY_RAM_DISCARD"),
        (4281, "POSTCOPY_RAM_DISCARD"), (4309, "PING"), (4318, "package"), (4327, "POSTCOPY_LISTEN"),
        (4332, "clk"), (4358, "PING"), (4367, "POSTCOPY_RUN"), (4372, "PING"), (4381, "ram"), (12644, "end"),
    ]  # fmt: skip
    assert [block["pages"] for block in found["ram"]] == [{"data": 3, "zero": 1}, {"zero": 1}]


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["words", "json"])
def test_the_first_wrong_byte_and_what_came_before(flags: list[str]) -> None:
    data = bytearray(streams.POSTCOPY)
    data[4260] ^= 0xFF  # the name in the first discard
    done = inspect("-", *flags, data=bytes(data))
    assert done.returncode == 1
    assert done.stderr.startswith("vhostpc: migration stream, byte 4253 (0x109d): discard in RAM block")
    assert done.stderr.count("\n") == 1
    if flags:
        found = json.loads(done.stdout)
        assert found["wrong"]["offset"] == 4253
        assert found["elements"][-1]["kind"] == "ram"
        assert found["ram"][0]["pages"] == {"data": 1, "zero": 1}
    else:
        assert "1 RAM section: 1 data, 1 zero pages" in done.stdout


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["words", "json"])
def test_any_number_of_elements_in_little_memory(flags: list[str], tmp_path: Path) -> None:
    path, count = tmp_path / "stream", 120_000
    head = streams.POSTCOPY[: streams.POSTCOPY.index(el.Ping(1).encode())]
    path.write_bytes(head + el.Ping(1).encode() * count)

    def little() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (48 << 20, 48 << 20))

    with (tmp_path / "out").open("w+") as out:
        done = subprocess.run(
            command(str(path), *flags),
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
            preexec_fn=little,
        )
        out.seek(0)
        pings = sum("PING" in line for line in out)
    assert b"the stream ends where its next element belongs" in done.stderr
    assert pings == count


def test_a_description_that_does_not_fit_is_told() -> None:
    done = inspect("-", data=streams.PRECOPY.replace(b'"size": 4', b'"size": 5'))
    assert done.returncode == 1
    assert "section 9, clk instance 0 version 1: 4 bytes" in done.stdout
    assert "byte 8376 (0x20b8): section 'clk' has no footer behind the 5 bytes" in done.stderr


def shared() -> bytes:
    """A precopy from a source with x-ignore-shared: the shared block's address is told, its pages are not."""
    configuration = el.Configuration("toyvm", None, ("x-ignore-shared",), None).encode()
    blocks = el.RamBlocks(
        (el.BlockInfo("ram0", 0x3000, None, 0), el.BlockInfo("rom0", 0x1000, None, 1 << 32))
    )
    start = streams.SETUP[:17] + blocks.encode() + streams.SETUP[-5:]
    data = streams.PRECOPY.replace(streams.CONFIGURATION, configuration).replace(streams.SETUP, start)
    return data.replace(streams.FIRST_PART, b"")  # the last part names its block by CONTINUE


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["words", "json"])
def test_what_a_destination_would_refuse(flags: list[str]) -> None:
    """It is read all the same, and nothing in it is wrong."""
    data = shared().replace(h("0000000000002028"), h("0000000000002008 04 72616d30"))
    done = inspect("-", *flags, data=data)
    assert (done.returncode, done.stderr) == (0, "")
    why = "Capability x-ignore-shared is off, but received capability is on"
    if flags:
        found = json.loads(done.stdout)
        assert found["refused"] == [{"offset": 8, "reason": why}]
        assert [block["guest_address"] for block in found["ram"]] == [0, 1 << 32]
    else:
        assert f"\nOur destination refuses this stream:\n           8  {why}\n" in done.stdout
        assert done.stdout.endswith("\nNothing wrong.\n")


def test_forms_of_pages_that_a_destination_would_refuse() -> None:
    record = h("0000000000000040 04 72616d30 01 0005") + bytes(5)
    part = streams.FIRST_PART.replace(streams.END_OF_PART, record + streams.END_OF_PART)
    data = streams.PRECOPY.replace(streams.FIRST_PART, part)
    done = inspect("-", "--json", data=data)
    assert json.loads(done.stdout)["refused"] == [
        {"offset": 4205, "reason": "RAM pages in the form 'xbzrle'"}
    ]


def test_the_head_of_a_mapped_ram_file() -> None:
    """Its pages cannot be read, so that is wrong; what it is, is told."""
    data = streams.PRECOPY.replace(
        streams.CONFIGURATION, el.Configuration("toyvm", None, ("mapped-ram",), None).encode()
    )
    done = inspect("-", "--json", data=data)
    assert done.returncode == 1
    assert "RAM in the mapped-ram format" in done.stderr
    (refused,) = json.loads(done.stdout)["refused"]
    assert refused["reason"] == "Capability mapped-ram is off, but received capability is on"


def test_sections_that_come_twice_or_look_like_more() -> None:
    """Neither is wrong; of the second it is told."""
    clock = streams.CLOCK
    again = clock.replace(h("00000009"), h("0000000a"))
    done = inspect("-", "--json", data=streams.PRECOPY.replace(clock, clock + again))
    assert done.returncode == 1  # the description has only one
    blob = streams.BLOB.replace(clock, clock + again)
    data = streams.POSTCOPY.replace(h("0000002d") + streams.BLOB, len(blob).to_bytes(4, "big") + blob)
    found = json.loads(inspect("-", "--json", data=data).stdout)
    assert (found["wrong"], found["refused"], found["doubts"]) == (None, [], [])
    assert [e["name"] for e in found["elements"] if e["kind"] == "device"] == ["clk", "clk"]
    blob = streams.BLOB.replace(clock, clock + clock)
    data = streams.POSTCOPY.replace(h("0000002d") + streams.BLOB, len(blob).to_bytes(4, "big") + blob)
    done = inspect("-", data=data)
    assert done.returncode == 0
    assert "have more than one reading" in done.stdout


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_it_listens_for_a_source(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    address = f"unix:{path}" if kind == "unix" else "tcp:127.0.0.1:0"
    with subprocess.Popen(
        command(address), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        line = process.stderr.readline()  # it listens now
        assert "waiting for a source at" in line
        if kind == "unix":
            source = socket.socket(socket.AF_UNIX)
            source.connect(str(path))
        else:
            port = int(line.rpartition(":")[2])
            source = socket.create_connection(("127.0.0.1", port))
        with source:
            source.sendall(streams.POSTCOPY)  # and stays open: the end is in the stream
            out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.endswith("\nNothing wrong.\n")
    assert not path.exists()


@pytest.mark.parametrize(
    ("source", "code", "text"),
    [
        ("/nowhere/at all", 1, "/nowhere/at all: No such file or directory"),
        ("tcp:localhost:many", 2, "needs a port"),
        ("/dev/null", 1, "byte 0 (0x0): the stream ends inside the header"),
    ],
)
def test_what_cannot_be_read(source: str, code: int, text: str) -> None:
    done = inspect(source)
    assert done.returncode == code
    assert text in done.stderr
    assert "Traceback" not in done.stderr
