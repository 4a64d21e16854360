"""What people see while a run goes on: one live table on a terminal, one line per round elsewhere."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from pomona.cli.output import console, table
from pomona.errors import RegistryDamaged, RegistryUnavailable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

    from pomona.storage.records import Client, Round, Run
    from pomona.storage.registry import Registry

_COLUMNS = ("round", "clients", "accuracy", "loss", "down", "up", "energy kept", "seconds", "version")


class RunView:
    """Shows a run's rows whenever they have changed."""

    def __init__(self, registry: "Registry", screen: "Console", live: "Live | None") -> None:
        self._registry, self._screen, self._live = registry, screen, live
        self._announced: set[tuple[int, str]] = set()

    def show(self, run: "Run") -> None:
        """Show the present state."""
        rounds = self._registry.rounds(run.id)
        if self._live is not None:
            self._live.update(_picture(run, rounds, self._registry.clients(run.id)), refresh=True)
            return
        if not rounds and (0, "") not in self._announced:
            self._announced.add((0, ""))
            self._screen.print(f"run {run.id} of {run.adapter}: waiting for clients", soft_wrap=True, markup=False)
        for each in rounds:
            if (key := (each.number, each.state)) not in self._announced:
                self._announced.add(key)
                self._screen.print(_line(each), soft_wrap=True)

    def say(self, text: str) -> None:
        """Print a line above the table."""
        self._screen.print(text, style="dim", soft_wrap=True, markup=False)


class UnattendedRuns:
    """Prints, line by line, what becomes of the runs that a server started by itself."""

    def __init__(self, registry: "Registry", screen: "Console") -> None:
        self._registry, self._screen = registry, screen
        self._views: dict[str, RunView] = {}

    def watch(self, run_id: str, said: str) -> None:
        """Print that a run goes on, and from now on what it does."""
        self.say(said)
        self._views[run_id] = RunView(self._registry, self._screen, None)

    def say(self, text: str) -> None:
        """Print a line."""
        self._screen.print(text, soft_wrap=True, markup=False)

    def show(self) -> None:
        """Print what is new; nothing while the registry cannot be used, since that ends no run."""
        with suppress(RegistryUnavailable, RegistryDamaged):
            for run_id, view in list(self._views.items()):
                run = self._registry.run(run_id)
                view.show(run)
                if run.state != "running":
                    ending = f"run {run_id}: {run.state} {run.reason}".rstrip()
                    self._screen.print(ending, soft_wrap=True, markup=False)
                    del self._views[run_id]


@contextmanager
def run_view(registry: "Registry", *, as_json: bool) -> Iterator[RunView]:
    """Show a run on standard output, or on standard error where that is for machines."""
    screen = console(stderr=as_json)
    if not screen.is_terminal:
        yield RunView(registry, screen, None)
        return
    from rich.live import Live  # noqa: PLC0415

    with Live(console=screen, auto_refresh=False) as live:
        yield RunView(registry, screen, live)


def size(count: int) -> str:
    """Return a number of bytes in mebibytes."""
    return f"{count / 2**20:.1f} MiB" if count else ""


def _picture(run: "Run", rounds: "Sequence[Round]", clients: "Sequence[Client]") -> "RenderableType":
    from rich.console import Group  # noqa: PLC0415

    waiting = "" if rounds else f"waiting for clients, {sum(not c.excluded for c in clients)} enrolled"
    rows = [_initial(run), *map(_row, rounds)]
    ranks = ", ".join(f"{c.name} rank {c.rank}" for c in clients if not c.excluded)
    return Group(table(_COLUMNS, rows, title=f"run {run.id}: {run.adapter}"), waiting or ranks)


def _initial(run: "Run") -> Sequence[object]:
    metrics = run.initial_metrics
    return ("start", "", _score(metrics.get("accuracy")), _score(metrics.get("loss")), "", "", "", "", "")


def _row(each: "Round") -> Sequence[object]:
    metrics = each.version.metrics if each.version else {}
    unused = each.rejected + each.late + each.quarantined
    done = each.accepted + unused
    rejected = f" ({unused} not used)" if unused else ""
    return (
        each.number,
        f"{done}/{len(each.cohort)}{rejected}",
        _score(metrics.get("accuracy")),
        _score(metrics.get("loss")),
        size(each.bytes_down),
        size(each.bytes_up),
        f"{each.version.retained_energy:.1%}" if each.version else "",
        f"{each.seconds:.1f}" if each.seconds else "",
        each.version.ref if each.version else each.state,
    )


def _line(each: "Round") -> str:
    if each.version is None:
        return f"round {each.number}: {each.state} {each.reason}".rstrip() + f", {len(each.cohort)} clients asked"
    cells = dict(zip(_COLUMNS, _row(each), strict=True))
    return ", ".join(f"{name} {value}" for name, value in cells.items() if value != "")


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
