"""``pomona simulated-client``."""

from pathlib import Path
from typing import Annotated

import typer

from pomona.cli.join import keep_joined
from pomona.cli.options import Insecure, RootCertificates, RunFile, ServerAddress, TrainingThreads
from pomona.cli.output import console, exit_on_error


def simulated_client(
    file: RunFile,
    *,
    server: ServerAddress,
    clients: Annotated[int, typer.Option(min=1, help="How many clients share the training data, at most.")],
    claims: Annotated[Path, typer.Option(help="Folder that these clients share; in it each holds a number.")],
    insecure: Insecure = False,
    root_certificates: RootCertificates = None,
    threads: TrainingThreads = 1,
) -> None:
    """Join a coordinator as one of several simulated clients: a free number, its rank, its share of the data."""
    with exit_on_error():
        import socket  # noqa: PLC0415
        import tempfile  # noqa: PLC0415

        from pomona.client.simulated import claimed_number, simulated_client  # noqa: PLC0415
        from pomona.run_file import load_settings  # noqa: PLC0415

        settings = load_settings(file)
        with (
            claimed_number(claims, clients, holder=socket.gethostname()) as number,
            tempfile.TemporaryDirectory(prefix="pomona-share-") as folder,
        ):
            client = simulated_client(
                settings,
                number,
                clients,
                server=server,
                folder=Path(folder),
                root_certificates=root_certificates,
                threads=threads,
            )
            console().print(f"number {number} of {clients}: rank {client.rank}, a share of {settings.data.source}")
            keep_joined(client, insecure=insecure)
