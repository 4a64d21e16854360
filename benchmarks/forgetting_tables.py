"""Tables and plot of `forgetting.py`, and where its aims are missed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from forgetting_methods import ORACLE
from rich.console import Console
from rich.table import Table
from strategies import read_runs

AIMED = ("GS-LoRA", "GS-LoRA++")
PARAMETERS = 22_713_216  # of MiniLM, where a run does not say
_WIDTH = 170

Row = Mapping[str, Any]


def report(out: Path, chosen: Mapping[str, int]) -> None:
    """Print the tables as markdown too, name each missed aim, and draw the plot.

    Args:
        out: The results.
        chosen: The setting of each method; runs with others are left out.
    """
    runs: list[Mapping[str, Any]] = [
        run for run in read_runs(out) if run["stage"] == "choice" or run["choice"] == chosen[str(run["method"])]
    ]
    if not any(run["stage"] != "choice" for run in runs):
        Console().print("nothing but choices of settings is measured yet")
        return
    console = Console(width=_WIDTH)
    tables = [
        ("Single requests, mean over classes and seeds, in points", _accuracies(_rows(runs, "single"))),
        ("Requests in sequence, after the last, in points", _accuracies(_last(runs))),
        ("Traces after single requests, seed 0", _traces(_rows(runs, "single"))),
        ("Few-shot: forget one class with four examples of each", _accuracies(_rows(runs, "few-shot"))),
        ("Missing classes: some retained classes without examples", _accuracies(_rows(runs, "missing"))),
    ]
    markdown = []
    for title, (head, body) in tables:
        if not body:
            continue
        table = Table(*head, title=title)
        for line in body:
            table.add_row(*line)
        console.print(table)
        rule = "|".join("---" for _ in head)
        markdown += [f"### {title}", "", f"| {' | '.join(head)} |", f"|{rule}|"]
        markdown += [*(f"| {' | '.join(line)} |" for line in body), ""]
    missed = list(_missed(runs))
    markdown += ["### Aims", "", *(missed or ["All aims are met."]), ""]
    console.print("\n".join(missed) or "All aims are met.")
    out.with_suffix(".md").write_text("\n".join(markdown))
    _draw(runs, out.with_suffix(".png"))


def _rows(runs: Sequence[Mapping[str, Any]], stage: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for run in runs:
        if run["stage"] == stage:
            found.setdefault(run["method"], []).extend({"seed": run["seed"], **row} for row in run["rows"])
    return found


def _last(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[Row]]:
    found = _rows(runs, "sequence")
    longest = _requests(found) - 1
    return {method: [row for row in rows if len(row["earlier"]) == longest] for method, rows in found.items()}


def _requests(by_method: Mapping[str, Sequence[Row]]) -> int:
    return 1 + max((len(row["earlier"]) for rows in by_method.values() for row in rows), default=0)


def _points(rows: Sequence[Row], value: Callable[[Row], float | None], *, sign: bool = False) -> str:
    found = [100 * each for row in rows if (each := value(row)) is not None]
    if not found:
        return "-"
    spread = f" ± {np.std(found):.1f}" if len(found) > 1 else ""
    return f"{np.mean(found):{'+' if sign else ''}.1f}{spread}"


def _accuracies(by_method: Mapping[str, Sequence[Row]]) -> tuple[list[str], list[list[str]]]:
    head = [
        "method", "acc_forget", "acc_retain", "change of acc_retain", "acc_forgotten_earlier", "H",
        "acc_retain, rows removed", "blocks changed", "trained", "seconds", "n",
    ]  # fmt: skip
    if any("acc_missing" in row for rows in by_method.values() for row in rows):
        head.insert(4, "acc of the missing")
    body = []
    for method, rows in by_method.items():
        line = [
            method,
            _points(rows, lambda row: row["kept"]["acc_forget"]),
            _points(rows, lambda row: row["kept"]["acc_retain"]),
            _points(rows, lambda row: row["kept"]["acc_retain"] - row["retained_before"], sign=True),
            _points(rows, lambda row: row["kept"]["acc_forgotten_earlier"]),
            _points(rows, lambda row: row["kept"]["h_mean"]),
            _points(rows, lambda row: row["removed"]["acc_retain"]),
            _blocks(rows),
            f"{np.mean([_trained(row) for row in rows]):.2%}",
            f"{np.mean([row['cpu_seconds'] for row in rows]):.0f}",
            str(len(rows)),
        ]
        if "acc of the missing" in head:
            line.insert(4, _points(rows, lambda row: row.get("acc_missing")))
        body.append(line)
    return head, body


def _trained(row: Row) -> float:
    return float(row["trained_parameters"] / row.get("parameters", PARAMETERS))


def _blocks(rows: Sequence[Row]) -> str:
    counts = [len(row["groups_changed"]) for row in rows if "groups_changed" in row]
    total = max((row["groups_total"] for row in rows if "groups_total" in row), default=0)
    return f"{np.mean(counts):.1f} of {total}" if counts else "-"


def _traces(by_method: Mapping[str, Sequence[Row]]) -> tuple[list[str], list[list[str]]]:
    head = ["method", "AUC by loss", "AUC by confidence", "probe", "prototypes not erased", "relearning steps", "n"]
    body = []
    for method, rows in by_method.items():
        found = [row["verification"] for row in rows if "verification" in row]
        if not found:
            continue
        losses = [each["loss_auc"] for each in found if "loss_auc" in each]
        steps = [each["relearning_steps"] for each in found]
        body.append(
            [
                method,
                f"{np.mean(losses):.3f}" if losses else "-",
                f"{np.mean([each['confidence_auc'] for each in found]):.3f}",
                f"{100 * np.mean([each['probe'] for each in found]):.1f}",
                f"{100 * np.mean([each['prototypes_left'] for each in found]):.1f}",
                ", ".join("-" if each is None else str(each) for each in steps),
                str(len(found)),
            ]
        )
    return head, body


def _missed(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield one line for each aim that the means miss."""
    single, last = _rows(runs, "single"), _last(runs)

    def mean(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
        return float(np.mean([100 * value(row) for row in rows]))

    for method in AIMED:
        for name, rows, oracle in (
            ("single requests", single.get(method, []), single.get(ORACLE, [])),
            ("the sequence", last.get(method, []), last.get(ORACLE, [])),
        ):
            if not rows:
                continue
            figures = {
                "acc_forget at most 1": mean(rows, lambda row: row["kept"]["acc_forget"]) - 1.0,
                "H at most 2 below the oracle's": (
                    mean(oracle, lambda row: row["kept"]["h_mean"])
                    - mean(rows, lambda row: row["kept"]["h_mean"])
                    - 2.0
                    if oracle
                    else -1.0
                ),
                "at most 2 % of parameters": 100 * _trained(rows[0]) - 2.0,
            }
            if name == "single requests":
                figures["acc_retain down by less than 1"] = (
                    mean(rows, lambda row: row["retained_before"] - row["kept"]["acc_retain"]) - 1.0
                )
            else:
                figures["acc_forgotten_earlier at most 3"] = (
                    mean(rows, lambda row: row["kept"]["acc_forgotten_earlier"]) - 3.0
                )
            yield from (
                f"* {method}, {name}: {aim} is missed by {by:.2f} points." for aim, by in figures.items() if by > 0
            )


def _draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(1, 2, figsize=(13, 5))
    single, sequence = _rows(runs, "single"), _rows(runs, "sequence")
    for method, rows in single.items():
        x = np.mean([100 * row["kept"]["acc_forget"] for row in rows])
        y = np.mean([100 * (row["kept"]["acc_retain"] - row["retained_before"]) for row in rows])
        axes[0].scatter(x, y, label=method)
    axes[0].axhline(-1, color="grey", linestyle=":")
    axes[0].axvline(1, color="grey", linestyle=":")
    axes[0].set(xlabel="acc_forget, points", ylabel="change of acc_retain, points", title="single requests")
    requests = _requests(sequence)
    for method, rows in sequence.items():
        by_length = [[row for row in rows if len(row["earlier"]) == length] for length in range(1, requests)]
        points = [
            (length, np.mean([100 * row["kept"]["acc_forgotten_earlier"] for row in part]))
            for length, part in enumerate(by_length, start=2)
            if part
        ]
        axes[1].plot([x for x, _ in points], [y for _, y in points], marker="o", label=method)
    axes[1].axhline(3, color="grey", linestyle=":")
    axes[1].set(
        xlabel="request",
        ylabel="acc_forgotten_earlier, points",
        title="requests in sequence",
        xticks=range(2, requests + 1),
    )
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
