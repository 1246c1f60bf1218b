"""The application's table, and ours."""

from __future__ import annotations

from django.db import migrations, models

from mljobs.contrib.django import downgrade, upgrade


class Migration(migrations.Migration):
    """The first."""

    initial = True
    dependencies = []
    operations = [
        migrations.RunPython(upgrade, downgrade),
        migrations.CreateModel(
            name="Upload",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("path", models.CharField(max_length=200)),
                ("job_id", models.UUIDField()),
            ],
        ),
    ]
