"""``pomona registry search`` and ``metrics``: versions that satisfy a filter, and how their metrics went."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from pomona.cli.options import Home, Json
from pomona.cli.output import console, plain, print_json, print_table
from pomona.cli.registry import LONGEST, VERSION_COLUMNS, VERSION_DROP, opened, version_facts, version_row
from pomona.cli.sparkline import sparkline

if TYPE_CHECKING:
    from pomona.storage.records import MetricHistory, MetricPoint


def search(
    text: Annotated[
        str,
        typer.Argument(metavar="[FILTER]", help="Such as: name LIKE 'legal-%' AND metrics.accuracy > 0.7"),
    ] = "",
    *,
    order_by: Annotated[
        str, typer.Option("--order-by", metavar="FIELDS", help="Such as: metrics.accuracy DESC, created_at")
    ] = "",
    limit: Annotated[int, typer.Option(help="At most this many, 1 to 1000.")] = 100,
    page_token: Annotated[
        str | None, typer.Option("--page-token", metavar="TOKEN", help="Go on where the page before ended.")
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Find versions of all adapters by name, metrics, tags and more; without a filter all, newest first.

    Fields: name, version, rank, kind, exactness, retained_energy, run_id, round, bytes, sha256, base_model,
    base_sha256, created_at, alias, metrics.KEY, tags.KEY. Comparisons: = != < <= > >= LIKE ILIKE IN (...), with AND,
    OR, NOT and parentheses. Strings stand in single quotes.
    """
    with opened(home, as_json=as_json) as registry:
        page = registry.search(text, order_by=order_by, limit=limit, page_token=page_token)
        if as_json:
            found = [version_facts(item) for item in page.versions]
            print_json({"versions": found, "next_page_token": page.next_page_token})
            return
        rows = [(item.ref, *version_row(item)[1:]) for item in page.versions]
        print_table(VERSION_COLUMNS, rows, title=f"{len(rows)} found", drop=VERSION_DROP, longest=LONGEST)
        if page.next_page_token:
            console().print(plain(f"there are more: --page-token {page.next_page_token}"), soft_wrap=True)


def metrics(
    name: Annotated[str, typer.Argument(help="Name of the adapter.")],
    metric: Annotated[str | None, typer.Argument(help="One metric; all, if it is left out.")] = None,
    *,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show how the metrics of an adapter went over its versions."""
    with opened(home, as_json=as_json) as registry:
        histories = registry.metric_history(name, metric)
        if as_json:
            print_json(histories)
        elif metric is None:
            columns = ("metric", "versions", "first", "lowest", "highest", "newest", "over versions")
            title = name if histories else f"the versions of {name} have no metrics"
            drop = ("lowest", "first", "highest", "over versions")
            print_table(columns, map(_summary, histories), title=title, drop=drop)
        else:
            _show_points(name, histories[0])


def _show_points(name: str, history: "MetricHistory") -> None:
    console().print(plain(f"{history.metric} of {name}") + f"  {_line(history.points)}", soft_wrap=True)
    print_table(("version", history.metric, "change", "created"), _changes(history.points))


def _changes(points: Sequence["MetricPoint"]) -> list[Sequence[object]]:
    before = [None, *(item.value for item in points)]
    return [
        (item.version, item.value, None if last is None else f"{item.value - last:+.4g}", item.created_at)
        for item, last in zip(points, before, strict=False)
    ]


def _summary(history: "MetricHistory") -> Sequence[object]:
    values = [item.value for item in history.points]
    finite = [value for value in values if math.isfinite(value)]
    lowest, highest = (min(finite), max(finite)) if finite else (None, None)
    return history.metric, len(values), values[0], lowest, highest, values[-1], _line(history.points)


def _line(points: Sequence["MetricPoint"]) -> str:
    return sparkline([item.value for item in points], encoding=console().encoding)
