"""A federation in a process of its own, which a failpoint kills; what it leaves is what a test goes on with."""

import sys
from pathlib import Path

from flwr.supercore.task_identity import TaskIdentity
from tests.coordinator.grid import InProcessGrid, Node

from pomona.client.trainer import Profile
from pomona.coordinator import federation, replies
from pomona.coordinator.federation import run_federation
from pomona.datasets import Dataset, Task, load_dataset
from pomona.settings import RunSettings
from pomona.storage.registry import open_registry

RANKS = (2, 4, 3)


def nodes(model: Path, data: Path) -> list[Node]:
    """Return three clients of unequal rank."""

    def profile(number: int) -> Profile:
        def load_data(task: str) -> Dataset:
            kind: Task = "causal-lm" if task == "causal-lm" else "classification"
            train = load_dataset(data, split="train", task=kind)
            return train.subset(range(number, len(train), len(RANKS)))

        return Profile(name=f"client-{number}", rank=RANKS[number], load_data=load_data, model_folder=str(model))

    return [Node(profile(number)) for number in range(len(RANKS))]


def main(home: str, model: str, data: str, settings: str) -> None:
    """Run it, or go on with it."""
    for name in ("_task_id", "_run_id", "_node_id"):
        setattr(TaskIdentity, name, 1)
    replies._POLL_S = 0.01
    federation._JOIN_POLL_S = 0.01
    with open_registry(Path(home)) as registry:
        grid = InProcessGrid(nodes(Path(model), Path(data)))
        run_federation(grid, RunSettings.model_validate_json(settings), registry, run_id="run-1")
        asked = sum(len(node.asked) for node in grid.nodes.values())
    sys.stdout.write(f"asked {asked}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
