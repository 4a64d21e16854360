"""``pomona forget --client``: a client is taken out of everything that its updates went into."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pomona.cli.output import console, counted, one_line, plain, print_json_line, print_table, told_when_interrupted
from pomona.cli.registry import opened

if TYPE_CHECKING:
    from pomona.coordinator.client_removal import Removal

AGAIN = "the same command goes on; what was done already is not done twice"


def forget_client(client: str, *, home: Path | None, as_json: bool) -> None:
    """Forget a client in every adapter of a registry, and print what was done about each."""
    with opened(home, as_json=as_json, writes=True) as registry:
        from pomona.coordinator.client_removal import remove_client  # noqa: PLC0415
        from pomona.processes import terminated_like_interrupted  # noqa: PLC0415

        with (
            terminated_like_interrupted(),
            told_when_interrupted(AGAIN),
            console(stderr=as_json).status(f"forgetting {one_line(client)}") as status,
        ):
            removals, updates = remove_client(registry, client, told=status.update)
        known = [item for item in registry.certificates() if item.scope == "client" and client in item.subjects]
    if as_json:
        print_json_line({"client": client, "updates_deleted": updates, "adapters": [_facts(each) for each in removals]})
        return
    if removals or updates:
        _print(client, removals, updates)
    else:
        _say_nothing_was_left(client, [item.id for item in known])


def _say_nothing_was_left(client: str, certificates: Sequence[int]) -> None:
    """Say why nothing was done: the client was forgotten already, or no update of it counts anywhere."""
    name = plain(client)
    if certificates:
        ids = ", ".join(map(str, certificates))
        line = f"{name} was forgotten already, and nothing was left to do: certificate {ids}"
        line += f" (pomona registry certificate --id {certificates[-1]})"
    else:
        line = f"no version holds anything of {name}, and there is no update of it to delete: nothing was done"
    console().print(line, soft_wrap=True)


def _facts(removal: "Removal") -> dict[str, object]:
    certificate = removal.certificate
    return {
        "adapter": certificate.version,
        "method": certificate.method,
        "exactness": certificate.exactness,
        "affected": certificate.affected,
        "rounds_lost": removal.rounds_lost,
        "certificate": certificate.id,
        "evidence": certificate.evidence,
    }


def _print(client: str, removals: "list[Removal]", updates: int) -> None:
    rows = [
        (
            each.certificate.adapter,
            each.certificate.exactness,
            each.certificate.method,
            each.certificate.version or "nothing is left",
            ", ".join(each.certificate.affected),
            str(each.rounds_lost),
            str(each.certificate.id),
        )
        for each in removals
    ]
    columns = ("adapter", "exactness", "method", "what is left", "in quarantine", "rounds lost", "certificate")
    print_table(columns, rows, title=f"Without {one_line(client)}", drop=("rounds lost",))
    console().print(f"{counted(updates, 'update')} deleted")
