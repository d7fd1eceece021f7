"""A back-end's guest memory: what :mod:`vhostpc.memory` has in C, and its types."""
