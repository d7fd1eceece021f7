"""``vhostpc doctor`` on this machine and with rights taken away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vhostpc.cli import checks
from vhostpc.cli.checks import Level
from vhostpc.pages import dirty
from vhostpc.ufd import Features, kernel_version, probe

ROOT = Path(__file__).resolve().parents[2]


def doctor(*arguments: str, profile: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vhostpc", "doctor", *arguments]
    if profile:
        command = [sys.executable, "-m", "tests.kit.confine", profile, *command]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def as_root() -> None:
    if os.geteuid() != 0:
        pytest.fail("needs root") if os.environ.get("CI") else pytest.skip("needs root")


@pytest.mark.ufd
def test_here_it_works() -> None:
    done = doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Postcopy can work here." in done.stdout


@pytest.mark.ufd
def test_json_has_a_row_for_each_look() -> None:
    done = doctor("--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["postcopy"] is True
    rows = {c["name"]: c for c in found["checks"]}
    wanted = {
        "kernel",
        "userfaultfd",
        "features",
        "dirty tracking",
        "memfd",
        "huge pages",
        "transparent huge pages",
        "mlockall",
    }
    assert wanted | {"/dev/shm", "open files", "tap devices", "QEMU"} <= set(rows)
    assert rows["kernel"]["facts"]["minimum"] == "5.11"
    assert set(rows["userfaultfd"]["facts"]["ways"]) == {"device", "syscall", "user_mode_only"}
    assert "MISSING_SHMEM" in rows["userfaultfd"]["facts"]["features"]
    assert set(rows["dirty tracking"]["facts"]["ways"]) == {"wp-async", "wp-sync"}
    assert rows["dirty tracking"]["facts"]["ways"]["wp-sync"]["works"] == (kernel_version() >= (5, 19))


@pytest.mark.ufd
@pytest.mark.usefixtures("as_root")
def test_denied_userfaultfd_is_3_and_says_why_and_what_to_do() -> None:
    done = doctor(profile="denied")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "seccomp filter" in done.stdout
    assert "-> give this process read and write access to /dev/userfaultfd" in done.stdout
    assert "Postcopy cannot work here" in done.stdout
    assert not done.stderr
    found = json.loads(doctor("--json", profile="denied").stdout)
    assert found["postcopy"] is False
    (row,) = [c for c in found["checks"] if c["name"] == "userfaultfd"]
    assert row["level"] == "fail"
    assert row["facts"]["best"] is None


@pytest.mark.ufd
@pytest.mark.usefixtures("as_root")
def test_an_ordinary_user_is_told_that_user_mode_is_enough() -> None:
    found = json.loads(doctor("--json", profile="nobody").stdout)
    assert found["postcopy"] is True
    (row,) = [c for c in found["checks"] if c["name"] == "userfaultfd"]
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "0":
        assert row["facts"]["best"] == "user_mode_only"
        assert "enough for vhostpc" in row["text"]


@pytest.mark.ufd
def test_what_dirty_tracking_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = probe()
    assert checks.check_dirty_tracking(replace(found, ways=())) is None, "without userfaultfd there is no row"
    monkeypatch.setitem(dirty._FEATURES, dirty.DirtyWay.WP_ASYNC, Features(1 << 60))
    row = checks.check_dirty_tracking(found)
    assert row is not None
    assert (row.level, row.mend) == (Level.NOTE, "use Linux 6.7 or later for wp-async")
    assert "by wp-sync" in row.text
    monkeypatch.setitem(dirty._FEATURES, dirty.DirtyWay.WP_SYNC, Features(1 << 60))
    row = checks.check_dirty_tracking(found)
    assert row is not None
    assert row.level is Level.WARN
    assert "needs Linux 5.19" in row.text
    assert "use Linux 5.19 or later" in row.mend


def fake_qemu(folder: Path, version: str) -> Path:
    program = folder / "qemu-system-x86_64"
    program.write_text(f"#!/bin/sh\necho 'QEMU emulator version {version}'\n")
    program.chmod(0o755)
    return program


@pytest.mark.parametrize(
    ("version", "bug"),
    [("7.2.22 (Debian 1:7.2)", "MSI-X"), ("10.0.2", "queue pairs"), ("10.0.2", "postcopy-preempt")],
)
def test_known_bugs_of_qemu_are_named(tmp_path: Path, version: str, bug: str) -> None:
    found = checks.check_qemu(fake_qemu(tmp_path, version))
    assert found.level is Level.NOTE
    assert bug in found.text
    assert found.mend
    assert ("--no-fault" in found.mend) == version.startswith("10")
    assert found.facts["version"] == version.split()[0]


def test_a_program_that_is_no_qemu(tmp_path: Path) -> None:
    program = tmp_path / "qemu-system-x86_64"
    program.write_text("#!/bin/sh\necho hello\n")
    program.chmod(0o755)
    assert "does not report its version" in checks.check_qemu(program).text
    assert "does not report its version" in checks.check_qemu(tmp_path / "absent").text


def doctor_through(*command: str) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit code and the rows of a doctor with fewer rights."""
    done = subprocess.run(
        [*command, sys.executable, "-m", "vhostpc", "doctor", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, {row["name"]: row for row in json.loads(done.stdout)["checks"]}


def test_few_descriptors_are_a_row() -> None:
    """With which each program ends with 3."""
    code, rows = doctor_through("prlimit", "--nofile=20")
    assert code == 3
    assert rows["open files"]["level"] == "fail"
    assert "this process may have 20 open files" in rows["open files"]["text"]
    assert "ulimit -n" in rows["open files"]["mend"]


@pytest.mark.usefixtures("as_root")
def test_rights_for_tap_devices_are_a_row() -> None:
    """Without CAP_NET_ADMIN the bridge is refused another user's."""
    _, rows = doctor_through("setpriv", "--bounding-set", "-net_admin")
    assert rows["tap devices"]["level"] == "note"
    assert "only those that belong to this user" in rows["tap devices"]["text"]
    assert "only for --tap" in rows["tap devices"]["mend"]
    before = set(os.listdir("/sys/class/net"))
    _, rows = doctor_through()
    assert rows["tap devices"]["level"] == "ok"
    assert set(os.listdir("/sys/class/net")) == before


def test_without_proc_nobody_counts_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> list[str]:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "listdir", absent)
    assert checks.check_descriptors().level is Level.OK


@pytest.mark.parametrize(("number", "mend"), [(2, "modprobe tun"), (13, "let this process open it")])
def test_a_tun_device_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch, number: int, mend: str) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    row = checks.check_tap()
    assert (row.level, row.text) == (Level.NOTE, f"/dev/net/tun: {os.strerror(number)}")
    assert row.mend.startswith(f"only for --tap: {mend}")
