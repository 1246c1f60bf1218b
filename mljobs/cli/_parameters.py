"""Read texts and numbers of the command line without pydantic, which newer versions of Typer load for each value."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, Self

_WHOLE: Final = re.compile("[0-9]{1,9}")


class _Light:
    """Reads the values of one parameter; leaves to Typer what is neither a text nor a whole number in its range.

    Args:
        slow: Returns what Typer reads the values with; it loads pydantic, which takes as long as half of SQLAlchemy.
    """

    def __init__(self, slow: Callable[[], Any]) -> None:
        self._slow = slow

    def get(self) -> Self:
        """Return this, where Typer asks for its own."""
        return self

    def coerce(self, value: Any, *, param: Any, ctx: Any) -> Any:
        """Return the value as the parameter's type."""
        wanted, many = param.type_descriptor.annotation, param.multiple or param.nargs == -1
        if value is None:
            return () if many else None
        if many and wanted == list[str] and isinstance(value, list | tuple):
            return list(value)
        if not many and wanted is str and isinstance(value, str):
            return value
        if wanted is int and not many:
            number = int(value) if isinstance(value, str) and _WHOLE.fullmatch(value) else value
            limits = param.type_descriptor.parameter_info
            if isinstance(number, int) and (limits.min or 0) <= number <= (limits.max or number):
                return number
        if wanted is float and isinstance(value, float):
            return value
        return self._slow().coerce(value, param=param, ctx=ctx)


def spare_pydantic(command: Any) -> None:
    """Read the command's texts and numbers directly; with a Typer that does not use pydantic, change nothing."""
    params_of = command.get_params

    def get_params(ctx: Any) -> list[Any]:
        parameters: list[Any] = params_of(ctx)
        for parameter in parameters:
            if "get_runtime_param" not in vars(parameter) and hasattr(parameter, "get_runtime_param"):
                parameter.get_runtime_param = _Light(parameter.get_runtime_param).get
        return parameters

    command.get_params = get_params
