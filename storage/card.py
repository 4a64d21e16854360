"""The model card of an export: what it is made of, and nothing about who or what it was made from.

It names no client and quotes no data; the number of clients of a round is in it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence

from pomona.storage.records import LineageNode, Version


def model_card(node: LineageNode, *, library: str = "peft", notes: Sequence[str] = ()) -> str:
    """Return the card of a version in Markdown, with the front matter that hubs read.

    Args:
        node: The version with its ancestors.
        library: What loads the folder.
        notes: Sentences about this export, such as what its layout leaves out.
    """
    version = node.version
    kind = "A LoRA adapter" if library == "peft" else "A model with a LoRA adapter merged in,"
    lines = [
        *_front_matter(version, library),
        f"# {version.ref}",
        "",
        f"{kind} of rank {version.rank} for `{version.base_model}`, published by Pomona on "
        f"{version.created_at:%Y-%m-%d}.",
        *(line for note in notes for line in ("", note)),
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _facts(node)),
        "",
        "## Lineage",
        "",
        *(list(_ancestors(node)) or ["The first of its line."]),
        "",
        "## Metrics",
        "",
        *([f"* {_plain(key)}: {value:.6g}" for key, value in version.metrics.items()] or ["None recorded."]),
        "",
    ]
    return "\n".join(lines)


def _front_matter(version: Version, library: str) -> Iterator[str]:
    front = {
        "base_model": version.base_model,
        "library_name": library,
        "tags": ["lora", "federated-learning", "pomona"],
        "base_model_relation": "adapter" if library == "peft" else "merge",
    }
    yield "---"
    yield from (f"{key}: {json.dumps(value)}" for key, value in front.items())
    yield from ("---", "")


def _facts(node: LineageNode) -> Iterator[tuple[str, str]]:
    version = node.version
    yield "SHA-256 of the adapter", f"`{version.sha256}`"
    yield "SHA-256 of the base model", f"`{version.base_sha256}`"
    if version.run_id is None:
        yield "Origin", f"{_plain(version.kind)}, not made by a run"
        return
    merged = sum(item.status == "accepted" and item.version == version.ref for item in node.submissions)
    if isinstance(strategy := version.recipe.get("strategy"), str):
        yield "Strategy", f"`{_plain(strategy)}`"
    yield "Aggregation", f"{version.exactness}, retained energy {version.retained_energy:.6f}"
    told = version.recipe.get("privacy")
    hidden = isinstance(told, Mapping) and not node.submissions
    yield "Round", f"{version.round_number} of run `{version.run_id}`" + ("" if hidden else f", {merged} clients")
    if isinstance(told, Mapping) and isinstance(plan := told.get("plan"), Mapping):
        yield "Privacy", _plain(_promise(plan))
        yield "Privacy ledger", f"row {told.get('ledger_seq')}, `{_plain(str(told.get('ledger_sha256')))}`"


def _promise(plan: Mapping[str, object]) -> str:
    """Return what all releases to a population keep within; `pomona privacy certificate` says how much was spent."""
    names = ("budget", "delta", "unit", "population", "adjacency", "mechanism", "library")
    budget, delta, unit, population, adjacency, mechanism, library = (plan.get(name) for name in names)
    return (
        f"epsilon of at most {budget} at delta {delta} for each {unit} of {population} - {adjacency} - by {mechanism}, "
        f"account by {library}"
    )


def _ancestors(node: LineageNode) -> Iterator[str]:
    queue, seen = list(node.parents), {node.version.id}
    for parent in queue:
        if parent.version.id not in seen:
            seen.add(parent.version.id)
            yield f"* {parent.version.ref} ({parent.kind}, coefficient {parent.coefficient:g})"
            queue.extend(parent.parents)


def _plain(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in " -_./@:," else "?" for letter in text)
