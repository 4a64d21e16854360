"""Remember that a round takes no more updates.

Why: a coordinator that dies while it aggregates must go on with the very updates that it had begun with, and must not
take one from a client that was told that it came too late.
Data: kept; rounds from before are not frozen. Downgrade forgets which open rounds are.

Revision: 0005
Revises: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.add_column("round", sa.Column("frozen_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    """Drop it."""
    op.drop_column("round", "frozen_at")
