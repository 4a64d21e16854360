"""Run files: TOML, read into :class:`pomona.settings.RunSettings`, with errors that say what to change."""

import difflib
import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from pydantic import BaseModel, ValidationError

from pomona.errors import ConfigError
from pomona.settings import RunSettings

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def parse_settings(text: str, *, source: str) -> RunSettings:
    """Parse a run file.

    Args:
        text: TOML.
        source: Name of the file, for the error.

    Raises:
        ConfigError: The text is no TOML, a key is unknown, or values contradict each other.
    """
    try:
        return RunSettings.model_validate_json(json.dumps(tomllib.loads(text), default=str), strict=True)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not TOML: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error)}") from error


def load_settings(path: Path) -> RunSettings:
    """Read and parse a run file.

    Raises:
        ConfigError: The file cannot be read, or as in :func:`parse_settings`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the run file {path}: {error}") from error
    return parse_settings(text, source=str(path))


def _explain(error: ValidationError) -> str:
    return "; ".join(_explain_one(item) for item in error.errors(include_url=False))


def _explain_one(item: "ErrorDetails") -> str:
    where = ".".join(map(str, item["loc"])) or "run"
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown; {_hint(str(item['loc'][-1]), item['loc'][:-1])}"
    if where == "aggregation.rank" and item["input"] == "auto":
        return f"{where}: expected a whole number; clients choose their own rank by `pomona join --rank auto`"
    silent = item["type"] in {"missing", "value_error"}
    return f"{where}: {item['msg'].removeprefix('Value error, ')}" + ("" if silent else f", got {item['input']!r}")


def _hint(key: str, path: tuple[int | str, ...]) -> str:
    for section in RunSettings.model_fields:
        if key in _keys((section,)):
            return f"it belongs in [{section}]"
    known = _keys(path)
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"


def _keys(path: tuple[int | str, ...]) -> list[str]:
    """Return the keys of the section at a path, none where that is no section."""
    section: type[BaseModel] | None = RunSettings
    for part in path:
        field = section.model_fields.get(str(part)) if section else None
        inside = [field.annotation, *get_args(field.annotation)] if field else []
        section = next((each for each in inside if isinstance(each, type) and issubclass(each, BaseModel)), None)
    return list(section.model_fields) if section else []
