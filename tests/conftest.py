"""Settings for the whole suite."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tests.kit.hugepages import HUGE, hugepages
from vhostpc.logs import ration

try:
    from hypothesis import settings
except ImportError:  # in a small guest only a few files of the suite run, and none needs it
    pass
else:
    # Times are not asserted, and a first example may have to load a library.
    settings.register_profile("default", deadline=None)
    settings.register_profile(
        "fuzz", deadline=None, max_examples=int(os.environ.get("FUZZ_EXAMPLES", "5000"))
    )
    settings.load_profile("fuzz" if "FUZZ_EXAMPLES" in os.environ else "default")


# Under nohup SIGHUP is ignored, and programs that tests start would do the same.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test with QEMU needs its peers; what is promised is not skipped where CI is set."""
    if item.get_closest_marker("qemu"):
        from tests.qemu import guest, peers

        try:
            if os.geteuid() != 0:
                raise peers.PeerMissing("needs root: a network namespace, huge pages")
            guest.initrd(peers.kernel())
            for version in (*peers.VERSIONS, peers.NEWEST):
                peers.qemu(version)
        except peers.PeerMissing as exc:
            pytest.fail(str(exc)) if os.environ.get("CI") else pytest.skip(str(exc))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Property tests are what ``make fuzz`` runs with many more examples."""
    for item in items:
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker("fuzz")


@pytest.fixture(autouse=True)
def all_lines() -> Iterator[None]:
    """What one test has logged takes no line from another."""
    ration.forget()
    yield
    ration.forget()


@pytest.fixture
def huge_pages() -> Iterator[int]:
    """128 MiB more of huge pages; the size of one."""
    with hugepages(128):
        yield HUGE
