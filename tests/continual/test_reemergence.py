"""Forgotten classes put back in memory: with the rows that they last had, what hid them shows when it is undone."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.continual.test_requests import BUDGET, accuracy, encoder_of, learned
from torch import Tensor

from pomona.adapters import LoraFactors
from pomona.continual.encoder import Adapter
from pomona.continual.heads import LinearHead, NormalEquations, RidgeSums
from pomona.continual.knowledge import Knowledge, TaskKnowledge
from pomona.continual.mos import predict
from pomona.continual.reemergence import restored
from pomona.continual.requests import forget_in_knowledge
from pomona.continual.statistics import ClassStatistics
from pomona.mos_settings import AlignmentSettings, MosSettings

WIDTH = 3


def same(one: Knowledge, other: Knowledge) -> bool:
    (tensors, facts), (others, other_facts) = one.to_tensors(), other.to_tensors()
    equal = tensors.keys() == others.keys() and all(torch.equal(each, others[name]) for name, each in tensors.items())
    return equal and facts == other_facts


def cancelling(edit: Adapter) -> Adapter:
    """Return an edit after which features are as if the other had never been."""
    return {name: LoraFactors(a=each.a, b=-each.b, scale=each.scale) for name, each in edit.items()}


def made_up(tasks: Sequence[Sequence[str]], *, ridge: bool, seed: int) -> Knowledge:
    """Return knowledge of random numbers."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def head(classes: int) -> LinearHead:
        return LinearHead(drawn(classes, WIDTH), drawn(classes))

    def statistics(classes: int) -> tuple[ClassStatistics, ...]:
        return tuple(ClassStatistics.of(drawn(5, WIDTH)) for _ in range(classes))

    def equations(classes: int) -> NormalEquations:
        return NormalEquations(drawn(2, 2).double(), drawn(2, classes).double(), 5 * classes)

    parts = tuple(
        TaskKnowledge(
            number=number,
            classes=tuple(classes),
            adapter={"layer": LoraFactors(a=drawn(1, WIDTH), b=drawn(WIDTH, 1))},
            head=head(len(classes)),
            statistics=statistics(len(classes)),
            first=statistics(len(classes)),
            ridge=RidgeSums(equations(len(classes)), equations(len(classes))) if ridge else None,
        )
        for number, classes in enumerate(tasks, start=1)
    )
    chosen = MosSettings(head="ridge" if ridge else "combined", ridge_dimensions=2)
    return Knowledge(chosen, parts, head(sum(map(len, tasks))))


def reread(knowledge: Knowledge) -> Knowledge:
    return Knowledge.from_tensors(*knowledge.to_tensors())


@settings(max_examples=40, deadline=None)
@given(
    order=st.permutations("abcdef"),
    requests=st.lists(st.integers(1, 2), max_size=3),
    ridge=st.booleans(),
    seed=st.integers(0, 99),
)
def test_whatever_is_forgotten_in_whatever_order_is_put_back_where_it_was(
    order: list[str], requests: list[int], ridge: bool, seed: int
) -> None:
    whole = now = made_up(("abc", "de", "f"), ridge=ridge, seed=seed)
    earlier: dict[str, Knowledge] = {}
    for count in requests:
        gone, order = order[:count], order[count:]
        earlier |= dict.fromkeys(gone, now)
        now = reread(now.without(gone))
    assert same(restored(now, earlier), whole)
    assert same(restored(whole, earlier), whole)  # what is known goes on as it is known
    if earlier:
        kept = dict(list(earlier.items())[1:])
        expected = whole.without([label for label in whole.classes if label in earlier and label not in kept])
        assert same(restored(now, kept), expected)


def test_a_class_whose_task_is_gone_stays_out() -> None:
    whole = made_up(("ab", "cd"), ridge=False, seed=0)
    rows = [0, 1]
    other = replace(
        whole, tasks=whole.tasks[:1], head=LinearHead(whole.head.weight[rows], whole.head.bias[rows])
    ).without("a")
    assert restored(other, {"a": whole, "c": whole}).classes == ("a", "b")


@pytest.mark.parametrize("head", ["combined", "aligned", "ridge"])
def test_an_edit_that_is_undone_tells_the_class_again_if_its_rows_are_back(
    tiny_bert: Path, toy_data: Path, head: Literal["combined", "aligned", "ridge"]
) -> None:
    """What goes wrong without: to knowledge that lacks the rows, nothing is ever told again."""
    alignment = AlignmentSettings(epochs=60, learning_rate=0.3)
    known, train, test = learned(
        tiny_bert, toy_data, MosSettings(head=head, rank=4, ridge_dimensions=64, alignment=alignment)
    )
    met = forget_in_knowledge(encoder_of(tiny_bert), known, train, ["food"], settings=BUDGET, seed=0)
    back = restored(met.left, {"food": known})
    # for what was forgotten just now, it is what the request is judged by, but for sums that lost the class's examples
    first, second = met.edited.tasks
    assert same(back, replace(met.edited, tasks=(replace(first, ridge=known.tasks[0].ridge), second)))
    assert accuracy(tiny_bert, back, test, "food") <= 0.1
    undone = replace(met.left, edits=(*met.left.edits, cancelling(met.left.edit)))
    assert accuracy(tiny_bert, undone, test, "food") == 0.0
    assert accuracy(tiny_bert, restored(undone, {"food": known}), test, "food") > 0.8


def test_adapters_that_answering_overwrites_are_those_of_a_copy(tiny_bert: Path, toy_data: Path) -> None:
    known, _, test = learned(tiny_bert, toy_data, MosSettings(head="aligned", rank=2, official_compat=True))
    before = {name: each.clone() for name, each in known.to_tensors()[0].items()}
    left = known.without(["food"])
    predict(encoder_of(tiny_bert), restored(left, {"food": known}), test.states)
    assert all(torch.equal(each, before[name]) for name, each in known.to_tensors()[0].items())
    predict(encoder_of(tiny_bert), left, test.states)  # what would have become of them
    assert not all(torch.equal(each, before[name]) for name, each in known.to_tensors()[0].items())
