"""What is searched for in ``benchmarks/registry.py``, in both languages, and a slow reading of what must be found."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from registry_content import FIELDS, LANGUAGES, Content

PAGE = 100
Test = Callable[[Content, dict[str, str]], bool]
Rank = Callable[[Content], tuple[float, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A search with blanks to fill.

    Attributes:
        name: What it is called in the report.
        ours: The filter.
        test: What it means.
        order_by: The order; newest first without one.
        rank: What it means, smallest first.
        mlflow: The filter in MLflow's language; ``None`` where that cannot say it.
        mlflow_order: Its order.
        pages: How many pages are read, each timed by itself.
    """

    name: str
    ours: str
    test: Test
    order_by: str = ""
    rank: Rank = lambda item: (-item.place,)
    mlflow: str | None = None
    mlflow_order: Sequence[str] = field(default=())
    pages: int = 2


def blanks(draw: random.Random) -> dict[str, str]:
    """Return what fills them, other words every time."""
    return {
        "field": draw.choice(FIELDS),
        "language": draw.choice(LANGUAGES),
        "adapter": f"{draw.choice(FIELDS)}-{draw.choice(LANGUAGES)}-{draw.randrange(50):03d}",
        "site": f"site-{draw.randrange(20):02d}",
        "team": f"team-{draw.randrange(50):02d}",
        "corpus": f"corpus-{draw.randrange(200):03d}",
        "ticket": f"T-{draw.randrange(100_000):06d}",
    }


def _newest(name: str, text: str, test: Test, *, pages: int = 2) -> Query:
    """Return a query that both languages write alike."""
    return Query(name=name, ours=text, mlflow=text, test=test, pages=pages)


def _best(item: Content) -> tuple[float, ...]:
    return (-item.metrics["accuracy"], -item.place)


QUERIES = (
    _newest("newest of all", "", lambda _i, _b: True, pages=5),
    _newest("one adapter", "name = '{adapter}'", lambda i, b: i.name == b["adapter"]),
    _newest("name LIKE", "name LIKE '{field}-%'", lambda i, b: i.name.startswith(b["field"] + "-")),
    _newest("name LIKE, within", "name LIKE '%-{language}-%'", lambda i, b: f"-{b['language']}-" in i.name),
    _newest("tag =", "tags.site = '{site}'", lambda i, b: i.tags["site"] == b["site"], pages=5),
    _newest("tag = of one version", "tags.ticket = '{ticket}'", lambda i, b: i.tags["ticket"] == b["ticket"]),
    _newest("tag = of none", "tags.site = 'nowhere'", lambda _i, _b: False),
    _newest("tag LIKE", "tags.dataset LIKE 'corpus-1%'", lambda i, _: i.tags["dataset"].startswith("corpus-1")),
    _newest(
        "name LIKE, tag =",
        "name LIKE '{field}-%' AND tags.stage = 'live'",
        lambda i, b: i.name.startswith(b["field"] + "-") and i.tags["stage"] == "live",
    ),
    _newest(
        "three tags",
        "tags.site = '{site}' AND tags.stage = 'live' AND tags.owner = '{team}'",
        lambda i, b: (i.tags["site"], i.tags["stage"], i.tags["owner"]) == (b["site"], "live", b["team"]),
    ),
    Query(
        name="tag =, oldest first",
        ours="tags.owner = '{team}'",
        order_by="created_at",
        mlflow="tags.owner = '{team}'",
        mlflow_order=("creation_timestamp ASC",),
        test=lambda i, b: i.tags["owner"] == b["team"],
        rank=lambda i: (i.place,),
    ),
    Query(
        name="metric >",
        ours="metrics.accuracy > 0.7",
        test=lambda i, _: i.metrics["accuracy"] > 0.7,
    ),
    Query(
        name="metric <, few",
        ours="metrics.loss < 0.03",
        test=lambda i, _: i.metrics["loss"] < 0.03,
    ),
    Query(
        name="best by metric",
        ours="",
        order_by="metrics.accuracy DESC",
        test=lambda _i, _b: True,
        rank=_best,
        pages=5,
    ),
    Query(
        name="best by metric of one adapter",
        ours="name = '{adapter}'",
        order_by="metrics.accuracy DESC",
        test=lambda i, b: i.name == b["adapter"],
        rank=_best,
    ),
    Query(
        name="name LIKE, metric >, tag =, rank <=",
        ours="name LIKE '{field}-%' AND metrics.accuracy > 0.7 AND tags.site = '{site}' AND rank <= 16",
        test=lambda i, b: (
            i.name.startswith(b["field"] + "-")
            and i.metrics["accuracy"] > 0.7
            and i.tags["site"] == b["site"]
            and i.rank <= 16
        ),
    ),
    Query(
        name="the same, best by metric",
        ours="name LIKE '{field}-%' AND metrics.accuracy > 0.7 AND tags.site = '{site}' AND rank <= 16",
        order_by="metrics.accuracy DESC",
        test=lambda i, b: (
            i.name.startswith(b["field"] + "-")
            and i.metrics["accuracy"] > 0.7
            and i.tags["site"] == b["site"]
            and i.rank <= 16
        ),
        rank=_best,
    ),
    Query(
        name="name LIKE, tag =, best by metric",
        ours="tags.stage = 'live' AND name LIKE '{field}-{language}-%'",
        order_by="metrics.accuracy DESC",
        test=lambda i, b: i.tags["stage"] == "live" and i.name.startswith(f"{b['field']}-{b['language']}-"),
        rank=_best,
    ),
    Query(
        name="rank <=, oldest first",
        ours="rank <= 8",
        order_by="created_at",
        test=lambda i, _: i.rank <= 8,
        rank=lambda i: (i.place,),
    ),
    Query(
        name="largest rank, then best by metric",
        ours="",
        order_by="rank DESC, metrics.accuracy DESC",
        test=lambda _i, _b: True,
        rank=lambda i: (-i.rank, *_best(i)),
    ),
    Query(
        name="two metrics, rank =",
        ours="metrics.accuracy > 0.9 AND metrics.loss < 0.3 AND rank = 64",
        test=lambda i, _: i.metrics["accuracy"] > 0.9 and i.metrics["loss"] < 0.3 and i.rank == 64,
    ),
    Query(
        name="OR",
        ours="tags.owner = '{team}' OR metrics.accuracy > 0.98",
        test=lambda i, b: i.tags["owner"] == b["team"] or i.metrics["accuracy"] > 0.98,
    ),
    Query(
        name="NOT",
        ours="NOT tags.stage = 'old' AND name LIKE '{field}-%'",
        test=lambda i, b: i.tags["stage"] != "old" and i.name.startswith(b["field"] + "-"),
    ),
    Query(
        name="since, exactness, least loss",
        ours="created_at >= '2026-02-01' AND exactness = 'truncated'",
        order_by="metrics.loss",
        test=lambda i, _: i.created_at.month >= 2 and i.exactness == "truncated",
        rank=lambda i: (i.metrics["loss"], -i.place),
    ),
)


def found(query: Query, words: dict[str, str], items: Sequence[Content]) -> list[list[str]]:
    """Return the references on each page, read slowly."""
    chosen = sorted((item for item in items if query.test(item, words)), key=query.rank)[: query.pages * PAGE]
    return [[item.ref for item in chosen[at : at + PAGE]] for at in range(0, max(len(chosen), 1), PAGE)]
