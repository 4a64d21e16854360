"""Remove classes from where a classifier stores them rather than learned them: rows of a head, sums of a ridge head.

An edited adapter alone is not enough. A prototype *is* the knowledge of its class, and the classifier that compares
with it tells the class as before; statistics are replayed by the next alignment, which teaches it again; and a ridge
head is solved anew from its sums. What was learned task after task loses all of them by
:meth:`pomona.continual.knowledge.Knowledge.without`; here is the same for a single classifier.

::

    G' = G - sum_{i forgotten} h_i h_i^T,     Q' = Q - sum_{i forgotten} h_i y_i^T

is what the sums would be without the examples, as long as the features of the others are the same (the sums are those
of RanPAC, McDonnell et al. 2023, arXiv:2307.02251). That the column of a forgotten class is zero afterwards shows that
its examples were all there.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import Tensor

from pomona.continual.editing import Classifier
from pomona.continual.heads import CosineHead, LinearHead, RidgeSums, ridge_sums
from pomona.errors import DataError

_LEFT_OVER = 1e-6


def subtract_classes(
    sums: RidgeSums, features: Tensor, targets: Tensor, gone: Sequence[int], *, projection: Tensor
) -> RidgeSums:
    """Return ridge sums that no longer count any example of some classes, and have no column for them.

    Args:
        sums: Over all examples.
        features: Of all examples of the classes ``gone``, ``(examples, width)``.
        targets: Class of each ``(examples,)``.
        gone: The classes.
        projection: What the sums were made with.

    Raises:
        DataError: After the subtraction a column is not zero: examples are missing, are not those that were added, or
            their features come from another adapter.
    """
    less = sums - ridge_sums(features, targets, projection=projection, classes=sums.classes)
    for part, whole in ((less.total, sums.total), (less.held_out, sums.held_out)):
        column = whole.cross[:, list(gone)].norm()
        if float(part.cross[:, list(gone)].norm()) > _LEFT_OVER * float(column):
            raise DataError(
                "expected all examples of the classes to forget, with the features that they were learned with; "
                f"after subtracting {len(targets)} the sums still hold "
                f"{float(part.cross[:, list(gone)].norm() / column):.1%} of them"
            )
    return less.without(gone)


def without_rows(classifier: Classifier, forget: Collection[str]) -> Classifier:
    """Return a classifier whose linear or cosine head has no rows for some classes, so that it can never answer them.

    Raises:
        DataError: A class is unknown, all would go, or the head is another.
    """
    gone = classifier.indices(forget)
    if not isinstance(classifier.head, LinearHead | CosineHead):
        raise DataError("expected a linear or a cosine head; subtract from the sums of a ridge head and solve it anew")
    kept = [i for i in range(len(classifier.classes)) if i not in gone]
    return replace(
        classifier,
        classes=tuple(classifier.classes[i] for i in kept),
        head=classifier.head.without(gone),
        routes=tuple(classifier.routes[i] for i in kept) if classifier.routes else (),
    )
