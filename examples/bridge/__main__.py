"""A virtio network card joined to UDP or a tap device: ``vhostpc bridge`` as a program of its own.

    python examples/bridge --socket-path /tmp/vubr.sock -l 127.0.0.1:4444 -r 127.0.0.1:5555

How a network card is written: ``vhostpc/backend/net.py`` has the device, ``vhostpc/cli/bridge.py`` its options and
what it is joined to. Its socket, signals and the rest are those of every back-end program
(``vhostpc/cli/program.py``).
"""

import sys

from vhostpc.cli import run_only

if __name__ == "__main__":
    run_only("bridge", f"python {sys.argv[0]}")
