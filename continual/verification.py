"""Look for traces of forgotten classes: accuracies, membership, and what a probe can still read from the features.

::

    H = 2 acc_retain drop / (acc_retain + drop)                    drop: what acc_forget lost
    AUC = P( score(seen) > score(unseen) ) + P( = ) / 2            1/2: nobody can tell what was learned from
    probe = accuracy on the forgotten classes of a fresh linear classifier over the edited features

None of these has a right value of its own. A pretrained encoder separates classes that it was never taught, and
examples may differ from unseen ones without having been learned; so each is to be read beside the same figure of a
classifier trained without the classes (``forget_baselines/retrain.py``), and the gap is what the edit left.

References: Zhao et al. 2024 (arXiv:2403.11530) for the accuracies; Yeom et al. 2018 (arXiv:1709.01604) for membership
by a threshold on the loss.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pomona.continual.metrics import h_mean
from pomona.errors import DataError

_PROBE_PENALTY = 1e-3
_PROBE_STEPS = 100


@dataclass(frozen=True, slots=True)
class Assessment:
    """How well a request was met.

    Attributes:
        acc_forget: On the classes of this request; 0 is wanted.
        acc_retain: On the classes of no request.
        acc_forgotten_earlier: On the classes of earlier requests; 0 is wanted, None where there are none.
        h_mean: Of ``acc_retain`` and of what ``acc_forget`` lost.
    """

    acc_forget: float
    acc_retain: float
    acc_forgotten_earlier: float | None
    h_mean: float


def accuracy_of_classes(
    logits: Tensor, classes: Sequence[str], targets: Tensor, names: Sequence[str]
) -> dict[str, float]:
    """Return the share of right answers on each class that has test examples.

    Args:
        logits: Of a classifier, ``(examples, classes)``.
        classes: What its columns stand for; it may know fewer classes than there are, and then errs on the others.
        targets: True class of each example, as a position in ``names``.
        names: All classes.
    """
    answers = [classes[i] for i in logits.argmax(1).tolist()]
    right = torch.tensor([names[t] == found for t, found in zip(targets.tolist(), answers, strict=True)])
    return {names[t]: float(right[targets == t].double().mean()) for t in sorted(set(map(int, targets.tolist())))}


def assess(
    before: Mapping[str, float],
    after: Mapping[str, float],
    counts: Mapping[str, int],
    forget: Collection[str],
    earlier: Collection[str] = (),
) -> Assessment:
    """Compare accuracies before and after a request; within a group of classes every example counts alike.

    Args:
        before: Accuracy of each class before this request.
        after: After it.
        counts: Test examples of each class.
        forget: The classes of this request.
        earlier: Those of all requests before.

    Raises:
        DataError: The request's or the retained classes have no test examples, or a class is in both requests.
    """
    retained = set(counts) - set(forget) - set(earlier)
    if not retained or not set(forget) & set(counts) or set(forget) & set(earlier):
        raise DataError(
            f"expected test examples of the classes to forget and of others, and no class forgotten twice; "
            f"got tests of {', '.join(sorted(counts))}, forget {', '.join(forget)}, earlier {', '.join(earlier)}"
        )
    acc_forget, acc_retain = _share(after, counts, forget), _share(after, counts, retained)
    gone = set(earlier) & set(counts)
    return Assessment(
        acc_forget=acc_forget,
        acc_retain=acc_retain,
        acc_forgotten_earlier=_share(after, counts, gone) if gone else None,
        h_mean=h_mean(acc_retain, max(0.0, _share(before, counts, forget) - acc_forget)),
    )


def membership_auc(seen: Tensor, unseen: Tensor) -> float:
    """Return the probability that a seen example scores higher than an unseen one, ties counted half.

    Args:
        seen: Scores of examples that were learned from, ``(n,)``: minus their loss, or the classifier's confidence.
        unseen: Of others of the same kind, ``(m,)``.

    Raises:
        DataError: One is empty or not finite.

    Example:
        >>> membership_auc(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 0.0]))
        0.875
    """
    if not len(seen) or not len(unseen) or not bool(torch.cat([seen, unseen]).isfinite().all()):
        raise DataError(f"expected finite scores of seen and unseen examples, got {len(seen)} and {len(unseen)}")
    ordered = unseen.sort().values
    seen = seen.contiguous()
    below = torch.searchsorted(ordered, seen, side="left")
    not_above = torch.searchsorted(ordered, seen, side="right")
    return float((below + not_above).double().mean()) / (2 * len(unseen))


def confidence(logits: Tensor) -> Tensor:
    """Return the log-probability of the likeliest class, ``(examples,)``: a score that needs no label.

    A classifier trained without a class has no loss on it, so this is what it and an edited one are compared by.
    """
    return logits.log_softmax(1).max(1).values


def probe_accuracy(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], wanted: Collection[int]) -> float:
    """Return how well a fresh linear classifier over features tells some classes among all.

    Multinomial logistic regression with a small penalty, solved by L-BFGS in float64: no seed, one answer.

    Args:
        train: Features ``(examples, width)`` of length 1, and targets; those of the wanted classes too.
        test: The same of held-out examples.
        wanted: The classes whose accuracy is returned.

    Raises:
        DataError: The wanted classes have no examples in one of them.
    """
    chosen = torch.isin(test[1], torch.tensor(sorted(wanted)))
    if not bool(chosen.any()) or not bool(torch.isin(train[1], torch.tensor(sorted(wanted))).any()):
        raise DataError("expected training and test examples of the classes to probe for, got none")
    scale = math.sqrt(train[0].shape[1])
    rows, targets = train[0].double() * scale, train[1]
    weight = torch.zeros(int(targets.max()) + 1, rows.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=_PROBE_STEPS, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss = cross_entropy(rows @ weight.T, targets) + _PROBE_PENALTY * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(objective)  # type: ignore[no-untyped-call]
    found = (test[0][chosen].double() * scale @ weight.detach().T).argmax(1)
    return float((found == test[1][chosen]).double().mean())


def _share(accuracies: Mapping[str, float], counts: Mapping[str, int], classes: Collection[str]) -> float:
    there = [each for each in classes if each in counts]
    return sum(accuracies[each] * counts[each] for each in there) / sum(counts[each] for each in there)
