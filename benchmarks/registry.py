"""The registry at 100,000 versions, beside MLflow's on the same machine, in the same run, both on SQLite.

A thousand adapters of a hundred versions; each version has five metrics and five tags, each adapter an alias. MLflow's
versions have no metrics, so there they are five more tags; searches that it cannot express are timed on our side
alone, and one of them also in the way that is left with MLflow: fetch all that may be meant, then sort in Python.

Both are filled thousands of rows at a time, and a check publishes a small registry through either API and refuses to go
on unless all rows are the same (moments and the audit log aside). Everything timed goes through the public APIs,
``Registry`` and ``MlflowClient``, in processes that keep their connections; the two take turns, query by query and
block by block, so that what else the machine does hits both. Every page of the first two rounds of every search is
compared with a slow reading of the contents, and every page that both read with the other's. Nothing is reported when
one differs.

* ``search``: wall and CPU milliseconds a page of 100 versions, whole records;
* ``publish``: ``open_round`` and ``publish_round`` with a new payload of 100 KiB and five metrics, against
  ``create_model_version`` with five tags, which stores no bytes; then one tag, then one move of an alias;
* ``updates``: 100 KiB each, recorded durably one by one, in groups, and from four threads, beside what the disk
  alone takes (file, fsync, rename, fsync of the folder; a commit of one row);
* ``start``: whole processes, from the command to the answer.

MLflow is no dependency of this project: ``--mlflow-python`` names the Python of an environment that has it, otherwise
one is made for the run with ``pip install mlflow==3.17.2`` and deleted. Run as ``python benchmarks/registry.py``;
``--quick`` is a small one, to see that it runs; ``--postgresql URL`` also times the searches on PostgreSQL.
"""

import argparse
import json
import os
import platform
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from registry_content import ADAPTERS, Content, contents
from registry_filling import fill, fill_by_publishing, rows
from registry_queries import PAGE, QUERIES, Query, blanks, found
from registry_starting import starts
from registry_writing import publish, updates
from rich.console import Console
from rich.table import Table

from pomona import __version__
from pomona.storage.engine import create_engine
from pomona.storage.opening import open_registry
from pomona.storage.registry import Registry

RESULTS = Path(__file__).parent / "results" / "registry.json"
MLFLOW = "3.17.2"
VERSIONS = 100_000

Facts = dict[str, Any]


class Mlflow:
    """A process of MLflow's own Python that answers questions."""

    def __init__(self, python: Path) -> None:
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
        self._process = subprocess.Popen(
            [python, Path(__file__).with_name("registry_mlflow.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def ask(self, do: str, **facts: object) -> Any:  # noqa: ANN401 - JSON
        """Ask, and wait for the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **facts}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"MLflow's process ended at {do!r}; run benchmarks/registry_mlflow.py by hand to see why")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def mlflow_python(named: Path | None) -> Iterator[Path]:
    """Lend the Python of an environment with MLflow; one that was made for it is deleted."""
    if named:
        yield named
        return
    with tempfile.TemporaryDirectory(prefix="mlflow-") as folder:
        Console().print(f"installing mlflow {MLFLOW} in {folder}")
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"mlflow=={MLFLOW}"], check=True)
        yield python


# correctness


def check(work: Path, mlflow: Mlflow) -> Facts:
    """Refuse to go on unless the filling writes what either API writes."""
    versions, adapters = 24, 8
    fill(work / "check-filled", versions, adapters)
    fill_by_publishing(work / "check-published", versions, adapters)
    mine, theirs = rows(work / "check-filled"), rows(work / "check-published")
    _refuse(mine != theirs, f"filling differs from publishing in {[key for key in mine if mine[key] != theirs[key]]}")
    urls = [f"sqlite:///{work / name}" for name in ("check-filled.db", "check-client.db")]
    mlflow.ask("fill", url=urls[0], versions=versions, adapters=adapters)
    mlflow.ask("fill_by_client", url=urls[1], versions=versions, adapters=adapters)
    filled, made = (mlflow.ask("rows", url=url) for url in urls)
    _refuse(filled != made, "MLflow's filling differs from its client's")
    return {"rows": sum(map(len, mine.values())), "mlflow_rows": sum(map(len, filled.values()))}


def _refuse(red: bool, why: str) -> None:
    if red:
        raise SystemExit(f"a registry is wrong, so no speed is reported: {why}")


# searching


def search(registry: Registry, query: Query, words: dict[str, str]) -> Facts:
    """Read the pages of a query, each timed."""
    answer: Facts = {"seconds": [], "cpu": [], "refs": []}
    token = None
    for _ in range(query.pages):
        began, busy = time.perf_counter(), time.process_time()
        page = registry.search(query.ours.format_map(words), order_by=query.order_by, limit=PAGE, page_token=token)
        answer["seconds"].append(time.perf_counter() - began)
        answer["cpu"].append(time.process_time() - busy)
        answer["refs"].append([item.ref for item in page.versions])
        token = page.next_page_token
        if token is None:
            break
    return answer


def search_both(
    registry: Registry, mlflow: Mlflow | None, items: Sequence[Content], *, rounds: int, mlflow_rounds: int
) -> Facts:
    """Time every query in turns, and compare all that is found; the first round warms up and does not count."""
    draw = random.Random(1)  # noqa: S311
    held: Facts = {query.name: {"ours": [], "mlflow": [], "cpu": [], "mlflow_cpu": []} for query in QUERIES}
    for number in range(rounds + 1):
        for query in QUERIES:
            words = blanks(draw)
            mine = search(registry, query, words)
            if number < 2:
                _refuse(mine["refs"] != found(query, words, items), f"{query.name} with {words}")
            theirs = None
            if mlflow and query.mlflow is not None and number <= mlflow_rounds:
                asked = {"order_by": list(query.mlflow_order), "limit": PAGE, "pages": query.pages}
                theirs = mlflow.ask("search", text=query.mlflow.format_map(words), **asked)
                _refuse(mine["refs"] != theirs["refs"], f"{query.name} with {words} differs between the two")
            if number:
                held[query.name]["ours"] += mine["seconds"]
                held[query.name]["cpu"] += mine["cpu"]
                held[query.name]["mlflow"] += theirs["seconds"] if theirs else []
                held[query.name]["mlflow_cpu"] += theirs["cpu"] if theirs else []
    return (
        {name: {key: spread(values) for key, values in each.items() if values} for name, each in held.items()}
        | {
            "all": {"ours": spread(_all(held, "ours")), "cpu": spread(_all(held, "cpu"))},
        }
        | ({} if mlflow is None else {"what both can say": _both(held)})
    )


def _all(held: Facts, key: str, *, common: bool = False) -> list[float]:
    return [second for each in held.values() if each["mlflow"] or not common for second in each[key]]


def _both(held: Facts) -> Facts:
    return {key: spread(_all(held, key, common=True)) for key in ("ours", "mlflow", "cpu", "mlflow_cpu")}


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Return median, 95th percentile and maximum in milliseconds."""
    ordered = sorted(seconds)
    at = min(len(ordered) - 1, int(0.95 * len(ordered)))
    return {
        "p50_ms": 1e3 * statistics.median(ordered),
        "p95_ms": 1e3 * ordered[at],
        "max_ms": 1e3 * ordered[-1],
        "samples": len(ordered),
    }


def by_hand(registry: Registry, mlflow: Mlflow) -> Facts:
    """Find the best of a field by a metric, which MLflow's language cannot say, and resolve aliases."""
    began = time.perf_counter()
    page = registry.search(
        "name LIKE 'legal-%' AND metrics.accuracy > 0.9", order_by="metrics.accuracy DESC", limit=PAGE
    )
    ours = time.perf_counter() - began
    theirs = mlflow.ask("scan", text="name LIKE 'legal-%'", metric="accuracy", above=0.9, limit=PAGE)
    scores = sorted(item.ref for item in page.versions if item.metrics["accuracy"] < 0.999)
    _refuse(not set(scores) <= set(theirs["refs"][0]), "the best by a metric differ between the two")
    resolved: dict[str, list[float]] = {"ours": [], "mlflow": []}
    for number in range(30):
        name = f"legal-de-{number:03d}"
        began = time.perf_counter()
        version = registry.resolve(f"{name}@champion")
        resolved["ours"].append(time.perf_counter() - began)
        other = mlflow.ask("resolve", name=name, alias="champion")
        _refuse(other["refs"] != [[version.ref]], f"{name}@champion differs between the two")
        resolved["mlflow"] += other["seconds"]
    return {
        "best by metric, seconds": {"ours": ours, "mlflow, fetched and sorted in Python": theirs["seconds"][0]},
        "resolve": {key: spread(values) for key, values in resolved.items()},
    }


# running and reporting


def publish_both(registry: Registry, mlflow: Mlflow, *, blocks: int, count: int) -> Facts:
    """Publish, tag and move an alias, block by block in turns."""
    held: dict[str, dict[str, list[float]]] = {"ours": {}, "mlflow": {}}
    for block in range(blocks):
        for who, seconds in (
            ("ours", publish(registry, f"bench-{block}", count)),
            ("mlflow", mlflow.ask("publish", name=f"bench-{block}", count=count)),
        ):
            for key, values in seconds.items():
                held[who].setdefault(key, []).extend(values)
    return {
        who: {key: spread(values) | {"per_second": len(values) / sum(values)} for key, values in each.items()}
        for who, each in held.items()
    }


def main() -> None:
    """Check, fill, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the result goes")
    parser.add_argument("--mlflow-python", type=Path, help=f"Python of an environment with mlflow {MLFLOW}")
    parser.add_argument("--work", type=Path, help="folder for both registries (0.5 GB), kept and taken up again")
    parser.add_argument("--postgresql", metavar="URL", help="an empty database, to time searches there too")
    parser.add_argument("--rounds", type=int, default=20, help="how often every search is timed")
    parser.add_argument("--mlflow-rounds", type=int, default=4, help="in how many of these by MLflow too")
    parser.add_argument("--quick", action="store_true", help="few versions, to see that it runs")
    options = parser.parse_args()
    out = options.out or (Path(tempfile.gettempdir()) / RESULTS.name if options.quick else RESULTS)
    with mlflow_python(options.mlflow_python) as python, tempfile.TemporaryDirectory(prefix="registry-") as made:
        mlflow = Mlflow(python)
        document: Facts = {"versions": 3000 if options.quick else VERSIONS, "adapters": ADAPTERS}
        for piece in measure(options, document, mlflow, scratch=Path(made), python=python):
            document |= piece | {"load_after": os.getloadavg()}
            Console().print(f"{', '.join(piece)}: done; load {os.getloadavg()[0]:.1f}")
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(document, indent=1) + "\n")
        mlflow.close()
    report(document)


def measure(
    options: argparse.Namespace, known: Facts, mlflow: Mlflow, *, scratch: Path, python: Path
) -> Iterator[Facts]:
    """Run everything; yield the figures piece by piece."""
    versions, quick = known["versions"], options.quick
    yield {"load_before": os.getloadavg(), "checks": check(scratch, mlflow)}
    work = options.work or scratch
    home, database = work / f"pomona-{versions}", work / f"mlflow-{versions}.db"
    if not home.exists():
        fill(home, versions)
    if not database.exists():
        mlflow.ask("fill", url=f"sqlite:///{database}", versions=versions, adapters=ADAPTERS)
    sizes = {"pomona": home / "registry.db", "mlflow": database}
    yield {
        "machine": machine() | mlflow.ask("open", url=f"sqlite:///{database}"),
        "megabytes": {name: path.stat().st_size / 1e6 for name, path in sizes.items()},
    }
    items = list(contents(versions))
    rounds, theirs = (3, 1) if quick else (options.rounds, options.mlflow_rounds)
    with open_registry(home) as registry:
        yield {"search": search_both(registry, mlflow, items, rounds=rounds, mlflow_rounds=theirs)}
        yield by_hand(registry, mlflow)
    writable = _copies(home, database, scratch)
    mlflow.ask("open", url=f"sqlite:///{writable[1]}")
    with open_registry(writable[0]) as registry:
        yield {"updates": updates(registry, scratch, rounds=2 if quick else 7, count=32 if quick else 96)}
        yield {"publish": publish_both(registry, mlflow, blocks=2 if quick else 8, count=5 if quick else 25)}
    yield {"start": starts(home, scratch / "empty", python, database, rounds=1 if quick else 3)}
    if options.postgresql:
        yield {"search on PostgreSQL": search_postgresql(scratch, options.postgresql, items, rounds=rounds)}


def _copies(home: Path, database: Path, scratch: Path) -> tuple[Path, Path]:
    """Copy both, so that what is kept is not written to."""
    copy, other = scratch / "writable", scratch / "writable.db"
    copy.mkdir()
    for source, target in ((home / "registry.db", copy / "registry.db"), (database, other)):
        with closing(sqlite3.connect(source)) as one, closing(sqlite3.connect(target)) as two:
            one.backup(two)
    with closing(sqlite3.connect(copy / "registry.db")) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    return copy, other


def search_postgresql(scratch: Path, url: str, items: Sequence[Content], *, rounds: int) -> Facts:
    """Fill a database of PostgreSQL alike and time the same searches."""
    home = scratch / "postgresql"
    fill(home, len(items), url=url)
    engine = create_engine(url, read_only=False).execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text("VACUUM ANALYZE"))  # autovacuum does so within minutes
        version = connection.scalar(sa.text("SHOW server_version"))
    engine.dispose()
    with open_registry(home, url=url) as registry:
        answered = search_both(registry, None, items, rounds=rounds, mlflow_rounds=0)
    return answered | {"server": version}


def machine() -> Facts:
    """Return what it ran on."""
    commit = subprocess.run(
        ["/usr/bin/env", "git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent,
        check=False,
        capture_output=True,
        text=True,
    )
    return {
        "pomona": __version__,
        "commit": commit.stdout.strip(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "sqlite": sqlite3.sqlite_version,
        "command": " ".join(["python", "benchmarks/registry.py", *sys.argv[1:]]),
    }


def report(document: Facts) -> None:
    """Print tables for people."""
    console = Console(width=130)
    table = Table(
        "search, ms a page of 100", "p50", "p95", "CPU p50", "CPU p95", "MLflow p50", "MLflow p95", "p50 ratio"
    )
    for name, each in document["search"].items():
        figures = [each["ours"]["p50_ms"], each["ours"]["p95_ms"], each["cpu"]["p50_ms"], each["cpu"]["p95_ms"]]
        if "mlflow" in each:
            figures += [each["mlflow"]["p50_ms"], each["mlflow"]["p95_ms"], each["mlflow"]["p50_ms"] / figures[0]]
        table.add_row(name, *(f"{figure:.1f}" for figure in figures))
    console.print(table)
    table = Table("publish", "per second", "p50 ms", "p95 ms", "MLflow per second", "p50 ms", "p95 ms")
    for name, mine in document["publish"]["ours"].items():
        theirs = document["publish"]["mlflow"][name]
        columns = [f"{each[key]:.1f}" for each in (mine, theirs) for key in ("per_second", "p50_ms", "p95_ms")]
        table.add_row(name, *columns)
    console.print(table)
    table = Table("updates of 100 KiB", "per second", "of the disk's", "CPU ms")
    for name, each in document["updates"].items():
        table.add_row(
            name, *(f"{each[key]:.2f}" if key in each else "" for key in ("per_second", "over_disk_alone", "cpu_ms"))
        )
    console.print(table)
    table = Table("start", "seconds")
    for name, each in document["start"].items():
        table.add_row(name, f"{each['seconds']:.2f}")
    console.print(table)
    if "search on PostgreSQL" in document:
        console.print("on PostgreSQL:", document["search on PostgreSQL"]["all"])
    console.print(
        {key: document[key] for key in ("best by metric, seconds", "resolve", "megabytes", "load_before", "load_after")}
    )


if __name__ == "__main__":
    main()
