"""How many updates a coordinator takes, what limits it, and whether anything grows with clients or rounds.

* ``own``: our share of an update's way, without Flower: from a message in memory to the durable receipt, on SQLite and
  on PostgreSQL, in groups of 1 to 32, beside what the disk alone takes; and on SQLite without a disk
  (``load_own.py``);
* ``rounds``: 2,000 rounds of a tiny model in one process; memory, files, threads and seconds may not grow
  (``load_rounds.py``);
* ``fleet-100``, ``fleet-300``, ``fleet-1000``: a real server and so many light clients on Flower's Fleet API over gRPC;
  three in ten do not answer a round, which is closed by its deadline (``load_fleet.py``, ``load_clients.py``);
* ``superlink``: where Flower's SuperLink spends its time, by handler and by function (``py-spy``), with 100 clients who
  all answer; and what changes it: ``superlink-memory`` (its database in memory), ``superlink-1s`` and ``superlink-10s``
  (how often clients ask), ``superlink-objects`` (payloads in objects of their own).

Everything is checked first and nothing is reported that is wrong: no update is lost, every round is aggregated again,
the promises of ``tests/invariants.py`` hold. Run as ``python benchmarks/load.py [PART ...]`` (Linux). Every finished
part is written down at once in ``benchmarks/results/load.json``, so an interrupted benchmark goes on where it stopped;
a part that is named runs again. A part whose figures are not what they should be is written down with its
``verdict``, and the benchmark ends with exit code 1.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from load_fleet import Case, play
from load_own import measure
from load_rounds import slopes

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "load.json"
MEMORY = Path("/dev/shm")  # noqa: S108 - a file system without a disk, to see what the disk takes
ROUNDS = 2000
GROWTH = {"rss_mib": 8.0, "files": 1.0, "threads": 1.0}  # by a thousand rounds, at most
SLOWER = 1.25  # the last quarter's CPU seconds a round, at most, over those of the second
CASES = {
    "fleet-100": Case(clients=100, deadline_s=60.0),
    "fleet-300": Case(clients=300, deadline_s=120.0, database="memory", limit_s=1200.0),
    "fleet-1000": Case(clients=1000, deadline_s=180.0, database="memory", poll_s=10.0, limit_s=1800.0),
}
_ALL_ANSWER = Case(clients=100, deadline_s=90.0, rounds=2, silent=False)
VARIANTS = {
    "superlink": _ALL_ANSWER,
    "superlink-memory": replace(_ALL_ANSWER, database="memory"),
    "superlink-1s": replace(_ALL_ANSWER, poll_s=1.0),
    "superlink-10s": replace(_ALL_ANSWER, poll_s=10.0),
    "superlink-objects": replace(_ALL_ANSWER, objects=True),
}
LEAST_PER_S = 60.0  # updates of our own share, in groups
TOP = 12

Facts = dict[str, Any]
Show = Callable[[str], None]


def own(options: argparse.Namespace, show: Show) -> Facts:
    """Measure our own share on either database."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="pomona-load-own-", dir=options.work) as folder:
        for name, facts in measure(Path(folder), rounds=options.turns, clients=options.updates):
            show(f"own: {name} done")
            found[name] = facts
    if MEMORY.is_dir():
        with tempfile.TemporaryDirectory(prefix="pomona-load-own-", dir=MEMORY) as folder:
            _, found["sqlite, in memory"] = next(measure(Path(folder), rounds=options.turns, clients=options.updates))
    slow = [name for name, each in found.items() if each["group of 16"]["per_second"] < LEAST_PER_S]
    return found | {"verdict": f"below {LEAST_PER_S:g} updates a second: {', '.join(slow)}" if slow else ""}


def rounds(options: argparse.Namespace, show: Show) -> Facts:
    """Run many rounds in a process of its own, and refuse what grows."""
    samples, end = [], dict[str, Any]()
    with tempfile.TemporaryDirectory(prefix="pomona-load-rounds-", dir=options.work) as folder:
        command = [sys.executable, "-W", "ignore", str(HERE / "load_rounds.py"), folder, str(options.rounds)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                end = json.loads(line)
                if "round" in end:
                    samples.append(end)
                    show(f"rounds: {end['round']} of {options.rounds}, {end['rss_mib']:.0f} MiB")
    if process.returncode or end.get("broken") or end.get("versions") != options.rounds:
        raise SystemExit(f"the rounds went wrong, so nothing is reported: {process.returncode}, {end}")
    growth = slopes(samples)
    first = samples[0]["at_s"]
    samples = [{**each, "at_s": round(each["at_s"] - first, 2)} for each in samples]
    grown = [name for name, most in GROWTH.items() if growth[name] > most]
    pace = growth["cpu_seconds_a_round"]
    if pace[3] > SLOWER * pace[1]:
        grown.append("cpu_seconds_a_round")
    verdict = f"something grows: {', '.join(grown)}" if grown else ""
    return {"rounds": options.rounds, "by_1000_rounds": growth, "verdict": verdict, "samples": samples}


def fleet(name: str, show: Show) -> Facts:
    """Run a server under so many clients."""
    return _swept(play(CASES[name], show))


def _swept(made: Facts) -> Facts:
    """Remove the folder of a case; where it did not finish, its logs say why."""
    folder = made.pop("folder")
    if made["state"] != "finished":
        raise SystemExit(f"the run is {made['state']}, so nothing is reported; see {folder}")
    shutil.rmtree(folder)
    return made


def superlink(name: str, show: Show) -> Facts:
    """Run a server under clients who all answer; look into its SuperLink where nothing is changed."""
    profile = Path(tempfile.mkstemp(prefix="load-", suffix=".raw")[1]) if name == "superlink" and _spy() else None
    made = _swept(play(VARIANTS[name], show, profile=profile))
    return made | ({"functions": functions(profile)} if profile else {})


def _spy() -> str | None:
    return os.environ.get("PY_SPY") or shutil.which("py-spy")


def functions(profile: Path) -> Facts:
    """Return the share of samples in which each function was on the stack, and in which it ran itself."""
    inside: Counter[str] = Counter()
    itself: Counter[str] = Counter()
    total = 0
    for line in profile.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        frames = [frame.split(" (")[0] + " " + _where(frame) for frame in stack.split(";")]
        total += int(count)
        itself[frames[-1]] += int(count)
        for frame in set(frames):
            inside[frame] += int(count)
    return {
        "samples": total,
        "inside": {name: round(count / max(1, total), 3) for name, count in inside.most_common(4 * TOP)},
        "itself": {name: round(count / max(1, total), 3) for name, count in itself.most_common(TOP)},
    }


def _where(frame: str) -> str:
    """Return the file of a frame, from its package on."""
    path = frame.rpartition("(")[2].split(":")[0]
    return "/".join(path.split("site-packages/")[-1].split("/")[-3:])


PARTS = ("own", "rounds", *CASES, *VARIANTS)


def run(part: str, options: argparse.Namespace, show: Show) -> Facts:
    """Run one part."""
    match part:
        case "own":
            return own(options, show)
        case "rounds":
            return rounds(options, show)
        case variant if variant in VARIANTS:
            return superlink(variant, show)
        case _:
            return fleet(part, show)


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the part of that name")
    parser.add_argument("--turns", type=int, default=5, help="of each group size, of the part own")
    parser.add_argument("--updates", type=int, default=96, help="of each turn")
    parser.add_argument("--work", type=Path, help="folder of the registries, to choose the disk")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {min(unknown)}; expected some of {', '.join(PARTS)}")
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    document: Facts = json.loads(options.out.read_text()) if options.out.exists() else {"machine": _machine()}
    missing = options.parts or [part for part in PARTS if part not in document]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(missing))
        for part in missing:
            show = _shower(progress)
            show(part)
            before = os.getloadavg()
            document[part] = run(part, options, show) | {"load_before": before, "load_after": os.getloadavg()}
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            progress.advance(task)
    report(document)
    if wrong := [f"{part}: {document[part]['verdict']}" for part in PARTS if document.get(part, {}).get("verdict")]:
        raise SystemExit("\n".join(wrong))


def _shower(progress: Progress) -> Show:
    def show(text: str) -> None:
        progress.update(progress.task_ids[0], description=text)

    return show


def _machine() -> Facts:
    packages = {name: version(name) for name in ("pomona", "flwr", "grpcio", "torch", "sqlalchemy")}
    return {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version(), **packages}


def report(document: Mapping[str, Any]) -> None:
    """Print tables for people."""
    console = Console(width=130)
    if "own" in document:
        table = Table("own share", "database", "updates/s", "least", "p50 ms", "p99 ms", "CPU ms")
        for database, facts in document["own"].items():
            for name, each in facts.items() if isinstance(facts, dict) else ():
                if isinstance(each, dict):
                    keys = ("per_second", "least_per_second", "p50_ms", "p99_ms", "cpu_ms")
                    table.add_row(name, database, *(f"{each[key]:.1f}" if key in each else "" for key in keys))
        console.print(table)
    if "rounds" in document:
        console.print("rounds:", document["rounds"]["by_1000_rounds"])
    cases = {name: document[name] for name in (*CASES, *VARIANTS) if name in document}
    if cases:
        _report_cases(console, cases)


def _report_cases(console: Console, cases: Mapping[str, Any]) -> None:
    table = Table(
        "fleet", "closed", "last update s", "updates/s", "messages/s", "ack p50 s", "p99", "CPU s", "coordinator MiB"
    )
    for name, each in cases.items():
        done = [one for one in each["rounds"] if one["updates_per_s"]]
        columns = [
            " ".join(f"{one[key]:.1f}" for one in done)
            for key in ("last_update_after_s", "updates_per_s", "messages_per_s")
        ]
        ack = [f"{each['acknowledged_s'].get(key, 0.0):.2f}" for key in ("p50", "p99")]
        cpu = " ".join(f"{part} {value:.0f}" for part, value in each["cpu_s"].items())
        table.add_row(name, str(each["closed"]), *columns, *ack, cpu, f"{each['peak_mib'].get('coordinator', 0):.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
