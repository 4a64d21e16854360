"""The three commands of a real federation, as separate processes, and what goes wrong with them."""

import json
import signal
import subprocess
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from tests.integration.conftest import Terminal, last_json, stop, write_rows, write_run_file
from tests.invariants import Outside, broken_promises

from pomona.coordinator.replay import Replay
from pomona.processes import free_ports
from pomona.settings import RunSettings
from pomona.storage.opening import open_registry
from pomona.storage.records import Run

pytestmark = pytest.mark.timeout(600)


def _serve(terminal: Terminal, home: Path, *more: str) -> tuple[subprocess.Popen[bytes], str]:
    (port,) = free_ports(1)
    server = terminal.start("server", "server", "--home", str(home), "--port", str(port), *(more or ("--insecure",)))
    terminal.wait_for_text("server", "listening on")
    return server, f"127.0.0.1:{port}"


def _join(terminal: Terminal, address: str, name: str, data: Path, model: Path, *more: str) -> subprocess.Popen[bytes]:
    arguments = ["--server", address, "--rank", "4", "--data", str(data), "--name", name, "--model", str(model)]
    return terminal.start(name, "join", *arguments, *(more or ("--insecure",)))


def test_server_join_and_run_under_a_private_authority(
    terminal: Terminal, tmp_path: Path, tiny_bert: Path, toy_data: Path
) -> None:
    home, certificates = tmp_path / "home", _certificates(tmp_path)
    ca = str(certificates / "ca.pem")
    tls = ("--ssl-ca-certfile", ca, "--ssl-certfile", str(certificates / "server.pem"))
    server, address = _serve(terminal, home, *tls, "--ssl-keyfile", str(certificates / "server.key"))
    shares = [write_rows(tmp_path / f"{i}.csv", toy_data, part=i, of=2) for i in range(2)]
    clients = [
        _join(terminal, address, f"site-{i}", share, tiny_bert, "--root-certificates", ca)
        for i, share in enumerate(shares)
    ]
    run_file = write_run_file(
        tmp_path / "run.toml", model=tiny_bert, data=toy_data, lines=["[cohort]\nmin_clients = 2"]
    )
    done = terminal.run("run", str(run_file), "--home", str(home), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = last_json(done.stdout)
    assert found["adapter"] == "toy/2"
    assert [client["name"] for client in found["clients"]] == ["site-0", "site-1"]  # type: ignore[attr-defined]
    assert "round 2" in terminal.output("site-0").read_text()

    lineage = json.loads(terminal.run("registry", "lineage", "toy/2", "--home", str(home), "--json").stdout)
    assert "toy/1" in json.dumps(lineage)

    again = terminal.run("run", str(run_file), "--home", str(home), "--json")
    assert last_json(again.stdout)["adapter"] == "toy/4", "the same clients serve a second run"

    assert [stop(client, kind=signal.SIGTERM) for client in clients] == [0, 0]
    assert stop(server) == 0
    terminal.expect_no_process()


def test_a_run_ends_with_an_error_when_all_clients_die(
    terminal: Terminal, tmp_path: Path, tiny_bert: Path, toy_data: Path
) -> None:
    home = tmp_path / "home"
    server, address = _serve(terminal, home)
    client = _join(terminal, address, "only", write_rows(tmp_path / "0.csv", toy_data, part=0, of=1), tiny_bert)
    lines = ["rounds = 500", "[cohort]\nround_deadline_s = 20\njoin_timeout_s = 60"]
    run_file = write_run_file(tmp_path / "run.toml", model=tiny_bert, data=toy_data)
    run_file.write_text(run_file.read_text().replace("rounds = 2", lines[0]) + lines[1] + "\n")
    run = terminal.start("run", "run", str(run_file), "--home", str(home), "--json")
    terminal.wait_for_text("only", "round 1")
    stop(client, kind=signal.SIGKILL)
    assert run.wait(timeout=150) == 31
    error = last_json(terminal.output("run").read_text())["error"]
    assert error["type"] == "NotEnoughClients"  # type: ignore[index]
    runs = json.loads(terminal.run("registry", "runs", "--home", str(home), "--json").stdout)
    assert [each["state"] for each in runs] == ["failed"]
    assert stop(server) == 0
    terminal.expect_no_process()


@pytest.mark.timeout(1400)
def test_a_server_that_was_killed_or_stopped_goes_on_where_it_was(
    terminal: Terminal, tmp_path: Path, tiny_bert: Path, toy_data: Path
) -> None:
    home, rounds = tmp_path / "home", 3
    server, address = _serve(terminal, home)
    clients = [
        _join(terminal, address, f"site-{i}", write_rows(tmp_path / f"{i}.csv", toy_data, part=i, of=2), tiny_bert)
        for i in range(2)
    ]
    run_file = write_run_file(
        tmp_path / "run.toml",
        model=tiny_bert,
        data=toy_data,
        lines=["[cohort]\nmin_clients = 2\nmin_replies = 2\njoin_timeout_s = 200"],
    )
    run_file.write_text(run_file.read_text().replace("rounds = 2", f"rounds = {rounds}"))
    for number, (kind, code) in enumerate([(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)], start=1):
        trained = terminal.output("site-0").read_text().count("round 2,")
        run = terminal.start(f"run-{number}", "run", str(run_file), "--home", str(home), "--json")
        terminal.wait_for_text("site-0", "round 2,", times=trained + 1)
        assert stop(server, kind=kind) == code
        assert run.wait(timeout=60) == 23, terminal.output(f"run-{number}").read_text()
        before = _accepted(home)

        name, port = f"server-{number}", address.rsplit(":", 1)[1]
        server = terminal.start(name, "server", "--home", str(home), "--port", port, "--insecure")
        terminal.wait_for_text(name, "going on with")
        followed = terminal.run("run", "--resume", "latest", "--home", str(home), "--json", timeout_s=400.0)
        assert followed.returncode == 0, "it is followed, whichever of the two has started it: " + followed.stdout
        assert last_json(followed.stdout)["adapter"] == f"toy/{number * rounds}"
        assert before
        assert before <= _accepted(home)
        assert len(_accepted(home)) == 2 * rounds, "nobody is counted twice"
        _expect_kept_promises(home, orphans=2)
    for client in clients:
        stop(client)
    assert stop(server) == 0
    terminal.expect_no_process()


def test_an_interrupted_run_is_stopped_and_can_be_resumed(
    terminal: Terminal, tmp_path: Path, tiny_bert: Path, toy_data: Path
) -> None:
    home = tmp_path / "home"
    server, address = _serve(terminal, home)
    client = _join(terminal, address, "only", write_rows(tmp_path / "0.csv", toy_data, part=0, of=1), tiny_bert)
    run_file = write_run_file(tmp_path / "run.toml", model=tiny_bert, data=toy_data)
    run_file.write_text(run_file.read_text().replace("rounds = 2", "rounds = 4"))
    run = terminal.start("run", "run", str(run_file), "--home", str(home), "--json")
    terminal.wait_for_text("only", "round 1")
    assert stop(run, timeout_s=60) == 130
    (ended,) = _runs(home)
    assert f"go on with it by: pomona run --resume {ended.id}" in terminal.output("run.err").read_text()
    assert (ended.state, ended.reason[:17]) == ("failed", "KeyboardInterrupt")
    done = terminal.run("run", "--resume", ended.id, "--home", str(home), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert last_json(done.stdout)["adapter"] == "toy/4"
    _expect_kept_promises(home, orphans=1)
    stop(client)
    assert stop(server) == 0
    terminal.expect_no_process()


def _runs(home: Path) -> list[Run]:
    with open_registry(home) as registry:
        return registry.runs()


def _accepted(home: Path) -> set[tuple[int, str, str]]:
    """Return round, client and hash of every update that counts in the latest run."""
    with open_registry(home) as registry:
        sent = registry.submissions(registry.runs()[-1].id)
        return {(each.round_number, each.client, each.sha256) for each in sent if each.status == "accepted"}


def _expect_kept_promises(home: Path, *, orphans: int) -> None:
    """Fail unless the latest run kept its promises, and aggregating its rounds again gives their bytes.

    A process that was ended may have had so many updates on disk that it was about to record.
    """
    with open_registry(home) as registry:
        run = registry.runs()[-1]
        known = Outside(replay=Replay(RunSettings.model_validate_json(run.settings_json)), orphans=orphans)
        assert not broken_promises(registry, run.id, known)


def test_two_servers_on_one_registry_are_refused(terminal: Terminal, tmp_path: Path) -> None:
    server, _ = _serve(terminal, tmp_path / "home")
    done = terminal.run("server", "--home", str(tmp_path / "home"), "--port", "0", "--insecure")
    assert done.returncode == 20
    assert "already" in done.stderr
    stop(server)


def test_a_client_with_bad_data_or_rank_is_left_out_with_its_reason(
    terminal: Terminal, tmp_path: Path, tiny_bert: Path, toy_data: Path
) -> None:
    home = tmp_path / "home"
    server, address = _serve(terminal, home)
    good = write_rows(tmp_path / "good.csv", toy_data, part=0, of=1)
    strange = tmp_path / "strange.csv"
    strange.write_text("text,label\nthe cat,dinosaur\n")
    clients = [
        _join(terminal, address, "good", good, tiny_bert),
        _join(terminal, address, "strange", strange, tiny_bert),
    ]
    for name in ("good", "strange"):
        terminal.wait_for_text(name, "ready")
    lines = ["[cohort]\nmin_clients = 2\njoin_timeout_s = 30"]
    run_file = write_run_file(tmp_path / "run.toml", model=tiny_bert, data=toy_data, lines=lines)
    done = terminal.run("run", str(run_file), "--home", str(home), "--json")
    assert done.returncode == 31, done.stdout + done.stderr
    message = last_json(done.stdout)["error"]["message"]  # type: ignore[index]
    assert "strange" in message
    assert "dinosaur" in message
    for client in clients:
        stop(client)
    stop(server)


def _certificates(folder: Path) -> Path:
    """Write a certificate authority and a server certificate that it signed, for loopback."""
    now, keys = datetime.now(UTC), {name: ec.generate_private_key(ec.SECP256R1()) for name in ("ca", "server")}
    names = {"ca": "test-ca", "server": "localhost"}
    alternatives = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
    for name, key in keys.items():
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[name])]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names["ca"])]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=name == "ca", path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .sign(keys["ca"], hashes.SHA256())
        )
        (folder / f"{name}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
        (folder / f"{name}.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return folder
