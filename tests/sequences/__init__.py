"""Scenarios of a migration, played with QEMUs and with our endpoint; what each monitor tells."""
