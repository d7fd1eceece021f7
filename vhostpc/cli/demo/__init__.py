"""``vhostpc demo``: what it starts and does, what it counts, and how it shows that."""
