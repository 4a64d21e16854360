"""``pomona privacy ledger``, ``certificate`` and ``confirm``: what was spent, and what can be said of an adapter."""

from typing import TYPE_CHECKING, Annotated

import typer

from pomona.cli.options import Home, Json
from pomona.cli.output import console, print_json, print_table
from pomona.cli.registry import opened
from pomona.errors import ConfigError

if TYPE_CHECKING:
    from pomona.coordinator.certificate import Certificate
    from pomona.storage.records import LedgerEntry

Population = Annotated[str, typer.Argument(metavar="POPULATION", help="Whose ledger; all, if none is named.")]


def ledger(population: Population = "", *, home: Home = None, as_json: Json = False) -> None:
    """Show what was spent: one row when a release is reserved, one when it is released or burned."""
    with opened(home, as_json=as_json) as registry:
        from pomona.coordinator.spending import whole_ledger  # noqa: PLC0415

        names = sorted({row.population for row in registry.ledger()})
        if population and population not in names:
            raise ConfigError(
                f"there is no ledger of {population!r}; there are those of {', '.join(names) or 'nobody'}"
            )
        rows = [
            row
            for name in ([population] if population else names)
            for row in whole_ledger(registry, name, releasing=False)
        ]
        if as_json:
            print_json([_row(row) for row in rows])
            return
        print_table(
            ("population", "row", "state", "run", "round", "epsilon", "of budget", "noise", "rate"),
            [_cells(row) for row in rows],
            title="Privacy ledger",
        )


def certificate(
    ref: Annotated[str, typer.Argument(metavar="NAME/V", help="A version, or NAME@ALIAS.")],
    *,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show what is promised about a version, computed again from the ledger."""
    with opened(home, as_json=as_json) as registry:
        from pomona.coordinator.certificate import certify, population_of  # noqa: PLC0415
        from pomona.coordinator.spending import whole_ledger  # noqa: PLC0415

        version = registry.resolve(ref)
        told = certify(version, whole_ledger(registry, population_of(version), releasing=False))
        if as_json:
            print_json(told.model_dump(mode="json"))
            return
        _show(told)


def confirm(
    population: Annotated[str, typer.Argument(metavar="POPULATION", help="Whose ledger it is.")],
    *,
    home: Home = None,
) -> None:
    """Say that a population's ledger is the newest, after a backup was restored or on a machine that is new to it."""
    with opened(home, as_json=False, writes=True) as registry:
        from pomona.coordinator.spending import witness_folder  # noqa: PLC0415
        from pomona.storage.ledger_witness import confirm as take_word  # noqa: PLC0415

        if not take_word(witness_folder(registry), population, registry.ledger(population)):
            known = sorted({row.population for row in registry.ledger()})
            raise ConfigError(
                f"the ledger of {population!r} is not in doubt, or no word can help it; "
                f"there are ledgers of {', '.join(known) or 'nobody'}"
            )
        registry.log_event("privacy-ledger-confirmed", population)
        console().print(f"{population}: releases go on where the ledger ends")


def _row(row: "LedgerEntry") -> dict[str, object]:
    names = (
        "population", "seq", "state", "run_id", "round", "attempt", "unit", "adjacency", "epsilon", "delta", "budget",
        "noise_multiplier", "sample_rate", "releases", "library", "plan_sha256", "release_sha256", "sha256",
    )  # fmt: skip
    return {**{name: getattr(row, name) for name in names}, "at": row.at.isoformat()}


def _cells(row: "LedgerEntry") -> tuple[str, ...]:
    attempt = f" (attempt {row.attempt})" if row.attempt > 1 else ""
    return (
        row.population, str(row.seq), row.state, row.run_id, f"{row.round}{attempt}", f"{row.epsilon:.4g}",
        f"{row.budget:g}", f"{row.noise_multiplier:.4g}", f"{row.sample_rate:g}",
    )  # fmt: skip


def _show(told: "Certificate") -> None:
    sampling = "" if told.sample_rate == 1.0 else f" ({told.epsilon_without_sampling:.4g} where the sample is known)"
    size = "" if told.population_size is None else f" of {told.population_size:,}"
    rows = [
        ("adapter", f"{told.adapter}, sha256 {told.sha256}"),
        ("promise", f"epsilon {told.epsilon:.4g} at delta {told.delta:g}, {told.adjacency} {told.unit}"),
        ("population", told.population + size),
        ("of this run alone", f"epsilon {told.epsilon_of_run:.4g} after {told.rounds} rounds"),
        ("budget", f"epsilon {told.budget:g}"),
        ("releases", f"{told.releases}{sampling}"),
        ("mechanism", f"{told.mechanism}, clip {told.clip:.4g}, noise multiplier {told.noise_multiplier:.4g}"),
        ("sampling", f"rate {told.sample_rate:g}"),
        ("account", f"{told.accountant} of {told.library}"),
        ("ledger", f"row {told.ledger_seq}, sha256 {told.ledger_sha256}"),
        ("plan", told.plan_sha256),
        *(("if", each) for each in told.assumptions),
    ]
    print_table(("", ""), rows, title="Certificate")
