"""A place at which a test kills is counted right, however many threads come by."""

import os
import signal
import subprocess
import sys

import pytest

THREADS, TIMES = 8, 20_000
SCRIPT = f"""
import sys, threading
from pomona.failpoints import reach

sys.setswitchinterval(1e-6)

def work():
    for _ in range({TIMES}):
        reach("blob-written")

threads = [threading.Thread(target=work) for _ in range({THREADS})]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


@pytest.mark.parametrize(("times", "killed"), [(THREADS * TIMES, True), (THREADS * TIMES + 1, False)])
def test_no_thread_takes_the_count_of_another(times: int, killed: bool) -> None:
    """Blobs are written by several threads at once; a place that was counted too low would never kill."""
    environment = {**os.environ, "POMONA_FAILPOINT": f"blob-written:{times}"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, check=False, timeout=60)
    assert done.returncode == (-signal.SIGKILL if killed else 0)
