"""What can not be done here is refused as QEMU refuses it, before anything moves; and nothing is ignored."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.own_machine import bridge, far_side
from tests.qemu import peers
from tests.sequences.nodes import Node, own_node, qemu_node
from vhostpc.migration.options import Compat

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
@pytest.mark.parametrize("compat", peers.VERSIONS)
async def test_a_back_end_that_lacks_something(
    compat: Compat, what: str, incoming: bool, tmp_path: Path
) -> None:
    """Without a log the machine can not leave; without PAGEFAULT it can not come by postcopy."""
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
