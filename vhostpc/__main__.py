"""``python -m vhostpc`` is the command ``vhostpc``."""

from vhostpc.cli.main import main

main()
