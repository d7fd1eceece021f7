"""The two ends of a migration, as QEMU speaks it."""
