"""What the database says lies in the blob store, and who says so."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from pomona.storage import tables as t

METHOD_STATE = "method_state"  # key of a recipe: what the run's method carried into its next round
KEPT = ("accepted", "quarantined")  # submissions whose bytes are kept; of others only the hash is

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """One fact that needs a blob.

    Attributes:
        sha256: The blob.
        bytes: Its size as recorded, ``None`` where that was not.
        holder: What the fact is about, in words, such as ``version demo/3``.
        remedy: What to do where the blob is not there.
    """

    sha256: str
    bytes: int | None
    holder: str
    remedy: str


def references(connection: sa.Connection) -> list[Reference]:
    """Return every fact that needs a blob: of versions, what their method kept, submissions, and private releases."""
    return [*_of_versions(connection), *_of_submissions(connection), *_of_releases(connection)]


def named_blobs(connection: sa.Connection) -> set[str]:
    """Return the hashes that must stay: all that :func:`references` has, and all that a recipe mentions.

    A recipe is free text, and what looks like a hash in it is kept: a blob too many costs space, one too few a version.
    """
    recipes = connection.scalars(sa.select(t.version.c.recipe))
    return {item.sha256 for item in references(connection)} | {sha for recipe in recipes for sha in _hashes(recipe)}


def _of_versions(connection: sa.Connection) -> Iterator[Reference]:
    columns = (t.version.c.adapter_name, t.version.c.version, t.version.c.blob_sha256, t.version.c.bytes)
    for name, number, sha256, size, recipe in connection.execute(sa.select(*columns, t.version.c.recipe)):
        lost = "put the file back from a backup: its name is its hash; nothing else holds this version"
        yield Reference(sha256=sha256, bytes=size, holder=f"version {name}/{number}", remedy=lost)
        state = recipe.get(METHOD_STATE) if isinstance(recipe, Mapping) else None
        if isinstance(state, str) and _SHA256.fullmatch(state):
            resumed = "put the file back from a backup, if the run is still to go on after this version"
            yield Reference(
                sha256=state, bytes=None, holder=f"the method's state after {name}/{number}", remedy=resumed
            )


def _of_submissions(connection: sa.Connection) -> Iterator[Reference]:
    sent = t.submission.c
    query = sa.select(sent.sha256, sent.bytes, sent.client, sent.round, sent.run_id).where(sent.status.in_(KEPT))
    for sha256, size, client, number, run_id in connection.execute(query):
        yield Reference(
            sha256=sha256,
            bytes=size,
            holder=f"the update of {client!r} in round {number} of run {run_id}",
            remedy="put the file back from a backup; until then its round cannot be aggregated again",
        )


def _of_releases(connection: sa.Connection) -> Iterator[Reference]:
    """Yield what was released and not published yet; the next process of its run publishes it."""
    row = t.ledger.c
    published = sa.select(t.version.c.id).where(t.version.c.blob_sha256 == row.release_sha256).exists()
    query = sa.select(row.release_sha256, row.round, row.run_id).where(row.release_sha256.is_not(None), ~published)
    for sha256, number, run_id in connection.execute(query):
        lost = "put the file back from a backup, or the round is tried again, and paid again"
        yield Reference(sha256=sha256, bytes=None, holder=f"the release of round {number} of run {run_id}", remedy=lost)


def _hashes(value: object) -> Iterator[str]:
    match value:
        case str():
            if _SHA256.fullmatch(value):
                yield value
        case Mapping():
            for item in value.values():
                yield from _hashes(item)
        case Sequence():
            for item in value:
                yield from _hashes(item)
