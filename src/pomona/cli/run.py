"""``pomona run``."""

from pomona.cli.options import Home, Json, RunFile
from pomona.cli.output import console, exit_on_error, print_json_line


def run(file: RunFile, *, home: Home = None, as_json: Json = False) -> None:
    """Start a run at the server on this machine and follow it to its end."""
    with exit_on_error(as_json=as_json):
        from pomona.cli.progress import run_view  # noqa: PLC0415
        from pomona.coordinator.launch import run_at  # noqa: PLC0415
        from pomona.coordinator.server import find_server  # noqa: PLC0415
        from pomona.coordinator.summary import summarise  # noqa: PLC0415
        from pomona.processes import terminated_like_interrupted  # noqa: PLC0415
        from pomona.settings import load_settings  # noqa: PLC0415
        from pomona.storage.registry import default_home, open_registry  # noqa: PLC0415

        settings = load_settings(file)
        folder = home or default_home()
        server = find_server(folder / "server")
        with terminated_like_interrupted(), open_registry(folder) as registry:
            with run_view(registry, as_json=as_json) as view:
                done = run_at(server, registry, settings, show=view.show)
            result = summarise(registry, done)
            if as_json:
                print_json_line(result)
            else:
                console().print(f"published {result.adapter}; see it with: pomona registry show {result.adapter}")
