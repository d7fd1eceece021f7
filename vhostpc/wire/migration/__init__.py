"""QEMU's migration stream and its return path. What users need of it is exported by :mod:`vhostpc.wire`."""
