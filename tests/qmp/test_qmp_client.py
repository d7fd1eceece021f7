"""The client of a monitor, against our own server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio

from tests.kit.fake_endpoint import FakeEndpoint
from vhostpc.errors import PeerClosed, RequestFailed
from vhostpc.migration.phase import Event
from vhostpc.qmp import Monitor
from vhostpc.qmp.qmp_client import open_monitor


async def test_commands_and_events(tmp_path: Path) -> None:
    path = str(tmp_path / "qmp")
    endpoint = FakeEndpoint()
    with trio.fail_after(30):
        async with Monitor(endpoint, endpoint.events).listening(path):
            async with open_monitor(path, "it") as client:
                assert (await client.command("query-status"))["status"] == "prelaunch"
                capabilities = [{"capability": "events", "state": True}]
                await client.command("migrate-set-capabilities", capabilities=capabilities)
                assert (await client.command("x-vhostpc-trace", from_=3))["next"] == 3
                with pytest.raises(
                    RequestFailed, match="it: nonsense: The command nonsense has not been found"
                ):
                    await client.command("nonsense")
                endpoint.move(Event.START)
                await client.command("query-status")
                when, event = client.events[-1]
                assert event["data"] == {"status": "setup"}
                assert when > 0


async def test_two_tasks_ask_at_once(tmp_path: Path) -> None:
    path = str(tmp_path / "qmp")
    endpoint = FakeEndpoint()
    with trio.fail_after(30):
        async with Monitor(endpoint, endpoint.events).listening(path):
            async with open_monitor(path, "it") as client:

                async def ask(number: int) -> None:
                    for _ in range(50):
                        assert (await client.command("x-vhostpc-trace", from_=number))["next"] == number

                async with trio.open_nursery() as nursery:
                    for number in range(8):
                        nursery.start_soon(ask, number)


async def test_a_monitor_that_goes_away_or_is_silent(tmp_path: Path) -> None:
    path = str(tmp_path / "qmp")
    sock = trio.socket.socket(trio.socket.AF_UNIX)
    await sock.bind(path)
    sock.listen()
    listener = trio.SocketListener(sock)
    greeting = json.dumps({"QMP": {}}).encode() + b"\n"

    async def serve() -> None:
        async with await listener.accept() as stream:
            await stream.send_all(greeting)
            await stream.receive_some()
            await stream.send_all(b'{"return": {}, "id": 1}\n')
            await stream.receive_some()  # a command that is not answered
            await stream.receive_some()

    with trio.fail_after(30):
        async with listener, trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            with pytest.RaisesGroup(PeerClosed):
                async with open_monitor(path, "it") as client:
                    with pytest.raises(RequestFailed, match="did not answer query-status within 0.05 s"):
                        await client.command("query-status", timeout=0.05)
                    with pytest.raises(RequestFailed, match="within 0.05 s"):
                        await client.command("query-status", timeout=0.05)
                    await client.command("query-status")
