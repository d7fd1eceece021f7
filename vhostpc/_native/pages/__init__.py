"""The page path: what :mod:`vhostpc.pages` has in C, and its types."""
