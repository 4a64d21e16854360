"""``pomona registry verify``, ``gc``, ``backup`` and ``restore``: keeping a registry whole."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

import typer

from pomona.cli.options import Home, Json
from pomona.cli.output import console, counted, error_facts, exit_on_error, plain, print_json, print_table
from pomona.cli.registry import opened, say
from pomona.errors import RegistryDamaged

if TYPE_CHECKING:
    from pomona.storage.consistency import Finding
    from pomona.storage.verification import Verification

_SHOWN = 50
_COLUMNS = ("about", "found", "what to do")


def verify(*, home: Home = None, as_json: Json = False) -> None:
    """Read every blob and follow every fact; say what is wrong and what to do."""
    from pomona.storage.verification import verify as check  # noqa: PLC0415

    with opened(home, as_json=as_json) as registry, _progress("blobs") as progress:
        report = check(registry, progress=progress)
    _tell(report, as_json=as_json)


def collect(
    *,
    grace: Annotated[
        float, typer.Option("--grace", min=0.0, metavar="HOURS", help="Keep blobs that were put in these last hours.")
    ] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing, say what would be deleted.")] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Delete blobs that nothing in the database names, and what dead writers left.

    Others may write meanwhile, as long as the grace period is longer than they take to publish what they have put.
    """
    from pomona.storage.collection import collect_garbage  # noqa: PLC0415

    with opened(home, as_json=as_json, writes=not dry_run) as registry:
        done = collect_garbage(registry, grace_s=grace * 3600.0, dry_run=dry_run)
        size = sum(blob.bytes for blob in done.blobs)
        if done.blobs and not dry_run:
            registry.log_event("garbage-collected", counted(len(done.blobs), "blob"), bytes=size)
    verb = "would delete" if dry_run else "deleted"
    line = (
        f"{verb} {counted(len(done.blobs), 'blob')} of {counted(size, 'byte')} in all and "
        f"{counted(done.leftovers, 'leftover')}; unnamed blobs younger than {grace:g} h that stay: {done.young}"
    )
    facts = {"blobs": done.blobs, "bytes": size, "leftovers": done.leftovers, "young": done.young, "dry_run": dry_run}
    say(line, facts, as_json=as_json)


def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE.tar", help="The file to create.")],
    *,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Write the database and every blob that it names into one file, while others may write."""
    from pomona.storage.backup import write_backup  # noqa: PLC0415

    with opened(home, as_json=as_json) as registry, _progress("blobs") as progress:
        done = write_backup(registry, file, progress=progress)
    say(
        f"wrote {done.path}: {counted(done.blobs, 'blob')}, {counted(done.bytes, 'byte')}",
        dataclasses.asdict(done),
        as_json=as_json,
    )


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE.tar", help="What `pomona registry backup` wrote.")],
    *,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Make a new registry of a backup in a folder that is empty or not there, and verify it."""
    from pomona.storage.backup import open_restored, restore_backup  # noqa: PLC0415
    from pomona.storage.opening import default_home  # noqa: PLC0415
    from pomona.storage.verification import verify as check  # noqa: PLC0415

    with exit_on_error(as_json=as_json):
        with _progress("members") as progress:
            done = restore_backup(file, home or default_home(), progress=progress)
        with open_restored(done.path) as registry, _progress("blobs") as progress:
            report = check(registry, progress=progress)
    if not as_json:
        console().print(plain(f"restored {done.path} as it was on {done.created_at}"), soft_wrap=True)
    _tell(report, as_json=as_json, more=dataclasses.asdict(done))


def _tell(report: "Verification", *, as_json: bool, more: Mapping[str, object] = MappingProxyType({})) -> None:
    """Print a report; end with RegistryDamaged's code where something is wrong."""
    damaged = RegistryDamaged(f"{_verdict(report)} with this registry; the list says what to do about each")
    if as_json:
        error = {"error": error_facts(damaged)} if report.problems else {}
        names = ("blobs", "bytes", "problems", "notes")
        print_json({**more, **{name: getattr(report, name) for name in names}, **error})
    else:
        _print_findings(report.problems, title="problems")
        _print_findings(report.notes, title="not wrong, but of no use")
        console().print(
            plain(f"read {counted(report.blobs, 'blob')} of {counted(report.bytes, 'byte')}: {_verdict(report)}"),
            soft_wrap=True,
        )
    with exit_on_error():
        if report.problems:
            raise damaged


def _verdict(report: "Verification") -> str:
    return counted(len(report.problems), "problem") if report.problems else "everything is there and fits together"


def _print_findings(findings: Sequence["Finding"], *, title: str) -> None:
    if findings:
        rows = [(item.about, item.found, item.remedy) for item in findings[:_SHOWN]]
        print_table(_COLUMNS, rows, title=title)
    if (more := len(findings) - _SHOWN) > 0:
        console().print(f"and {more} more; --json lists them all")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error where that is a terminal."""
    from rich.progress import Progress  # noqa: PLC0415

    screen = console(stderr=True)
    with Progress(console=screen, disable=not screen.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
