"""What a peer makes us say has a limit of rate."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhostpc.logs import BURST, INTERVAL, Ration

ROOT = Path(__file__).resolve().parents[2]
MORE = "more lines like the last one follow: they are only counted"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    log, own = logging.getLogger("test.ration"), Ration()
    log.setLevel(logging.DEBUG)
    log.addFilter(own)
    yield log
    log.removeFilter(own)


def test_the_first_few_lines_then_a_count(
    log: logging.Logger, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(1000):
        log.warning("declined: %d", i)
    assert caplog.messages == [*(f"declined: {i}" for i in range(BURST)), MORE]
    caplog.clear()
    clock.now += INTERVAL
    log.info("another")
    assert caplog.messages == [
        f"{1000 - BURST} lines were suppressed, the last one: declined: 999",
        "another",
    ]
    assert caplog.records[0].levelno == logging.WARNING
    caplog.clear()
    log.warning("declined: %d", 1)
    assert caplog.messages == ["declined: 1"]


def test_one_kind_takes_no_line_from_another(
    log: logging.Logger, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(100):
        log.error("%s", i)
        log.error("%d", i)
    assert len(caplog.messages) == 2 * (BURST + 1)


def test_lines_for_debugging_are_all_written(log: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(100):
        log.debug("a message")
    assert len(caplog.messages) == 100


def test_no_argument_is_kept(log: logging.Logger, clock: Clock) -> None:
    """It may own descriptors."""

    class Owner:
        gone = 0

        def __del__(self) -> None:
            Owner.gone += 1

    for _ in range(100):
        log.error("%s", Owner())
    assert Owner.gone >= 100 - BURST


def test_the_count_is_told_at_the_end_of_the_process() -> None:
    code = (
        "import logging\nfrom vhostpc.logs import rationed_logger\nlogging.basicConfig(format='%(message)s')\n"
        "log = rationed_logger('x')\nfor i in range(100): log.warning('no %d', i)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-2:] == [
        MORE,
        f"{100 - BURST} lines were suppressed, the last one: no 99",
    ]


@pytest.mark.parametrize(
    "path",
    [*sorted((ROOT / "vhostpc").rglob("*.py")), *sorted((ROOT / "examples").rglob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_all_that_logs_has_a_limit(path: Path) -> None:
    if path.name == "logs.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr == "getLogger":
            pytest.fail(f"{path.name}:{node.lineno}: getLogger in place of rationed_logger")
