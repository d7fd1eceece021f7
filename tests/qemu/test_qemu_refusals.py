"""What cannot be done here is refused as QEMU refuses it, before anything moves; and nothing is ignored."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.kit.own_machine import bridge, far_side
from tests.qemu.versions import EACH
from tests.sequences.nodes import FINAL, Node, endpoint_node, own_node, qemu_node
from vhostpc.dialect import Compat

pytestmark = pytest.mark.qemu

POSTCOPY = [{"capability": "postcopy-ram", "state": True}]


@contextlib.asynccontextmanager
async def beside(
    compat: Compat, folder: Path, hide: tuple[str, str], incoming: bool
) -> AsyncIterator[tuple[Node, Node]]:
    """A QEMU and ours, each with a network device whose back-end does not offer something."""
    ours, theirs = folder / "ours", folder / "theirs"
    card = ["-chardev", f"socket,id=vu,path={theirs}", "-netdev", "vhost-user,id=n0,chardev=vu"]
    card += ["-device", "virtio-net-pci,netdev=n0,romfile=,vectors=0"]
    async with contextlib.AsyncExitStack() as stack:
        far = await stack.enter_async_context(far_side())
        for path in (ours, theirs):
            await stack.enter_async_context(bridge(path, far, more=hide))
        backend = ["--backend", str(ours)]
        yield (
            await stack.enter_async_context(qemu_node(compat, "qemu", incoming=incoming, more=card)),
            await stack.enter_async_context(own_node(compat, "own", folder, incoming=incoming, more=backend)),
        )


def same_words(mine: dict[str, Any], theirs: dict[str, Any], about: str) -> str | None:
    """The refusal, if it is one: QEMU's sentence, or one that says more behind it."""
    mine, theirs = ({k: v for k, v in told.items() if k != "id"} for told in (mine, theirs))
    if "error" not in theirs:
        assert mine == theirs, about
        return None
    assert mine["error"]["class"] == theirs["error"]["class"], about
    said, model = str(mine["error"]["desc"]), str(theirs["error"]["desc"])
    assert said.startswith(model), about
    assert said[len(model) :][:1] in ("", ":", " "), about
    return said


@pytest.mark.parametrize("incoming", [False, True], ids=["source", "destination"])
@pytest.mark.parametrize("what", ["LOG_SHMFD", "LOG_ALL", "PAGEFAULT"])
@pytest.mark.parametrize("compat", EACH)
async def test_a_back_end_that_lacks_something(
    compat: Compat, what: str, incoming: bool, tmp_path: Path
) -> None:
    """Without a log the machine cannot leave; without PAGEFAULT it cannot come by postcopy."""
    hide = ("--hide-feature", "26") if what == "LOG_ALL" else ("--hide-protocol-feature", what)
    refused: dict[str, str | None] = {}
    async with beside(compat, tmp_path, hide, incoming) as (theirs, own):
        for name, arguments in (
            ("query-migrate", {}),
            ("migrate-set-capabilities", {"capabilities": POSTCOPY}),
            ("query-migrate-capabilities", {}),
            ("migrate", {"uri": f"unix:{tmp_path}/none"}),
        ):
            model = await theirs.qmp.reply(name, **arguments)
            mine = await own.qmp.reply(name, **arguments)
            refused[name] = same_words(mine, model, name)
        info = await own.qmp.command("query-migrate")
        assert ("status" in info) == (not refused["migrate"])  # refused, it has not begun
    if what == "PAGEFAULT":
        assert "blocked-reasons" not in info
        refusal = refused["migrate-set-capabilities"]
        if incoming:
            assert refusal is not None
            assert refusal.endswith("vhost-user backend not capable of postcopy (net0)")
        else:
            assert refusal is None
        return
    lacks = "vhost lacks VHOST_F_LOG_ALL" if what == "LOG_ALL" else "VHOST_USER_PROTOCOL_F_LOG_SHMFD"
    assert lacks in info["blocked-reasons"][0]
    if not incoming:
        assert refused["migrate"] == info["blocked-reasons"][0]


SHARED = "Capability x-ignore-shared is off, but received capability is on"
UUID = "11111111-2222-3333-4444-555555555555"


async def until_final(node: Node) -> str:
    return await node.until_status(*FINAL)


@contextlib.asynccontextmanager
async def moving(
    compat: Compat, folder: Path, capabilities: Sequence[str], more: Sequence[str] = ()
) -> AsyncIterator[tuple[Node, Node]]:
    """A QEMU that has begun to send its machine to an endpoint that would hold it."""
    events = [{"capability": name, "state": True} for name in ("events", *capabilities)]
    async with (
        endpoint_node(compat, "held", folder) as held,
        qemu_node(compat, "source", more=more) as source,
    ):
        await source.qmp.command("migrate-set-capabilities", capabilities=events)
        await source.qmp.command("migrate-set-parameters", max_bandwidth=0)
        await held.qmp.command("migrate-set-capabilities", capabilities=events[:1])
        await held.qmp.command("migrate-incoming", uri=f"unix:{folder}/in")
        await source.qmp.command("migrate", uri=f"unix:{folder}/in")
        yield source, held


async def refused(source: Node, held: Node, *, leaves: bool = False) -> str:
    """The source runs on (or ``leaves`` then); why the endpoint refused it, as it says when it ends."""
    assert await until_final(source) == "failed"
    # The machine runs again a moment after the status has said so.
    with trio.fail_after(30):
        while (status := (await source.qmp.command("query-status"))["status"]) == "finish-migrate":
            await trio.sleep(0.01)
    assert status == "running"
    if leaves:
        await source.qmp.command("quit")
    assert await held.process.wait() == 1
    (line,) = [line for line in held.process.err.lines if "the machine did not arrive" in line]
    return line


@pytest.mark.parametrize("more", [(), ("return-path",)], ids=["one way", "return path"])
@pytest.mark.parametrize("compat", EACH)
async def test_shared_memory_that_is_not_sent(compat: Compat, more: tuple[str, ...], tmp_path: Path) -> None:
    """7.2 leaves out all shared blocks, 10.0 those in a file: not a page of them would come."""
    file = ("-object", f"memory-backend-file,id=kept,mem-path={tmp_path}/kept,size=64M,share=on")
    other = (*file, "-M", "pc,memory-backend=kept") if compat == "10.0" else ()
    async with moving(compat, tmp_path, ("x-ignore-shared", *more), other) as ends:
        assert (await refused(*ends)).endswith(f": {SHARED}")


@pytest.mark.parametrize("compat", EACH)
async def test_a_qemu_refuses_shared_memory_in_these_words(compat: Compat, tmp_path: Path) -> None:
    async with (
        qemu_node(compat, "there", incoming=True) as there,
        qemu_node(compat, "here") as here,
    ):
        wanted = [{"capability": name, "state": True} for name in ("events", "x-ignore-shared")]
        await here.qmp.command("migrate-set-capabilities", capabilities=wanted)
        await there.qmp.command("migrate-incoming", uri=f"unix:{tmp_path}/in")
        await here.qmp.command("migrate", uri=f"unix:{tmp_path}/in")
        await there.process.err.find(SHARED)


@pytest.mark.parametrize("compat", EACH)
async def test_channels_that_nobody_takes(compat: Compat, tmp_path: Path) -> None:
    """With multifd the pages come over further connections. A source that is refused there keeps the first one."""
    async with moving(compat, tmp_path, ("multifd",)) as ends:
        await refused(*ends, leaves=True)


@pytest.mark.parametrize("compat", EACH)
async def test_a_uuid_is_kept_and_sent_on(compat: Compat, tmp_path: Path) -> None:
    """So the QEMU that takes the machine in the end compares it with its own."""
    async with moving(compat, tmp_path, ("validate-uuid",), ("-uuid", UUID)) as (source, held):
        assert await until_final(source) == "completed"
        assert await until_final(held) == "completed"
        other = UUID.replace("1", "9")
        for name, uuid, path in (("other", other, "a"), ("same", UUID, "b")):
            async with qemu_node(compat, name, incoming=True, more=("-uuid", uuid)) as target:
                events = [{"capability": "events", "state": True}]
                await target.qmp.command("migrate-set-capabilities", capabilities=events)
                await target.qmp.command("migrate-incoming", uri=f"unix:{tmp_path}/{path}")
                held.begin()
                await held.qmp.command("migrate", uri=f"unix:{tmp_path}/{path}")
                if name == "other":
                    await target.process.err.find(f"UUID received is {UUID} and local is {other}")
                    assert await held.until_status(*FINAL) == "failed"
                else:
                    assert await held.until_status(*FINAL) == "completed"
