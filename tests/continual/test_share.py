"""Shares of a task: their sums are those of all rows, however they are spread, and what cannot be sums is refused."""

import json
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor
from torch.testing import assert_close

from pomona.adapters import LoraFactors
from pomona.continual.discriminant import gaussian_head
from pomona.continual.heads import LinearHead, NormalEquations, RidgeSums, random_projection, ridge_head
from pomona.continual.knowledge import TaskKnowledge
from pomona.continual.share import TaskStart, TrainedShare, averaged, pooled, summed_share
from pomona.continual.share_payload import ShareFacts, decode_sums, encode_sums
from pomona.continual.share_verification import check_class, check_ridge, verify_sums
from pomona.continual.statistics import ClassStatistics
from pomona.continual.tasks import Task
from pomona.errors import ConfigError, PayloadError
from pomona.mos_settings import MosSettings

WIDTH, CLASSES = 5, 3
TASK = Task(2, ("a", "b", "c"))
RIDGE = MosSettings(head="ridge", ridge_dimensions=7)
DIAGONAL = MosSettings(moments="diagonal")
NO_ADAPTER: dict[str, LoraFactors] = {}
HEAD = LinearHead.zeros(CLASSES, WIDTH)


def features(rows: int, *, seed: int) -> Tensor:
    drawn = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=1)


def share(chosen: Sequence[int], targets: Tensor, *, mos: MosSettings = RIDGE) -> TaskKnowledge:
    own, first = (features(len(targets), seed=seed) for seed in (1, 2))
    rows = torch.tensor(chosen, dtype=torch.long)
    return summed_share(own[rows], first[rows], targets[rows], task=TASK, trained=(NO_ADAPTER, HEAD), settings=mos)


def payload(part: TaskKnowledge, rows: int) -> bytes:
    facts = ShareFacts(
        client="one", run_id="run-1", task_number=1, parent="", base_sha256="b" * 64, num_examples=rows, nonce="0" * 32
    )
    return encode_sums(part, facts, trained_sha256="a" * 64, is_first=False)


def taken(sent: bytes, *, mos: MosSettings = RIDGE) -> TaskKnowledge:
    """What a coordinator takes of it."""
    facts, part = decode_sums(sent, task=TASK, adapter=NO_ADAPTER, head=HEAD, settings=mos, is_first=False)
    verify_sums(part, num_examples=facts.num_examples, settings=mos)
    return part


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, CLASSES - 1), st.integers(0, 3)), min_size=1, max_size=30), st.booleans())
def test_sums_of_any_split_are_those_of_all_rows(rows: list[tuple[int, int]], diagonal: bool) -> None:
    """Through the bytes and the checks, which refuse nothing that is honest."""
    mos = DIAGONAL if diagonal else RIDGE
    targets = torch.tensor([label for label, _ in rows])
    whole = share(range(len(rows)), targets, mos=mos)
    split = [[i for i, (_, owner) in enumerate(rows) if owner == client] for client in range(4)]
    parts = [taken(payload(share(mine, targets, mos=mos), len(mine)), mos=mos) for mine in split if mine]
    total = pooled(parts)
    for pair in zip((*total.statistics, *total.first), (*whole.statistics, *whole.first), strict=True):
        assert pair[0].count == pair[1].count
        assert_close(pair[0].total, pair[1].total, atol=1e-13, rtol=1e-13)
        assert_close(pair[0].moment, pair[1].moment, atol=1e-13, rtol=1e-13)
    if total.ridge is not None and whole.ridge is not None:
        for one, other in ((total.ridge.total, whole.ridge.total), (total.ridge.held_out, whole.ridge.held_out)):
            assert one.count == other.count
            assert_close(one.gram, other.gram, atol=1e-12, rtol=1e-12)
            assert_close(one.cross, other.cross, atol=1e-12, rtol=1e-12)


Change = Callable[[dict[str, Tensor], dict[str, object]], object]

LIES: dict[str, tuple[Change, str]] = {
    "nan": (lambda t, _: t["first.total"].fill_(float("nan")), "first.total has NaN"),
    "huge": (lambda t, _: t["statistics.moment"].mul_(1e300), "expected features of length 1"),
    "negative": (lambda t, _: t["statistics.count"].neg_(), "expected counts of at least 0"),
    "other counts": (lambda t, _: t["first.count"].add_(1), "the same under both adapters"),
    "not stated": (lambda _, f: f.update(num_examples=5), "expected counts of 5 examples"),
    "shape": (lambda t, _: t.update({"first.total": torch.zeros(2, 3, dtype=torch.float64)}), "expected first.total"),
    "dtype": (lambda t, _: t.update({"first.total": t["first.total"].float()}), "torch.float32"),
    "extra": (lambda t, _: t.update(extra=torch.zeros(1)), "'extra' is not expected"),
    "missing": (lambda t, _: t.pop("first.total"), "'first.total' is missing"),
    "not positive": (lambda t, _: t["first.moment"][:, 1].add_(3.0), "a variance would be"),
    "long sums": (lambda t, _: t["statistics.total"].mul_(2.5), "the sums of class"),
    "short features": (lambda t, _: t["statistics.moment"].mul_(0.5), "expected features of length 1"),
    "ridge count": (lambda _, f: f["ridge"].update(total=3), "expected ridge sums of 12"),  # type: ignore[attr-defined]
    "a little not positive": (
        lambda t, _: t["first.moment"].add_(4e-5 * (torch.arange(15) == WIDTH) - 4e-5 * (torch.arange(15) == 0)),
        "a variance would be",
    ),
    "ridge held out count": (lambda _, f: f["ridge"].update(held_out=13), "got 12 and 13"),  # type: ignore[attr-defined]
    "ridge held out": (lambda t, _: t["ridge.held_out.gram"].mul_(9.0), "no sums of random features"),
    "ridge negative": (lambda t, _: t["ridge.total.cross"].neg_(), "no sums of random features"),
    "ridge huge": (lambda t, _: t["ridge.total.gram"].mul_(1e200), "features of length 1"),
    "no ridge": (lambda _, f: f.update(ridge={}), "expected counts of the sums of random features"),
    "another fact": (lambda _, f: f.update(more=1), "metadata are malformed: more"),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_cannot_be_sums_of_features_is_refused(lie: str) -> None:
    change, says = LIES[lie]
    targets = torch.arange(12) % CLASSES
    sent = payload(share(range(12), targets), 12)
    taken(sent)
    size = int.from_bytes(sent[:8], "little")
    facts = json.loads(json.loads(sent[8 : 8 + size])["__metadata__"]["pomona"])
    tensors = dict(load(sent))
    change(tensors, facts)
    with pytest.raises(PayloadError, match=says):
        taken(save(tensors, {"pomona": json.dumps(facts)}))


def test_a_class_without_examples_has_no_sums() -> None:
    part = share(range(4), torch.zeros(4, dtype=torch.long))
    assert [each.count for each in taken(payload(part, 4)).statistics] == [4, 0, 0]
    tensors = dict(load(payload(part, 4)))
    tensors["statistics.total"][2] = 0.1
    size = int.from_bytes(payload(part, 4)[:8], "little")
    text = json.loads(payload(part, 4)[8 : 8 + size])["__metadata__"]["pomona"]
    with pytest.raises(PayloadError, match="class 'c' has no examples, but sums"):
        taken(save(tensors, {"pomona": text}))


@pytest.mark.parametrize("count", [10_000, 10_000_000])
@pytest.mark.parametrize("spread", [0.0, 1e-8, 1e-4])
def test_sums_that_use_up_what_the_check_lets_pass_leave_a_head_to_solve(count: int, spread: float) -> None:
    """A variance just below zero, over more examples than all others have, made every covariance no covariance."""
    width = 48
    directions = torch.zeros(3, width, dtype=torch.float64)
    directions[0, 0], directions[1, 1], directions[2, 2] = 1.0 - spread, spread, -0.9e-9
    mean = directions[0].sqrt()
    lie = ClassStatistics(count, count * mean, count * (torch.outer(mean, mean) + directions[1:].sum(0).diag()))
    check_class("a", lie)
    rows = torch.nn.functional.normalize(torch.randn(40, width, generator=torch.Generator().manual_seed(1)), dim=1)
    honest = [ClassStatistics.of(part) for part in (rows[:20], rows[20:])]
    for classes in ([lie, lie], [honest[0], lie], [honest[0], honest[1] + lie]):
        logits = gaussian_head(classes, prior=3.0, sphere_examples=10.0).logits(rows)
        assert bool(logits.isfinite().all())
        for each in classes:
            assert bool(each.sample(3, torch.Generator()).isfinite().all())


def test_ridge_sums_that_use_up_what_the_check_lets_pass_can_be_solved() -> None:
    projection = random_projection(WIDTH, RIDGE.ridge_dimensions, seed=RIDGE.seed)
    count, side = 3_000_000, RIDGE.ridge_dimensions
    scale = float(torch.linalg.matrix_norm(projection, 2)) ** 2 * count
    gram, cross = torch.zeros(side, side, dtype=torch.float64), torch.zeros(side, CLASSES, dtype=torch.float64)
    gram[:2, :2] = 0.1 * scale
    gram[0, 1] = gram[1, 0] = (0.1 + 0.9e-9) * scale
    lie = RidgeSums(NormalEquations(gram, cross, count), NormalEquations(0 * gram, cross, 0))
    check_ridge(lie, [count, 0, 0], RIDGE, width=WIDTH)
    assert bool(ridge_head(lie, projection=projection, regularization=1e-6).weight.isfinite().all())


def trained(examples: int, *, seed: int) -> TrainedShare:
    b = torch.randn(4, 2, generator=torch.Generator().manual_seed(seed))
    return TrainedShare(examples, {"layer": LoraFactors(a=A, b=b)}, LinearHead(b[:CLASSES, :1], b[:CLASSES, 1]))


A = torch.randn(2, 3, generator=torch.Generator().manual_seed(9))
START = TaskStart({"layer": LoraFactors(a=A, b=torch.zeros(4, 2))}, LinearHead.zeros(CLASSES, 1))


def test_the_average_of_adapters_is_the_average_of_their_updates() -> None:
    shares = [trained(n, seed=n) for n in (3, 1, 8)]
    found = averaged(START, shares)
    expected = sum(each.examples / 12 * each.adapter["layer"].delta() for each in shares)
    assert_close(found.adapter["layer"].delta(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(found.adapter["layer"].a, A)


@given(st.integers(1, 10_000_000))
def test_one_share_comes_out_as_it_went_in(examples: int) -> None:
    (share,) = (trained(examples, seed=4),)
    found = averaged(START, [share])
    assert torch.equal(found.adapter["layer"].b, share.adapter["layer"].b)
    assert torch.equal(found.head.weight, share.head.weight)


def test_nothing_has_no_average_and_no_sum() -> None:
    with pytest.raises(ConfigError, match="at least one owner"):
        averaged(START, [])
    with pytest.raises(ConfigError, match="at least one owner"):
        pooled([])
