"""What client-level privacy costs class statistics, task after task: accuracy by epsilon and number of clients.

WordNet nouns, 24 classes in 6 tasks of 4, features of MiniLM as it is. Simulated is the one release of each task that
sums features up, by the code of a run: its layout, bound, noise and post-processing. Adapters are not trained and stay
at no change, so that the figure is of the sums alone; the plan is that of a run with one round a task, which pays for
those rounds too. All classes are told by their normal distributions (``head = "gaussian"``).

A population is drawn: each client has six rows, drawn with replacement from the training split, of about one of each
task. So rows repeat, between clients and within one, and the privacy that is paid for protects nobody here. Clients are
all asked in each release (``sample_rate = 1``). The bound is one row.

Only the weights of counts, sums and moments were looked at on other data before: on the validation split, with another
population and order of classes. What is reported is the test split; seeds 0 to 2 draw population, order and noise.
Run as ``python benchmarks/private_tasks.py``; results go to ``benchmarks/results/private_tasks.json``.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from pomona.base_model import find_base_model
from pomona.continual.discriminant import gaussian_head
from pomona.continual.encoder import FrozenEncoder
from pomona.continual.statistics import ClassStatistics
from pomona.coordinator.private_task_loop import statistics_of
from pomona.datasets import class_names, load_dataset
from pomona.mos_settings import Moments, MosSettings
from pomona.privacy.class_sums import COUNT, FIRST, MOMENT, OWN, TOTAL, SumsLayout
from pomona.privacy.clipping import clip, joint_norm
from pomona.privacy.gaussian_sum import GaussianSum
from pomona.privacy.plan import PrivacyPlan, plan_of
from pomona.privacy.randomness import SecureRandom
from pomona.settings import RunSettings

RESULTS = Path(__file__).parent / "results" / "private_tasks.json"
CLIENTS, EPSILONS, SEEDS = (2_000, 20_000), (2.0, 8.0), (0, 1, 2)
ROWS_PER_CLIENT, CLASSES_PER_TASK, BOUND = 6, 4, 1.0
_CHUNK = 4096


@dataclass(frozen=True)
class Features:
    """Of the training split and of the test split, with their classes."""

    train: Tensor
    targets: Tensor
    test: Tensor
    expected: Tensor
    names: tuple[str, ...]


@dataclass(frozen=True)
class Population:
    """Which training rows each client has, ``(clients, rows)``, and the classes of each task."""

    rows: Tensor
    tasks: tuple[tuple[int, ...], ...]


def features() -> Features:
    """Return them, once for all."""
    encoder = FrozenEncoder(find_base_model("all-minilm-l6-v2"))
    names, found = class_names(load_dataset("wordnet-nouns", split=None)), []
    for split in ("train", "test"):
        data = load_dataset("wordnet-nouns", split=split)
        found.append(encoder.all_features(encoder.of_texts(data.texts, max_length=64)).double())
        found.append(torch.tensor([names.index(label) for label in data.labels]))
    return Features(found[0], found[1], found[2], found[3], tuple(names))


def population_of(known: Features, *, clients: int, seed: int) -> Population:
    """Draw who has which rows, and an order of classes."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(known.names), generator=generator).tolist()
    tasks = tuple(tuple(order[at : at + CLASSES_PER_TASK]) for at in range(0, len(order), CLASSES_PER_TASK))
    return Population(torch.randint(len(known.train), (clients, ROWS_PER_CLIENT), generator=generator), tasks)


def plan_for(known: Features, people: Population, *, epsilon: float, moments: Moments) -> PrivacyPlan:
    """Return the plan of a run with one round a task."""
    clients = len(people.rows)
    settings = {
        "name": "tasks",
        "continual": {
            "tasks": [[known.names[place] for place in task] for task in people.tasks],
            "rounds_per_task": 1,
            "mos": {"moments": moments, "head": "gaussian"},
        },
        "privacy": {
            "unit": "client",
            "population": "drawn",
            "population_size": clients,
            "epsilon": epsilon,
            "delta": 0.1 / clients,
            "sums_clip": BOUND,
        },
    }
    return plan_of(RunSettings.model_validate(settings))


def layout_of(known: Features, number: int, moments: Moments) -> SumsLayout:
    """Return which sums there are of the task at a place."""
    adapters = (OWN, FIRST) if number else (OWN,)
    return SumsLayout(
        classes=CLASSES_PER_TASK, width=known.train.shape[1], moments=moments, adapters=adapters
    )  # fmt: skip


def sums_of(known: Features, weights: Tensor, task: Sequence[int], layout: SumsLayout) -> dict[str, Tensor]:
    """Return the sums of all training rows, each times a weight."""
    upper = torch.triu_indices(layout.width, layout.width)
    parts: dict[str, list[Tensor]] = {COUNT: [], TOTAL: [], MOMENT: []}
    for place in task:
        at = (known.targets == place).nonzero().flatten()
        rows, times = known.train[at], weights[at]
        parts[COUNT].append(times.sum())
        parts[TOTAL].append(times @ rows)
        full = layout.moments == "full"
        parts[MOMENT].append(((rows * times[:, None]).T @ rows)[*upper] if full else times @ rows.square())
    stacked = {kind: torch.stack(each) for kind, each in parts.items()}
    both = {f"{name}.{kind}": stacked[kind] for name in layout.adapters for kind in (TOTAL, MOMENT)}
    return {COUNT: stacked[COUNT], **both}


def clipped_weights(known: Features, people: Population, task: Sequence[int], layout: SumsLayout) -> Tensor:
    """Return what each training row counts for, over all clients that have it: the clipping factor of each.

    The norm of a client's vector is had from inner products of its rows: ``||sum f f^T||^2 = sum_ij (f_i f_j)^2``.
    """
    found = torch.zeros(len(known.train), dtype=torch.float64)
    a, b, c = (layout.weight(kind) ** 2 for kind in (COUNT, TOTAL, MOMENT))
    k = len(layout.adapters)
    for rows in torch.split(people.rows, _CHUNK):
        classes, each = known.targets[rows], known.train[rows]
        mine = torch.isin(classes, torch.tensor(task)).double()
        same = (classes[:, :, None] == classes[:, None, :]).double() * mine[:, :, None] * mine[:, None, :]
        inner = each @ each.transpose(1, 2)
        squares = each.square()
        moment = inner.square() if layout.moments == "full" else squares @ squares.transpose(1, 2)
        norm = ((a + k * (b * inner + c * moment)) * same).sum((1, 2)).clamp(min=0.0).sqrt()
        factor = (BOUND / norm.clamp(min=1e-12)).clamp(max=1.0)
        found.index_add_(0, rows.flatten(), (mine * factor[:, None]).flatten())
    return found


def check(known: Features) -> None:
    """Compare with the mechanism itself, client after client; nothing is reported where they differ."""
    for moments in ("full", "diagonal"):
        layout, people = layout_of(known, 1, moments), population_of(known, clients=40, seed=99)
        task = people.tasks[1]
        total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in layout.shapes.items()}
        for rows in people.rows:
            held = torch.zeros(len(known.train), dtype=torch.float64).index_add_(
                0, rows, torch.ones(len(rows)).double()
            )
            for name, part in clip(layout.contribution(sums_of(known, held, task, layout)), BOUND).items():
                total[name] += part
        fast = layout.contribution(sums_of(known, clipped_weights(known, people, task, layout), task, layout))
        if joint_norm({name: fast[name] - total[name] for name in total}) > 1e-8 * joint_norm(total):
            raise SystemExit("the sums of the benchmark are not those of the mechanism; nothing is reported")


def accuracy(known: Features, people: Population, statistics: Sequence[ClassStatistics]) -> float:
    """Return the accuracy over all classes, on the test split."""
    mos = MosSettings()
    head = gaussian_head(statistics, prior=mos.prior, sphere_examples=mos.sphere_examples)
    order = torch.tensor([place for task in people.tasks for place in task])
    return float((order[head.logits(known.test).argmax(1)] == known.expected).double().mean())


def exact(known: Features, people: Population, moments: Moments) -> float:
    """Return it without privacy, from all rows of all clients."""
    statistics = []
    for place in (place for task in people.tasks for place in task):
        rows = people.rows.flatten()
        statistics.append(ClassStatistics.of(known.train[rows[known.targets[rows] == place]], moments=moments))
    return accuracy(known, people, statistics)


def released(
    sums: Sequence[tuple[SumsLayout, Mapping[str, Tensor]]], plan: PrivacyPlan, *, seed: int
) -> list[ClassStatistics]:
    """Return the statistics of all classes that a run would know."""
    noise, found = SecureRandom(hashlib.sha256(f"private-tasks:{seed}".encode()).digest()), []
    for layout, clipped in sums:
        drawn = GaussianSum(
            layout.shapes,
            bound=BOUND,
            noise_multiplier=plan.update_noise_multiplier,
            divisor=plan.divisor,
            noise=noise,
        ).release()
        mean = {name: each + clipped[name] / plan.divisor for name, each in drawn.items()}
        found += statistics_of(mean, layout, plan)[layout.adapters[-1]]
    return found


def measured(known: Features, *, clients: int, seed: int) -> list[dict[str, object]]:
    """Return one run for each kind of moments and each epsilon."""
    people, found = population_of(known, clients=clients, seed=seed), []
    for moments in ("diagonal", "full"):
        facts = {"clients": clients, "seed": seed, "moments": moments}
        found.append({**facts, "epsilon": None, "accuracy": exact(known, people, moments)})
        layouts = [layout_of(known, number, moments) for number in range(len(people.tasks))]
        sums = [
            (layout, layout.contribution(sums_of(known, clipped_weights(known, people, task, layout), task, layout)))
            for layout, task in zip(layouts, people.tasks, strict=True)
        ]
        for epsilon in EPSILONS:
            plan = plan_for(known, people, epsilon=epsilon, moments=moments)
            noise = layouts[-1].noise_of_class(noise_multiplier=plan.noise_multiplier, divisor=plan.divisor)
            score = accuracy(known, people, released(sums, plan, seed=seed))
            kept = {"epsilon": epsilon, "noise_multiplier": plan.noise_multiplier, "noise_of_class": noise}
            found.append({**facts, **kept, "accuracy": score})
    return found


def shown(runs: Sequence[Mapping[str, object]], *, clients: int, moments: str, epsilon: float | None) -> str:
    """Return mean and range over seeds."""
    scores = [
        float(str(run["accuracy"]))
        for run in runs
        if (run["clients"], run["moments"], run["epsilon"]) == (clients, moments, epsilon)
    ]
    mean = math.fsum(scores) / len(scores)
    return f"{mean:.3f} ({min(scores):.3f}-{max(scores):.3f})"


def main() -> None:
    """Measure, write down, show."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = features()
    check(known)
    runs = [run for clients in CLIENTS for seed in SEEDS for run in measured(known, clients=clients, seed=seed)]
    arguments.out.write_text(json.dumps({"runs": runs}, indent=1, sort_keys=True) + "\n")
    for clients in CLIENTS:
        for moments in ("diagonal", "full"):
            cells = [shown(runs, clients=clients, moments=moments, epsilon=each) for each in (None, *EPSILONS[::-1])]
            Console().print(f"{clients:,} {moments}: none {cells[0]}, epsilon 8 {cells[1]}, epsilon 2 {cells[2]}")


if __name__ == "__main__":
    main()
