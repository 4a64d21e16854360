"""What clients say of themselves under privacy reaches nothing that is written; without it, the same search finds it.

Every client plants canaries in all that it can say: names of reasons, losses, counts, norms, texts of errors, bytes of
its update. Then everything that was written is searched: the database with its log and its free pages, blobs, logs of
every level, metrics, what the commands print, the error of the run.
"""

import json
import logging
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from tests.coordinator.grid import Answer, InProcessGrid, Node, Reply, Tamper
from typer.testing import CliRunner

from pomona.cli import app
from pomona.client.trainer import Profile
from pomona.coordinator.federation import run_federation
from pomona.coordinator.metrics import RegistryCollector
from pomona.datasets import Dataset
from pomona.logs import configure_logs
from pomona.payload import read_header
from pomona.settings import RunSettings
from pomona.storage.opening import open_registry
from pomona.wire import decode_update, encode_update

pytestmark = pytest.mark.usefixtures("quick_polls")

RUN = "run-1"
LOSS = 3.1415926535
COUNT = 60497
NONCE = "feedfacecafe"
WORD = "zyzzogeton"
TEXTS = {  # as patterns: digits of a count may be among those of a random number, but not all of it
    "a word": WORD.encode(),
    "a loss": rb"3\.14159",
    "a count": rb"(?<![\d.])%d(?!\d)" % COUNT,
    "a nonce": NONCE.encode(),
}


@dataclass
class Planted:
    """What was planted as bytes: of updates and of losses."""

    pieces: set[bytes] = field(default_factory=set)

    def in_update(self, _request: str, answer: Answer) -> Reply:
        """Send an honest update, with a loss and a nonce that are canaries, and remember its tensors."""
        update = decode_update(answer[2])
        changed = encode_update(replace(update, train_loss=LOSS, nonce=f"{NONCE}{update.round_number:020d}"))
        for info in read_header(changed).tensors.values():
            self.pieces.add(changed[info.start : info.start + 32])
        self.pieces.add(struct.pack("<d", LOSS))
        return answer[0], answer[1], changed


def refused(_request: str, _answer: Answer) -> Reply:
    return "refusal", json.dumps({"name": f"{WORD}-1", "error": f"{WORD}: row {COUNT} has loss {LOSS}"}), b""


def lying(request: str, answer: Answer) -> Reply:
    """Claim a number of examples that is a canary; the update is rejected for it."""
    return answer[0], answer[1], encode_update(replace(decode_update(answer[2]), num_examples=COUNT))


def unreadable(_request: str, _answer: Answer) -> Reply:
    return OSError(f"{WORD} {LOSS}")


@pytest.fixture
def settings(tiny_bert: Path, toy_data: Path) -> Callable[..., RunSettings]:
    def make(*, private: bool) -> RunSettings:
        facts: dict[str, object] = {
            "name": "toy",
            "rounds": 2,
            "seed": 3,
            "model": {"base": str(tiny_bert), "max_length": 16},
            "data": {"source": str(toy_data)},
            "cohort": {"join_timeout_s": 1.0, "round_deadline_s": 5.0, "min_clients": 5},
            "training": {"batch_size": 8, "max_steps": 1, "learning_rate": 1e-2},
            "aggregation": {"strategy": "fedit", "rank": 4, "max_rank": 4},
        }
        if private:
            facts["privacy"] = {
                "unit": "client", "population": "toys", "population_size": 10, "epsilon": 1e9, "delta": 1e-3,
                "noise_multiplier": 0.5, "adaptive_clip": {"count_noise": 1.0},
            }  # fmt: skip
        return RunSettings.model_validate(facts)

    return make


def clients(make_profile: Callable[..., Profile], planted: Planted) -> list[Node]:
    def counted(profile: Profile) -> Profile:
        def load(task: str) -> Dataset:
            rows = profile.load_data(task)
            return rows.subset([i % len(rows) for i in range(137)])

        return Profile(name=profile.name, rank=profile.rank, load_data=load, model_folder=profile.model_folder)

    tampers: list[Tamper] = [planted.in_update, refused, lying, unreadable, lambda _r, _a: None]
    nodes = [Node(counted(make_profile(i, count=6)), trains=tamper) for i, tamper in enumerate(tampers)]
    return [*nodes, Node(make_profile(5, count=6), enrols=refused), Node(make_profile(4, count=6), enrols=unreadable)]


def everything(home: Path, log: str, *, private: bool) -> Iterator[tuple[str, bytes]]:
    """Yield all that was written, and what may be asked for."""
    for path in sorted(home.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(home)), path.read_bytes()
    yield "the log", log.encode()
    with open_registry(home, read_only=True) as registry:
        collectors = CollectorRegistry(auto_describe=False)
        collectors.register(RegistryCollector(registry))
        yield "metrics", generate_latest(collectors)
    for command in (
        ["registry", "ls"], ["registry", "show", "toy/2"], ["registry", "versions", "toy"], ["registry", "runs"],
        ["registry", "lineage", "toy/2"], ["registry", "audit"], ["privacy", "ledger"],
        ["privacy", "certificate", "toy/2"],
    ):  # fmt: skip
        for form in ([], ["--json"]):
            told = CliRunner().invoke(app, [*command, *form, "--home", str(home)])
            assert told.exit_code == 0 or (not private and "privacy" in command), told.output
            yield " ".join([*command, *form]), told.output.encode()


def found(home: Path, log: str, planted: Planted, *, private: bool) -> dict[str, set[str]]:
    """Return where each kind of canary stands."""
    places: dict[str, set[str]] = {}
    for place, content in everything(home, log, private=private):
        for kind, pattern in TEXTS.items():
            if re.search(pattern, content):
                places.setdefault(kind, set()).add(place)
        if re.search(rb"\b137\b", content) and not place.endswith((".db", "-wal", "-shm")) and "/" not in place:
            places.setdefault("a size", set()).add(place)
        if any(piece in content for piece in planted.pieces):
            places.setdefault("an update", set()).add(place)
    return places


@pytest.mark.parametrize("private", [True, False])
def test_canaries_reach_nothing_under_privacy_and_are_found_without(
    private: bool,
    tmp_path: Path,
    settings: Callable[..., RunSettings],
    make_profile: Callable[..., Profile],
    caplog: pytest.LogCaptureFixture,
) -> None:
    planted, home = Planted(), tmp_path / "home"
    configure_logs()
    caplog.set_level(logging.DEBUG)
    for name in ("pomona.client.trainer", "pomona.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # its own log, on its own machine
    with open_registry(home) as registry:
        run_federation(
            InProcessGrid(clients(make_profile, planted)), settings(private=private), registry, run_id=RUN,
            lasting=False,
        )  # fmt: skip
        assert registry.run(RUN).state == "finished"
    assert len(planted.pieces) > 5
    places = found(home, caplog.text, planted, private=private)
    if private:
        assert not places
    else:
        assert places.keys() >= {"a word", "a loss", "a count", "a nonce", "a size", "an update"}, "or it finds nothing"


def test_the_rounds_of_a_private_run_look_alike_whoever_took_part(
    tmp_path: Path, settings: Callable[..., RunSettings], make_profile: Callable[..., Profile]
) -> None:
    """With all clients and with none, the registry has the same rows, but for hashes, times, scores and noise."""
    shapes = []
    for name, takes_part in (("all", True), ("none", False)):
        home = tmp_path / name
        nodes = [Node(make_profile(i, count=5)) for i in range(5)]
        for node in nodes:
            if not takes_part:
                node.trains = lambda _request, _answer: None
        with open_registry(home) as registry:
            run_federation(InProcessGrid(nodes), settings(private=True), registry, run_id=RUN, lasting=False)
            told = [
                (each.cohort, each.accepted, each.rejected, each.late, each.bytes_up, each.bytes_down, each.seconds)
                for each in registry.rounds(RUN)
            ]
            rows = [(row.state, row.round, row.epsilon, row.noise_multiplier) for row in registry.ledger()]
            audit = [(record.event, record.subject) for record in registry.audit()]
            sizes = [len(registry.payload(version.ref)) // 1000 for version in registry.versions("toy")]
            shapes.append((told, rows, audit, sizes, registry.submissions(RUN)))
    assert shapes[0] == shapes[1]
