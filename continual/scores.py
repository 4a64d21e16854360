"""Right answers counted class by class: sums over examples, so those of several owners add up."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pomona.continual.encoder import FrozenEncoder, States
from pomona.continual.knowledge import Knowledge
from pomona.continual.mos import predict


@dataclass(frozen=True, slots=True)
class Scores:
    """Right answers on each class.

    Attributes:
        right: Of each class that has test examples.
        counts: Those examples.
    """

    right: Mapping[str, int]
    counts: Mapping[str, int]

    def __add__(self, other: "Scores") -> "Scores":
        """Return the scores on the examples of both."""
        return Scores(Counter(self.right) + Counter(other.right), Counter(self.counts) + Counter(other.counts))

    def accuracies(self) -> dict[str, float]:
        """Return the share of right answers on each class."""
        return {label: self.right.get(label, 0) / count for label, count in self.counts.items()}

    def accuracy(self, classes: Collection[str]) -> float:
        """Return the share of right answers on all examples of some classes, of which one must have examples."""
        there = [label for label in classes if label in self.counts]
        return sum(self.right.get(label, 0) for label in there) / sum(self.counts[label] for label in there)


def scores_of(encoder: FrozenEncoder, knowledge: Knowledge, states: States, labels: Sequence[str]) -> Scores:
    """Score some knowledge on labelled examples; on a class that is not known no answer is right."""
    answers = [knowledge.classes[i] for i in predict(encoder, knowledge, states).tolist()]
    right = Counter(label for label, answer in zip(labels, answers, strict=True) if label == answer)
    return Scores(right=right, counts=Counter(labels))
