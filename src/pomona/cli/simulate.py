"""``pomona simulate``."""

from typing import Annotated

import typer

from pomona.cli.options import Home, Json, RunFile
from pomona.cli.output import console, exit_on_error, print_json_line


def simulate(
    file: RunFile,
    *,
    clients: Annotated[int, typer.Option(min=1, help="How many clients share the training data.")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Simulate many clients on this machine with Flower's simulation runtime on Ray."""
    with exit_on_error(as_json=as_json):
        from pomona.cli.progress import run_view  # noqa: PLC0415
        from pomona.coordinator.simulate import simulate_run  # noqa: PLC0415
        from pomona.coordinator.summary import summarise  # noqa: PLC0415
        from pomona.processes import terminated_like_interrupted  # noqa: PLC0415
        from pomona.run_file import load_settings  # noqa: PLC0415
        from pomona.storage.opening import default_home, open_registry  # noqa: PLC0415
        from pomona.storage.retrying import RUN_PATIENCE_S  # noqa: PLC0415

        settings = load_settings(file)
        folder = home or default_home()
        with terminated_like_interrupted(), open_registry(folder, patience_s=RUN_PATIENCE_S) as registry:
            with run_view(registry, as_json=as_json) as view:
                done = simulate_run(registry, settings, clients=clients, show=view.show)
            result = summarise(registry, done)
            if as_json:
                print_json_line(result)
            else:
                console().print(f"published {result.adapter}; see it with: pomona registry show {result.adapter}")
