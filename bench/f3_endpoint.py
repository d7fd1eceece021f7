"""``vhostpc`` beside a thread that computes in plain Python: ``python -m bench.f3_endpoint endpoint ...``."""

from __future__ import annotations

import threading

from vhostpc.cli.main import main

from .f1_service import compute

if __name__ == "__main__":
    threading.Thread(target=compute, daemon=True).start()
    main()
