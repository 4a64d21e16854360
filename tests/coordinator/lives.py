"""The lives of coordinators that are killed, as the process sees it that starts them one after another."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from pomona.settings import RunSettings

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Life:
    """How a coordinator ended.

    Attributes:
        code: Its exit code; minus the signal that ended it.
        seconds: How long it lived.
    """

    code: int
    seconds: float

    @property
    def killed(self) -> bool:
        """Whether it was killed before it came to its end."""
        return self.code == -signal.SIGKILL


class Lives:
    """Starts coordinators of one base model and data set, each when the one before has ended."""

    def __init__(self, model: Path, data: Path) -> None:
        self._model, self._data = model, data
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
        env.pop("POMONA_REGISTRY_URL", None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.coordinator.run_until_killed"],
            env=env, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def live(
        self,
        home: Path,
        settings: RunSettings,
        *,
        failpoint: str = "",
        kill_after_s: float | None = None,
        clock_s: float = 0.0,
        url: str | None = None,
    ) -> Life:
        """Let a coordinator live, and return how it ended.

        Args:
            home: Folder of its registry; its log and journal go there too.
            settings: Of the run.
            failpoint: Where it is killed, ``NAME:TIMES``; empty: nowhere.
            kill_after_s: When it is killed.
            clock_s: How far its clock is wrong.
            url: Database of its registry; None: a file in ``home``.
        """
        home.mkdir(parents=True, exist_ok=True)
        wanted = {
            "home": str(home),
            "model": str(self._model),
            "data": str(self._data),
            "settings": settings.model_dump_json(),
            "failpoint": failpoint,
            "kill_after_s": kill_after_s,
            "clock_s": clock_s,
            "url": url,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        ended = json.loads(self._process.stdout.readline())
        return Life(ended["code"], ended["seconds"])
