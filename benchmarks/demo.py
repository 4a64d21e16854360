"""What ``pomona demo`` takes: seconds, CPU seconds and memory over all its processes together.

Memory is the proportional set size, so shared pages count once. A run whose export does not score what the
coordinator scored is not reported. Run as ``python benchmarks/demo.py``; results go to ``benchmarks/results``.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil
from rich.console import Console

POMONA = Path(sys.executable).parent / "pomona"
RESULTS = Path(__file__).parent / "results" / "demo.json"
_POLL_S = 2.0
_KINDS = ("supernode", "superexec", "clientapp", "serverapp", "client.daemon", "rescore", "superlink")


def measure() -> dict[str, object]:
    """Run the demo once in a fresh registry and return its figures."""
    cpu_s: dict[tuple[int, str], float] = {}
    peak = 0
    with tempfile.TemporaryDirectory() as home, Path(home, "out").open("w+") as out:
        began = time.monotonic()
        process = subprocess.Popen([POMONA, "demo", "--json", "--home", home], stdout=out, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            peak = max(peak, _look(process.pid, cpu_s))
            time.sleep(_POLL_S)
        wall_s = time.monotonic() - began
        out.seek(0)
        found = json.loads(out.read().splitlines()[-1])
    if process.returncode or found["accuracy_exported"] != found["accuracy_rounds"][-1]:
        raise SystemExit(f"the demo is wrong, so its speed is not reported: {found}")
    by_kind: dict[str, float] = defaultdict(float)
    for (_, kind), seconds in cpu_s.items():
        by_kind[kind] += seconds
    kept = ("accuracy_initial", "accuracy_rounds", "accuracy_exported", "bytes_down", "bytes_up", "retained_energy")
    return {
        "wall_s": round(wall_s, 1),
        "cpu_s": round(sum(cpu_s.values()), 1),
        "cpu_s_by_process": {kind: round(seconds, 1) for kind, seconds in sorted(by_kind.items())},
        "peak_memory_gb": round(peak / 1e9, 2),
        **{name: found[name] for name in kept},
    }


def _look(pid: int, cpu_s: dict[tuple[int, str], float]) -> int:
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            command = " ".join(process.cmdline())
            times = process.cpu_times()
            if command:
                kind = next((kind for kind in _KINDS if kind in command), "pomona and flwr")
                cpu_s[process.pid, kind] = times.user + times.system
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def main() -> None:
    """Measure some runs and write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    runs = [measure() for _ in range(options.runs)]
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "command": "python benchmarks/demo.py"}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    for run in runs:
        Console().print(run)


if __name__ == "__main__":
    main()
