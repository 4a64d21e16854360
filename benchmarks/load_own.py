"""Our own share of an update's way, for ``benchmarks/load.py``: from a Flower message in memory to the durable receipt.

What runs is the coordinator's own code, ``LoraStrategy.receive_all``: unpack, decode, verify, measure the spectrum,
write the blob (fsync of file and folder), commit the row. The registry is on SQLite with full synchronisation, or on a
private PostgreSQL with fsync. Group sizes take turns, round by round, with the disk alone between them.
"""

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import sqlalchemy as sa
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.supercore.task_identity import TaskIdentity
from load_making import LABELS, Shapes, answerer, client_names, manifest_of, random_weights
from registry_writing import disk
from tests import postgresql
from tests.conftest import write_tiny_bert, write_toy_data

from pomona.adapters import AdapterWeights
from pomona.base_model import find_base_model
from pomona.coordinator.beginning import begin_run
from pomona.coordinator.enrolment import Roster
from pomona.coordinator.strategy import LoraStrategy
from pomona.lora_model import AdaptedModel
from pomona.messages import pack, unpack
from pomona.protocol import TRAIN, Enrolled
from pomona.settings import RunSettings
from pomona.storage.engine import create_engine
from pomona.storage.opening import open_registry
from pomona.storage.registry import Registry
from pomona.storage.verification import verify

RANK = 64
GROUPS = (1, 8, 16, 32)
RUN = "own"

Facts = dict[str, Any]


class Own:
    """A coordinator's strategy with enrolled clients and a registry, but no Flower."""

    def __init__(self, folder: Path, registry: Registry, *, clients: int) -> None:
        for name in ("_task_id", "_run_id", "_node_id"):
            setattr(TaskIdentity, name, 1)
        model, data = write_tiny_bert(folder / "model"), write_toy_data(folder / "toy.csv")
        self.registry, self._number = registry, 0
        settings = RunSettings.model_validate(
            {
                "name": RUN,
                "rounds": 1,
                "model": {"base": str(model), "max_length": 16},
                "data": {"source": str(data)},
                "aggregation": {"max_rank": RANK},
            }
        )
        invitation, manifest = begin_run(registry, settings, run_id=RUN), manifest_of(model)
        shapes, roster = Shapes.of(manifest), Roster()
        weights = random_weights(shapes, RANK, seed=1)
        self._answers = {name: answerer(name, RANK, shapes, weights) for name in client_names(clients)}
        for node, (name, answer) in enumerate(self._answers.items(), start=1):
            kind, text, _ = answer("query", "")
            Enrolled.model_validate_json(text)
            roster.introduce(node, kind, text, invitation=invitation, training=settings.training, online=[])
            registry.enrol_client(RUN, name=name, rank=RANK, num_examples=24)
        base = AdaptedModel(find_base_model(str(model)), task="classification", labels=LABELS, target_modules=())
        self.strategy = LoraStrategy(
            settings=settings,
            invitation=invitation,
            manifest=manifest,
            registry=registry,
            roster=roster,
            weights=AdapterWeights(heads=base.initial_heads(seed=1)),
        )

    def replies(self) -> list[tuple[str, Message]]:
        """Open a new round, and return the answers of all its clients."""
        self._number += 1
        names = list(self._answers)
        self.registry.open_round(RUN, self._number, parent=None, cohort=names)
        config = ConfigRecord({"cohort": names, "frozen": False})
        asked = self.strategy.configure_train(self._number, ArrayRecord(), config, None)  # type: ignore[arg-type]
        found = []
        for name, message in zip(self.strategy.asked, asked, strict=True):
            message.metadata.__dict__["_message_id"] = f"{self._number}-{name}"
            answer = self._answers[name](TRAIN, unpack(message)[1])
            found.append((name, Message(pack(*answer), reply_to=message)))
        return found

    def check(self, count: int) -> None:
        """Refuse to go on unless all updates of the round are in the registry."""
        (made,) = self.registry.rounds(RUN, self._number)
        if made.accepted != count:
            raise SystemExit(f"updates are lost, so no speed is reported: {made.accepted} of {count} are there")


def measure(folder: Path, *, rounds: int, clients: int) -> Iterator[tuple[str, Facts]]:
    """Measure on either database; yield the name of each and its figures."""
    for name, url in (("sqlite", None), ("postgresql", "own")):
        home = folder / f"own-{name}"
        with _database(url) as found, open_registry(home, url=found) as registry:
            made = Own(home, registry, clients=clients)
            facts = _durability(registry) | _turns(made, home, rounds=rounds, clients=clients)
            if problems := verify(registry).problems:
                raise SystemExit(f"the registry is broken, so no speed is reported: {problems[:3]}")
        yield name, facts


def _turns(made: Own, work: Path, *, rounds: int, clients: int) -> Facts:
    held: dict[str, dict[str, list[float]]] = {}
    payload_bytes = 0
    for number in range(-1, rounds):  # the first turn is not counted: statements are compiled in it
        for group in GROUPS:
            replies = made.replies()
            payload_bytes = len(unpack(replies[0][1])[2])
            seconds, cpu_s = _receive(made, replies, group)
            made.check(clients)
            if number >= 0:
                one = held.setdefault(f"group of {group}", {"rate": [], "latency": [], "cpu_ms": []})
                one["rate"].append(clients / sum(seconds))
                one["latency"] += [each for each in seconds for _ in range(group)]
                one["cpu_ms"].append(1e3 * cpu_s / clients)
        if number >= 0:
            held.setdefault("disk alone", {"rate": []})["rate"].append(clients / disk(work, clients))
    return {"update_bytes": payload_bytes, "updates": clients * rounds} | {
        name: {"per_second": median(each["rate"]), "least_per_second": min(each["rate"])}
        | ({"p50_ms": _at(each["latency"], 0.5), "p99_ms": _at(each["latency"], 0.99)} if "latency" in each else {})
        | ({"cpu_ms": median(each["cpu_ms"])} if "cpu_ms" in each else {})
        for name, each in held.items()
    }


def _receive(made: Own, replies: Sequence[tuple[str, Message]], group: int) -> tuple[list[float], float]:
    """Hand over the replies; return the seconds that each group took, and the CPU seconds of all."""
    seconds, busy = [], time.process_time()
    for at in range(0, len(replies), group):
        began = time.perf_counter()
        reasons = made.strategy.receive_all(replies[at : at + group])
        seconds.append(time.perf_counter() - began)
        if any(reasons):
            raise SystemExit(f"a valid update was refused, so no speed is reported: {max(reasons)}")
    return seconds, time.process_time() - busy


def _at(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return round(1e3 * ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)], 2)


def _durability(registry: Registry) -> Facts:
    """Say what the database does for a commit to last; refuse what would not."""
    with registry._engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            level = connection.execute(sa.text("PRAGMA synchronous")).scalar()
            if level != 2:
                raise SystemExit(f"SQLite does not synchronise fully, so no speed is reported: {level}")
            return {"durability": "synchronous = FULL"}
        fsync = connection.execute(sa.text("SHOW fsync")).scalar()
        waits = connection.execute(sa.text("SHOW synchronous_commit")).scalar()
    if (fsync, waits) != ("on", "on"):
        raise SystemExit(f"PostgreSQL does not synchronise, so no speed is reported: {fsync}, {waits}")
    return {"durability": "fsync = on, synchronous_commit = on"}


@contextmanager
def _database(wanted: str | None) -> Iterator[str | None]:
    """Lend an empty PostgreSQL database of a server that synchronises, or None for SQLite."""
    if wanted is None:
        yield None
        return
    if named := os.environ.get("POMONA_TEST_POSTGRES_URL"):
        with postgresql.fresh_database(named) as url:
            yield url
        return
    postgresql.SETTINGS["fsync"] = "on"
    with postgresql.own_server() as server, postgresql.fresh_database(server.url) as url:
        create_engine(url, read_only=False).dispose()
        yield url
