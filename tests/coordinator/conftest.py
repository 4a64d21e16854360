"""A coordinator in the tests' process asks its stand-in grid without long pauses; files to learn one by one."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pomona.coordinator import membership, replies
from pomona.datasets import load_dataset, write_jsonl
from pomona.storage.opening import open_registry
from pomona.storage.registry import Registry

if TYPE_CHECKING:
    from tests.coordinator.grid import MakeNodes, Node, Tamper

    from pomona.coordinator.learning import LearnRequest


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """Return an empty registry."""
    with open_registry(tmp_path / "registry") as registry:
        yield registry


@pytest.fixture
def quick_polls(flower_task: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask every 10 ms, with the registry in a folder."""
    del flower_task
    monkeypatch.delenv("POMONA_REGISTRY_URL", raising=False)
    monkeypatch.setattr(replies, "_POLL_S", 0.01)
    monkeypatch.setattr(membership, "_JOIN_POLL_S", 0.01)


@pytest.fixture
def make_nodes(tiny_bert: Path, toy_data: Path) -> "MakeNodes":
    """Return a maker of clients among whom the training rows are spread: row ``i`` is of ``owner(i, label)``."""
    from tests.coordinator.grid import nodes_of

    rows = load_dataset(toy_data, split="train")

    def make(count: int, owner: Callable[[int, str], int] | None = None, **tampers: "Tamper") -> "list[Node]":
        owners = [owner(i, label) if owner else i % count for i, label in enumerate(rows.labels)]
        return nodes_of(rows, tiny_bert, owners, count, **tampers)

    return make


@pytest.fixture(scope="session")
def write(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Write the rows of some classes of one split into a file, and return its name."""
    folder = tmp_path_factory.mktemp("rows")

    def rows(split: str, classes: Sequence[str] = ("animal", "food", "tool", "weather")) -> str:
        path = folder / f"{split}-{'-'.join(classes)}.jsonl"
        data = load_dataset(toy_data, split="train" if split == "train" else "validation")
        write_jsonl(data.subset([i for i, label in enumerate(data.labels) if label in classes]), path)
        return str(path)

    return rows


@pytest.fixture(scope="session")
def things(write: Callable[..., str], tiny_bert: Path) -> "LearnRequest":
    """Learn four classes in two tasks."""
    from tests.coordinator.things import SETTINGS

    from pomona.coordinator.learning import LearnRequest

    return LearnRequest(
        name="things",
        data=write("train"),
        test=write("test"),
        classes_per_task=2,
        base=str(tiny_bert),
        settings=SETTINGS,
    )
