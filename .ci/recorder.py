"""A model server in threads of this process that remembers each request, and reads
nothing that is not framed as llmswap frames it."""

import contextlib
import queue
import socket
import threading
from hashlib import sha256
from typing import NamedTuple


class ForwardedRequest(NamedTuple):
    """A request as a backend got it; `start` is method, target, version."""

    start: tuple
    headers: list
    body: bytes

    def all(self, name):
        return [value for header, value in self.headers if header == name]


def read_request(file):
    """The next request in this file. EOFError if it ends before, ValueError if it is
    not framed as llmswap does it."""
    start, headers = read_line(file).split(" "), []
    while line := read_line(file):
        name, value = line.split(": ", 1)
        headers.append((name.lower(), value))
    fields = dict(headers)
    length = int(fields.get("content-length", 0))
    body = file.read(length)
    if len(body) < length:
        raise EOFError
    if "transfer-encoding" in fields:
        while size := int(read_line(file), 16):
            body += file.read(size)
            read_line(file, "")
        read_line(file, "")
    return ForwardedRequest(tuple(start), headers, body)


def read_line(file, expected=None):
    """The next line without its end."""
    line = file.readline().decode("latin-1")
    if not line.endswith("\n"):
        raise EOFError
    if not line.endswith("\r\n") or expected not in (None, line[:-2]):
        raise ValueError(line)
    return line[:-2]


class RecordingBackend:
    """A backend that answers each request with its digest, or as a test wishes."""

    def __init__(self):
        self._seen = queue.SimpleQueue()
        self.wishes = {}  # target: the bytes of the answer, after which it hangs up
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                sock.settimeout(60)
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock):
        with sock, sock.makefile("rb") as file, contextlib.suppress(OSError, EOFError):
            try:
                while self._answer(sock, read_request(file)):
                    pass
            except ValueError as error:
                self._seen.put(error)

    def _answer(self, sock, request):
        """Answer; whether the connection goes on."""
        method, target, _ = request.start
        if target in ("/health", "/own/health"):
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            return True
        self._seen.put(request)
        if wish := self.wishes.get(target):
            sock.sendall(wish)
            return False
        digest = request_digest(method, target, request.body)
        body = b"" if method == "HEAD" else digest
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 64\r\n\r\n" + body)
        return True

    def take_requests(self):
        """The requests, and ValueErrors, since the last call."""
        seen = []
        while not self._seen.empty():
            seen.append(self._seen.get())
        return seen

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def request_digest(method, target, body):
    """The SHA-256 of a request in hex, by which it is recognized."""
    return sha256(f"{method} {target} ".encode() + body).hexdigest().encode()
