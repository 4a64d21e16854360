"""docker-compose.yml, the Dockerfile and the run file fit each other and the command line. No container is started;
`make compose-test` does that."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from pomona.cli import app
from pomona.run_file import load_settings

ROOT = Path(__file__).parents[1]
VARIABLE = re.compile(r"\$\{([A-Z_]+)(?::?-([^}]*))?\}")


def _filled(text: str) -> str:
    """Return a text with the defaults that Compose puts in place of variables that nobody set."""
    return VARIABLE.sub(lambda found: found[2] or "", text)


COMPOSE: Mapping[str, Any] = yaml.safe_load(_filled((ROOT / "docker-compose.yml").read_text(encoding="utf-8")))
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
OURS = ["coordinator", "client"]


@pytest.mark.parametrize("service", OURS)
def test_the_command_line_takes_what_a_service_types(service: str) -> None:
    name, *arguments = COMPOSE["services"][service]["command"]
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    with command.make_context(name, arguments) as context:
        assert context.params["insecure"] is True


def test_clients_join_where_the_coordinator_listens() -> None:
    services = COMPOSE["services"]
    coordinator, client = (shlex.join(services[name]["command"]).replace("=", " ") for name in OURS)
    port = re.search(r"--port (\d+)", coordinator)
    assert port is not None
    assert f"--server coordinator:{port[1]}" in client
    assert "--host 0.0.0.0" in coordinator
    assert services["coordinator"]["ports"] == [f"127.0.0.1:{port[1]}:{port[1]}"], "loopback: there is no TLS"
    assert port[1] in str(services["coordinator"]["healthcheck"]["test"])
    assert set(services["client"]["networks"]) < set(services["coordinator"]["networks"])


def test_only_the_coordinator_reaches_the_database() -> None:
    services = COMPOSE["services"]
    (network,) = services["db"]["networks"]
    assert [name for name in services if network in services[name]["networks"]] == ["db", "coordinator"]
    assert COMPOSE["networks"][network]["internal"] is True
    assert "ports" not in services["db"]
    assert services["coordinator"]["environment"]["POMONA_REGISTRY_URL"] == "postgresql://pomona@db/pomona"
    assert services["coordinator"]["environment"]["PGPASSWORD"] == services["db"]["environment"]["POSTGRES_PASSWORD"]


def test_the_run_file_is_one_and_fits_the_clients() -> None:
    mounts = [mount for name in OURS for mount in COMPOSE["services"][name]["volumes"] if mount.startswith(".")]
    assert len(mounts) == 2
    assert len(set(mounts)) == 1
    source, target, _ = mounts[0].split(":")
    assert all(target in COMPOSE["services"][name]["command"] for name in OURS)
    settings, client = load_settings(ROOT / source), COMPOSE["services"]["client"]
    replicas = client["deploy"]["replicas"]
    assert settings.cohort.min_clients == replicas
    assert len(set(settings.simulation.ranks)) == replicas, "of unequal rank"
    assert max(settings.simulation.ranks) <= settings.aggregation.max_rank
    shares = re.search(r"--clients=(\d+)", shlex.join(client["command"]))
    assert shares is not None
    assert int(shares[1]) >= 2 * replicas


def test_every_named_volume_is_one_that_the_user_of_the_image_may_write() -> None:
    for name in OURS:
        (mount,) = [each for each in COMPOSE["services"][name]["volumes"] if not each.startswith(".")]
        volume, folder = mount.split(":")
        assert volume in COMPOSE["volumes"]
        assert f"--owner pomona --group pomona --mode 0700 {folder}" in DOCKERFILE
    assert "\nUSER pomona\n" in DOCKERFILE
    assert "ENV POMONA_HOME=/var/lib/pomona\n" in DOCKERFILE


def test_changed_code_installs_nothing_again_but_itself() -> None:
    lines = DOCKERFILE.splitlines()
    code = lines.index("COPY . .")
    assert [line for line in lines[code:] if "pip install" in line] == [
        "RUN pip install --no-deps --no-build-isolation . && rm -rf build"
    ]
    copied = [line.split()[1] for line in lines[:code] if line.startswith("COPY")]
    assert copied == ["constraints.txt", "pyproject.toml"]
    assert "torch" in "".join(lines[: lines.index("COPY pyproject.toml ./")])


def test_the_image_has_every_room_and_nothing_private() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] not in "#"]
    assert rules[0] == "*"
    let_in = {line[1:] for line in rules if line.startswith("!")}
    rooms = {path.name for path in (ROOT / "src" / "pomona").iterdir() if path.is_symlink()}
    assert rooms | {"src", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} == let_in


def test_the_example_of_settings_names_all_that_there_are_with_their_defaults() -> None:
    used = dict(VARIABLE.findall((ROOT / "docker-compose.yml").read_text(encoding="utf-8")))
    lines = (ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    assert dict(line.split("=", 1) for line in lines if line and not line.startswith("#")) == used
