"""Say how a parent may have gone into a version, and keep the audit log from being emptied.

Why: a version may now have several parents, each of a kind that people query by. On PostgreSQL, TRUNCATE fires no
trigger of rows: it took out the whole log.
Data: kept. Upgrade fails where a row of the lineage has another kind, which nothing ever wrote.

Revision: 0010
Revises: 0009
"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

_CHECK = "ck_lineage_edge_kind"
_KINDS = "kind IN ('parent', 'round', 'stack', 'merge', 'task', 'forget', 'import')"
_LINEAGE = """
CREATE VIEW lineage AS
SELECT
    c.adapter_name || '/' || c.version AS child,
    p.adapter_name || '/' || p.version AS parent,
    e.kind,
    e.coefficient,
    c.adapter_name AS child_name,
    c.version AS child_version,
    p.adapter_name AS parent_name,
    p.version AS parent_version
FROM lineage_edge AS e
JOIN version AS c ON c.id = e.child_id
JOIN version AS p ON p.id = e.parent_id
"""


def upgrade() -> None:
    """Add the check and the trigger."""
    if op.get_context().dialect.name == "sqlite":
        _rebuild(sa.CheckConstraint(_KINDS, name=op.f(_CHECK)))
        return
    op.create_check_constraint(op.f(_CHECK), "lineage_edge", _KINDS)
    op.execute(
        "CREATE TRIGGER audit_is_kept BEFORE TRUNCATE ON audit FOR EACH STATEMENT EXECUTE FUNCTION audit_is_immutable()"
    )


def downgrade() -> None:
    """Drop them."""
    if op.get_context().dialect.name == "sqlite":
        _rebuild()
        return
    op.drop_constraint(op.f(_CHECK), "lineage_edge", type_="check")
    op.execute("DROP TRIGGER audit_is_kept ON audit")


def _rebuild(*more: sa.CheckConstraint) -> None:
    """Build the table anew under its name, which SQLite refuses while a view reads it."""
    op.execute("DROP VIEW lineage")
    table = sa.Table(
        "lineage_edge",
        sa.MetaData(),
        sa.Column("child_id", sa.Integer(), nullable=False),
        sa.Column("parent_id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("coefficient", sa.Double(), nullable=False),
        sa.CheckConstraint("child_id > parent_id", name=op.f("ck_lineage_edge_parents_come_first")),
        *more,
        sa.ForeignKeyConstraint(["child_id"], ["version.id"], name=op.f("fk_lineage_edge_child_id")),
        sa.ForeignKeyConstraint(["parent_id"], ["version.id"], name=op.f("fk_lineage_edge_parent_id")),
        sa.PrimaryKeyConstraint("child_id", "parent_id", "kind", name=op.f("pk_lineage_edge")),
        sa.Index("ix_lineage_edge_parent_id", "parent_id"),
    )
    with op.batch_alter_table("lineage_edge", copy_from=table, recreate="always"):
        pass  # the copy has the check, or has it not
    op.execute(_LINEAGE)
