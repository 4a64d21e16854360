"""``pomona registry diff``: two versions side by side."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from pomona.cli.options import Home, Json
from pomona.cli.output import print_json, print_table
from pomona.cli.registry import opened

if TYPE_CHECKING:
    from pomona.coordinator.differences import Difference
    from pomona.storage.records import Version

_LAYERS = ("layer", "norm A, B", "|A - B|", "cosine", "angles out", "angles in", "rank", "stable rank")
_HEADS = ("head", "norm A", "norm B", "|A - B|", "cosine")


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="name/3, name@alias, or name for its newest version.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other.")],
    *,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Compare two versions layer by layer: size, direction, and the spaces they read from and write to.

    Angles are the smallest and largest principal angle between the spaces they write to (out) and read from (in), in
    degrees: 0 is a direction that both have, 90 one that the other has nothing of.
    """
    with opened(home, as_json=as_json) as registry:
        from pomona.coordinator.differences import compare_versions  # noqa: PLC0415

        found = compare_versions(registry, a, b)
    if as_json:
        print_json(_facts(found))
        return
    title = f"A = {found.one.ref}, B = {found.other.ref}"
    print_table(_LAYERS, [*(_row(found, name) for name in found.comparison.layers), _total(found)], title=title)
    if found.comparison.heads:
        print_table(_HEADS, _head_rows(found), title="trained whole")


def _facts(found: "Difference") -> dict[str, object]:
    return {
        "a": _identity(found.one),
        "b": _identity(found.other),
        "base_sha256": found.one.base_sha256,
        **dataclasses.asdict(found.comparison),
    }


def _identity(version: "Version") -> dict[str, object]:
    return {"ref": version.ref, "sha256": version.sha256, "rank": version.rank}


def _row(found: "Difference", name: str) -> Sequence[object]:
    layer = found.comparison.layers[name]
    return (
        name,
        _both(layer.norms),
        layer.distance,
        layer.cosine,
        _degrees(layer.column_angles),
        _degrees(layer.row_angles),
        f"{layer.ranks[0]}, {layer.ranks[1]}",
        _both(layer.stable_ranks),
    )


def _total(found: "Difference") -> Sequence[object]:
    comparison = found.comparison
    ranks = [max((layer.ranks[side] for layer in comparison.layers.values()), default=0) for side in (0, 1)]
    largest = f"at most {ranks[0]}, {ranks[1]}"
    return ("all layers", _both(comparison.norms), comparison.distance, comparison.cosine, None, None, largest, None)


def _head_rows(found: "Difference") -> Iterator[Sequence[object]]:
    for name, head in found.comparison.heads.items():
        yield name, *head.norms, head.distance, head.cosine


def _both(values: tuple[float, float]) -> str:
    return f"{values[0]:.3g}, {values[1]:.3g}"


def _degrees(angles: Sequence[float]) -> str:
    return f"{math.degrees(angles[0]):.1f} to {math.degrees(angles[-1]):.1f}" if angles else ""
