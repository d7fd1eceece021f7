"""Which pairs of a bridge are given frames of the network: those that the guest uses."""

from __future__ import annotations

from tests.kit.net_card import udp
from tests.kit.raw_front_end import Guest, RawFrontEnd, connected
from tests.kit.until import until
from vhostpc.backend.net import Bridge
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Request

RX_OF_FIRST, RX_OF_SECOND = 0, 2


async def enable(front: RawFrontEnd, index: int, on: bool) -> None:
    await front.send(Request.SET_VRING_ENABLE, vu.VringState(index, int(on)).pack())
    await front.barrier()


async def test_a_further_link_is_attached_while_its_pair_is_enabled() -> None:
    guest = Guest()
    first, second = guest.ring(RX_OF_FIRST), guest.ring(RX_OF_SECOND)
    calls: list[tuple[int, bool]] = []
    with udp() as link, udp() as other:
        bridge = Bridge(
            [link.fileno(), other.fileno()], pairs=2, attach=lambda fd, on: calls.append((fd, on))
        )
        on, off = (other.fileno(), True), (other.fileno(), False)
        assert calls == [off]  # nobody uses it yet; the first pair's always stays
        async with connected(bridge) as front:
            await front.negotiate()
            await guest.send_memory(front)
            await first.send_setup(front)
            await second.send_setup(front)
            await until(lambda: calls == [off, on], 10)
            # Stopped and started again it keeps frames that come meanwhile.
            reply = await front.ask(Request.GET_VRING_BASE, vu.VringState(RX_OF_SECOND, 0).pack())
            await second.send_setup(front, base=vu.VringState.unpack(reply.payload).num)
            await front.barrier()
            assert calls == [off, on]
            await enable(front, RX_OF_SECOND, False)
            await until(lambda: calls == [off, on, off], 10)
            await enable(front, RX_OF_SECOND, True)
            await until(lambda: calls == [off, on, off, on], 10)
        # The next front-end begins with one pair.
        async with connected(bridge) as front:
            await front.negotiate()
            await until(lambda: calls == [off, on, off, on, off], 10)
    guest.close()
