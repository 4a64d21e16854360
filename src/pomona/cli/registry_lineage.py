"""``pomona registry lineage``: what a version is made of, as a tree, as a graph for Graphviz, or as JSON."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from pomona.cli.options import Home, Json
from pomona.cli.output import cell, console, one_line, plain, print_json
from pomona.cli.registry import Ref, opened, pairs, submission_row, version_facts

if TYPE_CHECKING:
    from rich.tree import Tree

    from pomona.storage.records import LineageNode, Submission


def lineage(
    ref: Ref,
    *,
    depth: Annotated[int, typer.Option(min=1, help="Show this many generations of the tree.")] = 10,
    as_dot: Annotated[bool, typer.Option("--dot", help="Print a graph for Graphviz; it names no client.")] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show what a version is made of, back to the first."""
    if as_dot and as_json:
        raise typer.BadParameter("give --dot or --json, not both")
    with opened(home, as_json=as_json) as registry:
        node = registry.lineage(ref)
        if as_json:
            print_json(_facts(node))
        elif as_dot:
            typer.echo(dot(node))
        else:
            console().print(_tree(node, depth=depth))


def dot(root: "LineageNode") -> str:
    """Return a version and its ancestors in Graphviz's language: an arrow goes from what was used to what was made."""
    nodes = list(_each_once(root))
    versions = [f"{_quoted(node.version.ref)} [label={_quoted(node.version.ref, _summary(node))}];" for node in nodes]
    edges = [
        f"{_quoted(parent.version.ref)} -> {_quoted(node.version.ref)} [label={_quoted(_edge(parent))}];"
        for node in nodes
        for parent in node.parents
    ]
    lines = ["rankdir=LR;", "node [shape=box];", *versions, *edges]
    return "\n".join([f"digraph {_quoted(root.version.ref)} {{", *(f"    {line}" for line in lines), "}"])


def _quoted(*lines: str) -> str:
    escaped = (one_line(line).replace("\\", "\\\\").replace('"', '\\"') for line in lines)
    return '"' + "\\n".join(escaped) + '"'


def _facts(root: "LineageNode") -> dict[str, object]:
    return {
        "ref": root.version.ref,
        "versions": [
            version_facts(node.version)
            | {
                "parents": [
                    {"ref": parent.version.ref, "kind": parent.kind, "coefficient": parent.coefficient}
                    for parent in node.parents
                ],
                "submissions": node.submissions,
            }
            for node in _each_once(root)
        ],
    }


def _each_once(root: "LineageNode") -> Iterator["LineageNode"]:
    seen, queue = set[int](), [root]
    for node in queue:
        if node.version.id not in seen:
            seen.add(node.version.id)
            yield node
            queue.extend(node.parents)


def _tree(root: "LineageNode", *, depth: int) -> "Tree":
    from rich.tree import Tree  # noqa: PLC0415

    tree = Tree(_node_line(root))
    shown, queue = {root.version.id}, [(root, tree, 1)]
    for node, branch, level in queue:
        for item in node.submissions:
            branch.add(_submission_line(item))
        for parent in node.parents:
            if parent.version.id in shown:
                branch.add(f"{_node_line(parent)} [dim](shown above)[/dim]")
            elif level == depth:
                branch.add(f"{_node_line(parent)} [dim](and on: --depth {depth + 1})[/dim]")
            else:
                shown.add(parent.version.id)
                queue.append((parent, branch.add(_node_line(parent)), level + 1))
    return tree


def _node_line(node: "LineageNode") -> str:
    edge = f" {plain(_edge(node))}" if node.kind else ""
    return f"[bold]{plain(node.version.ref)}[/bold]{edge}, {plain(_summary(node))}"


def _edge(node: "LineageNode") -> str:
    return f"{node.kind} x {node.coefficient:g}"


def _summary(node: "LineageNode") -> str:
    return f"rank {node.version.rank}, {pairs(node.version.metrics)}".removesuffix(", ")


def _submission_line(item: "Submission") -> str:
    client, rank, examples, weight, sha256, status, reason = map(cell, submission_row(item))
    why = f": {reason}" if item.reason else ""
    return (
        f"{client}  rank {rank}, {examples} examples, weight {weight}, {sha256}  "
        f"[{'green' if item.status == 'accepted' else 'yellow'}]{status}[/]{why}"
    )
