"""Harness that drives real QEMU pairs, their guests and the network around them."""
