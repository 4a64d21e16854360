"""Learning task after task: MOS and what it must be compared with, on one stream at a time.

``--stream wordnet``: WordNet's 24 noun classes in 6 tasks of 4, under MiniLM; ``continual_streams.py`` says what the
others are. Three seeds times three orders of classes; a seed draws 100 examples of each class, adapters, the order of
examples and what is sampled. All methods pass each example as often, each at a learning rate that was chosen for it
from the same five, by last accuracy on the validation split, with a seed and an order that are not reported on; all
answers of MOS have one rate. The budget is small, so methods are compared at equal cost and not at their best.

Before anything is measured, the exactness of RanPAC is checked on the stream itself; and a run after which the encoder
or what MOS knows has changed by being asked is not written. Times are CPU seconds of one thread. Every finished run is
written at once, so an interrupted benchmark goes on where it stopped, and several processes may share the work.

Run as ``python benchmarks/continual.py --tune``, then without; results, table and plots go to ``benchmarks/results/``.
"""

import argparse
from functools import lru_cache
from pathlib import Path

import torch
from continual_methods import (
    CLOSED_FORM,
    MOS,
    MOS_GROUPS,
    ONCE,
    PAIRED,
    PIECES,
    RATES,
    TUNED_AS,
    check_exactness,
    run_piece,
)
from continual_report import report
from continual_streams import ADAPTED_BLOCKS, EXAMPLES, FASHION, STREAMS, Stream, stream_of
from continual_verbs import WORDNET
from rich.console import Console
from strategies import keep_run, read_runs

from pomona.errors import PomonaError

RESULTS = Path(__file__).parent / "results"
TUNING_SEED = TUNING_ORDER = 100
SIZE = {"train_per_class": EXAMPLES["train"], "adapted_blocks": ADAPTED_BLOCKS}


def main() -> None:
    """Run what is missing, then write the table and draw the plots."""
    options = _options()
    torch.set_num_threads(options.threads)
    if options.tune:
        tune(options)
        return
    chosen = rates(options.out, options.stream)
    for seed, order in _pairs(options.seeds, options.orders):
        for piece in options.methods:
            wanted = {"stream": options.stream, "split": "test", "piece": piece, "seed": seed, "order": order}
            if piece in ONCE | PAIRED and options.seeds.index(seed) != options.orders.index(order):
                continue
            rate = chosen.get(TUNED_AS.get(piece, piece), 0.0)
            if not _done(options.out, {**wanted, "learning_rate": rate}):
                run(options, wanted, rate=rate)
    report(options.out, options.stream, chosen)


def run(options: argparse.Namespace, wanted: dict[str, object], *, rate: float) -> None:
    """Run one piece and write what its methods reached."""
    stream = _stream(options, wanted)
    found = run_piece(
        str(wanted["piece"]), stream, seed=int(str(wanted["seed"])), rate=rate, whole=wanted["split"] == "test"
    )
    for method, result in found.items():
        facts = {**wanted, **SIZE, **stream.facts, "method": method, "learning_rate": rate}
        keep_run(options.out, {**facts, **result})
        seconds = sum(result["learning_cpu_s"])  # type: ignore[call-overload]
        Console().print(f"{wanted}, {method}: {result['last']:.4f} ({seconds:.0f} s)", soft_wrap=True)


def tune(options: argparse.Namespace) -> None:
    """Score every trained piece at every learning rate, on the validation split; what is there already stays."""
    for piece in options.methods:
        for rate in RATES * (piece not in CLOSED_FORM and piece not in TUNED_AS):
            wanted: dict[str, object] = {
                "stream": options.stream, "split": "validation", "piece": piece, "seed": TUNING_SEED,
                "order": TUNING_ORDER, "learning_rate": rate,
            }  # fmt: skip
            if _done(options.out, wanted):
                continue
            try:
                run(options, wanted, rate=rate)
            except PomonaError as error:  # training diverged, or left features that all are one
                method = MOS if piece in MOS_GROUPS else piece
                keep_run(options.out, {**wanted, **SIZE, "method": method, "last": 0.0, "ended": str(error)})


def rates(out: Path, stream: str) -> dict[str, float]:
    """Return the best learning rate of each piece; of a group, that of its first method."""
    best: dict[str, tuple[float, float]] = {}
    for found in read_runs(out):
        if found["stream"] == stream and found["split"] == "validation":
            piece, scored = str(found["piece"]), (float(str(found["last"])), float(str(found["learning_rate"])))
            if piece in TUNED_AS or found["method"] not in (piece, MOS):
                continue
            best[piece] = max(best.get(piece, (0.0, 0.0)), scored)
    if missing := set(PIECES) - CLOSED_FORM - set(TUNED_AS) - set(best):
        raise SystemExit(f"no learning rate was chosen for {', '.join(sorted(missing))}; run with --tune first")
    return {piece: rate for piece, (_, rate) in best.items()}


def _stream(options: argparse.Namespace, wanted: dict[str, object]) -> Stream:
    return _checked_stream(
        options.stream,
        int(str(wanted["seed"])),
        int(str(wanted["order"])),
        str(wanted["split"]),
        options.encoders,
        options.fashion,
        options.wordnet,
    )


@lru_cache(maxsize=1)  # pieces of one seed and order come one after another
def _checked_stream(
    name: str, seed: int, order: int, split: str, encoders: Path, fashion: Path, wordnet: Path
) -> Stream:
    stream = stream_of(name, seed=seed, order=order, split=split, folder=encoders, fashion=fashion, verbs=wordnet)
    check_exactness(stream)
    return stream


def _pairs(seeds: list[int], orders: list[int]) -> list[tuple[int, int]]:
    """Return all pairs, first those in which every seed and every order is met once."""
    pairs = [(seed, order) for seed in seeds for order in orders]
    return sorted(pairs, key=lambda pair: (seeds.index(pair[0]) - orders.index(pair[1])) % len(orders))


def _done(out: Path, wanted: dict[str, object]) -> bool:
    return any(all(run.get(key) == value for key, value in (wanted | SIZE).items()) for run in read_runs(out))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", choices=list(STREAMS), default="wordnet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--orders", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=PIECES, default=list(PIECES))
    parser.add_argument("--tune", action="store_true", help="choose learning rates on the validation split")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fashion", type=Path, default=FASHION, help="folder of Fashion-MNIST's files")
    parser.add_argument("--wordnet", type=Path, default=WORDNET, help="folder of WordNet's files, for wordnet-long")
    parser.add_argument("--encoders", type=Path, default=Path("build/encoders"), help="where pretrained ViTs are kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "continual.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
