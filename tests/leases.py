"""Leases as the tests look at them."""

from __future__ import annotations

from sqlalchemy import Engine


def expire_leases(engine: Engine) -> None:
    """Let every lease have ended long ago."""
    moment = "0" if engine.dialect.name == "sqlite" else "'2020-01-01'"
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE ml_job_leases SET expires_at = {moment}")


def count_leases(engine: Engine) -> int:
    with engine.connect() as connection:
        number: int = connection.exec_driver_sql("SELECT count(*) FROM ml_job_leases").scalar_one()
        return number
