"""What clients answer, about a task or a request to forget: whatever it states is held against what was asked."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pomona.adapters import LoraFactors
from pomona.aggregation.verify import Enrolment
from pomona.continual.edit_rounds import EditState, Gradient, GradientShare
from pomona.continual.heads import LinearHead
from pomona.continual.knowledge import Knowledge, TaskKnowledge
from pomona.continual.moves import ClassMove, TaskMoves
from pomona.continual.moves_payload import encode_moves
from pomona.continual.request_payload import RequestFacts, encode_gradients, encode_scores
from pomona.continual.scores import Scores
from pomona.continual.share import TaskStart, summed_share
from pomona.continual.share_payload import ShareFacts, TrainedFacts, encode_sums, encode_trained
from pomona.continual.tasks import Task
from pomona.coordinator.request_answers import check_gradients, check_moves, check_scores
from pomona.coordinator.task_answers import Asked, Summing, check_sums, check_trained
from pomona.errors import UpdateRejected
from pomona.mos_settings import MosSettings
from pomona.protocol import Invitation

WIDTH, ROWS, BASE = 3, 6, "b" * 64
MOS = MosSettings()
INVITATION = Invitation.model_construct(run_id="run-1", base_sha256=BASE)
ASKED = Asked(invitation=INVITATION, task_number=2, parent="things/1", max_update_norm=1e3, max_examples=100)
ENROLMENT = Enrolment(client="clinic", rank=2, alpha=2.0, rslora=False, num_examples=ROWS)
ADAPTER = {"layer": LoraFactors(a=torch.ones(2, 4), b=torch.ones(5, 2))}
STATE = EditState(3, ADAPTER, ADAPTER, ADAPTER)
START = TaskStart(ADAPTER, LinearHead.zeros(2, WIDTH))
FEATURES = torch.nn.functional.normalize(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)), dim=1)
TARGETS = torch.arange(ROWS) % 2
PART = summed_share(FEATURES, FEATURES, TARGETS, task=Task(2, ("a", "b")), trained=(ADAPTER, START.head), settings=MOS)
SUMMING = Summing(task=Task(2, ("a", "b")), start=START, trained_sha256="c" * 64, settings=MOS, is_first=True)

Facts = dict[str, Any]


def of_task(facts: Facts) -> ShareFacts:
    plain = {"client": "clinic", "run_id": "run-1", "task_number": 2, "parent": "things/1", "base_sha256": BASE}
    return ShareFacts.model_validate({**plain, "num_examples": ROWS, "nonce": "0" * 32, **facts})


def of_request(facts: Facts) -> RequestFacts:
    plain = {"client": "clinic", "parent": "things/1", "base_sha256": BASE, "number": 3, "nonce": "0" * 32}
    return RequestFacts.model_validate({**plain, **facts})


def trained(facts: Facts, enrolment: Enrolment = ENROLMENT) -> None:
    number = facts.get("round_number", 1)
    stated = {**of_task({k: v for k, v in facts.items() if k != "round_number"}).model_dump(), "round_number": number}
    payload = encode_trained(ADAPTER, START.head, TrainedFacts.model_validate(stated))
    check_trained("clinic", payload, ASKED, start=START, round_number=1, enrolment=enrolment)


def sums(facts: Facts, enrolment: Enrolment = ENROLMENT) -> None:
    named = facts.get("trained_sha256", "c" * 64)
    stated = of_task({k: v for k, v in facts.items() if k != "trained_sha256"})
    payload = encode_sums(PART, stated, trained_sha256=named, is_first=True)
    check_sums("clinic", payload, ASKED, summing=SUMMING, enrolment=enrolment)


def gradients(facts: Facts, enrolment: Enrolment = ENROLMENT, before: tuple[int, int] | None = None) -> None:
    share = GradientShare(Gradient(4, 1.0, ADAPTER), Gradient(2, 1.0, ADAPTER))
    payload = encode_gradients(share, of_request(facts))
    check_gradients(payload, ASKED, enrolment, state=STATE, before=before)


def moves(facts: Facts, enrolment: Enrolment = ENROLMENT, retained: int = ROWS) -> None:
    known = Knowledge(
        MOS, (TaskKnowledge(1, ("a", "b"), ADAPTER, START.head, PART.statistics, PART.first),), START.head
    )
    each = tuple(ClassMove(kept.total, kept) for kept in PART.statistics)
    payload = encode_moves([TaskMoves(each, each)], of_request(facts))
    check_moves(payload, ASKED, enrolment, number=3, known=(known, ["z"]), retained=retained)


def scores(facts: Facts, enrolment: Enrolment = ENROLMENT) -> None:
    payload = encode_scores([Scores({"a": 2}, {"a": 3, "b": 3})], ["a", "b"], of_request(facts))
    check_scores(payload, ASKED, enrolment, number=3, classes=["a", "b"], sets=1)


Check = Callable[..., None]
BOTH: list[tuple[Facts, str]] = [
    ({"client": "other"}, "expected client 'clinic', got 'other'"),
    ({"parent": "things/2"}, "expected parent 'things/1', got 'things/2'"),
    ({"base_sha256": "a" * 64}, "expected base model"),
]
OF_TASK: list[tuple[Facts, str]] = [
    *BOTH,
    ({"run_id": "run-2"}, "expected run 'run-1', got 'run-2'"),
    ({"task_number": 1}, "expected task 2, got 1"),
]


@pytest.mark.parametrize(
    ("check", "facts", "says"),
    [
        *((check, *lie) for check in (trained, sums) for lie in OF_TASK),
        *((check, *lie) for check in (gradients, moves, scores) for lie in BOTH),
        (trained, {"round_number": 2}, "expected round 1, got 2"),
        (trained, {"num_examples": ROWS + 1}, "at most 6 examples of a task, got 7"),
        (sums, {"trained_sha256": "d" * 64}, "expected adapter"),
        (gradients, {"number": 2}, "expected gradients of step 3"),
        (moves, {"number": 2}, "expected step 3, got 2"),
        (scores, {"number": 2}, "expected step 3, got 2"),
    ],
)
def test_what_was_not_asked_for_is_refused(check: Check, facts: Facts, says: str) -> None:
    check({})
    with pytest.raises(UpdateRejected, match=says):
        check(facts)


@pytest.mark.parametrize("check", [trained, sums, gradients, moves, scores])
def test_no_client_has_more_rows_than_it_joined_with(check: Check) -> None:
    fewer = Enrolment(client="clinic", rank=2, alpha=2.0, rslora=False, num_examples=ROWS - 1)
    with pytest.raises(UpdateRejected, match="at most 5"):
        check({}, fewer)


def test_rows_are_those_of_the_steps_before() -> None:
    gradients({}, before=(4, 2))
    with pytest.raises(UpdateRejected, match=r"4 and 1, as before; got \(4, 2\)"):
        gradients({}, before=(4, 1))
    with pytest.raises(UpdateRejected, match="moves of its 5 rows to keep, got 6"):
        moves({}, retained=5)
