"""Keep the nonce of an update in quarantine from being used again, and find nonces by an index.

Why: only the coordinator saw to it that what a defence had set aside did not come back under its nonce; and it looked
at every submission of the run for each update.
Data: kept. No run has such a pair, since its coordinator refused the second.

Revision: 0008
Revises: 0007
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_NAME = "uq_submission_nonce"


def upgrade() -> None:
    """Make the index cover what was taken in, whether it counts or not."""
    _replace("status IN ('accepted', 'quarantined')")


def downgrade() -> None:
    """Let it cover what counts."""
    _replace("status = 'accepted'")


def _replace(condition: str) -> None:
    op.drop_index(_NAME, "submission")
    where = sa.text(condition)
    columns = ["run_id", "nonce"]
    op.create_index(_NAME, "submission", columns, unique=True, sqlite_where=where, postgresql_where=where)
