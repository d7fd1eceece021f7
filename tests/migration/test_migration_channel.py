"""The channel of a migration: every kind both ways, errors in QEMU's words, nothing left behind."""

from __future__ import annotations

import array
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, suppress
from pathlib import Path

import pytest
import trio

from tests.kit.qmp_wire import qemu
from tests.kit.until import until
from vhostpc.dialect import DIALECTS, Compat
from vhostpc.errors import ChannelLost, MigrationRefused
from vhostpc.migration import ends
from vhostpc.migration.channel import Channel, connect, listen
from vhostpc.migration.uri import Address, Exec, Fd, File, Tcp, Unix, from_channels, parse_address

ALL = tuple(DIALECTS)
BYTES = bytes(range(256)) * 1000  # more than a pipe or a socket takes at once


def children() -> set[int]:
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {int(pid) for pid in pids}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No descriptor and no child more than before."""
    fds, pids = set(os.listdir("/proc/self/fd")), children()
    yield
    assert set(os.listdir("/proc/self/fd")) == fds
    assert children() == pids


async def everything(channel: Channel) -> bytes:
    found = bytearray()
    with trio.fail_after(30):
        while data := await channel.receive_some(1 << 16):
            found += data
    return bytes(found)


async def send_and_close(channel: Channel, data: bytes = BYTES) -> None:
    async with channel:
        await channel.send_all(data)


# --- sockets

LISTENING = ["tcp:127.0.0.1:0", "tcp:localhost:0", "tcp::0", "tcp:[::1]:0", "tcp::0,ipv4", "unix:{}/socket"]


def address_of(told: dict[str, object]) -> Address:
    return from_channels([{"channel-type": "main", "addr": {"transport": "socket", **told}}])


@pytest.mark.parametrize("uri", LISTENING)
async def test_sockets_go_both_ways(uri: str, tmp_path: Path) -> None:
    async with listen(parse_address(uri.format(tmp_path), DIALECTS["10.0"], incoming=True)) as listener:
        told = listener.socket_address
        async with await connect(address_of(told[-1])) as there, await listener.accept() as here:
            assert here.two_way
            assert there.two_way
            assert here.in_fd == here.out_fd
            assert not os.get_blocking(here.in_fd)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(there.send_all, BYTES)
                nursery.start_soon(here.send_all, BYTES)
                for channel in (here, there):
                    found = b""
                    while len(found) < len(BYTES):
                        found += await channel.receive_some(1 << 16)
                    assert found == BYTES
            assert here.number == 0
            # As many as are wanted, and none behind the block.
            for number, where in enumerate(told, 1):
                async with await connect(address_of(where)), await listener.accept() as other:
                    assert other.number == number
    for where in told:
        with pytest.raises(ChannelLost, match="Connection refused|No such file"):
            await connect(address_of(where))
    with pytest.raises(ChannelLost, match="No other connection"):
        await listener.accept()
    assert not (tmp_path / "socket").exists()


@pytest.mark.parametrize("uri", ["tcp:127.0.0.1:0", "unix:{}/socket"])
async def test_many_connections(uri: str, tmp_path: Path) -> None:
    """All that are made during the block, in their order."""
    address = parse_address(uri.format(tmp_path))
    async with AsyncExitStack() as stack:
        listener = await stack.enter_async_context(listen(address, many=True))
        there = address_of(listener.socket_address[0])
        near = [await stack.enter_async_context(await connect(there)) for _ in range(20)]
        for number, channel in enumerate(near):
            await channel.send_all(bytes([number]))
        for number in range(20):
            async with await listener.accept() as far:
                assert await far.receive_some(10) == bytes([number])
    with pytest.raises(ChannelLost, match="was closed"):
        await listener.accept()


@pytest.mark.parametrize(("uri", "both"), [("tcp::0", True), ("tcp::0,ipv6", False), ("tcp:[::]:0", True)])
async def test_a_wildcard_of_ipv6_stands_for_ipv4_too(uri: str, both: bool) -> None:
    async with listen(parse_address(uri, DIALECTS["10.0"], incoming=True)) as listener:
        [six] = [told for told in listener.socket_address if "ipv6" in told]
        four = Tcp("127.0.0.1", six["port"])
        if both:
            async with await connect(four), await listener.accept():
                pass
        else:
            with pytest.raises(ChannelLost, match="Connection refused"):
                await connect(four)


async def test_a_passed_socket_goes_both_ways() -> None:
    here, there = socket.socketpair()
    async with await connect(Fd("x", here.detach())) as out:
        async with listen(Fd("y", there.detach())) as listener:
            assert listener.socket_address == []
            async with await listener.accept() as into:
                await out.send_all(b"ping")
                assert await into.receive_some(100) == b"ping"
                await into.send_all(b"pong")
                assert await out.receive_some(100) == b"pong"


async def test_an_abstract_name_makes_no_file(tmp_path: Path) -> None:
    name = str(tmp_path / "name")
    for tight in (True, False):
        async with listen(Unix(name, abstract=True, tight=tight)) as listener:
            assert listener.socket_address == [
                {"type": "unix", "path": name, "abstract": True, "tight": tight}
            ]
            assert not os.path.exists(name)
            with pytest.raises(ChannelLost):
                await connect(Unix(name, abstract=True, tight=not tight))
            async with await connect(address_of(listener.socket_address[0])), await listener.accept():
                pass


async def test_a_socket_in_the_way_is_replaced_and_a_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    async with listen(Unix(str(path))) as listener:
        async with await connect(Unix(str(path))), await listener.accept():
            pass
    path.write_text("mine")
    with pytest.raises(MigrationRefused, match=f"^Failed to bind socket to {path}: Address already in use$"):
        async with listen(Unix(str(path))):
            pass
    assert path.read_text() == "mine"


async def test_a_path_that_is_somebody_elses_by_now_stays(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with listen(Unix(str(path))):
        path.unlink()
        path.write_text("other")
    assert path.read_text() == "other"


async def test_options_reach_the_socket() -> None:
    async with listen(Tcp("127.0.0.1", "0")) as listener:
        port = listener.socket_address[0]["port"]
        async with await connect(Tcp("127.0.0.1", port, keep_alive=True)) as channel:
            with socket.socket(fileno=os.dup(channel.out_fd)) as sock:
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 0
    named = "tcp:127.0.0.1:{},keep-alive=on,keep-alive-count=3,keep-alive-idle=70,keep-alive-interval=7"
    async with listen(parse_address(named.format(0), DIALECTS["11.1"], incoming=True)) as listener:
        port = listener.socket_address[0]["port"]
        async with (
            await connect(parse_address(named.format(port), DIALECTS["11.1"])) as here,
            await listener.accept() as there,
        ):
            for channel in (here, there):
                with socket.socket(fileno=os.dup(channel.out_fd)) as sock:
                    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                    options = (socket.TCP_KEEPCNT, socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL)
                    assert [sock.getsockopt(socket.IPPROTO_TCP, o) for o in options] == [3, 70, 7]
    with pytest.raises(ChannelLost, match="address resolution failed for localhost:1:"):
        await connect(Tcp("localhost", "1", numeric=True))
    with pytest.raises(MigrationRefused, match="address resolution failed for localhost:1:"):
        await listening(Tcp("localhost", "1", numeric=True))
    parsed = parse_address("tcp:h:1,keep-alive=on,mptcp", DIALECTS["10.0"])
    assert parsed == Tcp("h", "1", keep_alive=True, mptcp=True)


async def test_a_range_of_ports() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with listen(Tcp("127.0.0.1", str(port), to=port + 50)) as listener:
            assert port < int(listener.socket_address[0]["port"]) <= port + 50


# --- pipes, commands, files


async def test_passed_pipes_go_one_way() -> None:
    read, write = os.pipe()
    async with listen(Fd("r", read)) as listener, await listener.accept() as into:
        out = await connect(Fd("w", write))
        assert (into.in_fd, into.out_fd, into.two_way) == (read, -1, False)
        assert (out.in_fd, out.out_fd, out.two_way) == (-1, write, False)
        assert not os.get_blocking(read)
        assert not os.get_blocking(write)
        with pytest.raises(ChannelLost, match="one way"):
            await into.send_all(b"x")
        with pytest.raises(ChannelLost, match="one way"):
            await out.receive_some(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_and_close, out)
            assert await everything(into) == BYTES


async def test_a_command_takes_a_stream_and_ends_by_itself(tmp_path: Path) -> None:
    """Nothing that it was given is lost, however long it takes after the pipe was closed."""
    path = tmp_path / "out"
    command = parse_address(f"exec:cat >{path}.part; sleep 0.3; mv {path}.part {path}", DIALECTS["10.0"])
    await send_and_close(await connect(command))
    assert path.read_bytes() == BYTES


async def test_a_command_brings_a_stream(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(BYTES)
    async with listen(Exec(("cat", str(tmp_path / "in")))) as listener, await listener.accept() as channel:
        assert channel.two_way
        assert await everything(channel) == BYTES


async def test_a_command_goes_both_ways() -> None:
    async with await connect(Exec(("cat",))) as channel:
        await channel.send_all(b"to and fro")
        assert await channel.receive_some(100) == b"to and fro"


async def test_the_errors_of_a_command_are_seen() -> None:
    code = (
        "import trio; from vhostpc.migration.channel import connect; from vhostpc.migration.uri import Exec\n"
        "async def main():\n"
        "    async with await connect(Exec(('sh', '-c', 'echo why >&2'))): pass\n"
        "trio.run(main)"
    )
    done = await trio.run_process([sys.executable, "-c", code], capture_stderr=True)
    assert done.stderr == b"why\n"


async def test_a_file_is_written_from_its_offset_and_ends_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"A" * 5000 + b"B" * 1_000_000)
    channel = await connect(File(str(path), 4096))
    assert channel.in_fd == -1
    await send_and_close(channel)
    assert path.read_bytes() == b"A" * 4096 + BYTES
    async with listen(File(str(path), 4096)) as listener, await listener.accept() as into:
        assert into.out_fd == -1
        assert await everything(into) == BYTES
    fresh = tmp_path / "fresh"
    await send_and_close(await connect(File(str(fresh))))
    assert (fresh.read_bytes(), fresh.stat().st_mode & 0o777) == (BYTES, 0o600)


async def test_files_can_be_passed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    await send_and_close(await connect(Fd("w", os.open(path, os.O_CREAT | os.O_RDWR))))
    async with listen(Fd("r", os.open(path, os.O_RDONLY))) as listener, await listener.accept() as into:
        assert await everything(into) == BYTES
    await send_and_close(await connect(Fd("null", os.open("/dev/null", os.O_WRONLY))))
    await send_and_close(await connect(File("/dev/null")))


async def test_a_full_disk_is_told() -> None:
    async with await connect(File("/dev/full")) as channel:
        with pytest.raises(ChannelLost, match="^Unable to write to file: No space left on device$"):
            await channel.send_all(BYTES)


def test_a_number_is_one_that_the_process_was_started_with(tmp_path: Path) -> None:
    """It is taken over; one of our own cannot be named; a standard one stays open, on nothing."""
    code = (
        "import os, sys, trio\n"
        "from vhostpc.errors import MigrationRefused\n"
        "from vhostpc.migration.channel import listen\n"
        "from vhostpc.migration.uri import Fd\n"
        "async def read(name):\n"
        "    async with listen(Fd(name)) as listener, await listener.accept() as channel:\n"
        "        return (await channel.receive_some(100)).decode()\n"
        "async def main():\n"
        "    number, own = sys.argv[1], os.open('/dev/null', os.O_RDONLY)\n"
        "    print(await read(number), await read('0'), os.read(0, 1))\n"
        "    for name in (number, str(own), '7x', '-1', '9' * 20, '²'):\n"
        "        try:\n"
        "            await read(name)\n"
        "        except MigrationRefused as exc:\n"
        "            assert str(exc) == f\"Invalid file descriptor number '{name}'\", exc\n"
        "        else:\n"
        "            raise SystemExit(name)\n"
        "trio.run(main)"
    )
    (tmp_path / "file").write_text("inherited")
    with open(tmp_path / "file") as file:
        done = subprocess.run(
            [sys.executable, "-c", code, str(file.fileno())],
            input="standard",
            pass_fds=[file.fileno()],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, "inherited standard b''\n", "")


# --- what is wrong

UNREACHABLE = [
    *("tcp:127.0.0.1:1", "tcp:localhost:1", "tcp:[::1]:1", "tcp:nosuch.invalid:5", "tcp:127.0.0.1:nosvc"),
    *("tcp:127.0.0.1:1,ipv6", "tcp::1", "tcp:127.0.0.1:1,ipv4=off,ipv6=off"),
    *("unix:/nowhere/x", "unix:{}/plain", "unix:" + "/x" * 60),
]
NO_PLACE = [
    *("tcp:[::]:0,ipv4=on", "tcp:127.0.0.1:{port}", "tcp:nosuch.invalid:5", "tcp:127.0.0.1:nosvc"),
    *("tcp:127.0.0.1:-1", "tcp:9.9.9.9:0", "tcp:127.0.0.1:1,ipv6", "unix:/nowhere/x", "unix:" + "/x" * 60),
    *("fd:7x", "fd:12345678901234"),
]
A_PLACE = [
    *(
        "tcp:127.0.0.1:0",
        "tcp::0",
        "tcp:0:0",
        "tcp:[::1]:0",
        "tcp:[::]:0,ipv4=off",
        "tcp::0,ipv6",
        "tcp::0,ipv4",
    ),
    *("tcp::0,ipv4=on,ipv6=on", "tcp:localhost:0", "unix:{}/s"),
]


@pytest.mark.qemu
@pytest.mark.parametrize("compat", ALL)
async def test_why_a_connection_fails_in_qemus_words(compat: Compat, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    async with qemu(compat) as wire:
        await wire.ready()
        for uri in [uri.format(tmp_path) for uri in UNREACHABLE]:
            assert await wire.command("migrate", uri=uri) == {"return": {}}
            with trio.fail_after(30):
                while (told := (await wire.command("query-migrate"))["return"])["status"] != "failed":
                    await trio.sleep(0.01)
            with pytest.raises(ChannelLost) as failed:
                await connect(parse_address(uri, DIALECTS[compat]))
            assert str(failed.value) == told["error-desc"], uri


@pytest.mark.qemu
@pytest.mark.parametrize("compat", ALL)
async def test_why_listening_fails_in_qemus_words(compat: Compat) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for uri in [uri.format(port=taken.getsockname()[1]) for uri in NO_PLACE]:
            # One for each: 10.0 is of no more use after a refusal.
            async with qemu(compat, "-incoming", "defer") as wire:
                await wire.ready()
                told = await wire.command("migrate-incoming", uri=uri)
            with pytest.raises(MigrationRefused) as failed:
                async with listen(parse_address(uri, DIALECTS[compat], incoming=True)):
                    pass
            assert str(failed.value) == told["error"]["desc"], uri


@pytest.mark.qemu
@pytest.mark.parametrize("compat", ALL)
async def test_where_it_listens_is_told_as_qemu_does(compat: Compat, tmp_path: Path) -> None:
    for uri in [uri.format(tmp_path) for uri in A_PLACE]:
        async with qemu(compat, "-incoming", "defer") as wire:
            await wire.ready()
            assert await wire.command("migrate-incoming", uri=uri) == {"return": {}}
            theirs = (await wire.command("query-migrate"))["return"]["socket-address"]
        async with listen(parse_address(uri, DIALECTS[compat], incoming=True)) as listener:
            ours = listener.socket_address
            for where in (*ours, *theirs):
                assert where.pop("port", "1").isdigit()
            assert sorted(map(str, map(sorted, map(dict.items, ours)))) == sorted(
                map(str, map(sorted, map(dict.items, theirs)))
            ), uri


@pytest.mark.qemu
async def test_commands_and_files_fail_in_qemus_words() -> None:
    """7.2 knows neither."""
    path = {"transport": "file", "offset": 0, "filename": "/nowhere/x"}
    folder = {**path, "filename": "/proc"}
    command = {"transport": "exec", "args": ["/nowhere/x"]}
    for addr in (path, folder, command):
        channels = [{"channel-type": "main", "addr": addr}]
        async with qemu("10.0") as wire:
            await wire.ready()
            told = await wire.command("migrate", channels=channels)
        with pytest.raises(ChannelLost) as lost:
            await connect(from_channels(channels))
        assert str(lost.value) == told["error"]["desc"]
    for addr in (path, command):
        channels = [{"channel-type": "main", "addr": addr}]
        async with qemu("10.0", "-incoming", "defer") as wire:
            await wire.ready()
            told = await wire.command("migrate-incoming", channels=channels)
        with pytest.raises(MigrationRefused) as refused:
            async with listen(from_channels(channels)):
                pass
        assert str(refused.value) == told["error"]["desc"]


async def test_odd_addresses_are_refused_in_a_sentence(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    odd: list[Address] = [
        *(
            Tcp("a" * 70, "1"),
            Tcp("\udcff", "1"),
            Tcp("x\0y", "1"),
            Unix("\0x"),
            Unix(""),
            Exec(()),
            Exec(("a\0b",)),
        ),
        *(
            File(str(tmp_path)),
            File("/nowhere/x"),
            File(str(tmp_path / "fifo")),
            File(str(tmp_path / "f"), 1 << 63),
        ),
        *(File("x\0"), Tcp("127.0.0.1", "5", to=4), Tcp("127.0.0.1", "1", ipv4=False, ipv6=False)),
    ]
    for address in odd:
        with pytest.raises(ChannelLost) as lost:
            await connect(address)
        with pytest.raises(MigrationRefused) as refused:
            async with listen(address):
                pass
        assert "\n" not in str(lost.value) + str(refused.value)


def descriptors() -> Iterator[int]:
    yield os.open("/", os.O_RDONLY)
    yield os.eventfd(0)
    yield socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach()
    yield socket.create_server(("127.0.0.1", 0)).detach()
    yield os.open("/dev/null", os.O_PATH)


async def test_descriptors_that_are_no_channel_are_refused_and_closed() -> None:
    for fd in descriptors():
        with pytest.raises(ChannelLost, match="^fd:x "):
            await connect(Fd("x", fd))
    for fd in descriptors():
        with pytest.raises(MigrationRefused, match="^fd:x "):
            async with listen(Fd("x", fd)):
                pass
    read, write = os.pipe()
    with pytest.raises(ChannelLost, match="^fd:x cannot be written to$"):
        await connect(Fd("x", read))
    with pytest.raises(MigrationRefused, match="^fd:x cannot be read from$"):
        async with listen(Fd("x", write)):
            pass


# --- peers that go


async def test_a_peer_that_is_gone_at_once() -> None:
    async with listen(Tcp("127.0.0.1", "0")) as listener:
        where = ("127.0.0.1", int(listener.socket_address[0]["port"]))
        with socket.create_connection(where) as rude:
            rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, array.array("i", [1, 0]).tobytes())
        async with await listener.accept() as channel:
            with pytest.raises(ChannelLost, match="^Unable to read from socket: Connection reset by peer$"):
                await channel.receive_some(1)
            with pytest.raises(ChannelLost, match="^Unable to write to socket: Broken pipe$"):
                await channel.send_all(BYTES)
    here, there = socket.socketpair()
    there.close()
    async with await connect(Fd("x", here.detach())) as channel:
        assert await channel.receive_some(1) == b""
        with pytest.raises(ChannelLost, match="^Unable to write to socket: Broken pipe$"):
            await channel.send_all(BYTES)


async def test_a_reader_that_is_gone() -> None:
    for address in (Exec(("false",)), Exec(("/bin/sh", "-c", "exec <&-; sleep 0.05"))):
        async with await connect(address) as channel:
            with pytest.raises(ChannelLost, match="^Unable to write to command: Broken pipe$"):
                await channel.send_all(BYTES)
    read, write = os.pipe()
    os.close(read)
    async with await connect(Fd("x", write)) as channel:
        with pytest.raises(ChannelLost, match="^Unable to write to pipe: Broken pipe$"):
            await channel.send_all(b"x")


# --- shut_down


async def kinds(stack: ExitStack, astack: AsyncExitStack, kind: str) -> Channel:
    if kind == "socket":
        here, there = socket.socketpair()
        stack.enter_context(there)
        return await connect(Fd("x", here.detach()))
    if kind == "command":
        return await connect(Exec(("/bin/sh", "-c", "sleep 1000 | sleep 1000")))
    read, write = os.pipe()
    if kind == "pipe in":
        stack.callback(os.close, write)
        return await (await astack.enter_async_context(listen(Fd("x", read)))).accept()
    stack.callback(os.close, read)
    return await connect(Fd("x", write))


@pytest.mark.parametrize("kind", ["socket", "command", "pipe in", "pipe out"])
async def test_shut_down_wakes_python(kind: str) -> None:
    with ExitStack() as stack:
        async with AsyncExitStack() as astack:
            channel = await kinds(stack, astack, kind)
            async with channel:
                ended = []

                async def for_ever(reads: bool) -> None:
                    while True:
                        await (channel.receive_some(1) if reads else channel.send_all(BYTES))

                async def use(reads: bool) -> None:
                    with pytest.raises(ChannelLost):
                        await for_ever(reads)
                    ended.append(reads)

                with trio.fail_after(30):
                    async with trio.open_nursery() as nursery:
                        ways = ([True] if channel.in_fd >= 0 else []) + (
                            [False] if channel.out_fd >= 0 else []
                        )
                        for reads in ways:
                            nursery.start_soon(use, reads)
                        await trio.testing.wait_all_tasks_blocked(0.01)
                        assert ended == []
                        channel.shut_down()
                    for reads in ways:
                        await use(reads)


@pytest.mark.parametrize("kind", ["socket", "command"])
@pytest.mark.parametrize("reads", [True, False], ids=["reads", "writes"])
async def test_shut_down_wakes_a_poll(kind: str, reads: bool) -> None:
    with ExitStack() as stack:
        async with AsyncExitStack() as astack, await kinds(stack, astack, kind) as channel:
            fd = channel.in_fd if reads else channel.out_fd
            with suppress(BlockingIOError):
                while not reads:
                    os.write(fd, BYTES)
            woken: list[object] = []

            def loop() -> None:
                poll = select.poll()
                poll.register(fd, select.POLLIN if reads else select.POLLOUT)
                woken.append(poll.poll(30_000))

            thread = threading.Thread(target=loop)
            thread.start()
            channel.shut_down()
            await until(lambda: woken)
            thread.join()
            assert woken != [[]]


# --- cancellation


async def test_cancelled_where_it_waits(tmp_path: Path) -> None:
    async with listen(Unix(str(tmp_path / "s"))) as listener:
        with trio.move_on_after(0.01) as scope:
            await listener.accept()
        assert scope.cancelled_caught
        # Its backlog is full: to connect is to wait.
        socks = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        for sock in socks:
            sock.setblocking(False)
            sock.connect_ex(str(tmp_path / "s"))
        for sock in socks:
            sock.close()
        # It can still accept.
        async with await listener.accept():
            pass
    for make in (connect, listening):
        for address in (
            Tcp("127.0.0.1", "1"),
            Tcp("localhost", "1"),
            File(str(tmp_path / "f")),
            Exec(("cat",)),
        ):
            with trio.CancelScope() as scope:
                scope.cancel()
                await make(address)


async def listening(address: Address) -> None:
    async with listen(address) as listener:
        async with await listener.accept():
            pass


async def test_a_cancelled_close_ends_the_command() -> None:
    before = children()
    channel = await connect(Exec(("/bin/sh", "-c", "sleep 1000 & sleep 1000")))
    [pid] = children() - before
    with trio.move_on_after(0.05) as scope:
        await channel.aclose()
    assert scope.cancelled_caught
    await until(lambda: not members(pid))


def members(group: int) -> list[str]:
    """Who is alive in a process group."""
    alive = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            alive.append(path.parent.name)
    return alive


async def test_a_command_that_brought_a_stream_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with trio.fail_after(30):
        monkeypatch.setattr(ends, "LAST_WORD", 0.05)
        async with listen(Exec(("/bin/sh", "-c", "echo x; sleep 1000"))) as listener:
            async with await listener.accept() as channel:
                assert await channel.receive_some(10) == b"x\n"
        # Nobody wanted this one: it is not waited for at all.
        monkeypatch.setattr(ends, "LAST_WORD", 1000)
        async with listen(Exec(("sleep", "1000"))):
            pass


async def test_a_listener_that_is_left_lets_go_of_who_accepts(tmp_path: Path) -> None:
    async def accept() -> None:
        with pytest.raises(ChannelLost):
            await listener.accept()

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            async with listen(Unix(str(tmp_path / "s"))) as listener:
                nursery.start_soon(accept)
                await trio.testing.wait_all_tasks_blocked()
