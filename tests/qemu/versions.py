"""Which versions of QEMU a test is played with."""

from __future__ import annotations

import pytest

from tests.qemu import peers

EACH = (*peers.VERSIONS, pytest.param(peers.NEWEST, marks=pytest.mark.long))
"""For ``parametrize``: the newest one with the long tests."""
