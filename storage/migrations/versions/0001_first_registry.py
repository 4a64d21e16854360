"""The registry as it was first shipped.

Why: base models, runs with their rounds, clients and submissions, and immutable versions with lineage,
aliases, tags and metrics.
Data: none was there before. Downgrade loses everything but the blobs.

Revision: 0001
Revises: nothing
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_TABLES = (
    "adapter",
    "base_model",
    "run",
    "client",
    "version",
    "alias",
    "alias_history",
    "lineage",
    "tag",
    "metric",
    "round",
    "submission",
)
_ACCEPTED = sa.text("status = 'accepted'")


def upgrade() -> None:
    """Create every table, and let nothing change a version."""
    _create_names_and_runs()
    _create_versions()
    _create_notes_on_versions()
    _create_rounds()
    _make_versions_immutable()


def downgrade() -> None:
    """Drop every table."""
    for table in reversed(_TABLES):
        op.drop_table(table)
    if op.get_context().dialect.name == "postgresql":
        op.execute("DROP FUNCTION version_is_immutable()")


def _create_names_and_runs() -> None:
    op.create_table(
        "adapter",
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_adapter")),
    )
    op.create_table(
        "base_model",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("added_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_base_model")),
    )
    op.create_table(
        "run",
        sa.Column("id", sa.String(length=100), nullable=False),
        sa.Column("adapter_name", sa.String(length=100), nullable=False),
        sa.Column("settings", sa.Text(), nullable=False),
        sa.Column("base_sha256", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("initial_metrics", sa.JSON(), nullable=False),
        sa.CheckConstraint("state IN ('running', 'finished', 'failed')", name=op.f("ck_run_state")),
        sa.ForeignKeyConstraint(["adapter_name"], ["adapter.name"], name=op.f("fk_run_adapter_name")),
        sa.ForeignKeyConstraint(["base_sha256"], ["base_model.sha256"], name=op.f("fk_run_base_sha256")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_run")),
    )
    op.create_index(op.f("ix_run_adapter_name"), "run", ["adapter_name"], unique=False)
    op.create_table(
        "client",
        sa.Column("run_id", sa.String(length=100), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("rank", sa.BigInteger(), nullable=True),
        sa.Column("num_examples", sa.BigInteger(), nullable=True),
        sa.Column("excluded", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_client_run_id")),
        sa.PrimaryKeyConstraint("run_id", "name", name=op.f("pk_client")),
    )


def _create_versions() -> None:
    op.create_table(
        "version",
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
        sa.CheckConstraint("exactness IN ('exact', 'truncated')", name=op.f("ck_version_exactness")),
        sa.CheckConstraint("(run_id IS NULL) = (round IS NULL)", name=op.f("ck_version_run_and_round_go_together")),
        sa.CheckConstraint("version > 0", name=op.f("ck_version_version_is_positive")),
        sa.ForeignKeyConstraint(["adapter_name"], ["adapter.name"], name=op.f("fk_version_adapter_name")),
        sa.ForeignKeyConstraint(["base_sha256"], ["base_model.sha256"], name=op.f("fk_version_base_sha256")),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_version_run_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_version")),
        sa.UniqueConstraint("adapter_name", "version", name=op.f("uq_version_adapter_name_version")),
        sa.UniqueConstraint("run_id", "round", name=op.f("uq_version_run_id_round")),
    )


def _create_notes_on_versions() -> None:
    op.create_table(
        "alias",
        sa.Column("adapter_name", sa.String(length=100), nullable=False),
        sa.Column("alias", sa.String(length=64), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("moved_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["adapter_name"], ["adapter.name"], name=op.f("fk_alias_adapter_name")),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name=op.f("fk_alias_version_id")),
        sa.PrimaryKeyConstraint("adapter_name", "alias", name=op.f("pk_alias")),
    )
    op.create_table(
        "alias_history",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("adapter_name", sa.String(length=100), nullable=False),
        sa.Column("alias", sa.String(length=64), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=True),
        sa.Column("moved_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["adapter_name"], ["adapter.name"], name=op.f("fk_alias_history_adapter_name")),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name=op.f("fk_alias_history_version_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alias_history")),
    )
    op.create_index("ix_alias_history_adapter_name_alias", "alias_history", ["adapter_name", "alias"], unique=False)
    op.create_table(
        "lineage",
        sa.Column("child_id", sa.Integer(), nullable=False),
        sa.Column("parent_id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("coefficient", sa.Double(), nullable=False),
        sa.CheckConstraint("child_id > parent_id", name=op.f("ck_lineage_parents_come_first")),
        sa.ForeignKeyConstraint(["child_id"], ["version.id"], name=op.f("fk_lineage_child_id")),
        sa.ForeignKeyConstraint(["parent_id"], ["version.id"], name=op.f("fk_lineage_parent_id")),
        sa.PrimaryKeyConstraint("child_id", "parent_id", "kind", name=op.f("pk_lineage")),
    )
    op.create_table(
        "tag",
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(length=100), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name=op.f("fk_tag_version_id")),
        sa.PrimaryKeyConstraint("version_id", "key", name=op.f("pk_tag")),
    )
    op.create_table(
        "metric",
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(length=100), nullable=False),
        sa.Column("value", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name=op.f("fk_metric_version_id")),
        sa.PrimaryKeyConstraint("version_id", "key", name=op.f("pk_metric")),
    )


def _create_rounds() -> None:
    op.create_table(
        "round",
        sa.Column("run_id", sa.String(length=100), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("parent_id", sa.Integer(), nullable=True),
        sa.Column("cohort", sa.JSON(), nullable=False),
        sa.Column("cohort_size", sa.Integer(), nullable=False),
        sa.Column("opened_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("closed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("bytes_down", sa.BigInteger(), nullable=False),
        sa.Column("bytes_up", sa.BigInteger(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.CheckConstraint("state IN ('open', 'committed', 'failed')", name=op.f("ck_round_state")),
        sa.ForeignKeyConstraint(["parent_id"], ["version.id"], name=op.f("fk_round_parent_id")),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_round_run_id")),
        sa.PrimaryKeyConstraint("run_id", "number", name=op.f("pk_round")),
    )
    op.create_table(
        "submission",
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
        sa.CheckConstraint("status IN ('accepted', 'rejected', 'late')", name=op.f("ck_submission_status")),
        sa.ForeignKeyConstraint(
            ["run_id", "round"], ["round.run_id", "round.number"], name=op.f("fk_submission_run_id_round")
        ),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name=op.f("fk_submission_version_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_submission")),
    )
    op.create_index("ix_submission_run_id_round", "submission", ["run_id", "round"], unique=False)
    op.create_index("ix_submission_version_id", "submission", ["version_id"], unique=False)
    op.create_index(
        "uq_submission_accepted",
        "submission",
        ["run_id", "round", "client"],
        unique=True,
        sqlite_where=_ACCEPTED,
        postgresql_where=_ACCEPTED,
    )
    op.create_index(
        "uq_submission_nonce",
        "submission",
        ["run_id", "nonce"],
        unique=True,
        sqlite_where=_ACCEPTED,
        postgresql_where=_ACCEPTED,
    )


def _make_versions_immutable() -> None:
    if op.get_context().dialect.name == "sqlite":
        op.execute(
            "CREATE TRIGGER version_is_immutable BEFORE UPDATE ON version "
            "BEGIN SELECT RAISE(ABORT, 'a version is never changed'); END"
        )
        return
    op.execute(
        "CREATE FUNCTION version_is_immutable() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'a version is never changed' "
        "USING ERRCODE = 'integrity_constraint_violation'; END $$"
    )
    op.execute(
        "CREATE TRIGGER version_is_immutable BEFORE UPDATE ON version "
        "FOR EACH ROW EXECUTE FUNCTION version_is_immutable()"
    )
