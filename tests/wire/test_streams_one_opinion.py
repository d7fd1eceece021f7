"""``vhostpc inspect`` and the endpoint have one reader: what one calls wrong the other refuses, at the same byte."""

from __future__ import annotations

import io
import re

import pytest

from tests.kit.migration_ends import feed
from tests.kit.streams import POSTCOPY, PRECOPY
from tests.migration.test_migration_incoming import REFUSED, TAKEN
from vhostpc.cli.inspect import inspect_stream
from vhostpc.migration.held import HeldMachine

#: What an endpoint does not want, or misses, of a stream without a wrong byte.
OF_AN_ENDPOINT = {
    "advise of other page sizes",
    "advise of another target page",
    "advise without sizes",
    "a package without a return path",
    "colo",
    "a page that never comes",
}


def wrong_byte(data: bytes) -> int | None:
    found = inspect_stream(io.BytesIO(data).read, lambda *_: None).wrong
    return None if found is None else found.offset


async def refused_byte(data: bytes) -> int | None:
    with HeldMachine() as machine:
        error = (await feed(data, machine, postcopy=b"\x08\x00\x03" in data)).error
    found = re.search(r"byte (\d+)", str(error)) if error else None
    assert error is None or found is not None, error
    return None if found is None else int(found[1])


@pytest.mark.parametrize("what", sorted(set(REFUSED) - OF_AN_ENDPOINT))
async def test_what_is_refused(what: str) -> None:
    data = REFUSED[what][0]
    assert wrong_byte(data) == await refused_byte(data) is not None


@pytest.mark.parametrize("what", [*TAKEN, "precopy", "postcopy"])
async def test_what_is_taken(what: str) -> None:
    data = {**TAKEN, "precopy": PRECOPY, "postcopy": POSTCOPY}[what]
    assert wrong_byte(data) is None
    assert await refused_byte(data) is None


@pytest.mark.parametrize("what", sorted(OF_AN_ENDPOINT))
def test_what_only_an_endpoint_refuses_is_there(what: str) -> None:
    assert what in REFUSED
