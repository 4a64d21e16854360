"""Let a version say that its aggregate is approximate, or that it was made to behave in a way.

Why: strategies that average factors separately are no exact aggregation, and what forgets by training is no sum at all.
Data: kept; every row that was valid still is. Downgrade fails where a version has one of the new values.

Revision: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_NAME = "ck_version_exactness"


def upgrade() -> None:
    """Widen the check."""
    _replace_check("exactness IN ('exact', 'truncated', 'approximate', 'behavioural')")


def downgrade() -> None:
    """Narrow the check again."""
    _replace_check("exactness IN ('exact', 'truncated')")


def _replace_check(after: str) -> None:
    if op.get_context().dialect.name != "sqlite":
        op.drop_constraint(op.f(_NAME), "version", type_="check")
        op.create_check_constraint(op.f(_NAME), "version", after)
        return
    with op.batch_alter_table("version", copy_from=_version(after), recreate="always"):
        pass  # the copy has the new check
    op.execute(
        "CREATE TRIGGER version_is_immutable BEFORE UPDATE ON version "
        "BEGIN SELECT RAISE(ABORT, 'a version is never changed'); END"
    )


def _version(exactness: str) -> sa.Table:
    return sa.Table(
        "version",
        sa.MetaData(),
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("adapter_name", sa.String(length=100), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("blob_sha256", sa.String(length=64), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("base_sha256", sa.String(length=64), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("exactness", sa.String(length=20), nullable=False),
        sa.Column("retained_energy", sa.Double(), nullable=False),
        sa.Column("run_id", sa.String(length=100), nullable=True),
        sa.Column("round", sa.Integer(), nullable=True),
        sa.Column("recipe", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(exactness, name=op.f(_NAME)),
        sa.CheckConstraint("(run_id IS NULL) = (round IS NULL)", name=op.f("ck_version_run_and_round_go_together")),
        sa.CheckConstraint("version > 0", name=op.f("ck_version_version_is_positive")),
        sa.ForeignKeyConstraint(["adapter_name"], ["adapter.name"], name=op.f("fk_version_adapter_name")),
        sa.ForeignKeyConstraint(["base_sha256"], ["base_model.sha256"], name=op.f("fk_version_base_sha256")),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_version_run_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_version")),
        sa.UniqueConstraint("adapter_name", "version", name=op.f("uq_version_adapter_name_version")),
        sa.UniqueConstraint("run_id", "round", name=op.f("uq_version_run_id_round")),
    )
