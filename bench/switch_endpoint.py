"""``vhostpc`` that notes when the steps of a switch begin and end: ``python -m bench.switch_endpoint endpoint ...``.

Each stamp is a line of the file that ``SWITCH`` names: nanoseconds of CLOCK_MONOTONIC, and which step it was. One costs
a system call of a microsecond or two, and a step is stamped some ten times in a switch.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import time
from collections.abc import Callable
from typing import Any

from vhostpc.cli.main import main

STEPS = {
    "switch": "vhostpc.migration.outgoing:Outgoing._switch",
    "stop": "vhostpc.endpoint.endpoint:Endpoint.stop_to_send",
    "vcpus": "vhostpc.guest.own_machine:stop_all",
    "bases": "vhostpc.guest.backends:BackEnd.stop",
    "rings": "vhostpc.guest.netdev:NetDevice.stop",
    "stand": "vhostpc.guest.own_machine:OwnMachine._stand",
    "look": "vhostpc.guest.own_machine:OwnMachine.sync_dirty",
    "save": "vhostpc.guest.own_machine:OwnMachine.save",
    "package": "vhostpc.migration.outgoing:Outgoing._send_package",
    "serve": "vhostpc.pages.pagesource:PageSource.serve",
    "discard": "vhostpc.migration.incoming:Incoming._discard",
    "split": "vhostpc.migration.incoming:Incoming._elements",
    "arm": "vhostpc.pages.service:FaultService.arm",
    "listen": "vhostpc.guest.own_machine:OwnMachine.listen",
    "heard": "vhostpc.frontend.postcopy:BackendPostcopy.listen",
    "net": "vhostpc.guest.netdev:NetDevice.load",
    "load": "vhostpc.migration.incoming:Incoming._load_package",
    "run": "vhostpc.endpoint.endpoint:Endpoint.let_run",
    "go": "vhostpc.guest.vcpu:VCpu.go",
    "backend": "vhostpc.guest.backends:BackEnd.start",
}


def hook(name: str, where: str, stamp: Callable[[str], None]) -> None:
    """Have the function at ``where`` stamped before and after each call. Raises AttributeError: there is none."""
    module, _, path = where.partition(":")
    holder: Any = importlib.import_module(module)
    *classes, last = path.split(".")
    for part in classes:
        holder = getattr(holder, part)
    plain: Callable[..., Any] = getattr(holder, last)

    @functools.wraps(plain)
    def stamped(*args: Any, **more: Any) -> Any:
        stamp(f"{name}>")
        try:
            return plain(*args, **more)
        finally:
            stamp(f"{name}<")

    @functools.wraps(plain)
    async def awaited(*args: Any, **more: Any) -> Any:
        stamp(f"{name}>")
        try:
            return await plain(*args, **more)
        finally:
            stamp(f"{name}<")

    setattr(holder, last, awaited if inspect.iscoroutinefunction(plain) else stamped)


def hook_all() -> None:
    file = os.open(os.environ["SWITCH"], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def stamp(what: str) -> None:
        os.write(file, b"%d %s\n" % (time.monotonic_ns(), what.encode()))

    for name, where in STEPS.items():
        hook(name, where, stamp)


if __name__ == "__main__":
    hook_all()
    main()
