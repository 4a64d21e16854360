"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines; progress goes to standard error.")]
Home = Annotated[
    Path | None,
    typer.Option("--home", help="Folder of the registry; by default POMONA_HOME, or the user's data folder."),
]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="No TLS: everything travels readable. For loopback and private networks."),
]
ServerAddress = Annotated[str, typer.Option("--server", help="HOST:PORT of the coordinator.")]
RootCertificates = Annotated[
    Path | None, typer.Option("--root-certificates", help="The coordinator's certificate authority (PEM).")
]
TrainingThreads = Annotated[int, typer.Option("--threads", min=1, help="CPU threads for training.")]
RunFile = Annotated[Path, typer.Argument(help="TOML file with the settings of the run.")]
