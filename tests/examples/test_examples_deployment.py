"""The units and the libvirt domain agree with the programs and with each other."""

from __future__ import annotations

import configparser
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNITS = ROOT / "examples" / "systemd"
SERVICES = sorted(UNITS.glob("*.service"))


def unit(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(path)
    return parser


@pytest.mark.parametrize("path", SERVICES, ids=lambda p: p.name)
def test_a_service_starts_a_program_that_knows_its_options(path: Path) -> None:
    program, name, *options = shlex.split(unit(path)["Service"]["ExecStart"])
    assert program == "/opt/vhostpc/bin/vhostpc"
    command = [sys.executable, "-m", "vhostpc", name, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for word in options:
        if word.startswith("--"):
            assert re.search(rf"{word}\b", done.stdout), word
    # The descriptor that systemd gives first.
    assert options[options.index("--fd") + 1] == "3"


@pytest.mark.parametrize("path", SERVICES, ids=lambda p: p.name)
def test_a_service_has_its_socket(path: Path) -> None:
    socket = path.with_suffix(".socket")
    assert unit(path)["Unit"]["Requires"] == socket.name.replace("@", "@%i")
    assert unit(socket)["Socket"]["ListenStream"].startswith("/run/vhostpc/")


def test_the_domain_connects_to_the_sockets_of_the_units() -> None:
    domain = ET.parse(ROOT / "examples" / "libvirt" / "domain.xml").getroot()
    paths = {source.attrib["path"] for source in domain.findall("./devices//source[@type='unix']")}
    offered = {
        unit(UNITS / f"vhostpc-{kind}@.socket")["Socket"]["ListenStream"].replace("%i", name)
        for kind, name in (("bridge", "tap0"), ("blk", "disk0"))
    }
    assert paths == offered
    access = domain.find("./memoryBacking/access")
    assert access is not None
    assert access.attrib == {"mode": "shared"}
