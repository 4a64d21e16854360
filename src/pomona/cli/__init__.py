"""The command line: parses, calls a room, prints. A command imports by itself what takes long to import."""

from typing import Annotated

import typer

from pomona import __version__
from pomona.cli import demo, doctor, join, registry, run, server, simulate, strategies

app = typer.Typer(
    name="pomona",
    help="Federated LoRA fine-tuning with exact aggregation and a versioned adapter registry.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.command("demo")(demo.demo)
app.command("server")(server.server)
app.command("join")(join.join)
app.command("run")(run.run)
app.command("simulate")(simulate.simulate)
app.command("strategies")(strategies.strategies)
app.command("doctor")(doctor.doctor)
app.add_typer(registry.app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pomona {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
