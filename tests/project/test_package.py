"""The package without a checkout: what is refused, what is in it, and that it works."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.examples.test_examples_blk import session
from tests.examples.test_examples_bridge import exchange
from tests.kit.raw_front_end import Guest, RawFrontEnd
from tests.peers.child import open_child
from tools import check_package
from vhostpc.wire.vhost_user import Feature

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 300


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return check_package.copy_to(tmp_path_factory.mktemp("checkout"), check_package.project_files())


# --- what compiling needs


def refusal(folder: Path, code: str = "pass", **environment: str) -> str:
    """What is said where a wheel is to be built, by a Python that runs ``code`` first."""
    hook = f"import sys, setuptools.build_meta as b; {code}; b.build_wheel('dist')"
    done = subprocess.run(
        [sys.executable, "-c", hook],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert not done.stdout
    assert not (folder / "build").exists()
    (line,) = done.stderr.splitlines()
    return line.removeprefix("vhostpc cannot be compiled here: ")


def test_a_missing_compiler_is_one_sentence(checkout: Path) -> None:
    assert refusal(checkout, CC="/absent/cc -x") == (
        "there is no C compiler /absent/cc (Debian: apt-get install gcc libc6-dev; CC= names another one)"
    )


@pytest.mark.parametrize(
    ("header", "package"),
    [("Python.h", "python3-dev"), ("pthread.h", "libc6-dev"), ("linux/userfaultfd.h", "linux-libc-dev")],
)
def test_missing_headers_are_one_sentence(header: str, package: str, checkout: Path, tmp_path: Path) -> None:
    """By a compiler that finds all but one."""
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\n! grep -q '<{header}>'\n")
    compiler.chmod(0o755)
    assert re.fullmatch(
        rf"<{header}> is missing, .*\(Debian: apt-get install {package}\)",
        refusal(checkout, CC=str(compiler)),
    )


def test_another_system_is_one_sentence(checkout: Path) -> None:
    assert refusal(checkout, "sys.platform = 'darwin'") == "it needs Linux, for userfaultfd"


# --- what is in it


def wheel(folder: Path, change: Callable[[dict[str, str]], object] = lambda held: None) -> Path:
    """A small wheel that is as it should be, but for one change."""
    held = {
        "vhostpc/__init__.py": "",
        "vhostpc/py.typed": "",
        "vhostpc/_native/_vpc.abi3.so": "",
        "vhostpc-1.dist-info/WHEEL": "Tag: cp311-abi3-linux_x86_64\n",
        "vhostpc-1.dist-info/METADATA": "## Two commands\n[web](https://example.org)\n",
    }
    change(held)
    path = folder / "vhostpc-1-cp311-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in held.items():
            archive.writestr(name, text)
    return path


FILES = {
    "Makefile",
    "vhostpc/__init__.py",
    "vhostpc/py.typed",
    "vhostpc/_native/build.py",
    "vhostpc/_native/memory/gm.c",
}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda held: None, None),
        (lambda held: held.pop("vhostpc/py.typed"), "wheel lacks vhostpc/py.typed"),
        (lambda held: held.pop("vhostpc/_native/_vpc.abi3.so"), "wheel lacks the compiled module"),
        (
            lambda held: held.update({"vhostpc/_native/memory/gm.c": ""}),
            "wheel holds vhostpc/_native/memory/gm.c, ",
        ),
        (
            lambda held: held.update({"vhostpc/_native/build.py": ""}),
            "wheel holds vhostpc/_native/build.py, ",
        ),
        (lambda held: held.update({"tests/x.py": ""}), "wheel holds tests/x.py, "),
        (
            lambda held: held.update({"vhostpc-1.dist-info/WHEEL": "Tag: cp311-cp311-linux_x86_64\n"}),
            "stable ABI",
        ),
        (lambda held: held.update({"vhostpc-1.dist-info/METADATA": ""}), "the description lacks README.md"),
        (
            lambda held: held.update({"vhostpc-1.dist-info/METADATA": "## Two commands [a](docs/a.md)"}),
            "a link that leads nowhere: ](docs/a.md)",
        ),
    ],
)
def test_each_fault_of_a_wheel_is_found(
    change: Callable[[dict[str, str]], object], problem: str | None, tmp_path: Path
) -> None:
    found = check_package.wheel_problems(FILES, wheel(tmp_path, change))
    assert len(found) == (problem is not None), found
    assert problem is None or problem in found[0]


def test_each_fault_of_a_source_archive_is_found() -> None:
    made = {"PKG-INFO", "setup.cfg", "vhostpc.egg-info/SOURCES.txt"}
    assert check_package.archive_problems(FILES, FILES | made) == []
    assert check_package.archive_problems(FILES, FILES - {"Makefile"}) == ["source archive lacks Makefile"]
    assert check_package.archive_problems(FILES, FILES | {"x.o"}) == [
        "source archive holds x.o, which is not of the project"
    ]


# --- that it works


@pytest.fixture(scope="module")
def archive(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source archive, unpacked."""
    folder = tmp_path_factory.mktemp("archive")
    (folder / "in").mkdir()
    return check_package.unpack(check_package.build("sdist", checkout, folder), folder / "in")


@pytest.fixture(scope="module")
def installed(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command ``vhostpc`` of an environment that has the wheel, and what it depends on, and no more of ours."""
    folder = tmp_path_factory.mktemp("installed")
    built = check_package.build("wheel", archive, folder)
    there = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", there], check=True)
    python = there / "bin" / "python"
    install: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        built,
    ]
    subprocess.run(install, check=True)
    (site,) = there.glob("lib/python*/site-packages")
    # A folder named in a .pth file is searched for modules; its own .pth files (an editable install's) are not read.
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(others) + "\n")
    found = subprocess.run(
        [python, "-I", "-c", "import vhostpc; print(vhostpc.__file__)"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(found.stdout.strip()).is_relative_to(site)
    assert not list((site / "vhostpc").rglob("*.[ch]"))
    return there / "bin" / "vhostpc"


def clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def call(installed: Path, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [installed, *arguments],
        cwd=folder,
        env=clean(),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.ufd
def test_the_wheel_demonstrates_itself(installed: Path, tmp_path: Path) -> None:
    said = call(installed, tmp_path, "demo", "--size", "64M")
    assert "Every frame and every page is accounted for" in said
    for name in ("bridge", "blk", "backend", "doctor", "endpoint", "inspect", "proxy", "completion"):
        assert call(installed, tmp_path, name, "--help").startswith(f"Usage: vhostpc {name} ")
    assert call(installed, tmp_path, "--version").startswith("vhostpc 0.")


DEVICE = """\
import os

from vhostpc.backend import Device, Queue


class Mine(Device):
    device_id = 4

    async def handle_queue(self, queue: Queue) -> None:
        async for chain in queue:
            chain.write(os.urandom(min(chain.writable, 65536)))
"""


@pytest.mark.long
@pytest.mark.parametrize("kind", ["bridge", "blk", "backend"])
async def test_the_programs_of_the_wheel_serve(kind: str, installed: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    (tmp_path / "mine.py").write_text(DEVICE)
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as far:
        far.bind(("127.0.0.1", 0))
        far.setblocking(False)
        options = {
            "bridge": ["-l", "127.0.0.1:0", "-r", f"127.0.0.1:{far.getsockname()[1]}"],
            "blk": ["--blk-file", "disk.img"],
            "backend": ["mine.py:Mine"],
        }[kind]
        command: list[str | Path] = [
            "env",
            "-u",
            "PYTHONPATH",
            installed,
            kind,
            *options,
            "--socket-path",
            path,
        ]
        async with open_child(command, name=kind, cwd=tmp_path) as child:
            await child.until(f"ready on {path}")
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.connect(str(path))
            if kind == "bridge":
                await exchange(sock, far)
            else:
                front, guest = RawFrontEnd(sock), Guest(4 << 20)
                with trio.fail_after(LIMIT):
                    if kind == "blk":
                        await session(front, guest)
                        assert (tmp_path / "disk.img").read_bytes()[1024:1536] == b"written!" * 64
                    else:
                        features, _ = await front.negotiate()
                        assert features & Feature.VERSION_1
                front.close()
                guest.close()
            child.process.send_signal(signal.SIGTERM)
            assert await child.wait() == 0, child.said


@pytest.mark.long
def test_tests_run_in_an_unpacked_source_archive(archive: Path, tmp_path: Path) -> None:
    """All of them can be read there; some that need the compiled module, docs, examples, tools and units pass."""
    folder = tmp_path / "unpacked"
    shutil.copytree(archive, folder)

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=clean(),
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    python("setup.py", "-q", "build_ext", "--inplace")
    python("-m", "pytest", "--collect-only", "-q")
    names = ["project/test_layers", "examples/test_examples_deployment", "cli/test_cli_manifest"]
    names += ["backend/test_backend_queue", "wire/test_wire_vhost_user", "project/test_logs"]
    python("-m", "pytest", "-q", *(f"tests/{name}.py" for name in names))
    assert Path(python("-c", "import vhostpc; print(vhostpc.__file__)").strip()).is_relative_to(folder)
