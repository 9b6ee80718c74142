"""What importing costs: peftlab beside torch alone and HF peft, each in fresh processes that take turns.

python benchmarks/import_time.py --rounds 10
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from _common import has_peft, show

PROBE = """
import time, sys
wall, cpu = time.perf_counter(), time.process_time()
{what}
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
try:
    import resource
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
except ImportError:
    size = 0
print(wall, cpu, size, len(sys.modules))
"""
JOBS = {"torch": "import torch", "peftlab": "import peftlab", "peftlab, wrap": "import peftlab; peftlab.wrap; peftlab.methods()", "HF peft": "import peft"}
GOAL = 1.05  # of importing torch alone


def probe(what: str) -> list[float]:
    """(wall seconds, processor seconds, peak resident bytes, modules) of an import in a fresh process."""
    done = subprocess.run([sys.executable, "-c", PROBE.format(what=what)], capture_output=True, text=True, check=True)
    return [float(v) for v in done.stdout.split()[-4:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    jobs = JOBS if has_peft() else {k: v for k, v in JOBS.items() if k != "HF peft"}
    found: dict[str, list[list[float]]] = {k: [] for k in jobs}
    for k in jobs:
        probe(jobs[k])  # files into the cache
    for i in range(rounds):
        for k in list(jobs) if i % 2 == 0 else reversed(jobs):
            found[k].append(probe(jobs[k]))

    def median(k: str, j: int) -> float:
        return statistics.median(r[j] for r in found[k])

    def ratio(k: str, j: int) -> float:
        return statistics.median(a[j] / b[j] for a, b in zip(found[k], found["torch"], strict=True))

    rows = []
    for k in jobs:
        goal = f"<= {GOAL}" if k == "peftlab" else ""
        size = f"{median(k, 2) / 2**20:.0f}"
        times = [f"{median(k, 0):.2f}", f"{median(k, 1):.2f}", f"{ratio(k, 0):.3f}", f"{ratio(k, 1):.3f}"]
        rows.append([k, *times, goal, size, f"{ratio(k, 2):.3f}", int(median(k, 3))])
    head = ["import", "wall s", "cpu s", "wall x torch", "cpu x torch", "target", "MiB", "MiB x torch", "modules"]
    show("importing", head, rows, f"medians of {rounds} rounds; ratios are medians over the rounds")


if __name__ == "__main__":
    main()
