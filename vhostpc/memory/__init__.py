"""Guest memory: mappings, the region table, the gate, the dirty log."""
