"""A file, or memory, as a virtio disk: ``vhostpc blk`` as a program of its own.

    python examples/blk --socket-path /tmp/blk.sock --blk-file disk.img

How a disk is written: ``vhostpc/backend/disk.py`` has its requests, ``vhostpc/backend/medium.py`` the file behind
it, ``vhostpc/cli/blk.py`` its options. Its socket, signals and the rest are those of every back-end program
(``vhostpc/cli/program.py``).
"""

import sys

from vhostpc.cli import run_only

if __name__ == "__main__":
    run_only("blk", f"python {sys.argv[0]}")
