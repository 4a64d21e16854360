"""``pomona forget``."""

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from pomona.cli.forget_client import AGAIN, forget_client
from pomona.cli.learn import Base, Seed, Settings, Test, warn_of_reemergence
from pomona.cli.options import Home, Json, TrainingThreads
from pomona.cli.output import console, exit_on_error, plain, print_json_line, print_table, told_when_interrupted
from pomona.cli.registry import opened
from pomona.errors import ConfigError

if TYPE_CHECKING:
    from pomona.coordinator.forgetting import Forgotten


def forget(
    name: Annotated[
        str | None, typer.Argument(help="Name of the adapter; what is left becomes its next version.")
    ] = None,
    *,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="LABEL", help="A class to forget; may be given several times."),
    ] = None,
    client: Annotated[
        str | None,
        typer.Option("--client", help="A client to forget, in all adapters that its updates went into."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Labelled texts of the classes to forget and of others; a few of each do."),
    ] = None,
    test: Test = None,
    seed: Seed = 0,
    settings: Settings = None,
    base: Base = None,
    threads: TrainingThreads = 1,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Forget classes of an adapter (GS-LoRA), in heads, prototypes and statistics too; or a client, in all adapters.

    Versions that know them go into quarantine. What was done, and how far it holds, becomes a certificate.
    """
    if client is not None:
        with exit_on_error(as_json=as_json):
            if name or classes or data or test:
                raise ConfigError("--client forgets it in all adapters; leave out NAME, --class, --data and --test")
        forget_client(client, home=home, as_json=as_json)
        return
    with exit_on_error(as_json=as_json):
        if not (name and classes and data):
            raise ConfigError(_missing(name=name, classes=classes, data=data))
        from pomona.coordinator.continual_settings import load_continual_settings  # noqa: PLC0415
        from pomona.coordinator.forgetting import ForgetRequest  # noqa: PLC0415
        from pomona.coordinator.forgetting import forget as forget_classes  # noqa: PLC0415
        from pomona.processes import terminated_like_interrupted  # noqa: PLC0415

        request = ForgetRequest(
            name=name,
            classes=tuple(dict.fromkeys(classes)),
            data=data,
            test=test,
            seed=seed,
            base=base,
            settings=load_continual_settings(settings).forget,
            threads=threads,
        )
        with (
            terminated_like_interrupted(),
            opened(home, as_json=as_json, writes=True) as registry,
            told_when_interrupted(AGAIN),
            console(stderr=as_json).status(f"forgetting {', '.join(request.classes)}"),
        ):
            found = forget_classes(registry, request)
        _warn(found)
        if as_json:
            print_json_line(dataclasses.asdict(found))
            return
        _print(found)


def _missing(*, name: str | None, classes: list[str] | None, data: str | None) -> str:
    given = {"NAME": name, "--class": classes, "--data": data}
    absent = ", ".join(word for word, value in given.items() if not value)
    return f"expected NAME, --class and --data to forget classes, or --client alone; {absent} is missing"


def _warn(found: "Forgotten") -> None:
    """Say on stderr where the edit did not do what it is for, or undid what an earlier one did."""
    from pomona.coordinator.edits import SHORTFALL  # noqa: PLC0415

    if missed := found.certificate.evidence.get(SHORTFALL):
        console(stderr=True).print(f"[yellow]warning: {plain(missed)}[/yellow]", soft_wrap=True)
    warn_of_reemergence(found.reappeared, found.unchecked)


def _print(found: "Forgotten") -> None:
    certificate = found.certificate
    rows = [
        ("on what was to be forgotten", found.acc_forget),
        ("on all that is to be kept", found.acc_retain),
        ("on what earlier requests forgot", found.acc_forgotten_earlier),
        ("H, of what was kept and what was forgotten", found.h_mean),
        ("blocks that the forget-adapter changes", f"{found.groups_changed} of {found.groups_total}"),
        ("exactness", f"{found.exactness}: {certificate.reason}"),
        ("in quarantine", ", ".join(certificate.affected)),
    ]
    print_table(("", ""), rows, title=f"{found.adapter}: without {', '.join(certificate.subjects)}")
    console().print(
        f"certificate {certificate.id}, {found.seconds:.0f} s\nnext: pomona registry certificate --id "
        f"{certificate.id}, pomona registry lineage {found.adapter}",
        soft_wrap=True,
    )
