"""Jobs as data frames of pandas and polars, made from Arrow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack

from mljobs.jobs import Bind, Filter, Filters, Model, Where
from mljobs.record._models import MlJob
from mljobs.transfer._arrow import Ids, to_arrow

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl


def to_pandas(
    session: Bind,
    /,
    filter: Filter | str | None = None,  # noqa: A002 - as users say it
    *,
    where: Where | None = None,
    columns: Sequence[str] | None = None,
    spread: Sequence[str] = ("spec", "metrics"),
    ids: Ids = "string",
    model: Model = MlJob,
    **fields: Unpack[Filters],
) -> pd.DataFrame:
    """Return jobs as a data frame of pandas, with a column for each key of ``spec`` and ``metrics``; see ``to_arrow``.

    Args:
        session: The caller's session or connection.
        filter: A :class:`~mljobs.Filter`, or its text; None for all jobs.
        where: SQLAlchemy expressions of one's own beside it.
        columns: Which columns of the record and of the host's class; None for all but the texts of what is spread.
        spread: ``"spec"``, ``"metrics"``, both or none.
        ids: ``"string"`` or ``"uuid"``.
        model: The mapped job class.
        **fields: Filters by keyword, see :class:`~mljobs.jobs.Filters`.

    Raises:
        ImportError: There is no pandas.
        InvalidValueError: See ``to_arrow``.
    """
    table = _table(session, filter, where=where, columns=columns, spread=spread, ids=ids, model=model, **fields)
    frame: pd.DataFrame = table.to_pandas()
    return frame


def to_polars(
    session: Bind,
    /,
    filter: Filter | str | None = None,  # noqa: A002 - as users say it
    *,
    where: Where | None = None,
    columns: Sequence[str] | None = None,
    spread: Sequence[str] = ("spec", "metrics"),
    ids: Ids = "string",
    model: Model = MlJob,
    **fields: Unpack[Filters],
) -> pl.DataFrame:
    """Return jobs as a data frame of polars, with a column for each key of ``spec`` and ``metrics``; see ``to_arrow``.

    Args:
        session: The caller's session or connection.
        filter: A :class:`~mljobs.Filter`, or its text; None for all jobs.
        where: SQLAlchemy expressions of one's own beside it.
        columns: Which columns of the record and of the host's class; None for all but the texts of what is spread.
        spread: ``"spec"``, ``"metrics"``, both or none.
        ids: ``"string"`` or ``"uuid"``.
        model: The mapped job class.
        **fields: Filters by keyword, see :class:`~mljobs.jobs.Filters`.

    Raises:
        ImportError: There is no polars.
        InvalidValueError: See ``to_arrow``.
    """
    table = _table(session, filter, where=where, columns=columns, spread=spread, ids=ids, model=model, **fields)
    import polars as pl  # noqa: PLC0415 - optional

    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)  # noqa: S101 - of a table it is one
    return frame


def _table(session: Bind, filter: Filter | str | None, *, columns: Any, spread: Sequence[str], **options: Any) -> Any:  # noqa: A002
    listed = [spread] if isinstance(spread, str) else list(spread)
    table = to_arrow(session, filter, columns=columns, spread=listed, **options)
    texts = [f"{name}_json" for name in listed] if columns is None else []
    return table.drop_columns(texts) if texts else table
