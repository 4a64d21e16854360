"""Accuracy of bounded FLoRA beside what it must be compared with, on WordNet glosses (24 classes, MiniLM).

Federated: 10 clients with the ranks of FLoRA's paper (64,32,16,16,8,8,4,4,4,4), IID and Dirichlet(0.3), with the
package's own local training and aggregation, called in this process without the network. Beside it:

* ``frozen``: logistic regression on mean-pooled, normalised embeddings of the frozen model;
* ``local``: each client trains alone for as many steps as it has in the federation; the mean over clients;
* ``central``: all data in one place, rank 16, as many optimiser steps as a client takes, each on as many examples as
  the whole cohort sees in one of its steps: the same steps, and the same number of examples;
* ``central-small-batch``: as many examples again, in as many steps of a client's batch size as the cohort takes.

Learning rates were chosen on the validation split (``--split validation``); what is reported is the test split.
Every finished piece is written down at once, so an interrupted run goes on where it stopped, and two processes may
share the work with ``--only`` and ``--kinds``. Run as ``python benchmarks/accuracy.py``; results and the plot go to
``benchmarks/results/``.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from pomona import __version__
from pomona.adapters import AdapterWeights, LoraFactors
from pomona.aggregation.flora import aggregate_layers, stack
from pomona.aggregation.heads import average_heads
from pomona.aggregation.weights import example_weights
from pomona.base_model import find_base_model
from pomona.batches import Encoded, batches
from pomona.client.train import Trained, train_locally
from pomona.datasets import Dataset, Split, class_names, load_dataset
from pomona.lora_model import AdaptedModel
from pomona.partition import partition_dirichlet, partition_iid
from pomona.seeds import seed_of
from pomona.settings import TrainingSettings

RESULTS = Path(__file__).parent / "results"
CENTRAL_RANK = 16
MAX_LENGTH = 64
SCORED_ROUNDS = (1, 2, 3, 5, 7)
LOCAL_EXAMPLES = 400  # each of ten clients is scored, on this many held-out examples


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is compared."""

    ranks: tuple[int, ...] = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
    rounds: int = 10
    steps: int = 30
    batch_size: int = 8
    learning_rate: float = 1e-3
    head_learning_rate: float = 2e-2
    alpha: float = 0.3
    max_rank: int = 64
    split: Split = "test"

    def training(self, *, steps: int, batch_size: int) -> TrainingSettings:
        """Return the local training that takes exactly ``steps`` steps."""
        return TrainingSettings(
            local_epochs=1000,
            max_steps=steps,
            batch_size=batch_size,
            learning_rate=self.learning_rate,
            head_learning_rate=self.head_learning_rate,
        )


class Bench:
    """The model and the data, loaded once."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.train = load_dataset("wordnet-nouns", split="train")
        held_out = load_dataset("wordnet-nouns", split=setting.split)
        self.model = AdaptedModel(
            find_base_model("all-minilm-l6-v2"), task="classification", labels=class_names(self.train)
        )
        self.held_out = self.encode(held_out)
        self.all_train = self.encode(self.train)
        chosen = np.random.default_rng(0).permutation(len(held_out))[:LOCAL_EXAMPLES]
        self.some_held_out = self.encode(held_out.subset(chosen.tolist()))

    def encode(self, data: Dataset) -> Encoded:
        """Tokenise a data set."""
        return self.model.encode(data.texts, data.labels, max_length=MAX_LENGTH)

    def shares(self, kind: str, seed: int) -> list[Encoded]:
        """Return the clients' data."""
        count = len(self.setting.ranks)
        parts = (
            partition_iid(len(self.train), count, seed=seed)
            if kind == "iid"
            else partition_dirichlet(self.train.labels, count, alpha=self.setting.alpha, seed=seed, min_examples=1)
        )
        return [self.encode(self.train.subset(part.tolist())) for part in parts]

    def accuracy(self, weights: AdapterWeights) -> float:
        """Score a global adapter on the held-out split."""
        self.model.attach(weights)
        return self.model.score(self.held_out).accuracy

    def start(self, seed: int) -> AdapterWeights:
        """Return what everybody starts from."""
        return AdapterWeights(heads=self.model.initial_heads(seed=seed))

    def local_round(
        self,
        data: Encoded,
        start: AdapterWeights,
        *,
        rank: int,
        steps: int,
        batch_size: int,
        seed: int,
        number: int,
        who: str,
    ) -> Trained:
        """Train one client for one round, as a real one does."""
        return train_locally(
            self.model,
            data,
            start=start,
            rank=rank,
            training=self.setting.training(steps=steps, batch_size=batch_size),
            adapter_seed=seed_of(seed, number),
            batch_seed=seed_of(seed, number, who),
        )


def federated(bench: Bench, kind: str, seed: int) -> dict[str, object]:
    """Run bounded FLoRA and return the accuracy after each round."""
    setting, weights = bench.setting, bench.start(seed)
    shares = bench.shares(kind, seed)
    curve: list[tuple[int, float]] = []
    energies: list[float] = []
    for number in range(1, setting.rounds + 1):
        trained = [
            bench.local_round(
                data,
                weights,
                rank=rank,
                steps=setting.steps,
                batch_size=setting.batch_size,
                seed=seed,
                number=number,
                who=f"{i}",
            )
            for i, (data, rank) in enumerate(zip(shares, setting.ranks, strict=True))
        ]
        shares_of_sum = example_weights([len(data) for data in shares])
        updates = [_scaled(each, setting) for each in trained]
        layers, energy = aggregate_layers(
            weights.layers, updates, weights=shares_of_sum, max_rank=setting.max_rank, energy=1.0
        )
        heads = average_heads([each.weights.heads for each in trained], weights=shares_of_sum)
        _check_exact(weights, updates, shares_of_sum, layers, energy)
        weights = AdapterWeights(layers=layers, heads=heads)
        energies.append(min(energy.values()))
        if number in SCORED_ROUNDS or number == setting.rounds:
            curve.append((number, bench.accuracy(weights)))
    return {"accuracy": curve[-1][1], "curve": curve, "retained_energy": energies}


def local_only(bench: Bench, kind: str, seed: int) -> dict[str, object]:
    """Train each client alone with the federation's steps and return the mean accuracy."""
    setting = bench.setting
    scores = []
    for i, (data, rank) in enumerate(zip(bench.shares(kind, seed), setting.ranks, strict=True)):
        trained = bench.local_round(
            data, bench.start(seed), rank=rank, steps=setting.rounds * setting.steps,
            batch_size=setting.batch_size, seed=seed, number=1, who=f"{i}",
        )  # fmt: skip
        del trained
        scores.append(bench.model.score(bench.some_held_out).accuracy)
    return {"accuracy": float(np.mean(scores)), "clients": scores}


def central(bench: Bench, _kind: str, seed: int) -> dict[str, object]:
    """Train on all data with the federation's steps, each on the cohort's examples."""
    setting = bench.setting
    steps = setting.rounds * setting.steps
    return _central(bench, seed, steps=steps, batch_size=setting.batch_size * len(setting.ranks))


def central_small_batch(bench: Bench, _kind: str, seed: int) -> dict[str, object]:
    """Train on all data with the federation's examples in small batches."""
    setting = bench.setting
    steps = setting.rounds * setting.steps * len(setting.ranks)
    return _central(bench, seed, steps=steps, batch_size=setting.batch_size)


def frozen(bench: Bench, _kind: str, seed: int) -> dict[str, object]:
    """Fit logistic regression on the frozen model's embeddings; the seed does not matter."""
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415

    del seed
    x = {name: _embed(bench, data) for name, data in (("train", bench.all_train), ("test", bench.held_out))}
    model = LogisticRegression(C=10.0, max_iter=2000).fit(x["train"], np.array(bench.all_train.targets))
    return {"accuracy": float(model.score(x["test"], np.array(bench.held_out.targets)))}


PIECES: dict[str, tuple[Callable[[Bench, str, int], dict[str, object]], Sequence[str]]] = {
    "frozen": (frozen, ("all",)),
    "central": (central, ("all",)),
    "flora-bounded": (federated, ("iid", "dirichlet")),
    "central-small-batch": (central_small_batch, ("all",)),
    "local": (local_only, ("iid", "dirichlet")),
}


def main() -> None:
    """Run what is missing, then print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy.json")
    parser.add_argument("--only", nargs="+", choices=list(PIECES), default=list(PIECES))
    for name in ("rounds", "steps", "batch_size", "max_rank"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Setting(), name))
    for name in ("learning_rate", "head_learning_rate", "alpha"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(Setting(), name))
    parser.add_argument("--ranks", type=int, nargs="+", default=list(Setting().ranks))
    parser.add_argument("--split", choices=["validation", "test"], default="test")
    parser.add_argument("--kinds", nargs="+", choices=["all", "iid", "dirichlet"], default=["all", "iid", "dirichlet"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = (
        "rounds",
        "steps",
        "batch_size",
        "max_rank",
        "learning_rate",
        "head_learning_rate",
        "alpha",
        "split",
    )
    setting = Setting(ranks=tuple(options.ranks), **{name: getattr(options, name) for name in names})
    results = run_missing(Bench(setting), options.out, seeds=options.seeds, only=options.only, kinds=options.kinds)
    report(results, options.out)


def run_missing(
    bench: Bench, out: Path, *, seeds: Sequence[int], only: Sequence[str], kinds: Sequence[str]
) -> dict[str, object]:
    """Run every piece that the result file does not have."""
    setting = json.loads(json.dumps(asdict(bench.setting)))
    machine = {"pomona": __version__, "torch": torch.__version__, "python": platform.python_version()}
    document = json.loads(out.read_text()) if out.exists() else {"setting": setting, "machine": machine, "runs": []}
    if document["setting"] != setting:
        raise SystemExit(f"{out} has results of another setting; give another --out")
    done = {(run["piece"], run["data"], run["seed"]) for run in document["runs"]}
    for seed in seeds:
        for piece in only:
            work, its_kinds = PIECES[piece]
            for kind in its_kinds:
                if kind not in kinds or (piece, kind, seed) in done:
                    continue
                began = time.process_time()
                run = {"piece": piece, "data": kind, "seed": seed, **work(bench, kind, seed)}
                run["cpu_s"] = round(time.process_time() - began, 1)
                if out.exists():  # another process may have added its pieces meanwhile
                    document = json.loads(out.read_text())
                document["runs"].append(run)
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(document, indent=1) + "\n")
                Console().print(f"{piece:>20} {kind:>9} seed {seed}: {run['accuracy']:.4f}  ({run['cpu_s']} s)")
    return document


def report(document: dict[str, object], out: Path) -> None:
    """Print mean and range over seeds, and draw accuracy over rounds."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    runs = document["runs"]
    assert isinstance(runs, list)
    table = Table("method", "data", "mean accuracy", "min", "max", "seeds", title="WordNet nouns, 24 classes")
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for color, key in enumerate(dict.fromkeys((run["piece"], run["data"]) for run in runs)):
        mine = [run for run in runs if (run["piece"], run["data"]) == key]
        scores = [run["accuracy"] for run in mine]
        table.add_row(*key, f"{np.mean(scores):.4f}", f"{min(scores):.4f}", f"{max(scores):.4f}", str(len(scores)))
        label = f"{key[0]} ({key[1]})" if key[1] != "all" else key[0]
        if "curve" in mine[0]:
            curves = np.array([[score for _, score in run["curve"]] for run in mine])
            rounds = [number for number, _ in mine[0]["curve"]]
            axes.plot(rounds, curves.mean(0), color=f"C{color}", label=label, marker="o", markersize=3)
            axes.fill_between(rounds, curves.min(0), curves.max(0), color=f"C{color}", alpha=0.2)
        else:
            axes.axhline(float(np.mean(scores)), color=f"C{color}", linestyle="--", label=label)
    axes.set(xlabel="round", ylabel="accuracy on the test split", ylim=(0, 1))
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out.with_suffix(".png"), dpi=120)
    Console().print(table)


def _central(bench: Bench, seed: int, *, steps: int, batch_size: int) -> dict[str, object]:
    bench.local_round(
        bench.all_train,
        bench.start(seed),
        rank=CENTRAL_RANK,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        number=1,
        who="all",
    )
    return {"accuracy": bench.model.score(bench.held_out).accuracy, "steps": steps, "batch_size": batch_size}


def _scaled(trained: Trained, setting: Setting) -> dict[str, LoraFactors]:
    scale_of = setting.training(steps=1, batch_size=1).scale_of
    return {name: replace(each, scale=scale_of(each.rank)) for name, each in trained.weights.layers.items()}


def _check_exact(
    before: AdapterWeights,
    updates: Sequence[dict[str, LoraFactors]],
    weights: Sequence[float],
    after: dict[str, LoraFactors],
    energy: dict[str, float],
) -> None:
    """Refuse to report if the aggregate of one layer is not the truncated sum that it claims to be."""
    name = sorted(after)[0]
    blocks = [update[name] for update in updates]
    dense = stack(blocks, weights=weights).delta().double()
    if name in before.layers:
        dense = dense + before.layers[name].delta().double()
    kept = 1.0 - float((dense - after[name].delta().double()).norm() ** 2 / dense.norm() ** 2)
    if abs(kept - energy[name]) > 1e-4:
        raise SystemExit(
            f"aggregation is wrong: layer {name} keeps {kept:.6f} of the energy, reported {energy[name]:.6f}"
        )


@torch.inference_mode()
def _embed(bench: Bench, data: Encoded) -> np.ndarray:
    bench.model.detach()
    found = []
    for i in range(0, len(data), 64):
        part = Encoded(data.tokens[i : i + 64], data.targets[i : i + 64], data.pad_id)
        order = np.argsort([-len(row) for row in part.tokens], kind="stable")
        batch = next(batches(part, batch_size=64, generator=None))
        hidden = bench.model.encoder()(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        mask = batch["attention_mask"][..., None]
        pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        found.append(pooled[np.argsort(order)].numpy())
    return np.concatenate(found)


if __name__ == "__main__":
    main()
