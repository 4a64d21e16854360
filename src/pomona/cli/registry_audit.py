"""``pomona registry audit``: who changed what, and whether the log of it is whole."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from pomona.cli.options import Home, Json
from pomona.cli.output import console, counted, error_facts, exit_on_error, plain, print_json, print_table
from pomona.cli.registry import opened
from pomona.errors import RegistryDamaged

if TYPE_CHECKING:
    from pomona.storage.audit import AuditRecord

_COLUMNS = ("record", "at", "actor", "event", "subject", "details")


def audit(
    *,
    last: Annotated[int, typer.Option(min=1, help="Show at most so many, the newest; --json shows them all.")] = 50,
    expect: Annotated[
        str, typer.Option(metavar="HASH", help="Fail unless the log has a record of this hash, noted down earlier.")
    ] = "",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show the log of all changes, and check that no record was changed, taken out or cut off."""
    from pomona.storage.audit import START  # noqa: PLC0415 - imports SQLAlchemy

    with opened(home, as_json=as_json) as registry:
        records, broken = registry.audit(), registry.broken_audit()
    problems = [f"record {number} {found}" for number, found in broken]
    if expect and expect not in {START, *(record.sha256 for record in records)}:
        problems.append(f"no record has the hash {expect}: the log was cut off or written anew after it was noted down")
    head = records[-1].sha256 if records else START
    damaged = RegistryDamaged(
        f"the audit log is not whole: {'; '.join(problems)}; do not trust what it says from there on, and compare with "
        "a backup"
    )
    if as_json:
        error = {"error": error_facts(damaged)} if problems else {}
        print_json({"records": [_facts(record) for record in records], "head": head, "problems": problems, **error})
    else:
        _show(records[-last:], len(records), head, whole=not problems)
    with exit_on_error():
        if problems:
            raise damaged


def _show(shown: Sequence["AuditRecord"], count: int, head: str, *, whole: bool) -> None:
    if shown:
        print_table(_COLUMNS, [_row(record) for record in shown], drop=("actor", "record"), longest=120)
    line = counted(count, "record")
    line += f", of which the newest {len(shown)} are shown; " if count > len(shown) else "; "
    line += "each follows on the one before it; " if whole else ""
    console().print(plain(f"{line}head {head}"), soft_wrap=True)


def _row(record: "AuditRecord") -> Sequence[object]:
    at = record.at.isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")
    return record.id, at, record.actor, record.event, record.subject, _pairs(record.details)


def _pairs(details: Mapping[str, object]) -> str:
    short = {
        name: value[:12] if "sha256" in name and isinstance(value, str) else value for name, value in details.items()
    }
    return ", ".join(f"{name} {value}" for name, value in short.items() if value is not None)


def _facts(record: "AuditRecord") -> dict[str, object]:
    return {name: getattr(record, name) for name in type(record).__slots__}
