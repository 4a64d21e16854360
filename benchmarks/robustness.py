"""What poisoned updates do to a federation, with each defence and without: WordNet glosses, MiniLM, ten clients.

Bounded FLoRA with the ranks of FLoRA's paper, clients of equal weight, IID or Dirichlet shares. A share of the clients
(10, 20, 30 %, the same ones in every round) sends, instead of its honest update ``u``:

* ``sign-flip``: ``-u``;
* ``scaled``: ``-10 u``;
* ``random``: normal factors, of five times the norm of ``u``.

Reported are the accuracy of the global adapter on the test split, and the attack's success, the share of the
undefended honest federation's accuracy that is gone. ``none`` of attackers 0 tells what a defence costs honest clients.
FLTrust's server trains on 240 examples of the validation split, which nobody else sees. Attackers know nothing of
the defence; one that does can do more.

Every finished run is written down at once, and several processes may share the work. Run as
``python benchmarks/robustness.py``; results and the plot go to ``benchmarks/results/``.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accuracy import Bench, Setting
from rich.console import Console
from rich.table import Table
from strategies import keep_run, read_runs
from torch import Tensor

from pomona.adapters import AdapterWeights, LoraFactors
from pomona.aggregation.defence import change, defend
from pomona.aggregation.flora import aggregate_layers, stack
from pomona.aggregation.geometry import add_head_changes, gram_matrix
from pomona.aggregation.robust import Defended, fltrust
from pomona.aggregation.verify import update_norm
from pomona.aggregation_settings import DefenceSettings
from pomona.batches import Encoded
from pomona.datasets import load_dataset

RESULTS = Path(__file__).parent / "results"
DEFENCES = ("none", "norm-bounding", "multi-krum", "trimmed-mean", "geometric-median", "fltrust")
ATTACKS = ("sign-flip", "scaled", "random")
ROOT_EXAMPLES = 240
LEARNING_RATE = 2e-3  # best on the validation split for rounds of five steps, see strategies.py
ROOT_RANK = 8  # the cohort's median
MAX_RANK = 64
_FIRST_ROUND: dict[object, AdapterWeights] = {}  # of honest clients, the same in all cases of a seed


@dataclass(frozen=True, slots=True)
class Case:
    """One run."""

    kind: str
    attack: str
    attackers: int
    defence: str
    seed: int

    def facts(self) -> dict[str, object]:
        """Return what tells this run from others in the result file."""
        return {name: getattr(self, name) for name in self.__slots__}


def run_case(bench: Bench, case: Case, root: Encoded) -> dict[str, object]:
    """Run one federation; return its accuracy, and how often attackers and honest clients were taken out."""
    setting, weights = bench.setting, bench.start(case.seed)
    shares = bench.shares(case.kind, case.seed)
    base = [1.0 / len(shares)] * len(shares)
    # attackers are spread over the ranks, not put where they are largest or smallest
    bad = set(np.random.default_rng(case.seed).permutation(len(shares))[: case.attackers].tolist())
    taken_out = {"attackers": 0, "honest": 0}
    for number in range(1, setting.rounds + 1):
        sent = []
        for client, (data, rank) in enumerate(zip(shares, setting.ranks, strict=True)):
            first = (case.kind, case.seed, client) if number == 1 else None
            honest = _FIRST_ROUND.get(first) or _changed(bench, data, weights, rank, case.seed, number, str(client))
            if first:
                _FIRST_ROUND[first] = honest
            sent.append(poison(honest, case.attack, seed=(case.seed, number, client)) if client in bad else honest)
        defended = _defended(bench, case, sent, base, weights, root, number)
        for client, weight in enumerate(defended.weights):
            taken_out["attackers" if client in bad else "honest"] += weight == 0.0
        layers, _ = aggregate_layers(
            weights.layers,
            [each.layers for each in sent],
            weights=defended.weights,
            max_rank=MAX_RANK,
            energy=1.0,
        )
        whole = [{name: weights.heads[name] + head for name, head in each.heads.items()} for each in sent]
        heads = add_head_changes(weights.heads, whole, weights=defended.weights)
        weights = AdapterWeights(layers=layers, heads=heads)
    return {"accuracy": bench.accuracy(weights), "taken_out": taken_out}


def poison(honest: AdapterWeights, attack: str, *, seed: Sequence[int]) -> AdapterWeights:
    """Return what an attacker sends instead of its honest change."""
    if attack in {"sign-flip", "scaled"}:
        factor = -1.0 if attack == "sign-flip" else -10.0
        layers = {name: replace(each, b=factor * each.b) for name, each in honest.layers.items()}
        return AdapterWeights(layers=layers, heads={name: factor * head for name, head in honest.heads.items()})
    noise = torch.Generator().manual_seed(int(np.random.default_rng(seed).integers(2**62)))
    layers = {
        name: LoraFactors(a=torch.randn(each.a.shape, generator=noise), b=torch.randn(each.b.shape, generator=noise))
        for name, each in honest.layers.items()
    }
    heads = {name: torch.randn(head.shape, generator=noise) for name, head in honest.heads.items()}
    size = 5.0 * update_norm(honest.layers, honest.heads) / update_norm(layers, heads)
    return AdapterWeights(
        layers={name: replace(each, scale=size) for name, each in layers.items()},
        heads={name: size * head for name, head in heads.items()},
    )


def main() -> None:
    """Run what is missing, then print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--kinds", nargs="+", choices=["iid", "dirichlet"], default=["iid"])
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--attackers", type=int, nargs="+", default=[0, 1, 2, 3], help="of ten clients")
    parser.add_argument("--defences", nargs="+", choices=DEFENCES, default=list(DEFENCES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "robustness.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = Setting(rounds=options.rounds, steps=options.steps, learning_rate=LEARNING_RATE)
    size = {"rounds": setting.rounds, "steps": setting.steps}
    check_defences()
    bench = root = None
    for case in _cases(options):
        wanted = {**size, **case.facts()}
        if any(all(run[key] == value for key, value in wanted.items()) for run in read_runs(options.out)):
            continue
        if bench is None:
            bench = Bench(setting)
            clean = load_dataset("wordnet-nouns", split="validation")
            chosen = np.random.default_rng(0).permutation(len(clean))[:ROOT_EXAMPLES]
            root = bench.encode(clean.subset(chosen.tolist()))
        found = run_case(bench, case, root)
        keep_run(options.out, {**wanted, **found})
        Console().print(f"{case}: {found['accuracy']:.4f} {found['taken_out']}")
    report(options.out)


def report(out: Path) -> None:
    """Print accuracy and attack success for each defence and attack, and draw them."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    groups: dict[tuple[object, ...], list[float]] = {}
    for run in read_runs(out):
        key = tuple(run[name] for name in ("kind", "attack", "attackers", "defence"))
        groups.setdefault(key, []).append(float(run["accuracy"]))  # type: ignore[arg-type]
    table = Table("data", "attack", "attackers of 10", "defence", "accuracy", "attack success", "seeds")
    for key in sorted(groups, key=str):
        honest = groups.get((key[0], "-", 0, "none"))
        lost = f"{1.0 - np.mean(groups[key]) / np.mean(honest):.1%}" if honest else "-"
        table.add_row(*map(str, key), f"{np.mean(groups[key]):.4f}", lost, str(len(groups[key])))
    Console(width=140).print(table)
    columns = sorted({(key[0], key[1]) for key in groups if key[1] != "-"}, key=str)
    figure, axes = plt.subplots(1, max(1, len(columns)), figsize=(4 * max(1, len(columns)), 4), squeeze=False)
    for axis, (kind, attack) in zip(axes[0], columns, strict=False):
        for defence in DEFENCES:
            honest = groups.get((kind, "-", 0, defence))
            points = [(0, honest)] if honest else []
            points += [(count, groups[kind, attack, count, defence]) for count in (1, 2, 3)
                       if (kind, attack, count, defence) in groups]  # fmt: skip
            axis.plot([x for x, _ in points], [np.mean(y) for _, y in points], marker="o", label=defence)
        axis.set(title=f"{attack}, {kind}", xlabel="attackers of 10", ylabel="test accuracy", ylim=(0, 0.8))
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out.with_suffix(".png"), dpi=100)


def _cases(options: argparse.Namespace) -> list[Case]:
    found = []
    for seed in options.seeds:
        for kind in options.kinds:
            for defence in options.defences:
                for attackers in options.attackers:
                    attacks = options.attacks if attackers else ["-"]
                    found += [Case(kind, attack, attackers, defence, seed) for attack in attacks]
    return found


def _changed(
    bench: Bench, data: Encoded, weights: AdapterWeights, rank: int, seed: int, number: int, who: str
) -> AdapterWeights:
    setting = bench.setting
    trained = bench.local_round(
        data, weights, rank=rank, steps=setting.steps, batch_size=setting.batch_size, seed=seed, number=number, who=who
    ).weights
    scale = setting.training(steps=1, batch_size=1).scale_of(rank)
    scaled = {name: replace(each, scale=scale) for name, each in trained.layers.items()}
    return change(AdapterWeights(layers=scaled, heads=trained.heads), start={}, heads=weights.heads)


def _defended(
    bench: Bench,
    case: Case,
    sent: Sequence[AdapterWeights],
    base: Sequence[float],
    weights: AdapterWeights,
    root: Encoded,
    number: int,
) -> Defended:
    if case.defence == "fltrust":
        trusted = _changed(bench, root, weights, ROOT_RANK, case.seed, number, "server")
        return fltrust(gram_matrix([*sent, trusted], heads=_zeros(sent)), weights=base)
    assumed = {"attackers": max(1, case.attackers)} if case.defence in {"multi-krum", "trimmed-mean"} else {}
    settings = DefenceSettings.model_validate({"kind": case.defence, "equal_weights": True, **assumed})
    return defend(sent, weights=base, settings=settings)


def _zeros(sent: Sequence[AdapterWeights]) -> Mapping[str, Tensor]:
    return {name: torch.zeros_like(head) for name, head in sent[0].heads.items()}


def check_defences() -> None:
    """Refuse to measure if, on a toy, the attack does nothing without a defence, or a defence does not hold."""
    noise = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 24, generator=noise), torch.randn(32, 4, generator=noise)
    near = [
        AdapterWeights(layers={"toy": LoraFactors(a=a, b=b + 0.05 * torch.randn(b.shape, generator=noise))})
        for _ in range(10)
    ]
    sent = [poison(near[0], "scaled", seed=(0,)), *near[1:]]
    honest = float((b @ a).norm())
    for defence in DEFENCES:
        if defence == "fltrust":
            weights = fltrust(gram_matrix([*sent, near[0]], heads={}), weights=[0.1] * 10).weights
        else:
            assumed = {"attackers": 1} if defence in {"multi-krum", "trimmed-mean"} else {}
            settings = DefenceSettings.model_validate({"kind": defence, **assumed})
            weights = defend(sent, weights=[0.1] * 10, settings=settings).weights
        moved = float((stack([each.layers["toy"] for each in sent], weights=weights).delta() - b @ a).norm())
        if (moved > 0.5 * honest) != (defence == "none"):
            raise SystemExit(f"{defence}: one client of ten moved the sum by {moved / honest:.2f} of its norm")


if __name__ == "__main__":
    main()
