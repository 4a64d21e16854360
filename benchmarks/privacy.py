"""What differential privacy costs in accuracy, on WordNet glosses (24 classes, MiniLM).

Four ways under client-level privacy, at epsilon 2, 8 and without, over three seeds:

* ``full``: every weight of the encoder's layers and the head; word embeddings stay frozen;
* ``dp-lora``: LoRA at rank 4 in every linear layer, both factors;
* ``dp-dylora``: the same with one rank from 1 to 4, drawn for each round;
* ``ffa-nested``: at rank 8, which trains as many numbers, only the up-projection, over a fresh public one each round;

and ``example-level``, DP-SGD in five silos over the same rows, LoRA at rank 1. The settings of client-level privacy:

* ``population``: the 2,000 simulated clients that there are, of three or four rows each. A real promise;
* ``simulated``: noise on the mean as a cohort of 5,000 out of a million would have it, on the mean of these clients'
  updates (:mod:`privacy_noise`). It promises nothing, and says how far the model comes under such noise.

What a million clients would have taught the model is in neither. Learning rates and bounds are chosen by ``--tune`` on
the validation split, with a seed that is not reported on; what is reported is the test split. Nothing is run before
the gate is green. Every finished piece is written down at once, so an interrupted benchmark goes on where it stopped,
and several processes may share the work. Run as ``python benchmarks/privacy.py --tune``, then without; results, the
tables and the plot go to ``benchmarks/results/``.
"""

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from privacy_cases import METHODS, ROUNDS, SILO_ROUNDS, Case, Choice, Setting, cases, federation_of, settings_of
from privacy_full import FullModel, federate_fully
from privacy_gate import check
from privacy_population import Population, federate
from privacy_report import report
from privacy_silos import federate_silos
from rich.console import Console
from strategies import keep_run, read_runs

from pomona.coordinator.dimensions import dimensions_of
from pomona.privacy.plan import plan_of

RESULTS = Path(__file__).parent / "results"
TUNING_SEED, TUNING_ROUNDS, TUNING_ROWS = 100, 6, 400
RATES = {
    "full": ((5e-5, 1e-1), (2e-4, 1e-1), (5e-4, 1e-1), (1e-3, 1e-1)),
    "other": ((3e-3, 3e-2), (1e-2, 1e-1), (3e-2, 1e-1)),
}
CLIPS = {"simulated": (3.0, 10.0), "population": (0.3, 1.0)}
PRIVATE: tuple[dict[Setting, float], dict[Setting, float]] = ({"simulated": 2.0, "population": 8.0}, {"silos": 8.0})


class Bench:
    """The models and the data; a model that is trained whole is another than the one under adapters."""

    def __init__(self, *, rows: int | None = None) -> None:
        self.rows = rows
        self._adapted: Population | None = None
        self._full: tuple[Population, FullModel] | None = None

    @property
    def adapted(self) -> Population:
        """Under adapters."""
        self._adapted = self._adapted or Population(rows=self.rows)
        return self._adapted

    @property
    def whole(self) -> tuple[Population, FullModel]:
        """Trained whole."""
        if self._full is None:
            population = Population(rows=self.rows)
            self._full = population, FullModel(population.model)
        return self._full

    def accuracy(self, case: Case, choice: Choice, *, rounds: int, split: str) -> float:
        """Run a cell and score what comes of it."""
        if case.method == "full":
            population, full = self.whole
            federate_fully(full, federation_of(population, case, choice, rounds=rounds))
            return population.model.score(population.held_out[split]).accuracy
        if case.method == "example-level":
            weights = federate_silos(self.adapted, case, choice, rounds=rounds)
        else:
            weights = federate(self.adapted, federation_of(self.adapted, case, choice, rounds=rounds))
        return self.adapted.accuracy(weights, split)

    def facts(self, case: Case, choice: Choice) -> dict[str, object]:
        """Return what a cell's noise is, and how large beside what it is on."""
        if case.setting == "none":
            return {"noise_scale": 0.0, "noise_multiplier": 0.0, "noise_to_signal": 0.0, "label": "no privacy"}
        if case.method == "example-level":
            settings = settings_of(case, choice, rounds=SILO_ROUNDS)
            plan, label, scale = plan_of(settings), "5 silos", 1.0
        else:
            run = federation_of(self.adapted, case, choice, rounds=ROUNDS)
            settings, plan, label, scale = run.settings, run.plan, run.noise.label, run.noise.noise_scale
        dimensions = dimensions_of(settings, self.adapted.model.manifest)
        if case.method == "full":
            dimensions = sum(shape[0] for shape in self.whole[1].shapes.values())
        return {
            "label": label,
            "noise_scale": scale,
            "delta": plan.delta,
            "noise_multiplier": plan.noise_multiplier,
            "epsilon_spent": plan.epsilon_after(plan.rounds),
            "trained_numbers": dimensions,
            "noise_to_signal": plan.noise_to_signal(dimensions),
        }


def rounds_of(method: str, *, tuning: bool = False) -> int:
    """Return how many rounds a method runs."""
    if method == "example-level":
        return SILO_ROUNDS
    return TUNING_ROUNDS if tuning else ROUNDS


def tune(bench: Bench, methods: list[str], out: Path) -> None:
    """Score learning rates without privacy, then bounds (of silos: rates again) at each setting, on validation data."""
    for method in methods:
        kind = "full" if method == "full" else "other"
        pairs = [Choice(learning_rate=body, head_learning_rate=head) for body, head in RATES[kind]]
        for choice in pairs:
            score(bench, Case(method=method, setting="none", epsilon=None, seed=TUNING_SEED), choice, out)
        best = chosen(out, method, "none")
        for setting, epsilon in PRIVATE[method == "example-level"].items():
            tried = [replace(best, clip=clip) for clip in CLIPS.get(setting, ())]
            for choice in tried or pairs:  # Adam undoes the size of a bound that every gradient reaches
                case = Case(method=method, setting=setting, epsilon=epsilon, seed=TUNING_SEED)
                score(bench, case, choice, out)


def score(bench: Bench, case: Case, choice: Choice, out: Path) -> None:
    """Score one choice, unless that was done."""
    wanted = {**asdict(case), **asdict(choice)}
    if any(all(run[key] == value for key, value in wanted.items()) for run in read_runs(out)):
        return
    rounds = rounds_of(case.method, tuning=True)
    accuracy = bench.accuracy(case, choice, rounds=rounds, split="validation")
    keep_run(out, {**wanted, "rounds": rounds, "validation_accuracy": accuracy})
    Console().print(f"{case} {choice}: {accuracy:.4f}")


def chosen(out: Path, method: str, setting: str) -> Choice:
    """Return the best choice for a method and a setting."""
    runs = [run for run in read_runs(out) if (run["method"], run["setting"]) == (method, setting)]
    if not runs:
        raise SystemExit(f"nothing was chosen for {method}, {setting}; run with --tune first")
    best = max(runs, key=lambda run: float(run["validation_accuracy"]))
    return Choice(**{name: float(best[name]) for name in ("learning_rate", "head_learning_rate", "clip")})


def main() -> None:
    """Run what is missing, then print the tables and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--tune", action="store_true", help="choose learning rates and bounds on the validation split")
    parser.add_argument("--report", action="store_true", help="only print what there is, and draw it")
    parser.add_argument("--out", type=Path, default=RESULTS / "privacy.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    choices = RESULTS / "privacy-choices.json"
    if not options.report:
        check()
        if options.tune:
            tune(Bench(rows=TUNING_ROWS), options.methods, choices)
            return
        run_missing(Bench(), cases(options.methods, options.seeds), choices, options.out)
    report(options.out)


def run_missing(bench: Bench, wanted: list[Case], choices: Path, out: Path) -> None:
    """Run every cell that the result file does not have."""
    for case in wanted:
        facts = asdict(case)
        if any(all(run[key] == value for key, value in facts.items()) for run in read_runs(out)):
            continue
        choice = chosen(choices, case.method, case.setting)
        rounds, began = rounds_of(case.method), time.process_time()
        accuracy = bench.accuracy(case, choice, rounds=rounds, split="test")
        cpu_s = round(time.process_time() - began, 1)
        told = {**facts, **asdict(choice), **bench.facts(case, choice), "rounds": rounds}
        keep_run(out, {**told, "accuracy": accuracy, "cpu_s": cpu_s})
        Console().print(f"{case}: {accuracy:.4f} ({cpu_s} s)")


if __name__ == "__main__":
    main()
