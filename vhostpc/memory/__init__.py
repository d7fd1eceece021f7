"""Guest memory as a back-end has it: mappings, the region table, the gate, the dirty log, the inflight region."""
