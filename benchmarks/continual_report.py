"""Table and plots of ``continual.py``: what is said of the results is computed here from all runs."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from continual_methods import LEARNERS, MOS, MOS_GROUPS, ORACLES, TUNED_AS, UPPER_BOUNDS
from rich.console import Console
from strategies import read_runs

ORDERED = (MOS, "SLCA-style", "SimpleCIL", "sequential fine-tuning")  # the paper's order
COMPARED = (MOS, "RanPAC", "RanPAC, first session", "MOS, normal distributions")  # with the default
METHODS = (
    *(name for name in LEARNERS if name not in UPPER_BOUNDS),
    *(name for heads in MOS_GROUPS.values() for name in heads),
    *ORACLES.values(),
    "joint training",
)
HEATMAPS = ("sequential fine-tuning", "SimpleCIL", "SLCA-style", "RanPAC", MOS, "MOS, default")

Runs = dict[str, list[Mapping[str, Any]]]


def report(out: Path, stream: str, rates: Mapping[str, float]) -> None:
    """Write the table of a stream beside the results, print it, and draw what it shows.

    Args:
        out: The results.
        stream: Which.
        rates: The learning rate that was chosen for each piece; runs at others are left out.
    """
    runs: Runs = {}
    for run in read_runs(out):
        rate = rates.get(TUNED_AS.get(str(run["piece"]), str(run["piece"])), 0.0)
        if run["stream"] == stream and run["split"] == "test" and run["learning_rate"] == rate:
            runs.setdefault(str(run["method"]), []).append(run)
    if not runs:
        raise SystemExit(f"{out} has no runs of {stream}")
    text = "\n".join((*_table(runs), "", *_verdicts(runs), ""))
    name = out.stem if stream == "wordnet" else f"{out.stem}-{stream}"
    out.with_name(f"{name}.md").write_text(text)
    Console(width=200).print(text, markup=False)
    _heatmaps(runs, out.with_name(f"{name}-matrices.png"))
    _curves(runs, out.with_name(f"{name}.png"))


def _table(runs: Runs) -> list[str]:
    """Return Markdown; accuracies in percent, mean and range."""
    lines = [
        "| method | runs | last | average | forgetting | learning, CPU s a task | answering, ms | passes | kB kept |"
        " kB a task |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in METHODS:
        if name in runs:
            cells = [name + " (upper bound)" * (name in UPPER_BOUNDS), str(len(runs[name]))]
            cells += [_spread(runs[name], key) for key in ("last", "average", "forgetting")]
            lines.append(f"| {' | '.join(cells + _costs(name, runs[name]))} |")
    return lines


def _costs(name: str, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    if name in ORACLES.values():
        return [""] * 5
    kept = np.mean([run["kept_bytes"] for run in runs], axis=0) / 1e3
    growth = (kept[-1] - kept[0]) / (len(kept) - 1)
    seconds = [sum(run["learning_cpu_s"]) / len(run["learning_cpu_s"]) for run in runs]
    answering, passes = ([run[key] for run in runs] for key in ("answering_cpu_ms", "passes_per_example"))
    return [
        f"{np.mean(seconds):.1f}", f"{np.mean(answering):.1f}", f"{np.mean(passes):.1f}", f"{kept[-1]:,.0f}",
        f"{growth:,.0f}",
    ]  # fmt: skip


def _spread(runs: Sequence[Mapping[str, Any]], key: str) -> str:
    values = [100 * run[key] for run in runs if key in run]
    return f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})" if values else ""


def _verdicts(runs: Runs) -> list[str]:
    """Say which pairs of the expected order hold: on average, and in how many runs of equal seed and order."""
    lines = []
    for above, below in (*itertools.pairwise(ORDERED), *(("MOS, default", name) for name in COMPARED)):
        pairs = _paired(runs, above, below)
        if pairs:
            gaps = [100 * (left - right) for left, right in pairs]
            error = np.std(gaps, ddof=1) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
            lines.append(
                f"* {above} minus {below}: {np.mean(gaps):+.1f} points, standard error {error:.1f}, "
                f"{sum(gap > 0 for gap in gaps)} of {len(gaps)} above"
            )
    return lines


def _paired(runs: Runs, above: str, below: str) -> list[tuple[float, float]]:
    left, right = ({(run["seed"], run["order"]): run["last"] for run in runs.get(name, [])} for name in (above, below))
    return [(left[key], right[key]) for key in sorted(left.keys() & right.keys())]


def _heatmaps(runs: Runs, out: Path) -> None:
    """Draw mean accuracy on each task after each task."""
    plt = _pyplot()
    names = [name for name in HEATMAPS if name in runs]
    figure, axes = plt.subplots(2, -(-len(names) // 2), figsize=(4 * -(-len(names) // 2), 7.5), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        mean = _mean_matrix(runs[name])
        axis.imshow(mean, vmin=0, vmax=1, cmap="viridis")
        for i, row in enumerate(mean):
            for j in range(i + 1):
                axis.text(j, i, f"{100 * row[j]:.0f}", ha="center", va="center", color="w" if row[j] < 0.6 else "k")
        axis.set(title=name, xlabel="accuracy on task", ylabel="after task")
        axis.set_xticks(range(len(mean)), [str(i + 1) for i in range(len(mean))])
        axis.set_yticks(range(len(mean)), [str(i + 1) for i in range(len(mean))])
    figure.tight_layout()
    figure.savefig(out, dpi=90)
    plt.close(figure)


def _curves(runs: Runs, out: Path) -> None:
    """Draw accuracy on all classes seen after each task, and last accuracy with its range."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.5))
    left.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    right.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    names = [name for name in METHODS if name in runs]
    for number, name in enumerate(names):
        scores = [100 * run["last"] for run in runs[name]]
        right.errorbar(
            np.mean(scores), number, xerr=[[np.mean(scores) - min(scores)], [max(scores) - np.mean(scores)]],
            fmt="o", mfc="none" if name in UPPER_BOUNDS else None, capsize=2,
        )  # fmt: skip
        if name != "joint training" and name not in ORACLES.values():
            after = np.mean([_after(run) for run in runs[name]], axis=0)
            style = "-" if name in (*ORDERED, "RanPAC", "MOS, default") else ":"
            left.plot(range(1, len(after) + 1), 100 * after, style, label=name)
    left.set(xlabel="tasks learned", ylabel="accuracy on all classes seen, %")
    left.legend(fontsize=7)
    right.set_yticks(range(len(names)), names, fontsize=8)
    right.invert_yaxis()
    right.set(xlabel="last accuracy, %; mean and range; hollow: upper bounds")
    right.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(out, dpi=100)
    plt.close(figure)


def _after(run: Mapping[str, Any]) -> list[float]:
    sizes = run["test_examples"]
    return [float(np.average(row, weights=sizes[: len(row)])) for row in run["rows"]]


def _mean_matrix(runs: Sequence[Mapping[str, Any]]) -> Any:  # noqa: ANN401 - numpy's arrays
    tasks = len(runs[0]["rows"])
    return np.mean([[[*row, *[math.nan] * (tasks - len(row))] for row in run["rows"]] for run in runs], axis=0)


def _pyplot() -> Any:  # noqa: ANN401 - a module
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    return plt
