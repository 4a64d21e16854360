"""Every aggregation strategy on one federation: WordNet glosses, MiniLM, five clients.

With the package's own local training and strategies, called in this process without the network; bytes are those of the
payloads that would travel. Ranks are 64, 32, 16, 8, 4, or 16 everywhere; strategies of equal ranks run with 16 only.
``--kinds`` chooses IID, Dirichlet(0.3) or Dirichlet(0.1); ``--rounds`` and ``--steps`` trade many short rounds for few
long ones. The budget is small (50 local steps of 8 examples on each client), so that methods are
compared at equal cost; it is no measure of what they reach in the end.

Each method has its own learning rate, chosen by ``--tune`` on the validation split, with a seed and a partition that
are not reported on; results are those of the test split. Every finished run is written down at once, so an interrupted
benchmark goes on where it stopped, and several processes may share the work. Run as
``python benchmarks/strategies.py --tune``, then without; results and the plot go to ``benchmarks/results/``.
"""

import argparse
import fcntl
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import Bench, Setting
from rich.console import Console
from rich.table import Table

from pomona import __version__
from pomona.adapters import AdapterWeights, LoraFactors
from pomona.aggregation.heads import average_heads
from pomona.aggregation.strategies import BY_NAME
from pomona.aggregation.strategies.contract import Assignment, Contribution, Rules
from pomona.aggregation.strategies.hetlora import pruned
from pomona.aggregation.strategies.start import starting_factors
from pomona.aggregation.weights import example_weights
from pomona.aggregation_settings import SelfPruningSettings
from pomona.client.train import train_locally
from pomona.partition import partition_dirichlet, partition_iid
from pomona.seeds import seed_of
from pomona.strategies import EQUAL_RANK
from pomona.wire import encode_weights

RESULTS = Path(__file__).parent / "results"
ALPHAS = {"dirichlet-0.3": 0.3, "dirichlet-0.1": 0.1}
PRUNING = SelfPruningSettings()
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "flora-bounded": ("flora-bounded", {}),
    "flora-bounded, warm": ("flora-bounded", {"warm_start": True}),
    "flora": ("flora", {}),
    "fedit": ("fedit", {}),
    "ffa": ("ffa", {}),
    "ffa-nested": ("ffa-nested", {}),
    "rolora": ("rolora", {}),
    "fedex": ("fedex", {}),
    "hetlora": ("hetlora", {}),
    "hetlora, partitioned": ("hetlora", {"rank_partitioned": True}),
    "hetlora, self-pruning": ("hetlora", {"self_pruning": PRUNING}),
    "flexlora": ("flexlora", {}),
    "flexlora, partitioned": ("flexlora", {"rank_partitioned": True}),
}
UNEQUAL_ONLY = {name for name in METHODS if "partitioned" in name or "pruning" in name}
RANKS = (64, 32, 16, 8, 4)
EQUAL = 16
MAX_RANK = 64
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
TUNING_SEED, TUNING_ROUNDS, TUNING_KIND = 100, 5, "dirichlet-0.3"


@dataclass(frozen=True, slots=True)
class Case:
    """One cell of the table."""

    method: str
    kind: str
    ranks: str
    seed: int


def run_case(bench: Bench, case: Case, learning_rate: float) -> dict[str, object]:
    """Run one federation and return its accuracy, its bytes and its time."""
    setting = bench.setting
    name, options = METHODS[case.method]
    strategy = BY_NAME[name]  # type: ignore[index]
    ranks = setting.ranks if case.ranks == "unequal" else (EQUAL,) * len(setting.ranks)
    steps = setting.training(steps=setting.steps, batch_size=setting.batch_size)
    training = steps.model_copy(update={"learning_rate": learning_rate})
    rules = Rules(
        shapes=bench.model.manifest.layers, seed=case.seed, max_rank=MAX_RANK, training=training, rank=EQUAL, **options
    )
    shares = _shares(bench, case)
    weights = example_weights([len(data) for data in shares])
    state, down, up, aggregation_s = bench.start(case.seed), 0, 0, 0.0
    largest = list(ranks)
    for number in range(1, setting.rounds + 1):
        contributions, heads = [], []
        for client, (data, rank) in enumerate(zip(shares, largest, strict=True)):
            assignment = strategy.assign(state.layers, rank=rank, round_number=number, rules=rules)
            given = AdapterWeights(layers=assignment.layers, heads=state.heads)
            down += len(encode_weights(given, without="a" if assignment.draws_a else None))
            trained = train_locally(
                bench.model,
                data,
                start=given,
                rank=assignment.rank,
                training=training,
                adapter_seed=assignment.adapter_seed,
                batch_seed=seed_of(case.seed, number, client),
                trainable=assignment.trainable,
                trains=assignment.trains,
                initial=assignment.initial,
                tail=(assignment.tail_from, assignment.tail_penalty),
            ).weights
            up += len(encode_weights(trained, without=_untrained(assignment)))
            _check_frozen_factor(assignment, rules, trained)
            layers = _scaled(trained.layers, rules, assignment)
            if rules.self_pruning is not None:
                start = starting_factors(assignment, rules)
                largest[client], layers = pruned(start, layers, rank=rank, rules=rules)
            contributions.append(Contribution(layers=layers, weight=weights[client]))
            heads.append(trained.heads)
        began = time.perf_counter()
        layers, _ = strategy.aggregate(state.layers, contributions, round_number=number, rules=rules)
        aggregation_s += time.perf_counter() - began
        state = AdapterWeights(layers=layers, heads=average_heads(heads, weights=weights))
    per_transfer = len(shares) * setting.rounds
    return {
        "accuracy": bench.accuracy(state),
        "learning_rate": learning_rate,
        "last_ranks": largest,
        "bytes_down": down // per_transfer,
        "bytes_up": up // per_transfer,
        "aggregation_s": round(aggregation_s / setting.rounds, 3),
    }


def main() -> None:
    """Run what is missing, then print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--kinds", nargs="+", choices=["iid", *ALPHAS], default=["dirichlet-0.3", "iid", "dirichlet-0.1"]
    )
    parser.add_argument("--ranks", nargs="+", choices=["unequal", "equal"], default=["unequal", "equal"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tune", action="store_true", help="choose learning rates on the validation split")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "strategies.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.tune:
        tune(Bench(Setting(ranks=RANKS, rounds=TUNING_ROUNDS, steps=options.steps, split="validation")), options)
        return
    setting = Setting(ranks=RANKS, rounds=options.rounds, steps=options.steps)
    chosen = rates(RESULTS / "strategies-rates.json")
    cases = [
        Case(method, kind, ranks, seed)
        for seed in options.seeds
        for ranks in options.ranks
        for kind in options.kinds
        for method in options.methods
        if runs_with(method, ranks)
    ]
    bench = None
    for case in cases:
        wanted = {"rounds": setting.rounds, "steps": setting.steps, **_facts(case)}
        if not any(all(run[key] == value for key, value in wanted.items()) for run in read_runs(options.out)):
            bench = bench or Bench(setting)
            began = time.process_time()
            found = run_case(bench, case, chosen[case.method])
            cpu_s = round(time.process_time() - began, 1)
            keep_run(options.out, {**wanted, **found, "cpu_s": cpu_s})
            Console().print(f"{case}: {found['accuracy']:.4f} ({cpu_s} s)")
    report(options.out)


def runs_with(method: str, ranks: str) -> bool:
    """Return whether a method is run with such ranks; options that change nothing at equal ranks are not."""
    return method not in UNEQUAL_ONLY if ranks == "equal" else METHODS[method][0] not in EQUAL_RANK


def tune(bench: Bench, options: argparse.Namespace) -> None:
    """Score every method at every learning rate, on the validation split; what is there already stays.

    While the smallest or the largest is the best, one beyond it is tried.
    """
    out = RESULTS / "strategies-rates.json"
    for method in options.methods:
        ranks = "unequal" if runs_with(method, "unequal") else "equal"
        case = Case(method, TUNING_KIND, ranks, TUNING_SEED)
        while True:
            done = [
                (float(r["learning_rate"]), r["validation_accuracy"]) for r in read_runs(out) if r["method"] == method
            ]
            rates = [rate for rate, _ in done]
            missing = [rate for rate in RATES if rate not in rates]
            if not missing:
                best = max(done, key=lambda run: run[1])[0]
                missing = [best / 2] * (best == min(rates)) + [best * 2] * (best == max(rates))
            if not missing:
                break
            found = run_case(bench, case, missing[0])
            keep_run(out, {"method": method, "learning_rate": missing[0], "validation_accuracy": found["accuracy"]})
            Console().print(f"{case} {missing[0]:g}: {found['accuracy']:.4f}")


def rates(path: Path) -> dict[str, float]:
    """Return each method's best learning rate."""
    best: dict[str, tuple[float, float]] = {}
    for run in read_runs(path):
        scored = float(run["validation_accuracy"]), float(run["learning_rate"])
        best[str(run["method"])] = max(best.get(str(run["method"]), (0.0, 0.0)), scored)
    if missing := set(METHODS) - set(best):
        raise SystemExit(f"no learning rate was chosen for {', '.join(sorted(missing))}; run with --tune first")
    return {method: rate for method, (_, rate) in best.items()}


def report(out: Path) -> None:
    """Print mean and range over seeds for each method and setting, and draw them; the axis begins at 0.2."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    runs = read_runs(out)
    keys = ("rounds", "steps", "kind", "ranks", "method")
    groups: dict[tuple[object, ...], list[Mapping[str, float]]] = {}
    for run in runs:
        groups.setdefault(tuple(run[key] for key in keys), []).append(run)
    columns = (*keys, "accuracy", "range", "seeds", "kB down", "kB up", "aggregation s")
    table = Table(*columns, title="WordNet nouns, test split; bytes per client and round")
    for key in sorted(groups, key=str):
        found = groups[key]
        scores = [run["accuracy"] for run in found]
        table.add_row(
            *map(str, key),
            f"{np.mean(scores):.4f}",
            f"{min(scores):.3f}-{max(scores):.3f}",
            str(len(scores)),
            *(f"{np.mean([run[name] for run in found]) / 1e3:.0f}" for name in ("bytes_down", "bytes_up")),
            f"{np.mean([run['aggregation_s'] for run in found]):.2f}",
        )
    Console(width=160).print(table)
    settings = list(dict.fromkeys(key[:4] for key in sorted(groups, key=lambda key: (key[0], key[3], key[2]))))
    rows = -(-len(settings) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(14, 4.2 * rows), squeeze=False)
    for axis in axes.flat[len(settings) :]:
        axis.set_visible(False)
    for axis, wanted in zip(axes.flat, settings, strict=False):
        methods = [name for name in METHODS if (*wanted, name) in groups]
        scores = [[run["accuracy"] for run in groups[(*wanted, name)]] for name in methods]
        means = [float(np.mean(each)) for each in scores]
        spread = [[mean - min(each) for mean, each in zip(means, scores, strict=True)],
                  [max(each) - mean for mean, each in zip(means, scores, strict=True)]]  # fmt: skip
        axis.barh(methods, means, xerr=spread, capsize=2)
        axis.set(title="{} x {} steps, {}, {} ranks".format(*wanted), xlim=(0.2, 0.7), xlabel="test accuracy")
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=8)
    figure.tight_layout()
    figure.savefig(out.with_suffix(".png"), dpi=100)


def _shares(bench: Bench, case: Case) -> list[object]:
    count = len(bench.setting.ranks)
    if case.kind == "iid":
        parts = partition_iid(len(bench.train), count, seed=case.seed)
    else:
        parts = partition_dirichlet(bench.train.labels, count, alpha=ALPHAS[case.kind], seed=case.seed, min_examples=1)
    return [bench.encode(bench.train.subset(part.tolist())) for part in parts]


def _untrained(assignment: Assignment) -> str | None:
    return {"both": None, "a": "b", "b": "a"}[assignment.trains]


def _scaled(layers: Mapping[str, LoraFactors], rules: Rules, assignment: Assignment) -> dict[str, LoraFactors]:
    scale = rules.scale(assignment.rank)
    return {name: LoraFactors(a=each.a, b=each.b, scale=scale) for name, each in layers.items()}


def _check_frozen_factor(assignment: Assignment, rules: Rules, trained: AdapterWeights) -> None:
    """Refuse to go on if what the server would assume of the factor that does not travel is not what was trained on."""
    if assignment.trains == "both":
        return
    kept = "a" if assignment.trains == "b" else "b"
    for name, start in starting_factors(assignment, rules).items():
        if not torch.equal(getattr(start, kept), getattr(trained.layers[name], kept)):
            raise SystemExit(f"the frozen factor of {name} is not what the server knows")


def read_runs(out: Path) -> list[dict[str, object]]:
    """Return the runs that a result file has."""
    return json.loads(out.read_text())["runs"] if out.exists() else []


def keep_run(out: Path, run: Mapping[str, object]) -> None:
    """Add a run to a result file, also while other processes add theirs."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(out.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # processes that share the work
        machine = {"pomona": __version__, "torch": torch.__version__, "python": platform.python_version()}
        document = json.loads(out.read_text()) if out.exists() else {"machine": machine, "runs": []}
        document["runs"].append(dict(run))
        out.write_text(json.dumps(document, indent=1) + "\n")
    finally:
        os.close(folder)


def _facts(case: Case) -> dict[str, object]:
    return {"method": case.method, "kind": case.kind, "ranks": case.ranks, "seed": case.seed}


if __name__ == "__main__":
    main()
