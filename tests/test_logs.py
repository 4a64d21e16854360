"""Logs: plain by default, JSON where it is asked for, with what is bound and nothing broken by what is logged."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
from structlog.contextvars import clear_contextvars

from pomona.errors import ConfigError
from pomona.logs import bind, configure_logs


@pytest.fixture(autouse=True)
def _own_root() -> Iterator[None]:
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)
    clear_contextvars()


def logged(monkeypatch: pytest.MonkeyPatch, wanted: str) -> tuple[logging.Logger, io.StringIO]:
    monkeypatch.setenv("POMONA_LOG_FORMAT", wanted)
    stream = io.StringIO()
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    configure_logs(text="%(levelname)s: %(message)s", stream=stream)
    return logging.getLogger("pomona.test"), stream


@pytest.mark.parametrize("wanted", ["", "text"])
def test_people_get_lines(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    log, stream = logged(monkeypatch, wanted)
    bind(run_id="r")
    log.info("round %d", 3)
    log.debug("not this")
    assert stream.getvalue() == "INFO: round 3\n"


def test_programs_get_one_object_a_line_with_what_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    log, stream = logged(monkeypatch, "json")
    bind(run_id="r", round=1)
    log.warning("the update of %s\ndoes not count", "änna", extra={"client": "änna", "other": object()})
    bind(round=2)
    logging.getLogger("flwr").info("100 %")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first.pop("timestamp").endswith("Z")
    assert first == {
        "event": "the update of änna\ndoes not count",
        "level": "warning",
        "logger": "pomona.test",
        "run_id": "r",
        "round": 1,
        "client": "änna",
    }
    assert (second["event"], second["logger"], second["round"]) == ("100 %", "flwr", 2)


def test_an_exception_stays_on_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    log, stream = logged(monkeypatch, "json")
    try:
        int("two\nlines")
    except ValueError:
        log.exception("it failed")
    (line,) = stream.getvalue().splitlines()
    assert r"invalid literal for int() with base 10: 'two\nlines'" in json.loads(line)["exception"]


def test_an_unknown_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POMONA_LOG_FORMAT", "xml")
    with pytest.raises(ConfigError, match="one of text, json, got 'xml'"):
        configure_logs()
