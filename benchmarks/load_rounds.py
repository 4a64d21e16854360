"""Thousands of rounds in one process, for ``benchmarks/load.py``: does anything grow?

The real round loop, strategy and registry (SQLite, fully synchronised) on the in-process grid of the tests, whose nodes
answer at once with valid updates. Every so many rounds the process looks at itself: resident memory, file descriptors,
threads, seconds. Run by ``benchmarks/load.py`` as a process of its own, one JSON object a line on standard output.
"""

import gc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity
from load_making import Answerer, Shapes, answerer, client_names, manifest_of, random_weights

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.conftest import write_tiny_bert, write_toy_data
from tests.coordinator.grid import InProcessGrid
from tests.invariants import Outside, broken_promises

from pomona.coordinator import membership, replies
from pomona.coordinator.federation import run_federation
from pomona.coordinator.replay import Replay
from pomona.messages import unpack
from pomona.settings import RunSettings
from pomona.storage.opening import open_registry

RUN, RANK, CLIENTS = "rounds", 4, 4
EVERY = 50
REPLAYED = 20  # of the last rounds, which are aggregated again

Facts = dict[str, Any]


@dataclass
class LightNode:
    """A node of the in-process grid that does not train."""

    answers: Answerer
    look: bool
    joins_after: int = 0
    leaves_after: float = float("inf")

    def answer(self, message: Message) -> tuple[str, str, bytes]:
        """Answer at once."""
        kind, text, _ = unpack(message)
        number = int(message.metadata.group_id or 0)
        if self.look and kind == "train" and number % EVERY == 1:
            say({"round": number, **sample()})
        return self.answers(message.metadata.message_type, text)


def sample() -> Facts:
    """Return what this process takes at the moment."""
    gc.collect()
    process = psutil.Process()
    return {
        "at_s": time.monotonic(),
        "cpu_s": sum(process.cpu_times()[:2]),
        "rss_mib": process.memory_info().rss / (1 << 20),
        "files": process.num_fds(),
        "threads": process.num_threads(),
    }


def say(facts: Facts) -> None:
    """Tell the benchmark."""
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def settings_of(model: Path, data: Path, rounds: int) -> RunSettings:
    """Return the settings of the run; few texts are scored, because scoring is not what is looked at."""
    return RunSettings.model_validate(
        {
            "name": RUN,
            "rounds": rounds,
            "model": {"base": str(model), "max_length": 8, "target_modules": ["query"]},
            "data": {"source": str(data), "evaluation_examples": 4},
            "cohort": {"min_clients": CLIENTS, "join_timeout_s": 60.0, "round_deadline_s": 60.0},
            "aggregation": {"max_rank": 8},
        }
    )


def main(folder: Path, rounds: int) -> None:
    """Run, look, and check what is left."""
    for name in ("_task_id", "_run_id", "_node_id"):
        setattr(TaskIdentity, name, 1)
    replies._POLL_S = membership._JOIN_POLL_S = 0.01
    model, data = write_tiny_bert(folder / "model"), write_toy_data(folder / "toy.csv")
    settings = settings_of(model, data, rounds)
    full = Shapes.of(manifest_of(model))
    shapes = Shapes(full.base_sha256, {k: v for k, v in full.layers.items() if k.endswith("query")}, full.heads)
    weights = random_weights(shapes, RANK, seed=1)
    answers = [answerer(name, RANK, shapes, weights) for name in client_names(CLIENTS)]
    nodes: Any = [LightNode(each, look=number == 0) for number, each in enumerate(answers)]
    with open_registry(folder / "home") as registry:
        run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
        say({"round": rounds, **sample()})
        known = Outside(replay=Replay(settings), replay_from=rounds - REPLAYED)
        say({"broken": broken_promises(registry, RUN, known), "versions": len(registry.versions(RUN))})


def slopes(samples: Sequence[Facts]) -> Facts:
    """Return how each figure goes on over the last three quarters: least squares, by a thousand rounds."""
    late = [each for each in samples if each["round"] >= samples[-1]["round"] / 4]
    return {name: 1000.0 * _slope(late, name) for name in ("rss_mib", "files", "threads")} | {
        "seconds_a_round": _paces(samples, "at_s"),
        "cpu_seconds_a_round": _paces(samples, "cpu_s"),
    }


def _slope(samples: Sequence[Facts], name: str) -> float:
    rounds, values = [each["round"] for each in samples], [each[name] for each in samples]
    middle, mean = sum(rounds) / len(rounds), sum(values) / len(values)
    above = sum((x - middle) * (y - mean) for x, y in zip(rounds, values, strict=True))
    return float(above / sum((x - middle) ** 2 for x in rounds))


def _paces(samples: Sequence[Facts], clock: str) -> list[float]:
    """Return the seconds that a round took in each quarter."""
    marks = [samples[(len(samples) - 1) * quarter // 4] for quarter in range(5)]
    return [round((b[clock] - a[clock]) / (b["round"] - a["round"]), 4) for a, b in pairwise(marks)]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
