"""Migration between this package and QEMU: options, statuses, addresses, the two ends."""
