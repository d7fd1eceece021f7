"""Takes a machine from a QEMU, shows what it is made of, and sends it on to another QEMU.

    python examples/migrate unix:/tmp/in unix:/tmp/out [--postcopy]

The first QEMU sends it by ``migrate unix:/tmp/in``, by precopy or by postcopy. The second one has the same command
line and ``-incoming unix:/tmp/out``; for ``--postcopy`` it has ``-incoming defer``, and is told
``migrate_set_capability postcopy-ram on`` before ``migrate_incoming unix:/tmp/out``.

``vhostpc endpoint`` does the same with a monitor, and goes on after a failure: docs/migration.md.
"""

import sys
from contextlib import closing

import trio

from vhostpc import errors
from vhostpc.migration import HeldMachine, Incoming, Options, Outgoing, connect, listen, parse_address


async def take(machine: HeldMachine, address: str) -> None:
    async with listen(parse_address(address, incoming=True)) as listener:
        print(f"waiting for a machine at {address}", flush=True)
        channel = await listener.accept()
    async with channel:
        with closing(Incoming(channel, machine, postcopy=True)) as incoming:
            await incoming.receive()  # to its last page, whichever way it comes


def show(machine: HeldMachine) -> None:
    print(f"{machine.configuration.machine} is held")
    for block in machine.ram.blocks:
        print(f"  RAM block {block.name}: {block.length >> 10} KiB in pages of {block.page_size >> 10} KiB")
    for section in (*machine.early, *machine.devices):
        name, size = f"{section.idstr} {section.instance}", len(section.body)
        print(f"  device section {name}: version {section.version}, {size} bytes")


async def send(machine: HeldMachine, address: str, postcopy: bool) -> None:
    options = Options(on={"postcopy-ram"} if postcopy else set())
    async with await connect(parse_address(address)) as channel:
        with closing(Outgoing(channel, machine, options=options)) as outgoing:
            if postcopy:
                outgoing.start_postcopy()  # at once: it runs there, and its pages follow
            await outgoing.send()  # until the destination says that it has all
            print(f"sent to {address}: {outgoing.ram_info().transferred >> 10} KiB")


async def main(come: str, go: str, postcopy: bool) -> None:
    with HeldMachine() as machine:
        await take(machine, come)
        show(machine)
        print("press Enter to send it on", flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
        await send(machine, go, postcopy)


if __name__ == "__main__":
    postcopy = sys.argv[3:] == ["--postcopy"]
    if len(sys.argv) != 3 + postcopy:
        sys.exit(__doc__)
    try:
        trio.run(main, sys.argv[1], sys.argv[2], postcopy)
    except (errors.VhostpcError, OSError) as error:
        sys.exit(f"migrate: {error}")
