"""Leave out of metrics what JSON cannot hold, such as one NaN among many numbers."""

from __future__ import annotations

from typing import Any

from mljobs._values import to_json_text
from mljobs.errors import InvalidValueError

_DEPTH_MAX = 50
_NAMED_MAX = 5


def storable_metrics(metrics: Any) -> tuple[str | None, list[str]]:
    """Return the JSON text of what can be stored, None where that is nothing; and the paths of what cannot.

    Of a dict the unfit keys are left out; in a list ``null`` takes their place.
    """
    unfit: list[str] = []
    kept = _storable(metrics, "metrics", unfit, 0)
    return (None if kept is None or kept == {} else to_json_text("metrics", kept)), unfit


def unfit_paths(paths: list[str]) -> str:
    """Return the first of the paths, for a message."""
    return ", ".join(paths[:_NAMED_MAX]) + (f" and {len(paths) - _NAMED_MAX} more" if len(paths) > _NAMED_MAX else "")


def _storable(value: Any, path: str, unfit: list[str], depth: int) -> Any:
    try:
        to_json_text("metrics", value)
    except Exception:  # noqa: BLE001 - code of the host's too, such as a tolist() that raises
        if isinstance(value, dict | list | tuple) and depth < _DEPTH_MAX:
            return _storable_parts(value, path, unfit, depth + 1)
        unfit.append(path)
        return None
    return value


def _storable_parts(value: Any, path: str, unfit: list[str], depth: int) -> Any:
    if not isinstance(value, dict):
        return [_storable(item, f"{path}[{at}]", unfit, depth) for at, item in enumerate(value)]
    kept = {}
    for key, item in value.items():
        of_item = f"{path}.{key}"
        try:
            to_json_text("metrics", {key: None})
        except InvalidValueError:
            unfit.append(of_item)
            continue
        before = len(unfit)
        part = _storable(item, of_item, unfit, depth)
        if part is not None or len(unfit) == before:
            kept[key] = part
    return kept
