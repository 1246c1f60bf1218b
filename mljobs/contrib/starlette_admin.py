"""Job tables in starlette-admin: ``admin.add_view(JobView(MlJob))``.

starlette-admin's own ``ModelView`` shows them as well. It posts times without a zone, which a record refuses, and it
answers 500 to any error that is not one of its own; this view puts the zone back, takes a blank for nothing, and shows our
errors beside the field.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, NoReturn

try:
    from starlette_admin import BaseField, DateTimeField, EnumField, IntegerField
    from starlette_admin.contrib.sqla import ModelView
    from starlette_admin.contrib.sqla.converters import ModelConverter
    from starlette_admin.converters import converts
    from starlette_admin.exceptions import ActionFailed, FormValidationError
except ImportError as error:
    raise ImportError("mljobs.contrib.starlette_admin needs starlette-admin: pip install 'mljobs[admin]'") from error
from sqlalchemy import JSON, inspect
from starlette.datastructures import FormData
from starlette.requests import Request

from mljobs._fields import NAMES
from mljobs.errors import InvalidValueError, MlJobsError
from mljobs.types import JsonText, TokenType, UtcMillis


class _UtcField(DateTimeField):
    """A time in UTC: a form gives it without a zone. What is no time is left to the record to refuse."""

    async def parse_form_data(self, request: Request, form_data: FormData) -> Any:
        moment: datetime | None = await super().parse_form_data(request, form_data)
        if moment is None:
            return form_data.get(self.id) or None
        return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)

    async def serialize_value(self, request: Request, value: Any) -> str:
        # A form that was refused is shown again with what was typed.
        return value if isinstance(value, str) else await super().serialize_value(request, value)


class _NumberField(IntegerField):
    """A number of the record's own: what is none is left to the record to refuse."""

    async def parse_form_data(self, request: Request, form_data: FormData) -> Any:
        number: int | None = await super().parse_form_data(request, form_data)
        return form_data.get(self.id) or None if number is None else number


class _Converter(ModelConverter):
    @converts(UtcMillis.__module__ + "." + UtcMillis.__name__)
    def conv_moment(self, *args: Any, **kw: Any) -> DateTimeField:
        return _UtcField(**self._field_common(*args, **kw))

    @converts("Integer")
    def conv_integer(self, *args: Any, **kw: Any) -> BaseField:
        if kw["name"] not in NAMES:
            return super().conv_integer(*args, **kw)
        return _NumberField(**self._field_common(*args, **kw))

    @converts(TokenType.__module__ + "." + TokenType.__name__)
    def conv_token(self, *args: Any, **kw: Any) -> EnumField:
        return EnumField(**self._field_common(*args, **kw), choices=[(str(one), str(one)) for one in kw["type"].enum])


class JobView(ModelView):
    """A job table: list, detail and forms; what the guard refuses is said in the form.

    Args:
        model: ``MlJob``, or a host's class with ``MlJobMixin``.
        **options: As of ``ModelView``.
    """

    def __init__(self, model: type[Any], **options: Any) -> None:
        options.setdefault("converter", _Converter())
        if self.sortable_fields is None:  # PostgreSQL has no order of json
            columns = inspect(model).columns
            self.sortable_fields = [
                name for name, column in columns.items() if not isinstance(column.type, JsonText | JSON)
            ]
        super().__init__(model, **options)

    async def create(self, request: Request, data: dict[str, Any]) -> Any:
        """Add a job; what was left blank is not set."""
        return await super().create(request, self._filled_in(data))

    async def edit(self, request: Request, pk: Any, data: dict[str, Any]) -> Any:
        """Change a live job; what was left blank is not set."""
        return await super().edit(request, pk, self._filled_in(data))

    def _filled_in(self, data: dict[str, Any]) -> dict[str, Any]:
        columns = inspect(self.model).columns
        filled: dict[str, Any] = {
            name: None if value == "" and name in columns and columns[name].nullable else value
            for name, value in data.items()
        }
        # Browsers send every line end as CRLF, which of a finished record would be a change.
        texts = [name for name in filled.keys() & NAMES if isinstance(filled[name], str)]
        return filled | {name: filled[name].replace("\r\n", "\n") for name in texts}

    async def handle_exception(self, request: Request, exc: Exception) -> NoReturn:
        """Say what a record refuses beside the field: of a finished one beside its status."""
        if isinstance(exc, MlJobsError):
            shown = exc.field if isinstance(exc, InvalidValueError) and exc.field in self._columns else "status"
            raise FormValidationError({shown: str(exc)}) from exc
        await super().handle_exception(request, exc)
        raise exc

    async def delete(self, request: Request, pks: list[Any]) -> int | None:
        """Delete live jobs; of a finished one say why it stays."""
        try:
            return await super().delete(request, pks)
        except MlJobsError as error:
            raise ActionFailed(str(error)) from error
