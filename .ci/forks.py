"""llmswap started in a fifth of the time, by forks of a process that has imported it.

`python3 -I -S .ci/forks.py FD FOLDER ROOM` is that process: it imports llmswap from
FOLDER and takes orders from the socket FD.
"""

import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from functools import lru_cache

PYTHON = [sys.executable, "-I", "-S"]
ROOM = "." * 8000  # an argument, which a fork replaces by its own
LOCK = threading.Lock()


def start(args, env, files, folder):
    """Start these arguments as the leader of a session with this environment; `files`
    become its descriptors 1 and 2, and, as systemd passes them, 3 and so on. Return the
    process. If it is of PYTHON, it is a fork; `folder` has llmswap.pyc."""
    if args[:3] == PYTHON:
        with LOCK:  # else threads start several, and all but one end at once
            forks = Forks.of(folder)
        return forks.start(args[3:], env, files)
    stdout, stderr = files
    return subprocess.Popen(
        args, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
        start_new_session=True,
    )


def run(args, env, folder):
    """What these arguments of PYTHON do until they end, as subprocess.run tells it."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        status = start(args, env, [stdout, stderr], folder).wait(60)
        stdout.seek(0), stderr.seek(0)
        texts = stdout.read().decode(), stderr.read().decode()
        return subprocess.CompletedProcess(args, status, *texts)


class Forks:
    """The process that forks. It ends with its parent; its programs outlive it."""

    @staticmethod
    @lru_cache(maxsize=None)
    def of(folder):
        return Forks(folder)

    def __init__(self, folder):
        self._orders, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with theirs:
            fd = theirs.fileno()
            words = [os.path.abspath(__file__), str(fd), folder, ROOM]
            self._process = subprocess.Popen(
                [*PYTHON, *words], pass_fds=[fd], stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def start(self, words, env, files):
        status, theirs = os.pipe()
        order = json.dumps([words, env, os.getcwd()]).encode()
        fds = [theirs, *(file.fileno() for file in files)]
        try:
            socket.send_fds(self._orders, [order], fds)
        finally:
            os.close(theirs)
        return Process(status, [*PYTHON, *words])


class Process:
    """A program that runs, as subprocess.Popen has it. `pipe` tells its pid and, after
    its end, its status."""

    def __init__(self, pipe, args):
        self._pipe, self.args = os.fdopen(pipe), args
        self.pid = int(self._pipe.readline())
        self.returncode = None
        self._lock = threading.Lock()  # several threads may wait

    def poll(self):
        return self._await_end(0)

    def wait(self, timeout=None):
        if self._await_end(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def _await_end(self, timeout):
        if self.returncode is None and select.select([self._pipe], [], [], timeout)[0]:
            with self._lock:
                if self.returncode is None:
                    self.returncode = int(self._pipe.readline())
        return self.returncode  # the pipe is not closed: another thread may select it

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


# ---- within that process


def serve(orders):
    """Carry out orders until their sender has ended. Return, in each fork, its order,
    and None in the end."""
    pipes = {}  # by pid
    wakeup, bell = os.pipe()
    os.set_blocking(bell, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(bell)
    while True:
        ready = select.select([orders, wakeup], [], [])[0]
        if wakeup in ready:
            os.read(wakeup, 1000)
            report_ends(pipes)
        if orders in ready:
            data, fds, _, _ = socket.recv_fds(orders, 1 << 20, 9)
            if not data:
                return None
            pipe, *files = fds
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for fd in (wakeup, bell, pipe, *pipes.values()):
                    os.close(fd)
                return json.loads(data), files
            os.write(pipe, b"%d\n" % pid)
            for fd in files:
                os.close(fd)
            pipes[pid] = pipe


def report_ends(pipes):
    while pipes:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        pipe = pipes.pop(pid)
        try:
            os.write(pipe, b"%d\n" % code)
        except BrokenPipeError:
            pass  # nobody waits for it
        os.close(pipe)


def become(words, env, folder, files):
    """Be the process that `python3 -I -S WORDS` is, for others too."""
    os.setsid()
    os.chdir(folder)
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in files]
    for number, fd in enumerate(high, 1):
        os.dup2(fd, number)
    for fd in {*files, *high} - {*range(len(files) + 1)}:
        os.close(fd)
    os.environ.clear()
    os.environ.update(env)
    if "LISTEN_FDS" in env:
        os.environ["LISTEN_PID"] = str(os.getpid())
    sys.argv = words[1:] if words[0] == "-c" else words
    show([*PYTHON, *words], env)


def show(words, env):
    """Have /proc show these arguments, and behind them the family."""
    import ctypes

    with open("/proc/self/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    start, end = map(int, fields[45:47])  # arg_start, arg_end
    family = f"TEST_FAMILY={env.get('TEST_FAMILY', '')}"
    line = "\0".join([*words, family]).encode() + b"\0"
    ctypes.memmove(start, line.ljust(end - start, b"\0"), end - start)


def be_run(words, end):
    """Run the program as the module __main__, as Python does. If it is llmswap, only
    the end of its file is left to be run."""
    sys.modules["llmswap"].VIA_NAME = f"llmswap-{os.urandom(8).hex()}"  # one for each
    if words[0] == "-c":
        main, code = types.ModuleType("__main__"), compile(words[1], "-c", "exec")
    else:
        main, code = sys.modules.pop("llmswap"), end
        main.__name__ = "__main__"
    sys.modules["__main__"] = main
    exec(code, main.__dict__)


def end_of(module):
    """The code of a module that runs only if it is the program."""
    path = module.main.__code__.co_filename
    with open(path) as file:
        before, mark, end = file.read().rpartition("\nif __name__ == ")
    return compile("\n" * before.count("\n") + mark + end, path, "exec")


if __name__ == "__main__":
    import ctypes  # noqa: F401 (llmswap does once it runs)
    import gc
    import types

    sys.path.insert(0, sys.argv[2])
    import llmswap

    del sys.path[0]
    end = end_of(llmswap)
    with tempfile.NamedTemporaryFile("w") as file:
        file.write("[m]\ncmd = x ${PORT}\n")
        file.flush()
        llmswap.load_config(file.name)  # fills the cache of the module re
    gc.collect()
    gc.freeze()  # else each collection in a fork copies what it looks at
    order = serve(socket.socket(fileno=int(sys.argv[1])))
    if order:
        become(*order[0], order[1])
        be_run(order[0][0], end)
