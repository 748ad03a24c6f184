"""Uploads by hand: clients that stop half-way, drip, or vanish. Nothing of it goes into a history."""

import select
import socket
import struct
from http.client import HTTPResponse
from typing import Self

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time: closing sends RST


class Upload:
    """A raw video that is sent piece by piece. Its head, with the whole ``length_bytes``, is sent at once.

    Args:
        length_bytes: None: the pieces are sent as chunks, and their number is not known before.
    """

    def __init__(self, port: int, *, length_bytes: int | None) -> None:
        self._chunked = length_bytes is None
        length = "Transfer-Encoding: chunked" if self._chunked else f"Content-Length: {length_bytes}"
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._socket.sendall(
            f"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: video/mp4\r\n{length}\r\n\r\n".encode()
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, piece: bytes) -> None:
        """Raises: ConnectionError: The server has hung up."""
        self._socket.sendall(b"%x\r\n%s\r\n" % (len(piece), piece) if self._chunked else piece)

    def finish(self) -> None:
        """Say that there are no more chunks."""
        self._socket.sendall(b"0\r\n\r\n")

    def is_answered(self) -> bool:
        """Whether the server has said something, or hung up."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def answer(self) -> HTTPResponse:
        """Raises: OSError: The server has hung up without a complete answer."""
        answer = HTTPResponse(self._socket, method="POST")
        answer.begin()
        return answer

    def vanish(self) -> None:
        """Reset the connection: a client that is gone from one moment to the next."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._socket.close()
