"""Let a submission keep a report on the spectrum of its update.

Why: what a poisoned update looks like is seen in its norm and in how few directions it has; the bytes of rejected ones
are not kept, so the report is made when an update comes.
Data: kept; submissions from before have no report. Downgrade loses the reports.

Revision: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.add_column("submission", sa.Column("spectrum", sa.JSON(), nullable=True))


def downgrade() -> None:
    """Drop it."""
    op.drop_column("submission", "spectrum")
