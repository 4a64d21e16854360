"""``pomona registry``: what adapters there are, what they are made of, and how to get one out."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pomona.cli.output import console, counted, exit_on_error, plain, print_json, print_table
from pomona.errors import ConfigError

if TYPE_CHECKING:
    from pomona.storage.records import AdapterSummary, Run, Submission, Version
    from pomona.storage.registry import Registry

app = typer.Typer(
    name="registry", help="The versioned adapters: list, look into, alias, tag, export.", no_args_is_help=True
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Home = Annotated[
    Path | None,
    typer.Option("--home", help="Folder of the registry; by default POMONA_HOME, or the user's data folder."),
]
Ref = Annotated[str, typer.Argument(help="name/3, name@alias, or name for its newest version.")]

_SPECTRUM = ("norm", "stable_rank", "effective_rank", "top_share")
VERSION_COLUMNS = (
    "version",
    "rank",
    "exactness",
    "energy",
    "metrics",
    "aliases",
    "tags",
    "made by",
    "created",
)
# what a list leaves out first where the terminal is narrow; `show` and --json have it
VERSION_DROP = ("energy", "made by", "exactness", "tags", "rank", "aliases")
LONGEST = 60  # characters of a text in a list
_ADAPTER_DROP = ("rank", "versions", "aliases")
_RUN_DROP = ("clients", "started", "finished", "rounds")
_SUBMISSION_DROP = ("sha256", "examples")


@app.command("ls")
def list_adapters(*, home: Home = None, as_json: Json = False) -> None:
    """List all adapters."""
    with opened(home, as_json=as_json) as registry:
        found = registry.adapters()
        if as_json:
            print_json([_adapter_facts(item) for item in found])
        else:
            columns = ("adapter", "versions", "newest", "rank", "metrics", "aliases", "updated")
            title = counted(len(found), "adapter")
            print_table(columns, map(_adapter_row, found), title=title, drop=_ADAPTER_DROP, longest=LONGEST)


@app.command()
def show(ref: Ref, *, home: Home = None, as_json: Json = False) -> None:
    """Show one version and the submissions that it is made of."""
    with opened(home, as_json=as_json) as registry:
        version = registry.resolve(ref)
        sent = registry.submissions(version.run_id, version.round_number) if version.run_id else []
        if as_json:
            print_json(version_facts(version) | {"submissions": sent})
            return
        print_table(("", ""), _version_details(version), title=version.ref)
        _say_certificates(registry, version)
        if version.kind in {"task", "forget"}:
            return
        columns = ("client", "rank", "examples", "weight", "sha256", "status", "reason")
        print_table(columns, map(submission_row, sent), title=counted(len(sent), "submission"), drop=_SUBMISSION_DROP)
        if any(item.spectrum for item in sent):
            changed = (
                "client",
                "norm",
                "of the median",
                "stable rank",
                "effective rank",
                "largest share of one direction",
            )
            print_table(changed, _spectrum_rows(sent), title="what they change")


def _say_certificates(registry: "Registry", version: "Version") -> None:
    for item in registry.certificates(version.adapter):
        if version.ref in {item.version, *item.affected}:
            line = f"{item.scope} {', '.join(item.subjects)} forgotten: {item.exactness}"
            console().print(plain(f"certificate {item.id}: {line} (pomona registry certificate --id {item.id})"))


@app.command()
def versions(
    name: Annotated[str, typer.Argument(help="Name of the adapter.")],
    *,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """List the versions of an adapter."""
    with opened(home, as_json=as_json) as registry:
        found = registry.versions(name)
        if as_json:
            print_json([version_facts(item) for item in found])
        else:
            title = name if found else f"{name} has no versions yet"
            print_table(VERSION_COLUMNS, map(version_row, found), title=title, drop=VERSION_DROP, longest=LONGEST)


@app.command()
def alias(
    name: Annotated[str, typer.Argument(help="Name of the adapter.")],
    alias: Annotated[str, typer.Argument(help="The alias, such as champion.")],
    version: Annotated[int | None, typer.Argument(help="Number of the version to point it at.")] = None,
    *,
    remove: Annotated[bool, typer.Option("--remove", help="Delete the alias; the version stays.")] = False,
    history: Annotated[bool, typer.Option("--history", help="Show how it moved; change nothing.")] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Point an alias at a version, remove it, or show how it moved."""
    if remove + history + (version is not None) != 1:
        raise typer.BadParameter("give the number of a version, or --remove, or --history")
    if history:
        _show_moves(name, alias, home=home, as_json=as_json)
        return
    with opened(home, as_json=as_json, writes=True) as registry:
        if version is None:
            registry.remove_alias(name, alias)
            say(f"removed {name}@{alias}", {"removed": f"{name}@{alias}"}, as_json=as_json)
        else:
            moved = registry.set_alias(name, alias, version)
            say(f"{name}@{alias} is {moved.ref}", version_facts(moved), as_json=as_json)


@app.command()
def tag(
    ref: Ref,
    pair: Annotated[str, typer.Argument(metavar="KEY=VALUE", help="The tag.")],
    *,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Attach a tag to a version."""
    with opened(home, as_json=as_json, writes=True) as registry:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"expected KEY=VALUE, got {pair!r}")
        tagged = registry.set_tag(ref, key, value)
        say(f"{tagged.ref} has {key}={value}", version_facts(tagged), as_json=as_json)


@app.command()
def runs(*, home: Home = None, as_json: Json = False) -> None:
    """List all runs."""
    with opened(home, as_json=as_json) as registry:
        found = registry.runs()
        if as_json:
            print_json(found)
        else:
            columns = ("run", "adapter", "state", "rounds", "clients", "started", "finished", "reason")
            print_table(
                columns,
                [_run_row(registry, run) for run in found],
                title=counted(len(found), "run"),
                drop=_RUN_DROP,
                longest=LONGEST,
            )


def _show_moves(name: str, alias: str, *, home: Path | None, as_json: bool) -> None:
    with opened(home, as_json=as_json) as registry:
        moves = registry.alias_history(name, alias)
        if as_json:
            print_json(moves)
        else:
            rows = [(item.moved_at, item.previous, item.version or "removed") for item in moves]
            print_table(("moved", "from version", "to version"), rows, title=f"{name}@{alias}")


@contextmanager
def opened(home: Path | None, *, as_json: bool, writes: bool = False, creates: bool = False) -> Iterator["Registry"]:
    """Open a registry for a command, read-only unless it writes; end with an error's exit code.

    A registry that is not there is created only for a command that says so: a mistyped folder is an error.
    """
    from pomona.storage.opening import open_registry  # noqa: PLC0415

    with (
        exit_on_error(as_json=as_json),
        open_registry(home, read_only=not writes, create=creates) as registry,
    ):
        yield registry


def say(line: str, facts: Mapping[str, object], *, as_json: bool) -> None:
    """Print one line for people, or facts for machines."""
    if as_json:
        print_json(facts)
    else:
        console().print(plain(line), soft_wrap=True)


def version_facts(version: "Version") -> dict[str, object]:
    """Return a version as machines get it."""
    names = ("adapter", "number", "sha256", "bytes", "base_sha256", "base_model", "rank", "kind", "exactness")
    more = (
        "retained_energy",
        "run_id",
        "round_number",
        "created_at",
        "metrics",
        "tags",
        "aliases",
        "recipe",
        "quarantined",
    )
    facts: dict[str, object] = {name: getattr(version, name) for name in (*names, *more)}
    return {"ref": version.ref, **facts}


def _adapter_facts(item: "AdapterSummary") -> dict[str, object]:
    return {
        "name": item.name,
        "created_at": item.created_at,
        "versions": item.versions,
        "latest": version_facts(item.latest) if item.latest else None,
        "aliases": item.aliases,
    }


def submission_row(item: "Submission") -> Sequence[object]:
    """Return an answer of a client as a row: client, rank, examples, weight, hash, status, reason."""
    return (
        item.client,
        item.rank,
        item.num_examples,
        item.weight,
        item.sha256[:12],
        item.status,
        item.reason,
    )


def _spectrum_rows(sent: Sequence["Submission"]) -> Iterator[Sequence[object]]:
    """Yield what each update changes; norms also as multiples of the cohort's median."""
    known = [item for item in sent if item.spectrum]
    median = statistics.median(item.spectrum["norm"] for item in known)
    for item in known:
        norm, stable, effective, top = (item.spectrum.get(name) for name in _SPECTRUM)
        yield item.client, norm, norm / median if norm and median else None, stable, effective, top


def _adapter_row(item: "AdapterSummary") -> Sequence[object]:
    newest = item.latest
    return (
        item.name,
        item.versions,
        _newest(newest) if newest else None,
        newest.rank if newest else None,
        pairs(newest.metrics) if newest else None,
        ", ".join(f"{name} = {number}" for name, number in item.aliases.items()),
        newest.created_at if newest else item.created_at,
    )


def _newest(version: "Version") -> str:
    return f"{version.ref}, in quarantine" if version.quarantined else version.ref


def version_row(version: "Version") -> Sequence[object]:
    """Return a version as a row of ``VERSION_COLUMNS``."""
    return (
        version.number,
        version.rank,
        version.exactness,
        version.retained_energy,
        pairs(version.metrics),
        ", ".join(version.aliases),
        pairs(version.tags),
        _made_by(version),
        version.created_at,
    )


def _made_by(version: "Version") -> str:
    by = f"{version.run_id} round {version.round_number}" if version.run_id else version.kind
    return f"{by}, in quarantine" if version.quarantined else by


def _version_details(version: "Version") -> list[tuple[str, object]]:
    return [
        *zip(VERSION_COLUMNS, version_row(version), strict=True),
        ("base model", f"{version.base_model} {version.base_sha256[:12]}"),
        ("sha256", version.sha256),
        ("size", f"{version.bytes} bytes"),
        ("recipe", pairs(version.recipe)),
        *([("in quarantine", version.quarantined)] if version.quarantined else []),
    ]


def _run_row(registry: "Registry", run: "Run") -> Sequence[object]:
    rounds = registry.rounds(run.id)
    committed = sum(item.state == "committed" for item in rounds)
    return (
        run.id,
        run.adapter,
        run.state,
        f"{committed} of {len(rounds)} committed",
        len(registry.clients(run.id)),
        run.started_at,
        run.finished_at,
        run.reason,
    )


def pairs(values: Mapping[str, object]) -> str:
    """Return metrics, tags or a recipe on one line."""
    return ", ".join(f"{key}={f'{value:.4g}' if isinstance(value, float) else value}" for key, value in values.items())
