"""``pomona learn`` and ``pomona predict``."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pomona.cli.options import Home, Json, TrainingThreads
from pomona.cli.output import (
    console,
    counted,
    exit_on_error,
    plain,
    print_json,
    print_json_line,
    print_table,
    table,
    told_when_interrupted,
)
from pomona.cli.registry import Ref, opened

if TYPE_CHECKING:
    from pomona.coordinator.learning import Learned

Data = Annotated[str, typer.Option("--data", help="Labelled texts: .csv or .jsonl with text and label.")]
Test = Annotated[
    str | None,
    typer.Option("--test", help="Other ones, to score by; by default some of --data are held out by their hash."),
]
Settings = Annotated[Path | None, typer.Option("--settings", help="TOML file with the tables encoder, mos and forget.")]
Base = Annotated[
    str | None, typer.Option("--base", help="The base model's folder or packaged name; by default as before.")
]
Seed = Annotated[int, typer.Option(min=0, help="Of the order of classes, of what is held out, and of training.")]


def learn(
    name: Annotated[str, typer.Argument(help="Name of the adapter; each task becomes its next version.")],
    *,
    data: Data,
    test: Test = None,
    classes_per_task: Annotated[
        int | None,
        typer.Option("--classes-per-task", min=1, help="Where the data have no column task."),
    ] = None,
    seed: Seed = 0,
    relearn: Annotated[
        list[str] | None, typer.Option("--relearn", metavar="LABEL", help="A forgotten class that is wanted again.")
    ] = None,
    settings: Settings = None,
    base: Base = None,
    threads: TrainingThreads = 1,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Learn task after task (MOS), each from its own examples only, and keep what was learned before.

    Cut off, it goes on where it was when it is asked for the same again.
    """
    with exit_on_error(as_json=as_json):
        from pomona.coordinator.continual_settings import load_continual_settings  # noqa: PLC0415
        from pomona.coordinator.learning import LearnRequest  # noqa: PLC0415
        from pomona.coordinator.learning import learn as learn_stream  # noqa: PLC0415
        from pomona.processes import terminated_like_interrupted  # noqa: PLC0415

        request = LearnRequest(
            name=name,
            data=data,
            test=test,
            classes_per_task=classes_per_task,
            seed=seed,
            base=base,
            relearn=tuple(relearn or ()),
            settings=load_continual_settings(settings),
            threads=threads,
        )
        with (
            terminated_like_interrupted(),
            opened(home, as_json=as_json, writes=True, creates=True) as registry,
            told_when_interrupted("the same command goes on with the task that it was at"),
            _progress(as_json=as_json) as show,
        ):
            found = learn_stream(registry, request, show=show)
        warn_of_reemergence(found.reappeared, found.unchecked)
        if as_json:
            print_json_line(learned_facts(found))
            return
        _print(found)


def warn_of_reemergence(reappeared: Sequence[str], unchecked: Mapping[str, str]) -> None:
    """Say on stderr what was to be forgotten and would be told again, and what nobody could look at."""
    lines = [f"{label} was not looked at again: {why}" for label, why in unchecked.items()]
    if reappeared:
        back = ", ".join(reappeared)
        lines.insert(0, f"{back} was to be forgotten, and would be told again if it had its rows of the heads back")
    for line in lines:
        console(stderr=True).print(f"[yellow]warning: {plain(line)}[/yellow]", soft_wrap=True)


def learned_facts(found: "Learned") -> dict[str, object]:
    """Return what was learned as machines get it."""
    return {
        "average_accuracy": found.average_accuracy,
        "last_accuracy": found.last_accuracy,
        "forgetting": found.forgetting,
        "matrix": found.matrix.seen(),
        "adapter": found.adapter,
        "seconds": found.seconds,
        "reappeared": found.reappeared,
        "unchecked": found.unchecked,
    }


def predict(
    ref: Ref,
    *,
    data: Annotated[str, typer.Option("--data", help="Texts: .csv or .jsonl with text; labels are not looked at.")],
    out: Annotated[Path | None, typer.Option("--out", help="The file to create; by default standard output.")] = None,
    base: Base = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Say which class each text has, by a version that was learned; one line of JSON for each."""
    with opened(home, as_json=as_json) as registry:
        from pomona.coordinator.predicting import predict as predict_file  # noqa: PLC0415
        from pomona.coordinator.predicting import write_lines  # noqa: PLC0415

        found = predict_file(registry, ref, data, base=base)
        if out is not None:
            write_lines(found, out)
    if as_json:
        print_json({"adapter": found.adapter, "rows": found.rows})
    elif out is None:
        for line in found.lines():
            typer.echo(line)
    else:
        console().print(plain(f"{found.adapter}: {counted(len(found.rows), 'text')}, see {out}"), soft_wrap=True)


@contextmanager
def _progress(*, as_json: bool) -> Iterator[Callable[["Learned"], None]]:
    """Show each task when it is learned: one live table on a terminal, one line per task elsewhere."""
    screen = console(stderr=as_json)
    if not screen.is_terminal:
        yield lambda found: screen.print(plain(_line(found)), soft_wrap=True)
        return
    from rich.live import Live  # noqa: PLC0415

    with Live(console=screen, auto_refresh=False, transient=True) as live:
        yield lambda found: live.update(table(_columns(found), _rows(found), title=found.adapter), refresh=True)


def _line(found: "Learned") -> str:
    done = len(found.matrix)
    return (
        f"task {done} of {len(found.tasks)} ({', '.join(found.tasks[done - 1].classes)}): {found.adapter}, accuracy "
        f"{found.last_accuracy:.4f} on all seen"
    )


def _print(found: "Learned") -> None:
    print_table(_columns(found), _rows(found), title=f"{found.adapter}: accuracy on each task after each task")
    console().print(
        f"average accuracy {found.average_accuracy:.4f}, last {found.last_accuracy:.4f}, forgetting "
        f"{found.forgetting:.4f}; {found.seconds:.0f} s\n"
        f"next: pomona predict {found.adapter.split('/')[0]} --data FILE, pomona registry lineage {found.adapter}",
        soft_wrap=True,
    )


def _columns(found: "Learned") -> Sequence[str]:
    return ("after task", "classes", *(f"task {task.number}" for task in found.tasks), "all seen")


def _rows(found: "Learned") -> Iterator[Sequence[object]]:
    for number, (task, row) in enumerate(zip(found.tasks, found.matrix.seen(), strict=False), start=1):
        blank = [""] * (len(found.tasks) - number)
        seen = found.accuracy_after(number)
        yield number, ", ".join(task.classes), *(f"{value:.4f}" for value in row), *blank, f"{seen:.4f}"
