"""Views for people who query by hand, and indexes for searching.

Why: the tables may change from release to release, what people query may not. The views join and count what is wanted
together, and name versions as the command line does (``name/3``).
Data: kept; the table ``lineage`` becomes ``lineage_edge``, because a view has its name now. Downgrade loses the views.

Revision: 0004
Revises: 0003
"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_INDEXES = (
    ("ix_version_created_at", "version", ["created_at"]),
    ("ix_metric_key_value_version_id", "metric", ["key", "value", "version_id"]),
    ("ix_tag_key", "tag", ["key"]),
    ("ix_alias_version_id", "alias", ["version_id"]),
)
_RENAMED = ("pk_{}", "ck_{}_parents_come_first", "fk_{}_child_id", "fk_{}_parent_id")

_ADAPTER_VERSIONS = """
CREATE VIEW adapter_versions AS
SELECT
    v.adapter_name || '/' || v.version AS ref,
    v.adapter_name AS name,
    v.version,
    v.created_at,
    v.kind,
    v.rank,
    v.exactness,
    v.retained_energy,
    v.run_id,
    v.round,
    v.bytes,
    v.blob_sha256 AS sha256,
    b.name AS base_model,
    v.base_sha256,
    (
        SELECT {join}(a.alias, ', ')
        FROM (SELECT alias FROM alias WHERE version_id = v.id ORDER BY alias) AS a
    ) AS aliases,
    (SELECT COALESCE({collect}(m.key, m.value), {nothing}) FROM metric AS m WHERE m.version_id = v.id) AS metrics,
    (SELECT COALESCE({collect}(g.key, g.value), {nothing}) FROM tag AS g WHERE g.version_id = v.id) AS tags,
    v.recipe
FROM version AS v
JOIN base_model AS b ON b.sha256 = v.base_sha256
"""

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

_ROUNDS = """
CREATE VIEW rounds AS
SELECT
    r.run_id,
    u.adapter_name AS name,
    r.number AS round,
    r.state,
    r.reason,
    p.adapter_name || '/' || p.version AS parent,
    v.adapter_name || '/' || v.version AS published,
    r.cohort_size,
    COALESCE(s.accepted, 0) AS accepted,
    COALESCE(s.rejected, 0) AS rejected,
    COALESCE(s.late, 0) AS late,
    COALESCE(s.quarantined, 0) AS quarantined,
    r.opened_at,
    r.closed_at,
    r.seconds,
    r.bytes_down,
    r.bytes_up
FROM round AS r
JOIN run AS u ON u.id = r.run_id
LEFT JOIN version AS p ON p.id = r.parent_id
LEFT JOIN version AS v ON v.run_id = r.run_id AND v.round = r.number
LEFT JOIN (
    SELECT
        run_id,
        round,
        SUM(CASE WHEN status = 'accepted' THEN 1 ELSE 0 END) AS accepted,
        SUM(CASE WHEN status = 'rejected' THEN 1 ELSE 0 END) AS rejected,
        SUM(CASE WHEN status = 'late' THEN 1 ELSE 0 END) AS late,
        SUM(CASE WHEN status = 'quarantined' THEN 1 ELSE 0 END) AS quarantined
    FROM submission
    GROUP BY run_id, round
) AS s ON s.run_id = r.run_id AND s.round = r.number
"""

_SUBMISSIONS = """
CREATE VIEW submissions AS
SELECT
    s.id,
    s.run_id,
    u.adapter_name AS name,
    s.round,
    s.client,
    s.status,
    s.reason,
    v.adapter_name || '/' || v.version AS published,
    s.weight,
    s.rank,
    s.alpha,
    s.num_examples,
    s.train_loss,
    s.bytes,
    s.sha256,
    s.received_at,
    s.spectrum
FROM submission AS s
JOIN run AS u ON u.id = s.run_id
LEFT JOIN version AS v ON v.id = s.version_id
"""

_ALIAS_MOVES = """
CREATE VIEW alias_moves AS
SELECT
    h.adapter_name AS name,
    h.alias,
    h.moved_at,
    v.version,
    LAG(v.version) OVER (PARTITION BY h.adapter_name, h.alias ORDER BY h.id) AS previous
FROM alias_history AS h
LEFT JOIN version AS v ON v.id = h.version_id
"""

_VIEWS = {
    "adapter_versions": _ADAPTER_VERSIONS,
    "lineage": _LINEAGE,
    "rounds": _ROUNDS,
    "submissions": _SUBMISSIONS,
    "alias_moves": _ALIAS_MOVES,
}
_WORDS = {
    "sqlite": {"join": "group_concat", "collect": "json_group_object", "nothing": "'{}'"},
    "postgresql": {"join": "string_agg", "collect": "jsonb_object_agg", "nothing": "CAST('{}' AS jsonb)"},
}


def upgrade() -> None:
    """Make room for the view ``lineage``, then create views and indexes."""
    _rename("lineage", "lineage_edge")
    op.create_index("ix_lineage_edge_parent_id", "lineage_edge", ["parent_id"])
    for name, table, columns in _INDEXES:
        op.create_index(name, table, columns)
    for view in _VIEWS.values():
        op.execute(view.format(**_WORDS[op.get_context().dialect.name]))


def downgrade() -> None:
    """Drop views and indexes, and give the table its name back."""
    for name in _VIEWS:
        op.execute(f"DROP VIEW {name}")
    for name, table, _ in _INDEXES:
        op.drop_index(name, table)
    op.drop_index("ix_lineage_edge_parent_id", "lineage_edge")
    _rename("lineage_edge", "lineage")


def _rename(old: str, new: str) -> None:
    if op.get_context().dialect.name == "sqlite":
        _copy(old, new)
        return
    op.rename_table(old, new)
    for name in _RENAMED:
        op.execute(f"ALTER TABLE {new} RENAME CONSTRAINT {name.format(old)} TO {name.format(new)}")


def _copy(old: str, new: str) -> None:
    """Build the table anew under its name: SQLite cannot rename constraints."""
    op.execute(
        f"CREATE TABLE {new} (child_id INTEGER NOT NULL, parent_id INTEGER NOT NULL, kind VARCHAR(20) NOT NULL, "
        "coefficient DOUBLE NOT NULL, "
        f"CONSTRAINT pk_{new} PRIMARY KEY (child_id, parent_id, kind), "
        f"CONSTRAINT ck_{new}_parents_come_first CHECK (child_id > parent_id), "
        f"CONSTRAINT fk_{new}_child_id FOREIGN KEY(child_id) REFERENCES version (id), "
        f"CONSTRAINT fk_{new}_parent_id FOREIGN KEY(parent_id) REFERENCES version (id))"
    )
    op.execute(f"INSERT INTO {new} SELECT child_id, parent_id, kind, coefficient FROM {old}")  # noqa: S608
    op.drop_table(old)
