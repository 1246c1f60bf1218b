"""${message}

Frozen SQL: a migration says what was true when it was written, so it imports nothing of mljobs.

Revision ID: ${up_revision}
Revises: ${down_revision | comma,n}
Create Date: ${create_date}
"""

from __future__ import annotations

from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    """Say what becomes true."""
    ${upgrades if upgrades else "op.execute('')"}


def downgrade() -> None:
    """Say how it is taken back."""
    ${downgrades if downgrades else "op.execute('')"}
