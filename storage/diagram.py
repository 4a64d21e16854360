"""The registry's tables as a Mermaid diagram, drawn from ``tables.py``; ``docs/registry.md`` holds it."""

from pathlib import Path

import sqlalchemy as sa

from pomona.storage.tables import metadata

BEGIN = "<!-- drawn by `make diagram` from storage/tables.py -->"
END = "<!-- end of the diagram -->"


def er_diagram() -> str:
    """Return the tables, their columns and what refers to what, as Mermaid text without a fence."""
    tables = sorted(metadata.tables.values(), key=lambda table: table.name)
    lines = ["erDiagram", *(line for table in tables for line in _table(table))]
    lines += sorted({line for table in tables for line in _references(table)})
    return "\n".join(lines) + "\n"


def redrawn(page: str) -> str:
    """Return a page with the diagram between its two marks drawn anew.

    Raises:
        ValueError: The page lacks a mark.
    """
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"expected a page with the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n```mermaid\n{er_diagram()}```\n\n{END}{after}"


def _table(table: sa.Table) -> list[str]:
    return [f"    {table.name} {{", *(f"        {_column(column)}" for column in table.columns), "    }"]


def _column(column: sa.Column[object]) -> str:
    kind = type(column.type.impl if isinstance(column.type, sa.TypeDecorator) else column.type).__name__.lower()
    keys = ", ".join(["PK"] * column.primary_key + ["FK"] * bool(column.foreign_keys))
    return " ".join(filter(None, [kind, column.name, keys, '"may be null"' if column.nullable else ""]))


def _references(table: sa.Table) -> list[str]:
    """Return one line per foreign key: the table it points at, how many, and by which columns."""
    return [
        f'    {key.referred_table.name} {_least(key)}--o{{ {table.name} : "{", ".join(key.column_keys)}"'
        for key in table.foreign_key_constraints
    ]


def _least(key: sa.ForeignKeyConstraint) -> str:
    return "|o" if any(column.nullable for column in key.columns) else "||"


def main() -> None:
    """Draw the diagram of ``docs/registry.md`` anew, from the root of a checkout."""
    page = Path("docs", "registry.md")
    page.write_text(redrawn(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
