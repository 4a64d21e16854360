"""The methods that ``continual.py`` compares, and what one run of each gives.

All train LoRA of rank 8 on the feed-forward layers of the upper two blocks, for the same passes over each example, with
a learning rate of their own; MOS trains ``B`` alone, the others both factors. MOS is trained once and answered from in
several ways; what these share is computed once, and its time counts for each. ``oracle`` is told the task of each test
example, so it is an upper bound on retrieval and no method.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from continual_streams import ADAPTED_BLOCKS, Stream
from torch import Tensor

from pomona.continual.baselines.first_session import FirstSession
from pomona.continual.baselines.joint import JointTraining
from pomona.continual.baselines.nearest_class_mean import NearestClassMean
from pomona.continual.baselines.ranpac import RanPac
from pomona.continual.baselines.sequential import SequentialFineTuning
from pomona.continual.baselines.simple_cil import SimpleCil
from pomona.continual.baselines.slao import Slao
from pomona.continual.baselines.slca import Slca
from pomona.continual.encoder import FrozenEncoder
from pomona.continual.knowledge import Knowledge, nothing_known
from pomona.continual.learner import Learner, TaskData, accuracy
from pomona.continual.metrics import (
    AccuracyMatrix,
    average_accuracy,
    backward_transfer,
    forgetting,
    last_accuracy,
)
from pomona.continual.mos import Mos, task_knowledge, train_task, with_task
from pomona.mos_settings import AlignmentSettings, LoopSettings, MosSettings

EPOCHS = 3
DIMENSIONS = 2000
ALIGNMENT = AlignmentSettings()
RATES = (1e-4, 5e-4, 2e-3, 8e-3, 2e-2)

Predict = Callable[[TaskData], Tensor]
Result = dict[str, object]
_Made = TypeVar("_Made")


def loop(rate: float) -> LoopSettings:
    """Return how every method trains, at its own rate."""
    return LoopSettings(epochs=EPOCHS, min_steps=1, learning_rate=rate)


LEARNERS: dict[str, Callable[[FrozenEncoder, int, float], Learner]] = {
    "sequential fine-tuning": lambda encoder, seed, rate: SequentialFineTuning(encoder, settings=loop(rate), seed=seed),
    "sequential, local softmax": lambda encoder, seed, rate: SequentialFineTuning(
        encoder, settings=loop(rate), loss="local", seed=seed
    ),
    "nearest class mean": lambda encoder, _seed, _rate: NearestClassMean(encoder),
    "SimpleCIL": lambda encoder, _seed, _rate: SimpleCil(encoder),
    "first session, class means": lambda encoder, seed, rate: FirstSession(
        encoder, lambda adapter: SimpleCil(encoder, adapter=adapter), settings=loop(rate), seed=seed
    ),
    "SLCA-style": lambda encoder, seed, rate: Slca(encoder, settings=loop(rate), alignment=ALIGNMENT, seed=seed),
    "SLAO": lambda encoder, seed, rate: Slao(encoder, settings=loop(rate), alignment=ALIGNMENT, seed=seed),
    "RanPAC": lambda encoder, seed, _rate: RanPac(encoder, dimensions=DIMENSIONS, seed=seed),
    "RanPAC, first session": lambda encoder, seed, rate: FirstSession(
        encoder,
        lambda adapter: RanPac(encoder, adapter=adapter, dimensions=DIMENSIONS, seed=seed),
        settings=loop(rate),
        seed=seed,
    ),
    "joint training": lambda encoder, seed, rate: JointTraining(encoder, settings=loop(rate), seed=seed),
}
MOS = "MOS, as the paper"
MOS_GROUPS: dict[str, dict[str, dict[str, object]]] = {  # trained alike: name of the head, settings
    "mos": {
        MOS: {"head": "aligned", "regularized_replay": False},
        "MOS, regularized replay": {"head": "aligned"},
        "MOS, default": {"head": "combined"},
        "MOS, normal distributions": {"head": "gaussian"},
        "MOS, ridge head": {"head": "ridge", "ridge_dimensions": DIMENSIONS},
        "MOS, ridge head, mean adapter": {"head": "ridge-own", "ridge_dimensions": DIMENSIONS},
    },
    "mos-apart": {
        "MOS, no merge": {"head": "aligned", "regularized_replay": False, "merge_weight": 0.0},
        "MOS, default without merge": {"head": "combined", "merge_weight": 0.0},
    },
    "mos-official": {"MOS, as its code": {"head": "aligned", "regularized_replay": False, "official_compat": True}},
}
ORACLES = {MOS: "MOS, oracle retrieval", "MOS, no merge": "MOS, no merge, oracle retrieval"}
CLOSED_FORM = {"nearest class mean", "SimpleCIL", "RanPAC"}
ONCE = {"joint training"}  # for each seed, as it knows no order
PAIRED = {"sequential, local softmax", "mos-apart", "mos-official"}  # with one order for each seed, to save time
UPPER_BOUNDS = {"joint training", *ORACLES.values()}
PIECES = (*LEARNERS, *MOS_GROUPS)
TUNED_AS = {"mos-apart": "mos", "mos-official": "mos", "RanPAC, first session": "first session, class means"}


def run_piece(piece: str, stream: Stream, *, seed: int, rate: float, whole: bool = True) -> dict[str, Result]:
    """Learn a stream and return what each method of the piece reached.

    Args:
        piece: A learner, or a group of heads over one MOS.
        stream: What to learn.
        seed: Of the method.
        rate: Learning rate of adapters.
        whole: Score after every task; else after the last one alone.
    """
    weights = stream.encoder.digest()
    stream.encoder.forget()
    if piece in MOS_GROUPS:
        found = _run_mos(MOS_GROUPS[piece], stream, seed=seed, rate=rate, whole=whole)
    else:
        found = {piece: _run_learner(piece, stream, seed=seed, rate=rate, whole=whole)}
    if stream.encoder.digest() != weights:
        raise SystemExit(f"{piece} changed the frozen encoder; nothing of it is written")
    return found


def kept_bytes(kept: object) -> int:
    """Return the bytes of all tensors that records, mappings and sequences hold."""
    if isinstance(kept, Tensor):
        return kept.numel() * kept.element_size()
    if dataclasses.is_dataclass(kept):
        return sum(kept_bytes(getattr(kept, field.name)) for field in dataclasses.fields(kept))
    if isinstance(kept, Mapping):
        return sum(map(kept_bytes, kept.values()))
    return sum(map(kept_bytes, kept)) if isinstance(kept, (tuple, list)) else 0


def _run_learner(name: str, stream: Stream, *, seed: int, rate: float, whole: bool) -> Result:
    learner = LEARNERS[name](stream.encoder, seed, rate)
    board = _Board(stream, whole=whole and name != "joint training")
    for number, data in enumerate(stream.train):
        began = time.process_time()
        learner.learn(data)
        if name == "joint training" and number == len(stream.train) - 1:
            learner.predict(data.states.subset([0]))  # trains
        board.learned(time.process_time() - began, kept_bytes(_state(learner)))
        board.score(number, lambda test: learner.predict(test.states))
    return board.result()


def _state(learner: Any) -> object:  # noqa: ANN401 - one record for each kind of learner
    """Return what must be kept to go on with the next task, without what a seed gives."""
    if isinstance(learner, FirstSession):
        return [learner.adapter, _state(learner.rest)]
    names = ("adapter", "head", "statistics", "trained") if not isinstance(learner, RanPac) else ("sums",)
    if isinstance(learner, JointTraining):
        return [data.states.rows for data in learner.kept]
    return [getattr(learner, name) for name in names if hasattr(learner, name)]


def _run_mos(
    heads: Mapping[str, Mapping[str, object]], stream: Stream, *, seed: int, rate: float, whole: bool
) -> dict[str, Result]:
    """Train the adapters once, and make of them what each head needs."""
    encoder = stream.encoder
    known = {name: nothing_known(encoder.width, _settings(given, seed, rate)) for name, given in heads.items()}
    first = next(iter(heads))
    boards = {name: _Board(stream, whole=whole) for name in (*heads, *(ORACLES[n] for n in heads if n in ORACLES))}
    for number, data in enumerate(stream.train):
        (adapter, head), shared_s = _timed(partial(train_task, encoder, known[first], data))
        for name, knowledge in known.items():
            encoder.remembers = name != first  # the others find the features of the first
            part, summed_s = _timed(
                partial(task_knowledge, encoder, knowledge, data, adapter=_copied(adapter), head=head)
            )
            shared_s += summed_s if name == first else 0.0
            grown, aligned_s = _timed(partial(with_task, knowledge, part))
            spent_s = aligned_s + (summed_s if name != first else 0.0)
            boards[name].learned(shared_s + spent_s, kept_bytes(grown))
            known[name] = grown
        for name, knowledge in known.items():
            before = _bytes_of(knowledge)
            if name in ORACLES:
                boards[ORACLES[name]].learned(0.0, 0)
                boards[ORACLES[name]].score(number, lambda test, k=knowledge: _told(encoder, k, test))
            boards[name].score(number, _answers(encoder, knowledge))
            if not knowledge.settings.official_compat and _bytes_of(knowledge) != before:
                raise SystemExit(f"answering changed what {name} knows; nothing of it is written")
    return {name: board.result() for name, board in boards.items()}


def _timed(make: Callable[[], _Made]) -> tuple[_Made, float]:
    """Return what is made, and the CPU seconds that it took."""
    began = time.process_time()
    made = make()
    return made, time.process_time() - began


def _answers(encoder: FrozenEncoder, knowledge: Knowledge) -> Predict:
    learner = Mos(encoder, knowledge.settings)
    learner.knowledge = knowledge
    return lambda test: learner.predict(test.states)


def _told(encoder: FrozenEncoder, knowledge: Knowledge, test: TaskData) -> Tensor:
    """Answer as the paper, under the adapter of the task that each example is of, which nobody would know."""
    logits = knowledge.head.logits(encoder.all_features(test.states, knowledge.adapter(test.task.number - 1)))
    cosines = knowledge.prototypes().logits(encoder.all_features(test.states, knowledge.adapter(0)))
    return (logits.softmax(1) + (len(knowledge.tasks) * cosines).softmax(1)).argmax(1)


def _settings(given: Mapping[str, object], seed: int, rate: float) -> MosSettings:
    options = {"seed": seed, "adapted_blocks": ADAPTED_BLOCKS, "training": loop(rate), "alignment": ALIGNMENT, **given}
    return MosSettings.model_validate(options)


def _copied(adapter: Any) -> Any:  # noqa: ANN401 - a mapping of factors
    """Return an adapter of its own for each head, as the published code writes into it."""
    return {name: dataclasses.replace(each, a=each.a.clone(), b=each.b.clone()) for name, each in adapter.items()}


def _bytes_of(knowledge: Knowledge) -> list[bytes]:
    tensors, _ = knowledge.to_tensors()
    return [tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors.values()]


class _Board:
    """Counts and scores of one method, task after task."""

    def __init__(self, stream: Stream, *, whole: bool) -> None:
        self._stream, self._whole = stream, whole
        self._rows: list[tuple[float, ...]] = []
        self._learning_s: list[float] = []
        self._kept: list[int] = []
        self._stream.encoder.remembers = False
        self._cost = (0.0, 0.0)

    def learned(self, seconds: float, kept: int) -> None:
        self._learning_s.append(round(seconds, 2))
        self._kept.append(kept)

    def score(self, number: int, answer: Predict) -> None:
        last = number == len(self._stream.train) - 1
        if not (last or self._whole):
            return
        tests = self._stream.held_out[: number + 1]
        self._stream.encoder.passes, self._stream.encoder.remembers = 0, not last
        began = time.process_time()
        self._rows.append(tuple(accuracy(answer(test), test.targets) for test in tests))
        examples = sum(map(len, tests))
        self._stream.encoder.remembers = False
        self._cost = ((time.process_time() - began) / examples, self._stream.encoder.passes / examples)

    def result(self) -> Result:
        sizes = tuple(len(test) for test in self._stream.held_out)
        found: Result = {
            "rows": [[round(value, 4) for value in row] for row in self._rows],
            "test_examples": list(sizes),
            "learning_cpu_s": self._learning_s,
            "kept_bytes": self._kept,
            "answering_cpu_ms": round(1e3 * self._cost[0], 3),
            "passes_per_example": round(self._cost[1], 3),
        }
        last = sum(n * value for n, value in zip(sizes, self._rows[-1], strict=True)) / sum(sizes)
        if len(self._rows) < len(sizes):
            return {**found, "last": round(last, 5)}
        matrix = AccuracyMatrix(rows=tuple(self._rows), examples=sizes)
        return {
            **found,
            "last": round(last_accuracy(matrix), 5),
            "average": round(average_accuracy(matrix), 5),
            "forgetting": round(forgetting(matrix), 5),
            "backward_transfer": round(backward_transfer(matrix), 5),
        }


def check_exactness(stream: Stream) -> None:
    """Refuse to go on where RanPAC depends on the order of tasks, or deletion leaves a trace, on this very stream."""
    learners = [RanPac(stream.encoder, dimensions=200) for _ in range(3)]
    sums = [learners[0].sums_of(data) for data in stream.train]
    for learner, parts in zip(learners, (sums, sums[::-1], [*sums, sums[0]]), strict=True):
        _added(learner, parts)
    learners[2].forget(sums[0])
    first, *others = (learner.sums.total for learner in learners if learner.sums is not None)
    for other in others:
        for left, right in ((first.gram, other.gram), (first.cross, other.cross)):
            if float((left - right).abs().max() / left.abs().max()) > 1e-9:
                raise SystemExit("the sums of RanPAC depend on the order of tasks; nothing is measured")


def _added(learner: RanPac, parts: Iterable[Any]) -> None:
    for part in parts:
        learner.add(part)
