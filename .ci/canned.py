"""A model server that costs next to nothing, for the benchmark: canned.py --port N.

One thread, and answers made beforehand. The body's first 400 bytes may hold
"stream": true with "tokens" and "interval", for a stream whose every token is the time
at which it was sent, or "bytes": N.
"""

import heapq
import json
import os
import select
import socket
import sys
import time


class CannedConnection:
    """One connection of the canned server: finds where requests end, drops bodies."""

    def __init__(self, server, sock):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.server = server
        self.sock = sock
        self.buffer = b""
        self.head = b""
        self.wish = b""  # the first bytes of the body
        self.missing = 0  # bytes of the body; None: chunked
        self.to_send = 0  # bytes of a large answer

    def receive(self):
        """Take what has come, and answer the requests that are whole."""
        size = self.sock.recv_into(self.server.scratch)
        if not size:
            return self.server.drop(self)
        if self.missing and self.missing > size and len(self.wish) == CANNED_WISH:
            self.missing -= size
            return None
        self.buffer += self.server.scratch[:size]
        while self.buffer and self._take():
            self.server.answer(self)
            self.head = self.wish = b""
        return None

    def _take(self):
        """Whether a whole request was taken from the buffer."""
        if not self.head and not self._take_head():
            return False
        self.wish += self.buffer[: CANNED_WISH - len(self.wish)]
        if self.missing is None:
            is_whole = self.buffer.endswith(b"0\r\n\r\n")
            self.buffer = b"" if is_whole else self.buffer[-5:]
            return is_whole
        taken = min(self.missing, len(self.buffer))
        self.missing -= taken
        self.buffer = self.buffer[taken:]
        return not self.missing

    def _take_head(self):
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        self.head, self.buffer = self.buffer[:end].lower(), self.buffer[end + 4 :]
        length = self.head.partition(b"content-length:")[2].partition(b"\r")[0]
        is_chunked = not length and b"transfer-encoding:" in self.head
        self.missing = None if is_chunked else int(length or 0)
        return True

    def send_large(self):
        """Send what the socket takes of a large answer, from the page cache."""
        while self.to_send:
            size = min(self.to_send, CANNED_BLOCK)
            try:
                sent = os.sendfile(self.sock.fileno(), self.server.block, 0, size)
            except BlockingIOError:
                return self.server.poll.modify(self.sock, select.EPOLLOUT)
            self.to_send -= sent
        return self.server.poll.modify(self.sock, select.EPOLLIN)


class CannedServer:
    """The server: all its connections, in one thread."""

    def __init__(self, listener):
        listener.setblocking(False)
        self.listener = listener
        self.poll = select.epoll()
        self.poll.register(listener, select.EPOLLIN)
        self.connections = {}
        self.timers = []  # (due, id, connection, tokens left, interval)
        self.scratch = memoryview(bytearray(262144))
        self.block = os.memfd_create("block")
        os.truncate(self.block, CANNED_BLOCK)

    def serve(self):
        """Serve for ever."""
        while True:
            for descriptor, event in self.poll.poll(self._pause()):
                if descriptor == self.listener.fileno():
                    self._accept()
                elif connection := self.connections.get(descriptor):
                    self._serve_one(connection, event)
            self._send_tokens()

    def _pause(self):
        return max(0.0, self.timers[0][0] - time.monotonic()) if self.timers else -1

    def _accept(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except BlockingIOError:
                return
            self.connections[sock.fileno()] = CannedConnection(self, sock)
            self.poll.register(sock, select.EPOLLIN)

    def _serve_one(self, connection, event):
        try:
            if event & select.EPOLLOUT:
                connection.send_large()
            else:
                connection.receive()
        except OSError:
            self.drop(connection)

    def drop(self, connection):
        """Forget a connection, at its end or at an error."""
        self.connections.pop(connection.sock.fileno(), None)
        connection.sock.close()

    def answer(self, connection):
        """Answer the request that `connection` just took."""
        connection.wish = wish = connection.wish.replace(b" ", b"")
        if b'"stream":true' in wish:
            self._start_stream(connection)
        elif size := int(canned_number(wish, "bytes")):
            connection.sock.send(CANNED_LARGE % size)
            connection.to_send = size
            connection.send_large()
        else:
            connection.sock.send(CANNED_ANSWER)

    def _start_stream(self, connection):
        """Send the head; the first token comes at a random moment of an interval."""
        connection.sock.send(CANNED_STREAM)
        tokens = int(canned_number(connection.wish, "tokens"))
        interval = canned_number(connection.wish, "interval")
        due = time.monotonic() + interval * int.from_bytes(os.urandom(2), "big") / 65536
        heapq.heappush(self.timers, (due, id(connection), connection, tokens, interval))

    def _send_tokens(self):
        now = time.monotonic()
        while self.timers and self.timers[0][0] <= now:
            due, number, connection, tokens, interval = self.timers[0]
            event = CANNED_TOKEN % time.monotonic() if tokens else CANNED_END
            try:
                connection.sock.send(event)
            except OSError:
                self.drop(connection)
                tokens = 0
            if tokens:
                timer = (due + interval, number, connection, tokens - 1, interval)
                heapq.heapreplace(self.timers, timer)
            else:
                heapq.heappop(self.timers)


def canned_number(wish, name):
    """The number that follows `name` in the first bytes of compact JSON, or 0."""
    text = wish.partition(b'"%b":' % name.encode())[2]
    return float(text.partition(b",")[0].partition(b"}")[0] or 0)


def canned_chunk(content):
    """A chunk that holds one event of a chat's stream."""
    choice = {"finish_reason": None, "index": 0, "delta": {"content": content}}
    document = {
        "choices": [choice],
        "created": 1700000000,
        "id": "chatcmpl-" + "x" * 32,
        "model": "canned",
        "system_fingerprint": "b0-fake",
        "object": "chat.completion.chunk",
    }
    event = f"data: {json.dumps(document)}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(event), event)


CANNED_BLOCK = 16 * 2**20
CANNED_WISH = 400
CANNED_HEAD = b"HTTP/1.1 200 OK\r\nServer: llama.cpp\r\n"
CANNED_TYPE = b"Content-Type: application/json; charset=utf-8\r\n"
CANNED_LARGE = CANNED_HEAD + CANNED_TYPE + b"Content-Length: %d\r\n\r\n"
CANNED_BODY = json.dumps({
    "choices": [{
        "finish_reason": "stop",
        "index": 0,
        "message": {"role": "assistant", "content": "word " * 340},
    }],
    "created": 1700000000,
    "model": "canned",
    "object": "chat.completion",
    "id": "chatcmpl-" + "x" * 32,
    "usage": {"completion_tokens": 340, "prompt_tokens": 400, "total_tokens": 740},
}).encode()
CANNED_ANSWER = CANNED_LARGE % len(CANNED_BODY) + CANNED_BODY
CANNED_CHUNKS = b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
CANNED_STREAM = CANNED_HEAD + CANNED_CHUNKS + b"\r\n"
CANNED_TOKEN = canned_chunk("@" * 16).replace(b"@" * 16, b"%016.6f")
CANNED_END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


if __name__ == "__main__":
    number = int(sys.argv[sys.argv.index("--port") + 1])
    CannedServer(socket.create_server(("127.0.0.1", number), backlog=1024)).serve()
