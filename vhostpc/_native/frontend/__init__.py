"""The guest's side of a ring: what :mod:`vhostpc.frontend` has in C, and its types."""
