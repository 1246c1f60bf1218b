"""The application's own table."""

from __future__ import annotations

from django.db import models


class Upload(models.Model):
    """A file that a user sent, and the job that trains on it."""

    path = models.CharField(max_length=200)
    job_id = models.UUIDField()

    def __str__(self) -> str:
        """Return what the admin shows."""
        return self.path
