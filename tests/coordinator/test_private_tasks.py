"""Tasks under client-level privacy: what they sum, what they cost, and what of a client they write down."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from tests.coordinator.grid import InProcessGrid, Node, Tamper

from pomona.client.trainer import Profile
from pomona.coordinator.federation import run_federation
from pomona.datasets import load_dataset
from pomona.settings import RunSettings
from pomona.storage.opening import open_registry
from pomona.storage.records import LedgerEntry, Version
from pomona.storage.registry import Registry

pytestmark = pytest.mark.usefixtures("quick_polls")

TASKS = (("animal", "food"), ("tool", "weather"))
RUN = "run-1"
MOS = {"rank": 2, "head": "aligned", "training": {"epochs": 1, "min_steps": 8}}
NOTHING = {"noise_multiplier": 1e-9, "clip": 1e3, "sums_clip": 1e3, "epsilon": 1e30}

MakeSettings = Callable[..., RunSettings]
MakeNodes = Callable[..., list[Node]]
Owner = Callable[[int, str], int]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with open_registry(tmp_path / "registry") as registry:
        yield registry


@pytest.fixture
def make_settings(tiny_bert: Path, toy_data: Path) -> MakeSettings:
    def make(
        privacy: Mapping[str, object] | None = NOTHING,
        *,
        tasks: object = TASKS,
        rounds_per_task: int = 1,
        mos: Mapping[str, object] = MOS,
        deadline_s: float = 30.0,
    ) -> RunSettings:
        facts: dict[str, object] = {
            "name": "things",
            "seed": 3,
            "model": {"base": str(tiny_bert), "max_length": 16},
            "data": {"source": str(toy_data)},
            "cohort": {"join_timeout_s": 5.0, "round_deadline_s": deadline_s, "min_clients": 3},
            "continual": {"tasks": tasks, "rounds_per_task": rounds_per_task, "mos": mos},
        }
        if privacy is not None:
            base = {"unit": "client", "population": "toys", "population_size": 3, "epsilon": 1e30, "delta": 1e-3}
            facts["privacy"] = {**base, **privacy}
        return RunSettings.model_validate(facts)

    return make


@pytest.fixture
def make_nodes(tiny_bert: Path, toy_data: Path) -> MakeNodes:
    """Return a maker of clients among whom the training rows are spread: row ``i`` is of client ``owner(i, label)``."""
    train = load_dataset(toy_data, split="train")

    def make(count: int = 3, *, owner: Owner | None = None, learns: Tamper | None = None) -> list[Node]:
        owners = [owner(i, label) if owner else i % count for i, label in enumerate(train.labels)]

        def profile(number: int) -> Profile:
            mine = train.subset([i for i, each in enumerate(owners) if each == number])
            return Profile(name=f"client-{number}", rank=4, load_data=lambda _task: mine, model_folder=str(tiny_bert))

        nodes = [Node(profile(number)) for number in range(count)]
        for node in nodes if learns else ():
            node.learns = learns
        return nodes

    return make


def federate(nodes: list[Node], settings: RunSettings, registry: Registry, *, lasting: bool = False) -> list[Version]:
    return run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN, lasting=lasting)


def steps(rows: list[LedgerEntry]) -> list[tuple[str, int, int]]:
    return [(row.state, row.round, row.attempt) for row in rows]

def test_smoke(registry, make_settings, make_nodes):
    a = federate(make_nodes(), make_settings(), registry)
    print(a[-1].metrics, a[-1].recipe.keys(), steps(registry.ledger("toys")))
    with open_registry(registry.blobs.root.parent.parent / "plain") as other:
        b = federate(make_nodes(), make_settings(None), other)
        print(b[-1].metrics)
