"""Indexes and statistics for a hundred thousand versions.

Why: finding versions by the value of a tag read every tag of that key, and SQLite, which knew nothing of how many rows
there are, began with the wrong table. Short values of tags are in a partial index now, long ones in another, which
keeps only their keys: an index of PostgreSQL cannot hold 5,000 characters. And the update of one client is found at
once among ten thousand of a round.
Data: kept. On SQLite the statistics are written here once and for all, so that a plan does not depend on who ran
ANALYZE when; PostgreSQL keeps its own.

Revision: 0006
Revises: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_SHORT, _LONG = sa.text("length(value) <= 200"), sa.text("length(value) > 200")

# Rows in all, then how many have the same first column, the same first two, and so on. A metric's index is there to be
# read in order until a page is full, which the planner cannot foresee: so few rows a key as a page takes.
_STATISTICS = {
    ("adapter", "sqlite_autoindex_adapter_1"): "1000 1",
    ("version", "sqlite_autoindex_version_1"): "100000 100 1",
    ("version", "sqlite_autoindex_version_2"): "100000 100 1",
    ("version", "ix_version_created_at"): "100000 1",
    ("version", "ix_version_rank"): "100000 10000",
    ("version", "ix_version_blob_sha256"): "100000 1",
    ("metric", "sqlite_autoindex_metric_1"): "500000 5 1",
    ("metric", "ix_metric_key_value_version_id"): "500000 500 10 1",
    ("tag", "sqlite_autoindex_tag_1"): "500000 5 1",
    ("tag", "ix_tag_short"): "500000 500 500 1",
    ("tag", "ix_tag_long"): "100 10",
    ("alias", "sqlite_autoindex_alias_1"): "2000 2 1",
    ("alias", "ix_alias_version_id"): "2000 1",
    ("base_model", "sqlite_autoindex_base_model_1"): "10 1",
}


def upgrade() -> None:
    """Create the indexes; on SQLite, tell its planner what the tables are like."""
    op.drop_index("ix_tag_key", "tag")
    op.create_index("ix_tag_short", "tag", ["key", "value", "version_id"], sqlite_where=_SHORT, postgresql_where=_SHORT)
    op.create_index("ix_tag_long", "tag", ["key"], sqlite_where=_LONG, postgresql_where=_LONG)
    op.create_index("ix_version_rank", "version", ["rank"])
    op.create_index("ix_version_blob_sha256", "version", ["blob_sha256"])
    op.drop_index("ix_submission_run_id_round", "submission")
    op.create_index("ix_submission_run_id_round_client", "submission", ["run_id", "round", "client"])
    if op.get_context().dialect.name == "sqlite":
        op.execute("ANALYZE sqlite_schema")  # makes the table of statistics
        op.execute("DELETE FROM sqlite_stat1")
        for (table, index), figures in _STATISTICS.items():
            op.execute(f"INSERT INTO sqlite_stat1 VALUES ('{table}', '{index}', '{figures}')")  # noqa: S608
        op.execute("ANALYZE sqlite_schema")  # lets this connection read them


def downgrade() -> None:
    """Drop them."""
    if op.get_context().dialect.name == "sqlite":
        op.execute("DELETE FROM sqlite_stat1")
        op.execute("ANALYZE sqlite_schema")
    op.drop_index("ix_submission_run_id_round_client", "submission")
    op.create_index("ix_submission_run_id_round", "submission", ["run_id", "round"])
    op.drop_index("ix_version_blob_sha256", "version")
    op.drop_index("ix_version_rank", "version")
    op.drop_index("ix_tag_long", "tag")
    op.drop_index("ix_tag_short", "tag")
    op.create_index("ix_tag_key", "tag", ["key"])
