"""How fast the registries of ``benchmarks/registry.py`` are written: versions, tags, aliases, updates of clients."""

import os
import secrets
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

from registry_content import BASES, contents
from registry_filling import PAYLOAD, base_sha256, new_version

from pomona.storage.records import NewSubmission
from pomona.storage.registry import Registry

UPDATE_BYTES = 100 * 1024
GROUP = 16

Facts = dict[str, Any]
Seconds = dict[str, list[float]]


def publish(registry: Registry, name: str, count: int) -> dict[str, list[float]]:
    """Publish rounds of a new run, each with new bytes; then a tag, then an alias."""
    registry.start_run(run_id=name, adapter=name, base_sha256=base_sha256(BASES[0]), settings_json="{}")
    seconds: dict[str, list[float]] = {"publish": [], "tag": [], "alias": []}
    for item in contents(count, 1):
        payload = PAYLOAD + os.urandom(UPDATE_BYTES)
        parent = f"{name}/{item.number - 1}" if item.number > 1 else None
        marks = [time.perf_counter()]
        registry.open_round(name, item.number, parent=parent, cohort=["anna", "bert"])
        registry.publish_round(new_version(item, run_id=name, adapter=name, payload=payload))
        marks.append(time.perf_counter())
        registry.set_tag(f"{name}/{item.number}", "stage", item.tags["stage"])
        marks.append(time.perf_counter())
        registry.set_alias(name, "champion", item.number)
        marks.append(time.perf_counter())
        for key, began, ended in zip(seconds, marks, marks[1:], strict=False):
            seconds[key].append(ended - began)
    return seconds


def updates(registry: Registry, work: Path, *, rounds: int, count: int) -> Facts:
    """Record updates of 100 KiB durably in each way, in turns with the disk alone."""
    held: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    registry.start_run(run_id="updates", adapter="updates", base_sha256=base_sha256(BASES[0]), settings_json="{}")
    number = 0
    for _ in range(rounds):
        for name, way in WAYS.items():
            number += 1
            registry.open_round("updates", number, parent=None, cohort=[])
            new = [_update(number, i) for i in range(count)]
            began, busy = time.perf_counter(), time.process_time()
            way(registry, new)
            held.setdefault(name, []).append(count / (time.perf_counter() - began))
            cpu.setdefault(name, []).append(1e3 * (time.process_time() - busy) / count)
            if registry.rounds("updates")[number - 1].accepted != count:
                raise SystemExit(f"the registry is wrong, so no speed is reported: {name} lost updates")
        held.setdefault("disk alone", []).append(count / disk(work, count))
    return {
        name: {
            "per_second": median(values),
            "over_disk_alone": median(a / b for a, b in zip(values, held["disk alone"], strict=True)),
            "all": values,
        }
        | ({"cpu_ms": median(cpu[name])} if name in cpu else {})
        for name, values in held.items()
    }


def _update(number: int, client: int) -> NewSubmission:
    return NewSubmission(
        run_id="updates",
        round_number=number,
        client=f"client-{client}",
        rank=8,
        alpha=8.0,
        num_examples=100,
        nonce=secrets.token_hex(16),
        status="accepted",
        payload=os.urandom(UPDATE_BYTES),
        train_loss=0.5,
        spectrum={"norm": 1.0, "stable_rank": 3.0},
    )


def one_by_one(registry: Registry, new: Sequence[NewSubmission]) -> None:
    """Record each in a transaction of its own."""
    for each in new:
        registry.record_submission(each)


def in_groups(registry: Registry, new: Sequence[NewSubmission]) -> None:
    """Record some in one transaction."""
    for at in range(0, len(new), GROUP):
        registry.record_submissions(new[at : at + GROUP])


def from_threads(registry: Registry, new: Sequence[NewSubmission]) -> None:
    """Record each in a transaction of its own, from four threads."""
    threads = [threading.Thread(target=one_by_one, args=(registry, new[at::4])) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


WAYS: dict[str, Callable[[Registry, Sequence[NewSubmission]], None]] = {
    "one by one": one_by_one,
    f"in groups of {GROUP}": in_groups,
    "from four threads": from_threads,
}


def disk(work: Path, count: int) -> float:
    """Return the seconds that the file system and SQLite take for as many files and rows, without a registry."""
    with (
        tempfile.TemporaryDirectory(dir=work) as name,
        closing(sqlite3.connect(Path(name) / "rows.db", isolation_level=None)) as connection,
    ):
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("CREATE TABLE row (text TEXT)")
        payloads = [os.urandom(UPDATE_BYTES) for _ in range(count)]
        began = time.perf_counter()
        for number, payload in enumerate(payloads):
            part = Path(name) / f"{number}.part"
            with part.open("wb", buffering=0) as file:
                file.write(payload)
                os.fsync(file.fileno())
            part.rename(Path(name) / f"{number}")
            folder = os.open(name, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
            connection.execute("INSERT INTO row VALUES (?)", ("x" * 300,))
        return time.perf_counter() - began
