"""vCPUs: what :mod:`vhostpc.guest` has in C, and its types."""
