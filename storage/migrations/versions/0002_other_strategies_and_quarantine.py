"""Let a version say that its aggregate is no exact sum, and a submission that a defence took it out.

Why: strategies that average factors separately are approximate, and what forgets by training is no sum at all
(``behavioural``). An update that was accepted on arrival and then left out of the sum is ``quarantined``.
Data: kept; every row that was valid still is. Downgrade fails where a row has one of the new values.

Revision: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_EXACTNESS = "ck_version_exactness"
_STATUS = "ck_submission_status"
_ACCEPTED = sa.text("status = 'accepted'")


def upgrade() -> None:
    """Widen both checks."""
    _replace_checks(
        exactness="exactness IN ('exact', 'truncated', 'approximate', 'behavioural')",
        status="status IN ('accepted', 'rejected', 'late', 'quarantined')",
    )


def downgrade() -> None:
    """Narrow them again."""
    _replace_checks(
        exactness="exactness IN ('exact', 'truncated')", status="status IN ('accepted', 'rejected', 'late')"
    )


def _replace_checks(*, exactness: str, status: str) -> None:
    if op.get_context().dialect.name != "sqlite":
        for name, table, text in ((_EXACTNESS, "version", exactness), (_STATUS, "submission", status)):
            op.drop_constraint(op.f(name), table, type_="check")
            op.create_check_constraint(op.f(name), table, text)
        return
    for rebuilt in (_version(exactness), _submission(status)):
        with op.batch_alter_table(rebuilt.name, copy_from=rebuilt, recreate="always"):
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
        sa.CheckConstraint(exactness, name=op.f(_EXACTNESS)),
        sa.CheckConstraint("(run_id IS NULL) = (round IS NULL)", name=op.f("ck_version_run_and_round_go_together")),
        sa.CheckConstraint("version > 0", name=op.f("ck_version_version_is_positive")),
        sa.ForeignKeyConstraint(["adapter_name"], ["adapter.name"], name=op.f("fk_version_adapter_name")),
        sa.ForeignKeyConstraint(["base_sha256"], ["base_model.sha256"], name=op.f("fk_version_base_sha256")),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_version_run_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_version")),
        sa.UniqueConstraint("adapter_name", "version", name=op.f("uq_version_adapter_name_version")),
        sa.UniqueConstraint("run_id", "round", name=op.f("uq_version_run_id_round")),
    )


def _submission(status: str) -> sa.Table:
    return sa.Table(
        "submission",
        sa.MetaData(),
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.String(length=100), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("client", sa.String(length=200), nullable=False),
        sa.Column("rank", sa.BigInteger(), nullable=True),
        sa.Column("alpha", sa.Double(), nullable=True),
        sa.Column("num_examples", sa.BigInteger(), nullable=True),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("nonce", sa.String(length=64), nullable=False),
        sa.Column("status", sa.String(length=20), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("weight", sa.Double(), nullable=True),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("train_loss", sa.Double(), nullable=True),
        sa.Column("version_id", sa.Integer(), nullable=True),
        sa.CheckConstraint(status, name=op.f(_STATUS)),
        sa.ForeignKeyConstraint(
            ["run_id", "round"], ["round.run_id", "round.number"], name=op.f("fk_submission_run_id_round")
        ),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name=op.f("fk_submission_version_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_submission")),
        sa.Index("ix_submission_run_id_round", "run_id", "round"),
        sa.Index("ix_submission_version_id", "version_id"),
        sa.Index("uq_submission_accepted", "run_id", "round", "client", unique=True, sqlite_where=_ACCEPTED),
        sa.Index("uq_submission_nonce", "run_id", "nonce", unique=True, sqlite_where=_ACCEPTED),
    )
