"""The factors that a client starts a round from, as the server knows them too."""

from pomona.adapters import LoraFactors
from pomona.aggregation.strategies.contract import Assignment, Rules
from pomona.seeds import fresh_a, orthonormal_a


def starting_factors(assignment: Assignment, rules: Rules) -> dict[str, LoraFactors]:
    """Return the trainable adapter of an assignment before its first step.

    Returns:
        For each layer ``A (rank, in)`` and ``B (out, rank)``, float32, with the scale of training beside them, so that
        ``delta()`` is the part of the global adapter that is trained on.
    """
    return {name: _start(name, shape, assignment, rules) for name, shape in rules.shapes.items()}


def _start(name: str, shape: tuple[int, int], assignment: Assignment, rules: Rules) -> LoraFactors:
    out, in_ = shape
    scale = rules.scale(assignment.rank)
    draw = orthonormal_a if assignment.initial == "orthonormal" else fresh_a
    rank = rules.layer_rank(name, assignment.rank)
    a = draw(name, rank, in_, seed=assignment.adapter_seed)
    b = a.new_zeros(out, rank)
    given = assignment.layers.get(name)
    taken = rules.layer_rank(name, assignment.trainable) if assignment.trainable else 0
    if given is not None and (count := min(taken, rank, given.rank)):
        a[:count] = given.a[:count]
        b[:, :count] = given.b[:, :count] * (given.scale / scale)
    return LoraFactors(a=a, b=b, scale=scale)
