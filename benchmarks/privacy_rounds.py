"""What client-level privacy adds to a round: the package's own loops, clients and registry, without the network.

Eight clients train MiniLM with LoRA on WordNet glosses, all of them in every round, with the mechanisms that a
coordinator runs and, for each, the same strategy without privacy:

* ``dp-lora``: clips each update, adds noise to the sum, writes the ledger ahead; against ``fedit``;
* ``ffa-nested``: the same over fresh public up-projections; against itself;
* ``secure ffa-nested``: clients clip, add noise shares and mask, and the coordinator sees a sum; against the same.

Runs take turns, and CPU time of the process is counted, clients' training and the coordinator together; ratios are
of the medians of rounds after the first. ``round`` counts everything, ``outside training`` all but what clients do
when they are asked to train, which a client in a secure sum does when it is asked for its masked vector.

Before anything is timed, each mechanism under a bound that nothing reaches and noise of nothing must give the adapter
of the strategy without privacy; nothing is reported when one does not. Run as ``python benchmarks/privacy_rounds.py``.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run as FlowerRun
from flwr.supercore.task_identity import TaskIdentity
from rich.console import Console
from rich.table import Table

from pomona import __version__
from pomona.client.trainer import Profile, Trainer
from pomona.coordinator import membership, replies
from pomona.coordinator.federation import run_federation
from pomona.datasets import Dataset, load_dataset
from pomona.messages import pack, unpack
from pomona.protocol import MASK, TRAIN
from pomona.settings import RunSettings
from pomona.storage.opening import open_registry
from pomona.wire import decode_weights

RESULTS = Path(__file__).parent / "results" / "privacy_rounds.json"
CLIENTS, RANK, STEPS, BATCH, EXAMPLES = 8, 8, 10, 16, 400
AIM = 1.05
_AGREEMENT = 1e-3
_NOTHING = {"noise_multiplier": 1e-11, "clip": 1e2, "epsilon": 1e30}
_REAL = {"noise_multiplier": 1.0, "clip": 0.1, "epsilon": 1e3}
_RUNS = itertools.count(1)
_FIXED: dict[str, Any] = {"strategy": "fedit", "rank": RANK, "max_rank": RANK}
_NESTED: dict[str, Any] = {"strategy": "ffa-nested", "max_rank": RANK}


@dataclass(frozen=True, slots=True)
class Mechanism:
    """A mechanism as the sections of a run file."""

    aggregation: dict[str, Any]
    privacy: dict[str, Any]


MECHANISMS = {
    "dp-lora": Mechanism(_FIXED, {}),
    "ffa-nested": Mechanism(_NESTED, {}),
    "secure ffa-nested": Mechanism(
        _NESTED, {"trust": "distributed", "accountant": "rdp", "secure_sum": {"least_survivors": 6}}
    ),
}


class LocalGrid(Grid):
    """Delivers messages to trainers in this process, and counts their CPU time.

    Attributes:
        training_s: CPU seconds that clients trained.
        begun: CPU time at which each round's first work was sent.
        trained: ``training_s`` at that time.
    """

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self._trainers = dict(enumerate(trainers, start=101))
        self._ids = map("message-{}".format, itertools.count())
        self._landed: dict[str, Message] = {}
        self.training_s = 0.0
        self.begun: dict[int, float] = {}
        self.trained: dict[int, float] = {}

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes."""
        return list(self._trainers)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have each message answered."""
        return [self._answered(message) for message in messages]

    def _answered(self, message: Message) -> str:
        facts = message.metadata
        if facts.group_id:
            self.begun.setdefault(int(facts.group_id), time.process_time())
            self.trained.setdefault(int(facts.group_id), self.training_s)
        _, request, payload = unpack(message)
        began = time.process_time()
        answer = self._trainers[facts.dst_node_id].answer(facts.message_type, request, payload)
        if facts.message_type in {TRAIN, MASK}:
            self.training_s += time.process_time() - began
        message_id = next(self._ids)
        facts.__dict__["_message_id"] = message_id  # as Flower's own grids do
        self._landed[message_id] = Message(pack(*answer), reply_to=message)
        return message_id

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the answers that nobody has had yet."""
        return [self._landed.pop(each) for each in list(message_ids) if each in self._landed]

    def set_run(self, run: FlowerRun) -> None:
        """Refuse: no part of the package asks for it."""
        raise NotImplementedError

    @property
    def run(self) -> FlowerRun:
        """Refuse: no part of the package asks for it."""
        raise NotImplementedError

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Refuse: no part of the package asks for it."""
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Refuse: no part of the package asks for it."""
        raise NotImplementedError


def settings_of(mechanism: Mechanism, privacy: dict[str, Any] | None, *, rounds: int) -> RunSettings:
    """Return a run of a mechanism under some noise; without privacy its strategy alone."""
    document: dict[str, Any] = {
        "name": "measured",
        "rounds": rounds,
        "seed": 3,
        "data": {"source": "wordnet-nouns", "evaluation_examples": 20},
        "cohort": {"join_timeout_s": 5.0, "round_deadline_s": 600.0, "min_clients": CLIENTS},
        "training": {"batch_size": BATCH, "max_steps": STEPS, "learning_rate": 1e-3},
        "aggregation": mechanism.aggregation,
    }
    if privacy is not None:
        promised = {"unit": "client", "population": "measured", "population_size": CLIENTS, "delta": 1e-3}
        document["privacy"] = {**promised, **mechanism.privacy, **privacy}
        if privacy is _NOTHING and "secure_sum" in mechanism.privacy:  # a grid that noise of nothing can be put on
            document["privacy"]["secure_sum"] = {**mechanism.privacy["secure_sum"], "fraction_bits": 34}
    return RunSettings.model_validate(document)


def trainers() -> list[Trainer]:
    """Return the clients, who share the training split in equal parts."""
    train = load_dataset("wordnet-nouns", split="train", task="classification")

    def share(number: int) -> Dataset:
        return train.subset(range(number * EXAMPLES, (number + 1) * EXAMPLES))

    return [
        Trainer(Profile(name=f"client-{i}", rank=RANK, load_data=lambda _task, i=i: share(i))) for i in range(CLIENTS)
    ]


def federate(clients: Sequence[Trainer], settings: RunSettings) -> tuple[LocalGrid, dict[str, torch.Tensor], float]:
    """Run a federation, and return its grid, what the last adapter does to each layer, and the CPU time at its end."""
    grid, run_id = LocalGrid(clients), f"run-{next(_RUNS)}"  # clients hold a run to its first terms
    with tempfile.TemporaryDirectory() as home, open_registry(Path(home)) as registry:
        versions = run_federation(grid, settings, registry, run_id=run_id, lasting=False)
        ended = time.process_time()
        weights, _ = decode_weights(registry.payload(versions[-1].ref))
    does = {name: each.delta() for name, each in weights.layers.items()}
    return grid, does | {name: head.double() for name, head in weights.heads.items()}, ended


def check(clients: Sequence[Trainer], name: str) -> float:
    """Refuse to go on unless a mechanism that adds nothing is its strategy; return how far it is off."""
    found = [federate(clients, settings_of(MECHANISMS[name], each, rounds=1))[1] for each in (None, _NOTHING)]
    plain, private = found
    square = sum(float((private[key] - plain[key]).square().sum()) for key in plain)
    off = (square / sum(float(each.square().sum()) for each in plain.values())) ** 0.5
    if not off <= _AGREEMENT:
        raise SystemExit(f"{name} without noise is {off:.1e} off its strategy, so no speed is reported")
    return off


def measure(clients: Sequence[Trainer], name: str, *, rounds: int, turns: int) -> dict[str, Any]:
    """Time rounds with and without privacy, in turns."""
    off = check(clients, name)
    spent: dict[str, dict[str, list[float]]] = {
        way: {"round": [], "outside training": []} for way in ("plain", "private")
    }
    for _ in range(turns):
        for way, privacy in (("plain", None), ("private", _REAL)):
            grid, _, ended = federate(clients, settings_of(MECHANISMS[name], privacy, rounds=rounds))
            for whole, training in _rounds(grid, ended):
                spent[way]["round"].append(whole)
                spent[way]["outside training"].append(whole - training)
    seconds = {way: {part: statistics.median(each) for part, each in parts.items()} for way, parts in spent.items()}
    return {
        "mechanism": name,
        "options": f"--rounds {rounds} --turns {turns}",
        "rounds_timed": len(spent["plain"]["round"]),
        "off_without_noise": off,
        "median_cpu_s": seconds,
        "ratio": seconds["private"]["round"] / seconds["plain"]["round"],
        "load": os.getloadavg()[0],
    }


def _rounds(grid: LocalGrid, ended: float) -> Iterable[tuple[float, float]]:
    """Yield CPU seconds of each round after the first, and of the training in it."""
    marks = [*sorted(grid.begun.values()), ended]
    trained = [*sorted(grid.trained.values()), grid.training_s]
    for number in range(1, len(marks) - 1):
        yield marks[number + 1] - marks[number], trained[number + 1] - trained[number]


def report(document: dict[str, Any]) -> None:
    """Print the table."""
    table = Table("mechanism", "round without", "with", "ratio", "outside training without", "with")
    for run in document["runs"]:
        plain, private = run["median_cpu_s"]["plain"], run["median_cpu_s"]["private"]
        cells = [f"{plain['round']:.2f} s", f"{private['round']:.2f} s", f"{run['ratio']:.3f}"]
        cells += [f"{each['outside training']:.2f} s" for each in (plain, private)]
        table.add_row(run["mechanism"], *cells)
    table.caption = (
        f"CPU time of a round: {CLIENTS} clients at rank {RANK}, {STEPS} steps of {BATCH} glosses each; "
        f"aim: a ratio of at most {AIM}"
    )
    Console(width=110).print(table)


def main() -> None:
    """Check, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of a run; the first is not counted")
    parser.add_argument("--mechanisms", nargs="+", choices=list(MECHANISMS), default=list(MECHANISMS))
    parser.add_argument("--turns", type=int, default=3, help="runs of each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("_task_id", "_run_id", "_node_id"):  # what Flower gives its apps, to write messages
        setattr(TaskIdentity, name, 1)
    replies._POLL_S = membership._JOIN_POLL_S = 0.01  # no network to wait for
    machine = {"pomona": __version__, "torch": torch.__version__, "python": platform.python_version()}
    facts = {"cores": os.cpu_count(), "command": "python benchmarks/privacy_rounds.py"}
    document: dict[str, Any] = {"machine": machine | facts, "aim": AIM, "runs": []}
    clients, found = trainers(), _found(options.out)
    for name in options.mechanisms:
        found[name] = measure(clients, name, rounds=options.rounds, turns=options.turns)
        document["runs"] = [found[each] for each in MECHANISMS if each in found]
        options.out.write_text(json.dumps(document, indent=1) + "\n")
        Console(stderr=True).print(f"{name}: done")
    report(document)


def _found(out: Path) -> dict[str, Any]:
    """Return what was measured before, by mechanism."""
    return {run["mechanism"]: run for run in json.loads(out.read_text())["runs"]} if out.exists() else {}


if __name__ == "__main__":
    main()
