"""A stand-in for systemd: it listens for llmswap, starts it, and gets its messages."""

import contextlib
import os
import select
import signal
import socket
import threading
import time
from pathlib import Path

from test_llmswap import FAMILY, family, forks, llmswap_file

def activated(ini, sockets, stderr, env=os.environ):
    """The process of llmswap to which these sockets are passed as by systemd."""
    words, files = [*forks.PYTHON, llmswap_file(), str(ini)], [stderr, stderr, *sockets]
    env = {**env, "LISTEN_FDS": str(len(sockets))}
    return forks.start(words, env, files, os.path.dirname(llmswap_file()))


class Activator:
    """systemd as far as a socket unit goes: it owns the listening socket and starts
    llmswap whenever a connection waits and none runs."""

    def __init__(self, text, folder):
        self.ini = Path(folder) / "test.ini"
        self.ini.write_text(text)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.listener.getsockname()[1]
        self.starts, self.statuses = 0, []
        self.token = f"{os.getpid()}-{self.port}"
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._live)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._is_over.set()
        self._thread.join(20)
        for pid in family(self.token):
            os.kill(pid, signal.SIGKILL)
        self._thread.join()
        self.listener.close()

    def _live(self):
        env = {**os.environ, FAMILY: self.token}
        while not self._is_over.is_set():
            if not select.select([self.listener], [], [], 0.1)[0]:
                continue
            self.starts += 1
            with open(self.ini.with_name("stderr"), "ab") as stderr:
                self.process = activated(self.ini, [self.listener], stderr, env)
            while self.process.poll() is None and not self._is_over.is_set():
                time.sleep(0.005)
            if self.process.poll() is None:
                self.process.terminate()
            self.statuses.append(self.process.wait())

    def log(self):
        return self.ini.with_name("stderr").read_text()


class Notifications:
    """The socket that systemd would listen on for notifications: a path, or a name
    after an @."""

    def __init__(self, address):
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0"))
        self._socket.settimeout(10)

    def until(self, wanted):
        """Return the datagrams up to the one that has this line."""
        seen = []
        while not seen or wanted not in seen[-1]:
            seen.append(self._socket.recv(4096).decode().split("\n"))
        return seen

    def until_silence(self, seconds=0.2):
        """Wait until nothing has come for so long."""
        self._socket.settimeout(seconds)
        deadline = time.monotonic() + 5
        with contextlib.suppress(socket.timeout):
            while self._socket.recv(4096):  # what was on its way
                assert time.monotonic() < deadline, "it goes on"
        self._socket.settimeout(10)
