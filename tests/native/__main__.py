"""``python -m tests.native TIMES``: every driver, many times as long as in the tests, with another seed each time."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.native import AHEAD, FAULTS, FLIP, GUARD, LOADS, MAPS, RESTART, STATE, VCPUS, run
from tests.native.twins import check_loads


def main(times: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        programs = (FLIP, GUARD, MAPS, FAULTS, LOADS, VCPUS, STATE, RESTART, AHEAD)
        built = (program.build(Path(folder)) for program in programs)
        flip, guard, maps, faults, loads, vcpus, state, restart, ahead = built
        for seed in range(1, times + 1):
            for mode in ("pop", "out", "in"):
                print(f"flip {mode}, seed {seed}: {run(flip, mode, 1_000_000, seed)}", flush=True)
            print(f"guard: {run(guard, 200)}", flush=True)
            print(f"maps: {run(maps)}", flush=True)
            print(f"faults: {run(faults, 20)}", flush=True)
            print(f"loads: {check_loads(loads, range(seed * 100_000, seed * 100_000 + 5_000))}", flush=True)
            print(f"vcpus: {run(vcpus, 20)}", flush=True)
            print(f"state, seed {seed}: {run(state, 200_000, seed)}", flush=True)
            print(f"ahead: {run(ahead, 100)}", flush=True)
            print(f"restart, seed {seed}: {run(restart, 25, seed)}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
