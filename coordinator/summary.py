"""What a finished run found, in the words that every command prints as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass

from pomona.errors import RunFailed
from pomona.storage.records import Run
from pomona.storage.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """A finished run.

    Attributes:
        run_id: The run.
        rounds: Rounds that were published.
        clients: Name, rank and examples of each client that took part.
        accuracy_initial: On the held-out data, before the first round.
        accuracy_rounds: After each round.
        adapter: Reference of the last version.
        base_sha256: Hash of the base model.
        bytes_down: Payload bytes sent to clients, all rounds.
        bytes_up: Payload bytes received from clients, all rounds.
        retained_energy: Least share of the energy that truncation kept in any layer, last round.
    """

    run_id: str
    rounds: int
    clients: Sequence[dict[str, object]]
    accuracy_initial: float
    accuracy_rounds: Sequence[float]
    adapter: str
    base_sha256: str
    bytes_down: int
    bytes_up: int
    retained_energy: float


def summarise(registry: Registry, run: Run) -> RunSummary:
    """Read a finished run's summary from the registry.

    Raises:
        RunFailed: It published nothing.
    """
    rounds = registry.rounds(run.id)
    versions = [each.version for each in rounds if each.version is not None]
    if not versions:
        raise RunFailed(f"run {run.id} published nothing")
    return RunSummary(
        run_id=run.id,
        rounds=len(versions),
        clients=[
            {"name": client.name, "rank": client.rank, "examples": client.num_examples}
            for client in registry.clients(run.id)
            if not client.excluded
        ],
        accuracy_initial=run.initial_metrics["accuracy"],
        accuracy_rounds=[version.metrics["accuracy"] for version in versions],
        adapter=versions[-1].ref,
        base_sha256=run.base_sha256,
        bytes_down=sum(each.bytes_down for each in rounds),
        bytes_up=sum(each.bytes_up for each in rounds),
        retained_energy=versions[-1].retained_energy,
    )
