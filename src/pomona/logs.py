"""Logs: lines for people, or one JSON object a line where ``POMONA_LOG_FORMAT=json`` says so.

Modules log with :mod:`logging` as everybody does. Facts that hold for a while (run, round, client) are bound with
:func:`bind` and stand in every JSON line until they are bound anew, also in those of other packages.
"""

import logging
import os
import sys
from typing import TextIO

import structlog
from structlog.typing import Processor

from pomona.errors import ConfigError

FORMATS = ("text", "json")


def configure_logs(*, text: str = "%(levelname)s %(name)s: %(message)s", stream: TextIO | None = None) -> None:
    """Send what this process logs, from INFO on, to a stream.

    Args:
        text: How a line for people looks, in :mod:`logging`'s way.
        stream: Where to; None: standard error.

    Raises:
        ConfigError: ``POMONA_LOG_FORMAT`` is neither ``text`` nor ``json``.
    """
    wanted = os.environ.get("POMONA_LOG_FORMAT") or "text"
    if wanted not in FORMATS:
        raise ConfigError(f"expected POMONA_LOG_FORMAT to be one of {', '.join(FORMATS)}, got {wanted!r}")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_json_lines() if wanted == "json" else logging.Formatter(text))
    logging.basicConfig(handlers=[handler], level=logging.INFO)


def bind(**facts: str | int) -> None:
    """Put facts into every JSON line of this thread from here on, in place of earlier ones of the same names."""
    structlog.contextvars.bind_contextvars(**facts)


def _json_lines() -> logging.Formatter:
    """Return a formatter of ``timestamp`` (UTC, ISO 8601), ``level``, ``logger``, ``event``, and what is bound."""
    before: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(["client"]),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    after: list[Processor] = [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(),
    ]
    return structlog.stdlib.ProcessorFormatter(foreign_pre_chain=before, processors=after)
