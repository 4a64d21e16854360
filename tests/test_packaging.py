"""The wheel has real files where the checkout has links, and everything that the package reads."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = sorted(path.name for path in (ROOT / "src" / "pomona").iterdir() if path.is_symlink())
PARTS = ("pyproject.toml", "README.md", "LICENSE", "src", *ROOMS)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of the files in a wheel that was built from a copy, so that nothing is left in the checkout."""
    checkout, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    for part in PARTS:
        if (ROOT / part).is_dir():
            generated = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / part, checkout / part, symlinks=True, ignore=generated)
        else:
            shutil.copy(ROOT / part, checkout / part)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(checkout)],
        cwd=out,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = out.glob("pomona-*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def _sources(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if "__pycache__" not in path.parts}


@pytest.mark.parametrize("room", ROOMS)
def test_every_module_of_a_room_is_in_it(wheel: set[str], room: str) -> None:
    expected = {f"pomona/{room}/{name}" for name in _sources(ROOT / room)}
    assert expected
    assert expected <= wheel


def test_every_module_of_the_spine_is_in_it(wheel: set[str]) -> None:
    spine = {name for name in _sources(ROOT / "src" / "pomona") if name.split("/")[0] not in ROOMS}
    assert {"__init__.py", "__main__.py", "errors.py", "cli/__init__.py"} <= spine
    assert {f"pomona/{name}" for name in spine} <= wheel


@pytest.mark.parametrize(
    "name",
    [
        "pomona/py.typed",
        "pomona/storage/migrations/env.py",
        "pomona/storage/migrations/script.py.mako",
        "pomona/storage/migrations/versions/0001_first_registry.py",
        "pomona/wordnet/LICENSE-WORDNET",
        "pomona/wordnet/nouns.csv.gz",
    ],
)
def test_what_the_package_reads_is_in_it(wheel: set[str], name: str) -> None:
    assert name in wheel


def test_nothing_generic_lands_in_site_packages(wheel: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pomona"}
    assert not any("tests" in name.split("/") for name in wheel)


def test_kernels_stays_a_namespace(wheel: set[str]) -> None:
    assert "pomona/kernels/__init__.py" not in wheel


def test_the_command_and_the_licences_are_in_it(wheel: set[str]) -> None:
    inside = {name.partition(".dist-info/")[2] for name in wheel if ".dist-info/" in name}
    assert "entry_points.txt" in inside
    assert {"licenses/LICENSE", "licenses/src/pomona/wordnet/LICENSE-WORDNET"} <= inside
