"""Forget classes of what was learned task after task, as ``pomona forget`` does: the head that answers, all statistics.

``forgetting.py`` edits one classifier that was trained on all classes at once, as the papers do. Here WordNet's 24 noun
classes are learned in 6 tasks of 4 with the defaults of ``pomona learn``; then ``plant``, ``food``, ``animal`` or
``substance`` is to be forgotten with 30 rows of each class at hand, and all four one after another. ``acc_forget`` and
``acc_retain`` are of the edit alone, while the class still has its rows and statistics; ``left`` is ``acc_retain`` of
what is published, without them.

``--tune`` scores settings on the validation split, on ``plant`` and ``food``, with a seed and an order that are not
reported on. Run as ``python benchmarks/forgetting_learned.py``; finished pieces are written at once.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from continual_streams import FASHION, Stream, stream_of
from rich.console import Console
from strategies import keep_run, read_runs

from pomona.continual.answering import Answerer
from pomona.continual.editing import Examples, few_of_each
from pomona.continual.encoder import FrozenEncoder, States
from pomona.continual.knowledge import Knowledge, nothing_known
from pomona.continual.learner import TaskData
from pomona.continual.mos import learn_task
from pomona.continual.requests import forget_in_knowledge
from pomona.continual.verification import accuracy_of_classes, assess
from pomona.forget_settings import ForgetSettings
from pomona.mos_settings import MosSettings

OUT = Path(__file__).parent / "results" / "forgetting-learned.json"
REQUESTS = ("plant", "food", "animal", "substance")
CHOSEN_ON = ("plant", "food")
AT_HAND = (30, 100)
TUNING_SEED = 100
GRID: tuple[dict[str, object], ...] = ({}, {"margin": 1.0}, {"retention": "labels"})


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="score settings on the validation split")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for piece in tuning() if options.tune else reported(options.seeds):
        if not any(all(run.get(key) == value for key, value in piece.items()) for run in read_runs(options.out)):
            keep_run(options.out, {**piece, "rows": measure(piece)})
            Console().print(time.strftime("%H:%M:%S", time.gmtime()), piece, soft_wrap=True)
    report(options.out, "validation" if options.tune else "test")


def tuning() -> Iterator[dict[str, object]]:
    """Yield every setting on each request that settings are chosen on."""
    for settings in GRID:
        for request in CHOSEN_ON:
            for at_hand in AT_HAND:
                asked = {"split": "validation", "seed": TUNING_SEED, "requests": [request]}
                yield {**asked, "at_hand": at_hand, "settings": settings}


def reported(seeds: Sequence[int]) -> Iterator[dict[str, object]]:
    """Yield each request by itself and all in sequence, with the defaults."""
    for seed in seeds:
        for at_hand in AT_HAND:
            for requests in (*([request] for request in REQUESTS), list(REQUESTS)):
                yield {"split": "test", "seed": seed, "requests": requests, "at_hand": at_hand, "settings": {}}


def measure(piece: Mapping[str, object]) -> list[dict[str, object]]:
    """Return one row for each request of a piece."""
    seed, split = int(str(piece["seed"])), str(piece["split"])
    settings = ForgetSettings.model_validate(piece["settings"])
    stream, knowledge = learned(seed, split)
    names = knowledge.classes
    at_hand = few_of_each(_examples(stream.train), int(str(piece["at_hand"])), seed=seed)
    held_out = _examples(stream.held_out)
    counts = {name: int((held_out.targets == i).sum()) for i, name in enumerate(names)}
    before = accuracies(stream.encoder, knowledge, held_out, names)
    rows, gone = [], list[str]()
    for request in piece["requests"]:  # type: ignore[attr-defined]
        began = time.process_time()
        known = at_hand.subset(~at_hand.of([names.index(each) for each in gone])) if gone else at_hand
        places = torch.tensor([knowledge.classes.index(names[i]) for i in known.targets.tolist()])
        met = forget_in_knowledge(
            stream.encoder, knowledge, Examples(known.states, places), [request], settings=settings, seed=seed
        )
        spent = time.process_time() - began
        edited, left = (accuracies(stream.encoder, each, held_out, names) for each in (met.edited, met.left))
        rows.append(
            {
                "forgotten": request,
                "acc_before": before[request],
                "retained_before": assess(before, before, counts, [request], gone).acc_retain,
                "kept": asdict(assess(before, edited, counts, [request], gone)),
                "left": assess(before, left, counts, [request], gone).acc_retain,
                "groups_changed": len(met.forgotten.groups_changed),
                "cpu_seconds": round(spent, 2),
            }
        )
        knowledge, before = met.left, left
        gone.append(request)
    return rows


@lru_cache(maxsize=1)
def learned(seed: int, split: str) -> tuple[Stream, Knowledge]:
    """Learn the stream with the defaults of ``pomona learn``."""
    stream = stream_of("wordnet", seed=seed, order=seed, split=split, folder=Path("build/encoders"), fashion=FASHION)
    settings = MosSettings(seed=seed)
    knowledge = nothing_known(stream.encoder.width, settings)
    for data in stream.train:
        knowledge = learn_task(stream.encoder, knowledge, data, settings)
    return stream, knowledge


def accuracies(
    encoder: FrozenEncoder, knowledge: Knowledge, held_out: Examples, names: Sequence[str]
) -> dict[str, float]:
    """Return how often each class is told; never, where it has no rows any more."""
    scores = Answerer(encoder, knowledge).scores(held_out.states)
    return accuracy_of_classes(scores, knowledge.classes, held_out.targets, names)


def report(out: Path, split: str) -> None:
    """Print means over seeds and classes, and write them as Markdown."""
    groups: dict[str, list[Mapping[str, object]]] = {}
    for run in read_runs(out):
        if run["split"] == split:
            rows: list[Mapping[str, object]] = run["rows"]  # type: ignore[assignment]
            name = "single requests" if len(rows) == 1 else "the last of four in sequence"
            name = f"{run['settings'] or 'defaults'}" if split == "validation" else name
            name = f"{name}, {run['at_hand']} rows a class"
            groups.setdefault(name, []).append(rows[-1])
    lines = [
        "| | acc_before | acc_forget | change of acc_retain | H | published: change of acc_retain | CPU s | n |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {name} | {' | '.join(_cells(rows))} |" for name, rows in groups.items()]
    Console(width=160).print("\n".join(lines), markup=False)
    if split == "test":
        out.with_suffix(".md").write_text("\n".join([*lines, ""]))


def _cells(rows: Sequence[Mapping[str, object]]) -> list[str]:
    def of(key: str) -> list[float]:
        return [100 * float(str(row["kept"][key])) for row in rows]  # type: ignore[index]

    before = [100 * float(str(row["retained_before"])) for row in rows]
    kept, left = np.subtract(of("acc_retain"), before), [100 * float(str(row["left"])) for row in rows]
    told = [100 * float(str(row["acc_before"])) for row in rows]
    forgotten = of("acc_forget")
    return [
        f"{np.mean(told):.1f}",
        f"{np.mean(forgotten):.1f} (largest {max(forgotten):.1f})",
        f"{np.mean(kept):+.1f} (least {min(kept):+.1f})",
        f"{np.mean(of('h_mean')):.1f}",
        f"{np.mean(np.subtract(left, before)):+.1f}",
        f"{np.mean([float(str(row['cpu_seconds'])) for row in rows]):.0f}",
        str(len(rows)),
    ]


def _examples(parts: Sequence[TaskData]) -> Examples:
    return Examples(sum((part.states for part in parts), States(())), torch.cat([part.targets for part in parts]))


if __name__ == "__main__":
    main()
