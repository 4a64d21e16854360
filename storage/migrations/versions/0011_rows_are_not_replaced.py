"""Refuse to delete a version, and on SQLite to replace what may not be changed.

Why: SQLite's ``INSERT OR REPLACE`` deletes a row without telling the triggers that forbid it, so a version, a record of
the audit log or a row of the privacy ledger could be written anew under its key.
Data: kept. Downgrade allows it again.

Revision: 0011
Revises: 0010
"""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_KEYS = {
    "version": "id = NEW.id OR (adapter_name = NEW.adapter_name AND version = NEW.version)",
    "audit": "id = NEW.id",
    "privacy_ledger": "population = NEW.population AND seq = NEW.seq",
}


def upgrade() -> None:
    """Create the triggers."""
    if op.get_context().dialect.name == "postgresql":
        op.execute(
            "CREATE TRIGGER version_is_kept BEFORE DELETE ON version "
            "FOR EACH ROW EXECUTE FUNCTION version_is_immutable()"
        )
        return
    op.execute(
        "CREATE TRIGGER version_is_kept BEFORE DELETE ON version "
        "BEGIN SELECT RAISE(ABORT, 'a version is never deleted'); END"
    )
    for table, same in _KEYS.items():
        there = f"EXISTS (SELECT 1 FROM {table} WHERE {same})"  # noqa: S608 - both from above
        refuse = "SELECT RAISE(ABORT, 'a row of that key is there already, and is never replaced')"
        op.execute(f"CREATE TRIGGER {table}_is_not_replaced BEFORE INSERT ON {table} WHEN {there} BEGIN {refuse}; END")


def downgrade() -> None:
    """Drop them."""
    if op.get_context().dialect.name == "postgresql":
        op.execute("DROP TRIGGER version_is_kept ON version")
        return
    op.execute("DROP TRIGGER version_is_kept")
    for table in _KEYS:
        op.execute(f"DROP TRIGGER {table}_is_not_replaced")
