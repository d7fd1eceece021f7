"""Random answers of a back-end, over the whole life of a machine: it is left in one sentence, or it is not."""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.backend.test_backend_fuzz import NUMBER, PAYLOAD, SMALL, open_fd, run
from tests.kit.fake_backend import REPLY, Answer, FakeBackend, listening
from tests.kit.until import until
from vhostpc.errors import PostcopyRefused, VhostpcError
from vhostpc.guest.netdev import AREA
from vhostpc.guest.own_machine import Block, OwnMachine, Spec, open_machine
from vhostpc.pages.service import FaultService
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import BackendRequest, Frame, MemoryRegion, Request

pytestmark = pytest.mark.ufd
ANSWERED = [
    Request.GET_FEATURES,
    Request.GET_PROTOCOL_FEATURES,
    Request.GET_QUEUE_NUM,
    Request.GET_MAX_MEM_SLOTS,
    Request.SET_BACKEND_REQ_FD,
    Request.SET_FEATURES,
    Request.SET_MEM_TABLE,
    Request.ADD_MEM_REG,
    Request.SET_LOG_BASE,
    Request.SET_VRING_ADDR,
    Request.SET_VRING_ENABLE,
    Request.GET_VRING_BASE,
    Request.POSTCOPY_ADVISE,
    Request.POSTCOPY_LISTEN,
    Request.POSTCOPY_END,
]
REGION = st.builds(MemoryRegion, NUMBER, NUMBER, NUMBER, NUMBER)
#: Of the size that is right somewhere, with numbers that are not.
BODY = st.one_of(
    PAYLOAD,
    st.builds(lambda i, n: struct.pack("=II", i, n), st.integers(0, 1), SMALL),
    st.builds(lambda region: vu.pack_table([region]), REGION),
    st.builds(vu.pack_single_region, REGION),
)
FLAGS = st.sampled_from([REPLY] * 8 + [vu.VERSION, REPLY | vu.FLAG_NEED_REPLY, 0, (1 << 32) - 1])
KINDS = st.lists(st.sampled_from(["event", "memory", "pipe", "socket"]), max_size=2)
ANSWER = st.tuples(st.one_of(st.none(), st.integers(0, 60)), FLAGS, BODY, KINDS)
#: Another answer, none at all, or the right one twice.
LIE = st.one_of(ANSWER, st.sampled_from(["nothing", "twice"]))
CHANNEL = st.tuples(
    st.one_of(st.sampled_from(BackendRequest), st.integers(0, 60)), st.sampled_from([1, 9, 0]), BODY
)


Lie = tuple[int | None, int, bytes, list[str]]


class Liar:
    """Of each request that is named the first answers are these."""

    def __init__(self, lies: dict[Request, list[object]]) -> None:
        self.left = {request: list(answers) for request, answers in lies.items()}
        self.fakes: list[FakeBackend] = []

    def change(self, frame: Frame) -> list[Answer] | None:
        lies = self.left.get(Request(frame.request)) if frame.request in ANSWERED else None
        if not lies:
            return None
        lie = lies.pop(0)
        if lie == "nothing":
            return []
        if lie == "twice":
            return self.fakes[-1].usual(frame) * (2 if frame.request != Request.POSTCOPY_ADVISE else 1)
        request, flags, payload, kinds = cast(Lie, lie)
        fds = []
        for kind in kinds:
            first, *others = open_fd(kind)
            fds.append(first)
            for fd in others:
                os.close(fd)
        return [(frame.request if request is None else request, flags, payload, fds)]


@contextlib.asynccontextmanager
async def machine_with(liar: Liar, folder: str) -> AsyncIterator[OwnMachine | None]:
    """None: it was not even opened, which it says in one sentence."""
    path = Path(folder) / "backend"
    spec = Spec([Block("mem", AREA + 65536)], backends=[str(path)], writes=10, checks=10, timeout=0.05)
    async with listening(path, liar.change) as fakes:
        liar.fakes = fakes
        async with contextlib.AsyncExitStack() as stack:
            try:
                machine = await stack.enter_async_context(open_machine(spec))
            except* VhostpcError:
                yield None
            else:
                yield machine


async def whole_life(machine: OwnMachine, fake: FakeBackend, said: list[tuple[int, int, bytes]]) -> None:
    """What an endpoint has a machine do, but for moving; no error comes out of it but a refusal of postcopy."""
    (backend,) = machine.backends
    await machine.cont()
    if fake.channel is not None:
        with contextlib.suppress(OSError):
            for request, flags, payload in said:
                await fake.channel.send(vu.HEADER.pack(request, flags, len(payload)) + payload)
    for area in (machine._log, None):
        await backend.set_log(area)
        machine._log.merge(machine._regions)
    await machine.stop()
    sections, _ = await machine.save()
    assert len(sections) == 4
    with FaultService(machine.ram) as service, contextlib.suppress(PostcopyRefused):
        await machine.advise(service)
        await machine.listen()
    await machine.end()
    await machine.cont()
    beats = machine.vcpus[0].numbers().beats
    await until(lambda: machine.vcpus[0].numbers().beats > beats)
    machine.report()
    assert len(machine.problems) == (0 if backend.works else 1), machine.problems
    await machine.stop()


@settings(suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(st.sampled_from(ANSWERED), st.lists(LIE, min_size=1, max_size=3), max_size=2),
    st.lists(CHANNEL, max_size=3),
)
def test_any_answers(lies: dict[Request, list[object]], said: list[tuple[int, int, bytes]]) -> None:
    async def scenario() -> None:
        with tempfile.TemporaryDirectory() as folder:
            liar = Liar(lies)
            async with machine_with(liar, folder) as machine:
                if machine is not None:
                    await whole_life(machine, liar.fakes[0], said)

    run(scenario)
