"""MLflow's side of ``benchmarks/registry.py``, run by the Python of MLflow's own environment.

It answers one JSON object a line on stdin with one on stdout. Everything that is timed goes through ``MlflowClient``.
A version of MLflow has no metrics, so they are tags beside the others, as text.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlflow
import sqlalchemy as sa
from mlflow import MlflowClient
from mlflow.store.model_registry.dbmodels.models import (
    SqlModelVersion,
    SqlModelVersionTag,
    SqlRegisteredModel,
    SqlRegisteredModelAlias,
)
from registry_content import Content, adapter_names, champions, contents

TABLES = (SqlRegisteredModel, SqlModelVersion, SqlModelVersionTag, SqlRegisteredModelAlias)
_ROWS = 10_000


def tags_of(item: Content) -> dict[str, str]:
    """Return tags and metrics, both as MLflow can hold them."""
    return item.tags | {key: repr(value) for key, value in item.metrics.items()}


def fill(url: str, versions: int, adapters: int) -> None:
    """Insert the rows that the client would have written, thousands at a time."""
    MlflowClient(url, url).search_registered_models(max_results=1)  # makes the tables
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        made = [{"name": name} | _moments(0) for name in adapter_names(adapters)]
        connection.execute(sa.insert(SqlRegisteredModel.__table__), made)
        rows: list[dict[str, Any]] = []
        tags: list[dict[str, Any]] = []
        for item in contents(versions, adapters):
            key = {"name": item.name, "version": item.number}
            rows.append(key | _moments(_millis(item)) | {"run_id": item.run_id} | _stored_place(item))
            tags += [key | {"key": name, "value": value} for name, value in tags_of(item).items()]
            if len(rows) == _ROWS or item.place == versions - 1:
                connection.execute(sa.insert(SqlModelVersion.__table__), rows)
                connection.execute(sa.insert(SqlModelVersionTag.__table__), tags)
                rows, tags = [], []
        pointers = [
            {"name": name, "alias": "champion", "version": number}
            for name, number in champions(versions, adapters).items()
        ]
        connection.execute(sa.insert(SqlRegisteredModelAlias.__table__), pointers)
    engine.dispose()


def fill_by_client(url: str, versions: int, adapters: int) -> None:
    """Write the same by the client alone."""
    client = MlflowClient(url, url)
    for name in adapter_names(adapters):
        client.create_registered_model(name)
    for item in contents(versions, adapters):
        client.create_model_version(item.name, source=_place(item)["source"], run_id=item.run_id, tags=tags_of(item))
    for name, number in champions(versions, adapters).items():
        client.set_registered_model_alias(name, "champion", str(number))


def rows(url: str) -> dict[str, list[list[str]]]:
    """Return every row of the four tables, moments left out."""
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        found = {
            model.__tablename__: sorted(
                [repr(value) for name, value in row.items() if not name.endswith("_time")]
                for row in connection.execute(sa.select(model.__table__)).mappings()
            )
            for model in TABLES
        }
    engine.dispose()
    return found


class Worker:
    """A client with its database, which keeps its connections between questions."""

    def __init__(self) -> None:
        self.client: MlflowClient | None = None

    def answer(self, asked: dict[str, Any]) -> object:
        """Do what is asked."""
        free: dict[str, Callable[..., object]] = {"fill": fill, "fill_by_client": fill_by_client, "rows": rows}
        do = asked.pop("do")
        return (free.get(do) or getattr(self, do))(**asked)

    def open(self, url: str) -> dict[str, str]:
        """Use another database from now on."""
        self.client = MlflowClient(url, url)
        return {"mlflow": mlflow.__version__, "mlflow_sqlalchemy": sa.__version__}

    def search(self, text: str, order_by: Sequence[str], limit: int, pages: int) -> dict[str, Any]:
        """Search page after page; the seconds are those of each page."""
        seconds, cpu, refs, token = [], [], [], None
        for _ in range(pages):
            began, busy = time.perf_counter(), time.process_time()
            found = self.client.search_model_versions(
                filter_string=text, max_results=limit, order_by=list(order_by), page_token=token
            )
            seconds.append(time.perf_counter() - began)
            cpu.append(time.process_time() - busy)
            refs.append([f"{each.name}/{each.version}" for each in found])
            token = found.token
            if not token:
                break
        return {"seconds": seconds, "cpu": cpu, "refs": refs}

    def scan(self, text: str, metric: str, above: float, limit: int) -> dict[str, Any]:
        """Find the best by a metric the way that is left: fetch all that may be meant, compare and sort here."""
        began = time.perf_counter()
        best, token = [], None
        while True:
            found = self.client.search_model_versions(filter_string=text, max_results=10_000, page_token=token)
            best += [(float(each.tags[metric]), f"{each.name}/{each.version}") for each in found]
            token = found.token
            if not token:
                break
        chosen = sorted((pair for pair in best if pair[0] > above), reverse=True)[:limit]
        return {"seconds": [time.perf_counter() - began], "refs": [[ref for _, ref in chosen]]}

    def resolve(self, name: str, alias: str) -> dict[str, Any]:
        """Follow an alias."""
        began = time.perf_counter()
        found = self.client.get_model_version_by_alias(name, alias)
        return {"seconds": [time.perf_counter() - began], "refs": [[f"{found.name}/{found.version}"]]}

    def publish(self, name: str, count: int) -> dict[str, list[float]]:
        """Create versions with five metrics; tag each, and move an alias to it."""
        try:
            self.client.get_registered_model(name)
        except mlflow.exceptions.MlflowException:
            self.client.create_registered_model(name)
        seconds: dict[str, list[float]] = {"publish": [], "tag": [], "alias": []}
        for item in contents(count, 1):
            scores = {key: repr(value) for key, value in item.metrics.items()}
            marks = [time.perf_counter()]
            made = self.client.create_model_version(name, **_place(item), run_id=item.run_id, tags=scores)
            marks.append(time.perf_counter())
            self.client.set_model_version_tag(name, made.version, "stage", item.tags["stage"])
            marks.append(time.perf_counter())
            self.client.set_registered_model_alias(name, "champion", made.version)
            marks.append(time.perf_counter())
            for key, began, ended in zip(seconds, marks, marks[1:], strict=False):
                seconds[key].append(ended - began)
        return seconds


def _millis(item: Content) -> int:
    return int(item.created_at.timestamp() * 1000)


def _moments(millis: int) -> dict[str, int]:
    return {"creation_time": millis, "last_updated_time": millis}


def _place(item: Content) -> dict[str, str]:
    return {"source": f"file:///adapters/{item.run_id}/{item.number}"}


def _stored_place(item: Content) -> dict[str, str]:
    return _place(item) | {"storage_location": _place(item)["source"]}


def main() -> None:
    """Answer until stdin ends."""
    worker = Worker()
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
