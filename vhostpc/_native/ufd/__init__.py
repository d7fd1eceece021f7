"""userfaultfd: what :mod:`vhostpc.ufd` has in C, and its types."""
