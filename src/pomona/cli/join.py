"""``pomona join``."""

from pathlib import Path
from typing import Annotated

import typer

from pomona.cli.options import Insecure
from pomona.cli.output import console, exit_on_error, plain


def join(
    *,
    server: Annotated[str, typer.Option(help="HOST:PORT of the coordinator.")],
    rank: Annotated[str, typer.Option(help="LoRA rank to train, or 'auto': what this machine can carry.")],
    data: Annotated[str, typer.Option(help="CSV or JSONL file with text and label. It stays here.")],
    name: Annotated[str, typer.Option(help="Name of this client, unique at the coordinator.")],
    model: Annotated[str, typer.Option(help="Folder of the base model, where it ships in no package.")] = "",
    insecure: Insecure = False,
    root_certificates: Annotated[
        Path | None, typer.Option(help="The coordinator's certificate authority (PEM).")
    ] = None,
    memory_share: Annotated[
        float, typer.Option(help="With --rank auto: share of the free memory that training may take.")
    ] = 0.5,
    round_s: Annotated[
        float | None, typer.Option(help="With --rank auto: seconds that the training of a round may take.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads for training.")] = 1,
) -> None:
    """Join a coordinator with this machine's data and train whenever it asks, until stopped."""
    with exit_on_error():
        from pomona.client.join import JoinSettings, run_client  # noqa: PLC0415
        from pomona.errors import ConfigError  # noqa: PLC0415
        from pomona.processes import terminated_like_interrupted  # noqa: PLC0415

        if insecure == (root_certificates is not None):
            raise ConfigError("give --root-certificates FILE, or --insecure to go without TLS, and not both")
        settings = JoinSettings(
            server=server,
            name=name,
            rank=_rank(rank),
            memory_share=memory_share,
            round_s=round_s,
            data=data,
            model=model,
            root_certificates=root_certificates,
            threads=threads,
        )
        settings.check()
        screen = console()
        try:
            with terminated_like_interrupted():
                run_client(settings, say=lambda line: screen.print(plain(line), soft_wrap=True))
        except KeyboardInterrupt:
            screen.print("stopped")


def _rank(text: str) -> int | None:
    from pomona.errors import ConfigError  # noqa: PLC0415

    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"expected --rank as a whole number or 'auto', got {text!r}") from None
