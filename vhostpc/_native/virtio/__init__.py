"""Queues, chains and pumps: what :mod:`vhostpc.virtio` has in C, and its types."""
