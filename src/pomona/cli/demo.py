"""``pomona demo``."""

from typing import Annotated

import typer

from pomona.cli.options import Home, Json
from pomona.cli.output import console, exit_on_error, print_json_line, print_table


def demo(
    *,
    home: Home = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the clients' shares and of the run.")] = 0,
    as_json: Json = False,
) -> None:
    """Run the main job for real: a coordinator and four clients over gRPC, three rounds, a checked export."""
    with exit_on_error(as_json=as_json):
        from pomona.cli.progress import run_view  # noqa: PLC0415
        from pomona.coordinator.demo import run_demo  # noqa: PLC0415
        from pomona.processes import terminated_like_interrupted  # noqa: PLC0415
        from pomona.storage.opening import default_home, open_registry  # noqa: PLC0415
        from pomona.storage.retrying import RUN_PATIENCE_S  # noqa: PLC0415

        folder = home or default_home()
        with terminated_like_interrupted(), open_registry(folder, patience_s=RUN_PATIENCE_S) as registry:
            with run_view(registry, as_json=as_json) as view:
                result = run_demo(registry, folder, show=view.show, say=view.say, seed=seed)
            if as_json:
                print_json_line(result)
                return
            versions = [v for v in registry.versions(result.adapter.split("/")[0]) if v.run_id == result.run_id]
            print_table(
                ("version", "rank", "exactness", "accuracy", "aliases", "sha256"),
                [
                    (
                        v.ref,
                        v.rank,
                        v.exactness,
                        f"{v.metrics['accuracy']:.4f}",
                        ", ".join(v.aliases),
                        v.sha256[:12],
                    )
                    for v in versions
                ],
                title="in the registry",
            )
            console().print(
                f"accuracy {result.accuracy_initial:.4f} before, {result.accuracy_rounds[-1]:.4f} after "
                f"{result.rounds} rounds; plain peft loads {result.export_dir} and scores "
                f"{result.accuracy_exported:.4f}; {result.wall_s:.0f} s in all\n"
                f"next: pomona registry lineage {result.adapter}, pomona registry ls, pomona server --insecure",
                soft_wrap=True,
            )
