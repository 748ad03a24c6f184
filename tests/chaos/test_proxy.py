import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.chaos.proxy import Proxy


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        def answer(connection: socket.socket) -> None:
            with connection:
                try:
                    while data := connection.recv(100):
                        connection.sendall(data)
                except ConnectionError:
                    pass

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy(echo: int) -> Iterator[Proxy]:
    with Proxy(echo) as proxy:
        yield proxy


def connected(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def says(connection: socket.socket, word: bytes) -> bytes:
    connection.sendall(word)
    return connection.recv(100)


def test_it_forwards(proxy: Proxy) -> None:
    with connected(proxy) as one, connected(proxy) as other:
        assert says(one, b"a") == b"a"
        assert says(other, b"b") == b"b"


def test_a_cut_resets_what_is_there_and_welcomes_what_comes(proxy: Proxy) -> None:
    with connected(proxy) as before:
        assert says(before, b"a") == b"a"
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            before.recv(100)
    with connected(proxy) as after:
        assert says(after, b"b") == b"b"


def test_refusing_resets_and_refuses_until_it_forwards_again(proxy: Proxy) -> None:
    with connected(proxy) as before:
        assert says(before, b"a") == b"a"
        proxy.refuse()
        with pytest.raises(ConnectionResetError):
            before.recv(100)
    with pytest.raises(ConnectionRefusedError):
        connected(proxy)
    proxy.forward()
    with connected(proxy) as after:
        assert says(after, b"b") == b"b"


def test_hanging_takes_everything_and_answers_late(proxy: Proxy) -> None:
    with connected(proxy) as before:
        assert says(before, b"a") == b"a"
        proxy.hang()
        with connected(proxy) as meanwhile:
            for connection in (before, meanwhile):
                connection.sendall(b"b")
                connection.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    connection.recv(100)
                connection.settimeout(5)
            proxy.forward()
            assert before.recv(100) == meanwhile.recv(100) == b"b"


def test_what_hangs_can_be_cut(proxy: Proxy) -> None:
    proxy.hang()
    with connected(proxy) as connection:
        connection.sendall(b"a")
        time.sleep(0.1)
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            connection.recv(100)


def test_a_server_that_is_gone_hangs_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with Proxy(port) as proxy, connected(proxy) as connection, suppress(ConnectionResetError):
        assert connection.recv(100) == b""
