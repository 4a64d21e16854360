"""Tasks whose data are spread over clients, in one process: what comes of them is what central learning gives."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from tests.coordinator.grid import InProcessGrid, Node, Tamper
from torch import Tensor

from pomona.client.trainer import Profile
from pomona.continual.encoder import FrozenEncoder
from pomona.continual.knowledge import nothing_known
from pomona.continual.learner import TaskData
from pomona.continual.mos import learn_task
from pomona.continual.tasks import Task
from pomona.coordinator.federation import run_federation
from pomona.coordinator.memory import recall
from pomona.coordinator.predicting import predict
from pomona.datasets import load_dataset
from pomona.settings import RunSettings
from pomona.storage.opening import open_registry
from pomona.storage.registry import Registry
from pomona.storage.verification import verify

pytestmark = pytest.mark.usefixtures("quick_polls")

TASKS = (("animal", "food"), ("tool", "weather"))
RUN = "run-1"
MOS = {"rank": 2, "training": {"epochs": 1, "min_steps": 8}}

MakeSettings = Callable[..., RunSettings]
MakeNodes = Callable[..., list[Node]]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with open_registry(tmp_path / "registry") as registry:
        yield registry


@pytest.fixture
def make_settings(tiny_bert: Path, toy_data: Path) -> MakeSettings:
    def make(*, mos: Mapping[str, object] = MOS, rounds_per_task: int = 1, **sections: object) -> RunSettings:
        return RunSettings.model_validate(
            {
                "name": "things",
                "seed": 3,
                "model": {"base": str(tiny_bert), "max_length": 16},
                "data": {"source": str(toy_data)},
                "cohort": {"join_timeout_s": 5.0, "round_deadline_s": 30.0},
                "continual": {"tasks": TASKS, "rounds_per_task": rounds_per_task, "mos": mos},
                **sections,
            }
        )

    return make


@pytest.fixture
def make_nodes(tiny_bert: Path, toy_data: Path) -> MakeNodes:
    """Return a maker of clients among whom the training rows are spread: row ``i`` is of client ``owner(i, label)``."""
    train = load_dataset(toy_data, split="train")

    def make(count: int, owner: Callable[[int, str], int] | None = None, **tampers: Tamper) -> list[Node]:
        owners = [owner(i, label) if owner else i % count for i, label in enumerate(train.labels)]

        def profile(number: int) -> Profile:
            mine = train.subset([i for i, each in enumerate(owners) if each == number])
            return Profile(name=f"client-{number}", rank=4, load_data=lambda _task: mine, model_folder=str(tiny_bert))

        nodes = [Node(profile(number)) for number in range(count)]
        for name, tamper in tampers.items():
            nodes[int(name.removeprefix("client_"))].learns = tamper
        return nodes

    return make


def central(model: Path, data: Path, settings: RunSettings) -> list[dict[str, Tensor]]:
    """What one owner of all rows learns by itself, after each task."""
    assert settings.continual is not None
    mos = settings.continual.mos.model_copy(update={"seed": settings.seed})
    encoder = FrozenEncoder(model, adapted_blocks=mos.adapted_blocks)
    train = load_dataset(data, split="train")
    knowledge, found = nothing_known(encoder.width, mos), []
    for number, classes in enumerate(settings.continual.tasks, start=1):
        mine = train.subset([i for i, label in enumerate(train.labels) if label in classes])
        order = (*knowledge.classes, *classes)
        targets = torch.tensor([order.index(label) for label in mine.labels])
        states = encoder.of_texts(mine.texts, max_length=16)
        knowledge = learn_task(encoder, knowledge, TaskData(Task(number, classes), states, targets), mos)
        found.append(knowledge.to_tensors()[0])
    return found


def known(registry: Registry, ref: str) -> dict[str, Tensor]:
    return dict(recall(registry, ref).state.tensors)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("head", ["combined", "aligned", "ridge"])
def test_one_client_with_all_rows_and_one_round_gives_the_bytes_of_central_learning(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes, tiny_bert: Path, toy_data: Path, head: str
) -> None:
    extra: dict[str, object] = {"ridge_dimensions": 30} if head == "ridge" else {}
    settings = make_settings(mos={**MOS, "adapted_blocks": 1, "head": head, **extra})
    run_federation(InProcessGrid(make_nodes(1)), settings, registry, run_id=RUN)
    for ref, expected in zip(("things/1", "things/2"), central(tiny_bert, toy_data, settings), strict=True):
        assert same(known(registry, ref), expected)


def test_each_task_becomes_a_version_that_predicts_and_forgets_like_one_that_was_learned_centrally(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes, toy_data: Path, tmp_path: Path
) -> None:
    settings = make_settings(rounds_per_task=2)
    versions = run_federation(InProcessGrid(make_nodes(3)), settings, registry, run_id=RUN)
    first, second = versions
    assert (first.ref, second.ref, second.kind, second.exactness) == ("things/1", "things/2", "task", "exact")
    assert [(each.version.ref, each.kind) for each in registry.lineage("things/2").parents] == [("things/1", "task")]
    assert second.metrics["accuracy"] > 0.8
    assert second.metrics["average_accuracy"] == pytest.approx(
        (first.metrics["accuracy"] + second.metrics["accuracy"]) / 2
    )
    everybody = ["client-0", "client-1", "client-2"]
    assert second.recipe["clients"] == {"trained": everybody, "summed": everybody}
    for number in (1, 2):
        shares = [each.weight or 0.0 for each in registry.submissions(RUN, number)]
        assert shares == pytest.approx([1 / 3] * 3)
    assert registry.run(RUN).state == "finished"
    assert verify(registry).problems == ()
    held_out = load_dataset(toy_data, split="validation")
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"{each.text},{each.label}\n" for each in held_out))
    answers = predict(registry, "things", str(rows)).rows
    right = sum(row.label == label for row, label in zip(answers, held_out.labels, strict=True))
    assert right / len(answers) == pytest.approx(second.metrics["accuracy"])
