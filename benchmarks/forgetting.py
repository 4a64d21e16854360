"""Forget classes from a classifier, in ten ways, and look for what is left of them.

``--data wordnet``: a classifier of WordNet's 24 noun classes under MiniLM is trained for each seed, then asked to
forget ``plant``, ``animal``, ``food`` or ``substance``, each a close neighbour of another, and all four one after
another. ``--data fashion``: one of five classes of Fashion-MNIST, under a small vision transformer that is pretrained
here on the other five, forgets three of them.

Ways to forget have a replay buffer of 30 examples a class and the same number of steps; each chooses among three
settings on the validation split, by the mean of H over two requests of seed 0. The oracle trains anew on everything but
the class.

Reported on the test split, with the head's rows kept, as the paper measures, and after their removal:
``acc_retain``, ``acc_forget``, ``acc_forgotten_earlier`` and H; for single requests of seed 0 also membership
inference, a linear probe and relearning, beside the oracle's, and what prototypes that nobody erased still tell.

Before anything is measured, one edit is checked: the same seed gives the same bytes, the base model and the
classifier's adapter are as before, and ridge sums less the class are those of the others. Finished pieces are written
down at once, and several processes may share the work. Run as ``python benchmarks/forgetting.py``; ``--report`` prints
the tables of what is there.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from continual_streams import FASHION
from forgetting_data import Material, glosses, pictures
from forgetting_methods import CHOICES, LEARNED, ON_REPLAY, ORACLE, REPLAY, STEPS, Bench, Result, forget
from forgetting_tables import report
from strategies import keep_run, read_runs

from pomona.continual.editing import Classifier, Examples, few_of_each
from pomona.continual.erasure import subtract_classes
from pomona.continual.forgetting import forget_classes
from pomona.continual.heads import CosineHead, class_means, random_projection, ridge_sums
from pomona.continual.relearning import RelearnSettings, relearning_steps
from pomona.continual.verification import (
    accuracy_of_classes,
    assess,
    confidence,
    membership_auc,
    probe_accuracy,
)
from pomona.forget_settings import ForgetSettings

RESULTS = Path(__file__).parent / "results"
FILES = {"wordnet": "forgetting.json", "fashion": "forgetting-fashion.json"}
FEW = 4
PROBED = 40  # examples of each class that a probe is fitted on


@dataclass(frozen=True, slots=True)
class Piece:
    """What is measured at once and written down: one request, or four in sequence."""

    stage: str  # choice, single, sequence, few-shot, missing
    method: str
    seed: int
    request: str
    choice: int

    def facts(self) -> dict[str, object]:
        """Return what tells this piece from others in the result file."""
        return asdict(self)


def measure(bench: Bench, piece: Piece) -> list[dict[str, object]]:
    """Return one row for each request of a piece."""
    requests, missing = bench.material.requests, bench.material.missing
    requests = requests if piece.stage == "sequence" else (piece.request,)
    held_out = bench.validation if piece.stage == "choice" else bench.test
    replay = bench.replay
    if piece.stage == "few-shot":
        replay = few_of_each(replay, FEW, seed=bench.seed)
    if piece.stage == "missing":
        replay = replay.subset(~bench.of(replay, missing))
    classifier, earlier = bench.classifier, list[str]()
    _features, logits = bench.logits(classifier, held_out)
    before = _accuracies(bench, classifier, logits, held_out)
    rows = []
    for request in requests:
        result = forget(bench, piece.method, classifier, [request], earlier=earlier, choice=piece.choice, replay=replay)
        row = {"forgotten": request, "earlier": list(earlier), **result.facts}
        after, scored = _scores(bench, result, held_out, before, request, earlier)
        rows.append({**row, **scored})
        if piece.stage == "missing":
            rows[-1]["acc_missing"] = float(np.mean([after[name] for name in missing]))
        if piece.stage == "single" and bench.seed == 0:
            rows[-1]["verification"] = verify(bench, result, request, before[request])
        classifier, before = result.kept, after
        earlier.append(request)
    return rows


def _scores(
    bench: Bench,
    result: Result,
    held_out: Examples,
    before: dict[str, float],
    request: str,
    earlier: Sequence[str],
) -> tuple[dict[str, float], dict[str, object]]:
    counts = {name: int((held_out.targets == i).sum()) for i, name in enumerate(bench.names)}
    features, logits = bench.logits(result.kept, held_out)
    after = _accuracies(bench, result.kept, logits, held_out)
    with torch.no_grad():
        removed = _accuracies(bench, result.removed, result.removed.logits(features), held_out)
    # an earlier class is at 0 before a classifier without its row; what this request drops is what counts
    return after, {
        "acc_before": before[request],
        "retained_before": assess(before, before, counts, [request], earlier).acc_retain,
        "kept": asdict(assess(before, after, counts, [request], earlier)),
        "removed": asdict(assess(before, removed, counts, [request], earlier)),
    }


def verify(bench: Bench, result: Result, request: str, accuracy_before: float) -> dict[str, object]:
    """Return what can still be found of a class: membership, probe, relearning, and prototypes nobody erased."""
    at = bench.names.index(request)
    learned = bench.learned.subset(bench.of(bench.learned, [request]))
    unseen = bench.test.subset(bench.of(bench.test, [request]))
    seen_features, seen = bench.logits(result.removed, learned)
    test_features, test = bench.logits(result.removed, bench.test)
    gone = bench.test.targets == at
    fitted = few_of_each(bench.learned, PROBED, seed=0)
    fit_features, _ = bench.logits(result.removed, fitted)
    found: dict[str, object] = {
        "confidence_auc": membership_auc(confidence(seen), confidence(test[gone])),
        "probe": probe_accuracy((fit_features, fitted.targets), (test_features, bench.test.targets), [at]),
    }
    if request in result.kept.classes:
        place = result.kept.classes.index(request)
        with torch.no_grad():
            scores = [
                result.kept.logits(each).log_softmax(1)[:, place] for each in (seen_features, test_features[gone])
            ]
        found["loss_auc"] = membership_auc(*scores)
    plain = bench.encoder.all_features(fitted.states, bench.classifier.adapters[0])
    prototypes = CosineHead(class_means(plain, fitted.targets, classes=len(bench.names)))
    answers = prototypes.logits(test_features[gone]).argmax(1)
    found["prototypes_left"] = float((answers == at).double().mean())
    kept = [name for name in bench.names if name != request]
    moved = torch.tensor([len(kept) if name == request else kept.index(name) for name in bench.names])
    examples = Examples(bench.replay.states, moved[bench.replay.targets])
    again = Examples(unseen.states, torch.full((len(unseen),), len(kept)))
    found["relearning_steps"] = relearning_steps(
        bench.encoder, result.removed, examples, again,
        accuracy_before=accuracy_before, settings=RelearnSettings(steps=40, every=2), seed=0,
    )  # fmt: skip
    return found


def check(bench: Bench) -> None:
    """Refuse to measure where an edit is not what it promises."""
    digest = bench.encoder.digest()
    before = {name: (each.a.clone(), each.b.clone()) for name, each in bench.classifier.adapters[0].items()}
    settings, request = ForgetSettings(steps=2), bench.material.requests[0]
    one, again = (
        forget_classes(bench.encoder, bench.classifier, bench.replay, [request], settings=settings, seed=0)
        for _ in range(2)
    )
    same = all(torch.equal(one.adapter[n].b, again.adapter[n].b) and bool(one.adapter[n].b.any()) for n in one.adapter)
    untouched = bench.encoder.digest() == digest and all(
        torch.equal(each.a, before[name][0]) and torch.equal(each.b, before[name][1])
        for name, each in bench.classifier.adapters[0].items()
    )
    projection, targets = random_projection(bench.encoder.width, 200, seed=0), bench.replay.targets
    features = bench.encoder.all_features(bench.replay.states)
    gone, classes = bench.names.index(request), len(bench.names)
    out = targets == gone
    sums = ridge_sums(features, targets, projection=projection, classes=classes)
    never = ridge_sums(features[~out], targets[~out], projection=projection, classes=classes).without([gone])
    left = subtract_classes(sums, features[out], targets[out], [gone], projection=projection)
    exact = torch.allclose(left.total.gram, never.total.gram, rtol=1e-9, atol=1e-9)
    if not (same and untouched and exact):
        raise SystemExit(f"wrong, so not measured: same bytes {same}, untouched {untouched}, exact sums {exact}")


def pieces(seeds: Sequence[int], out: Path, material: Material) -> Iterator[Piece]:
    """Yield what is to be measured, the choice of settings first; what follows depends on it."""
    for request in material.chosen_on:
        for method, choices in CHOICES.items():
            for choice in range(choices if choices > 1 else 0):
                yield Piece("choice", method, 0, request, choice)
    chosen = chosen_settings(out)
    order = [ORACLE, "GS-LoRA", "GS-LoRA++", ON_REPLAY, *CHOICES]
    for seed in seeds:
        for stage, requests in (("single", material.requests), ("sequence", ("all",))):
            for method in dict.fromkeys(order):
                for request in requests:
                    yield Piece(stage, method, seed, request, chosen[method])
    for seed in seeds:
        for stage in ("few-shot", "missing"):
            for method in ("GS-LoRA", "GS-LoRA++", "LwF", ON_REPLAY):
                yield Piece(stage, method, seed, material.requests[0], chosen[method])


def chosen_settings(out: Path) -> dict[str, int]:
    """Return the setting of each method with the best mean of H on the validation split, the rows kept."""
    scores: dict[tuple[str, int], list[float]] = {}
    for run in read_runs(out):
        if run["stage"] == "choice":
            scores.setdefault((str(run["method"]), int(str(run["choice"]))), []).append(
                json.loads(json.dumps(run["rows"]))[0]["kept"]["h_mean"]
            )
    found = {}
    for method in CHOICES:
        of_method = {choice: float(np.mean(each)) for (name, choice), each in scores.items() if name == method}
        found[method] = max(of_method, key=lambda choice: of_method[choice]) if of_method else 0
    return found


def main() -> None:
    """Measure what is missing, then print the tables and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(CHOICES), default=list(CHOICES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--data", choices=list(FILES), default="wordnet")
    parser.add_argument("--fashion", type=Path, default=FASHION, help="folder of Fashion-MNIST's files")
    parser.add_argument("--encoders", type=Path, default=Path("build/encoders"), help="where pretrained ViTs are kept")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    out = options.out or RESULTS / FILES[options.data]
    if not options.report:
        material = glosses() if options.data == "wordnet" else pictures(options.encoders, options.fashion)
        run(options, out, material)
    report(out, chosen_settings(out))


def run(options: argparse.Namespace, out: Path, material: Material) -> None:
    """Measure what is missing, and write each piece down."""
    benches: dict[int, Bench] = {}
    for piece in pieces(options.seeds, out, material):
        if piece.method not in options.methods:
            continue
        if any(all(run[k] == v for k, v in piece.facts().items()) for run in read_runs(out)):
            continue
        if piece.seed not in benches:
            benches = {piece.seed: Bench(piece.seed, material)}
            check(benches[piece.seed])
        size = {"steps": STEPS, "learned": LEARNED, "replay": REPLAY}
        keep_run(out, {**piece.facts(), **size, "rows": measure(benches[piece.seed], piece)})
        print(time.strftime("%H:%M:%S", time.gmtime()), piece, flush=True)


def _accuracies(bench: Bench, classifier: Classifier, logits: torch.Tensor, held_out: Examples) -> dict[str, float]:
    return accuracy_of_classes(logits, classifier.classes, held_out.targets, bench.names)


if __name__ == "__main__":
    main()
