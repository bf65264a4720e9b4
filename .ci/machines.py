"""Machines of namespaces: this Debian booted once more, and two joined by a cable; and
what stands for a machine that is asleep."""

import ctypes
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONTROL_GROUPS = ("/sys/fs/cgroup/unified", "/sys/fs/cgroup")
CLONE_NEWNET = 0x40000000


@contextmanager
def network_of(path):
    """Until the block ends, this thread and what it starts are in that network."""
    setns = ctypes.CDLL(None, use_errno=True).setns
    with open("/proc/thread-self/ns/net") as ours, open(path) as theirs:
        status = setns(theirs.fileno(), CLONE_NEWNET)
        assert status == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert setns(ours.fileno(), CLONE_NEWNET) == 0


class Debian:
    """This machine's Debian, booted once more: systemd with its own processes, network
    (but a loopback) and control groups, and root's user manager. What is written below
    /root is gone afterwards.
    """

    def __init__(self, folder):
        self._log = Path(folder, "boot.log")
        roots = [p for p in CONTROL_GROUPS if os.path.exists(f"{p}/cgroup.procs")]
        self._group = Path(roots[0], f"llmswap-test-{os.getpid()}")
        self._group.mkdir()
        unshare = "unshare --mount --pid --net --cgroup --ipc --uts --fork --kill-child"
        enter = f"echo $$ >{self._group}/cgroup.procs"
        enter += f"; exec setpriv --pdeathsig KILL {unshare}"
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                ["sh", "-c", f"{enter} sh -e {HERE}/boot.sh"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )

    def _first(self):
        pid = self._process.pid
        assert self._process.poll() is None, self._log.read_text()[-2000:]
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()

    def is_up(self):
        """Whether root's user manager runs."""
        if not self._first():
            return False
        self.pid = int(self._first()[0])
        self.home = Path(f"/proc/{self.pid}/root/root")
        self.network = f"/proc/{self.pid}/ns/net"
        state = self("systemctl --user is-active default.target", check=False)
        return state == "active"

    def __call__(self, script, check=True):
        """What root's shell there writes while it runs the script, as after a login."""
        session = "/sys/fs/cgroup/user.slice/user-0.slice/session-1.scope"
        login = f"mkdir -p {session}; echo $$ >{session}/cgroup.procs"
        shell = ["nsenter", "-a", "-t", str(self.pid), "bash", "-euo", "pipefail"]
        path = f"/root/.local/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = {"PATH": path, "HOME": "/root", "USER": "root"}
        env["XDG_RUNTIME_DIR"] = "/run/user/0"
        done = subprocess.run(
            [*shell, "-c", f"{login}\n{script}"],
            env=env, cwd="/", timeout=30, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        assert not check or done.returncode == 0, f"{script}\n{done.stdout}"
        return done.stdout.strip()

    def show(self, name, unit, scope="--user"):
        """A property of a unit."""
        return self(f"systemctl {scope} show --value -p {name} {unit}")

    def end(self):
        if self._process.poll() is None:
            for pid in self._first():
                os.kill(int(pid), signal.SIGKILL)
        self._process.wait(10)
        for folder, _, _ in os.walk(self._group, topdown=False):
            os.rmdir(folder)


class Sleeper:
    """The GPU machine of the recipe: 192.168.11.11 in a network with the box,
    192.168.11.1. Asleep it keeps its processes, stopped, and answers nothing; its
    network card hears the magic packet and wakes it 0.4 s later.
    """

    def __init__(self, folder):
        self.gpu, self.box = (f"/run/netns/{n}-{os.getpid()}" for n in ("gpu", "box"))
        self.packets = []
        self.naps = 0
        self._asks = folder / "suspend"
        self._is_over = threading.Event()
        (folder / "systemctl").write_text(
            f"#!/bin/sh\necho $@ >{self._asks}\n"
            f"while [ -e {self._asks} ]; do sleep 0.05; done\n"
        )  # it returns once the machine is awake again
        (folder / "systemctl").chmod(0o755)

    def __enter__(self):
        gpu, box = (Path(each).name for each in (self.gpu, self.box))
        for line in (
            f"netns add {gpu}", f"netns add {box}",
            f"-n {gpu} link add eth0 type veth peer name eth0 netns {box}",
            f"-n {gpu} link set lo up", f"-n {box} link set lo up",
            f"-n {gpu} link set eth0 up", f"-n {box} link set eth0 up",
            f"-n {gpu} addr add 192.168.11.11/24 dev eth0",
            f"-n {box} addr add 192.168.11.1/24 dev eth0",
            f"-n {box} route add default dev eth0",
            f"-n {box} ntable change name arp_cache dev eth0 retrans 50",
        ):
            subprocess.run(["ip", *line.split()], check=True)
        with network_of(self.gpu):
            kind = socket.SOCK_RAW, socket.htons(0x0800)  # IP
            self._card = socket.socket(socket.AF_PACKET, *kind)
        self._card.settimeout(0.02)
        return self

    def __exit__(self, *_):
        self._card.close()
        for each in (self.gpu, self.box):
            subprocess.run(["ip", "netns", "del", Path(each).name], check=True)

    @contextmanager
    def alive(self, server):
        """Until the block ends it sleeps when told to, with this llmswap."""
        self._server = server
        thread = threading.Thread(target=self._live)
        thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            thread.join()
            (self._asks.parent / "systemctl").write_text("#!/bin/sh\n")
            self._asks.unlink(missing_ok=True)

    def _live(self):
        while not self._is_over.is_set():
            if self._asks.exists():
                self._sleep()
            self._hear()

    def _hear(self):
        """Whether the card hears a magic packet for it just now."""
        magic = b"\xff" * 6 + bytes.fromhex("abcdef012345") * 16
        try:
            frame = self._card.recv(2000)
        except socket.timeout:
            return False
        is_magic = magic in frame and frame.startswith(b"\xff" * 6)  # a broadcast
        self.packets += [frame] * is_magic
        return is_magic

    def _sleep(self):
        while self._hear():
            pass  # what came before
        self._switch("del", signal.SIGSTOP)
        self.naps += 1
        while not (self._is_over.is_set() or self._hear()):
            pass
        self._is_over.wait(0.4)  # as a machine takes a while to come up
        self._asks.unlink()
        self._switch("add", signal.SIGCONT)

    def _switch(self, verb, number):
        line = f"-n {Path(self.gpu).name} addr {verb} 192.168.11.11/24 dev eth0"
        subprocess.run(["ip", *line.split()], check=True)
        os.kill(self._server.pid, number)


@contextmanager
def ears():
    """(the keys of a machine to wake, the packets sent: [(time, bytes)])."""
    packets = []
    hear = lambda data, *_: packets.append((time.monotonic(), data[0]))  # noqa: E731
    with socketserver.UDPServer(("127.0.0.1", 0), hear) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        port = server.server_address[1]
        keys = "wake-mac = ab:cd:ef:01:23:45", f"wake-broadcast = 127.0.0.1:{port}"
        yield keys, packets
        server.shutdown()


@contextmanager
def absence(machine, is_silent):
    """The machine drops what comes, or refuses it, until the block ends."""
    machine.off()
    place = "127.0.0.1", machine.port
    with ExitStack() as stack:
        if is_silent:  # as a listener with a full backlog is
            stack.enter_context(socket.create_server(place, backlog=0))
            for _ in range(3):
                sock = stack.enter_context(socket.socket())
                sock.setblocking(False)
                sock.connect_ex(place)
        yield
    machine.on()
