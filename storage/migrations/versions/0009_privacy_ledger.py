"""What each population has spent of its privacy, chained by hashes.

Why: every run that asks the same people draws on one budget, and a crash must not give any of it back.
Data: none before. Downgrade loses it, and with it what was spent: do not run on.

Revision: 0009
Revises: 0008
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_TABLE = "privacy_ledger"
_REFUSAL = "the privacy ledger is only added to"


def upgrade() -> None:
    """Create the table, and triggers that refuse to change, delete or truncate."""
    op.create_table(
        _TABLE,
        sa.Column("population", sa.String(100), nullable=False),
        sa.Column("seq", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("run_id", sa.String(100), nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("unit", sa.String(20), nullable=False),
        sa.Column("adjacency", sa.String(30), nullable=False),
        sa.Column("plan_sha256", sa.String(64), nullable=False),
        sa.Column("epsilon", sa.Double, nullable=False),
        sa.Column("delta", sa.Double, nullable=False),
        sa.Column("budget", sa.Double, nullable=False),
        sa.Column("noise_multiplier", sa.Double, nullable=False),
        sa.Column("sample_rate", sa.Double, nullable=False),
        sa.Column("releases", sa.Integer, nullable=False),
        sa.Column("library", sa.Text, nullable=False),
        sa.Column("release_sha256", sa.String(64), nullable=True),
        sa.Column("previous", sa.String(64), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("population", "seq", name=op.f("pk_privacy_ledger")),
        sa.CheckConstraint("state IN ('reserved', 'released', 'burned')", name=op.f("ck_privacy_ledger_state")),
        sa.CheckConstraint(
            "(release_sha256 IS NOT NULL) = (state = 'released')", name=op.f("ck_privacy_ledger_release")
        ),
    )
    for name, condition in (("reserved", "state = 'reserved'"), ("settled", "state <> 'reserved'")):
        where = sa.text(condition)
        columns = ["population", "run_id", "round", "attempt"]
        op.create_index(f"uq_{_TABLE}_{name}", _TABLE, columns, unique=True, sqlite_where=where, postgresql_where=where)
    _forbid_changes()


def _forbid_changes() -> None:
    if op.get_context().dialect.name == "sqlite":
        for name, change in ((f"{_TABLE}_is_immutable", "UPDATE"), (f"{_TABLE}_is_kept", "DELETE")):
            op.execute(
                f"CREATE TRIGGER {name} BEFORE {change} ON {_TABLE} BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END"
            )
        return
    op.execute(
        f"CREATE FUNCTION {_TABLE}_is_immutable() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{_REFUSAL}' USING ERRCODE = 'integrity_constraint_violation'; END $$"
    )
    op.execute(
        f"CREATE TRIGGER {_TABLE}_is_immutable BEFORE UPDATE OR DELETE ON {_TABLE} "
        f"FOR EACH ROW EXECUTE FUNCTION {_TABLE}_is_immutable()"
    )
    op.execute(
        f"CREATE TRIGGER {_TABLE}_is_kept BEFORE TRUNCATE ON {_TABLE} "
        f"FOR EACH STATEMENT EXECUTE FUNCTION {_TABLE}_is_immutable()"
    )


def downgrade() -> None:
    """Drop the table."""
    op.drop_table(_TABLE)
    if op.get_context().dialect.name == "postgresql":
        op.execute(f"DROP FUNCTION {_TABLE}_is_immutable")
