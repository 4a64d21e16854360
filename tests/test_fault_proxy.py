"""The bad network of the tests is as bad as it says, and no worse."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from tests.fault_proxy import FaultProxy, Link


def _echo(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_echo_one, args=(connection,), daemon=True).start()


def _echo_one(connection: socket.socket) -> None:
    with connection:
        try:
            while data := connection.recv(4096):
                connection.sendall(data)
        except OSError:
            return


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    """A proxy before a server that sends back what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_echo, args=(listener,), daemon=True).start()
        with FaultProxy("127.0.0.1:{1}".format(*listener.getsockname())) as made:
            yield made
        listener.shutdown(socket.SHUT_RDWR)


def connect(proxy: FaultProxy, *, timeout_s: float = 10.0) -> socket.socket:
    host, port = proxy.address.split(":")
    return socket.create_connection((host, int(port)), timeout=timeout_s)


def receive(client: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size and (data := client.recv(size - len(got))):
        got += data
    return got


def test_a_good_link_passes_everything_on_both_ways(proxy: FaultProxy) -> None:
    sent = bytes(range(256)) * 1024
    with connect(proxy) as client:
        threading.Thread(target=client.sendall, args=(sent,), daemon=True).start()
        assert receive(client, len(sent)) == sent
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    assert proxy.seen == {"up": len(sent), "down": len(sent)}


def test_a_slow_link_delays_each_byte_but_not_all_after_one_another(proxy: FaultProxy) -> None:
    proxy.set(Link(latency_s=0.3))
    sent = bytes(16 * 1024)
    with connect(proxy) as client:
        began = time.monotonic()
        client.sendall(sent)
        assert receive(client, len(sent)) == sent
        assert 0.6 <= time.monotonic() - began < 3.0


def test_a_narrow_link_lets_so_many_bytes_through_in_a_second(proxy: FaultProxy) -> None:
    proxy.set(Link(bytes_per_s=8000.0))
    sent = bytes(8 * 1024)
    with connect(proxy) as client:
        began = time.monotonic()
        client.sendall(sent)
        assert receive(client, len(sent)) == sent
        assert 0.9 <= time.monotonic() - began < 4.0
        assert 0.9 <= 8000.0 / proxy.seen["up"] * 1.024 <= 1.1


def test_a_cut_link_resets_at_that_byte_and_is_whole_again(proxy: FaultProxy) -> None:
    with connect(proxy) as client:
        client.sendall(bytes(100))
        receive(client, 100)
        proxy.set(Link(cut_at=2500))
        with pytest.raises(OSError):  # noqa: PT012, PT011 - which end sees the reset first is open
            client.sendall(bytes(4000))
            while client.recv(4096):
                pass
            raise OSError
    assert (proxy.seen["up"], proxy.cuts) == (2600, 1)
    with connect(proxy) as client:
        client.sendall(bytes(4000))
        assert receive(client, 4000) == bytes(4000)
    assert proxy.cuts == 1


def test_a_black_hole_swallows_everything_and_tells_nobody(proxy: FaultProxy) -> None:
    with connect(proxy, timeout_s=0.5) as client:
        proxy.set(Link(black_hole=True))
        client.sendall(b"lost")
        with pytest.raises(TimeoutError):
            client.recv(1)
        assert proxy.seen["up"] == 0
        proxy.set(Link())
        client.settimeout(10.0)
        assert receive(client, 4) == b"lost"


def test_open_connections_can_be_reset(proxy: FaultProxy) -> None:
    with connect(proxy) as client:
        client.sendall(b"x")
        receive(client, 1)
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_without_a_server_a_connection_is_reset() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nowhere = "127.0.0.1:{1}".format(*listener.getsockname())
    # the reset may come before the handshake is seen to be over
    with FaultProxy(nowhere) as proxy, pytest.raises(ConnectionResetError), connect(proxy) as client:
        client.recv(1)
