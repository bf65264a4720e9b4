"""The faults: each state of a model, and each thing that can go wrong in it.

`python3 test_llmswap.py faults --help` tells more.
"""

import contextlib
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llmswap

from test_llmswap import (
    BrokenAnswer,
    CHAT,
    FAMILY,
    Llmswap,
    PYTHON,
    Stranger,
    chat_body,
    eventually,
    executable,
    fake,
    fake_command,
    family,
    is_listening,
    llmswap_file,
    order_to,
)


FAULTS_USAGE = """\
python3 test_llmswap.py faults [FAULT ...]

Puts six models of one llmswap into the six states, lets the fault happen to all of them
at once, and compares what each client sees, what is logged and what the state is after
with the table; then asks each model again, ends llmswap, and looks for what is left.
Prints the table (?: it may be missing; /: either). Every question bears a mark that
its answer must bear; whatever takes longer than 15 s hangs.
"""

FAULT_INI = """\
[llmswap]
models-max = 0
budget = q 1, s 2
patience = 1m
log-level = info

[*]
stop-timeout = 2
load-timeout = 5
hang-timeout = 1500ms

[blocker]
cmd = FAKE --model blocker
needs = q 1
[queued]
cmd = FAKE --model queued
needs = q 1
[loading]
cmd = FAKE --model loading --load-until GATE
[idle]
cmd = FAKE --model idle
[busy]
cmd = FAKE --model busy
[sleeping]
cmd = FAKE --model sleeping --sleepable
needs = s 2
sleep-needs = s 1
sleep = POST /sleep?level=1
wake = POST /wake_up
[newcomer]
cmd = FAKE --model newcomer
needs = s 1
[unloading]
cmd = FAKE --model unloading --stop-until GATE
"""

FAULT_LAUNCHER = """\
import os, sys, time
folder, compiled, *argv = sys.argv[1:]
sys.path.insert(0, compiled)
import llmswap
llmswap.STALL_CHECK_AFTER = llmswap.LOOK_AT_LOADS = 0.3
def has(what): return os.path.exists(os.path.join(folder, what))
wall, clocks = time.time, time.clock_gettime
time.time = lambda: wall() + 7200 * has("ahead") - 7200 * has("back")
time.clock_gettime = lambda clock: (
    clocks(clock) + 3600 * (clock == time.CLOCK_BOOTTIME and has("slept"))
)
sys.exit(llmswap.main(argv))
"""

FAULT_WORDS = (  # texts in clients' answers and in the log that the table shows
    "exited with status 0", "exited with status 1", "killed by signal 9",
    "no sign of progress", " hung", "did not wake up", "broke off", "is not HTTP",
    "cannot be reached",
    "does not exist", "temporary file", "Too many open files", "start new thread",
    "shutting down", "(reload)", "(shutdown)", "unloaded after 2",
)
FAULT_STATES = ("queued", "loading", "idle", "busy", "sleeping", "unloading")
FAULT_TABLE = """\
fault          | state     | what its client sees      | what is logged        | after
exits 0        | queued    | 200                       | exited with status 0? | loaded
exits 0        | loading   | 502: exited with status 0 | exited with status 0  | unloaded
exits 0        | busy      | event, cut: broke off     | exited with status 0  | unloaded
exits 0        | unloading | 200                       |                       | loaded
exits 0        | others    | 200                       | exited with status 0  | loaded
exits 1        | queued    | 200                       | exited with status 1? | loaded
exits 1        | loading   | 502: exited with status 1 | exited with status 1  | unloaded
exits 1        | busy      | event, cut: broke off     | exited with status 1  | unloaded
exits 1        | unloading | 200                       |                       | loaded
exits 1        | others    | 200                       | exited with status 1  | loaded
SIGKILL        | queued    | 200                       | killed by signal 9?   | loaded
SIGKILL        | loading   | 502: killed by signal 9   | killed by signal 9    | unloaded
SIGKILL        | busy      | event, cut: broke off     | killed by signal 9    | unloaded
SIGKILL        | unloading | 200                       |                       | loaded
SIGKILL        | others    | 200                       | killed by signal 9    | loaded
hangs          | loading   | 504: no sign of progress  | no sign of progress   | unloaded
hangs          | idle      | 200                       | hung                  | loaded
hangs          | busy      | event, cut: broke off     | hung                  | unloaded
hangs          | sleeping  | 200                       | did not wake up       | loaded
hangs          | others    | 200                       | unloaded after 2      | loaded
closes socket  | loading   | 504: no sign of progress  | no sign of progress   | unloaded
closes socket  | idle      | 502: cannot be reached    | hung                  | unloaded
closes socket  | busy      | event, cut: broke off     | hung                  | unloaded
closes socket  | sleeping  | 200                       | did not wake up       | loaded
closes socket  | others    | 200                       |                       | loaded
rubbish        | loading   | 504: no sign of progress  | no sign of progress   | unloaded
rubbish        | idle      | 502: is not HTTP          | hung                  | unloaded
rubbish        | busy      | event, cut: broke off     | hung                  | unloaded
rubbish        | sleeping  | 200                       | did not wake up       | loaded
rubbish        | others    | 200                       |                       | loaded
late           | others    | 200                       |                       | loaded
port taken     | queued    | -: it has none yet        |                       | loaded
port taken     | loading   | 200                       |                       | loaded
port taken     | busy      | event, cut: broke off     | killed by signal 9    | unloaded
port taken     | unloading | -: it still has it        |                       | loaded
port taken     | others    | 200                       | killed by signal 9    | loaded
binary gone    | queued    | 502: does not exist       | does not exist        | unloaded
binary gone    | unloading | 502: does not exist       | does not exist        | unloaded
binary gone    | others    | 200                       |                       | loaded
disk full      | others    | 200                       |                       | loaded
fork fails     | queued    | 502: start new thread     | start new thread      | unloaded
fork fails     | unloading | 502: start new thread     | start new thread      | unloaded
fork fails     | others    | 200                       |                       | loaded
no descriptors | loading   | 200                       |                       | loaded
no descriptors | idle      | 200                       |                       | loaded
no descriptors | busy      | 200                       |                       | loaded
no descriptors | sleeping  | 502: Too many open files  | did not wake up, Too many open files | unloaded
no descriptors | others    | 502: Too many open files  | Too many open files   | unloaded
clock ahead    | others    | 200                       |                       | loaded
clock back     | others    | 200                       |                       | loaded
machine sleeps | others    | 200                       |                       | loaded
client leaves  | loading   | cut                       |                       | loaded
client leaves  | idle      | -: nobody asks            |                       | loaded
client leaves  | busy      | cut                       |                       | loaded
client leaves  | sleeping  | -: nobody asks            |                       | sleeping
client leaves  | others    | cut                       |                       | unloaded
SIGHUP         | busy      | 200                       | (reload)              | unloaded
SIGHUP         | unloading | 200                       |                       | loaded
SIGHUP         | others    | 200                       | (reload)              | loaded
SIGTERM        | busy      | 200                       | (shutdown)            | exit 0
SIGTERM        | unloading | 503: shutting down        |                       | exit 0
SIGTERM        | others    | 503: shutting down        | (shutdown)            | exit 0
SIGTERM twice  | idle      | cut/503: shutting down    | (shutdown)            | exit 0
SIGTERM twice  | busy      | event, cut: broke off     | (shutdown)            | exit 0
SIGTERM twice  | sleeping  | cut/503: shutting down    | (shutdown)            | exit 0
SIGTERM twice  | unloading | 503: shutting down        |                       | exit 0
SIGTERM twice  | others    | 503: shutting down        | (shutdown)            | exit 0
restart        | others    | cut                       |                       | unloaded
"""  # others: the states of this fault without a line of their own
FAULT_ROW = "{:14} | {:9} | {:25} | {:21} | {}"
FAULT_UNSERVED = ("queued", "sleeping", "unloading")  # without a new descriptor
FAULT_BOUND = 15.0  # s; nothing takes longer
FAULT_NOBODY = 64321  # a user whose processes, unlike root's, are limited
AS_NOBODY = (  # as that user, but able to read root's files
    f"setpriv --reuid {FAULT_NOBODY} --inh-caps +dac_override "
    "--ambient-caps +dac_override"
).split()


def expected_rows(fault):
    """What the table says of a fault: the cells of each of the six states."""
    lines = [map(str.strip, line.split(" | ")) for line in FAULT_TABLE.splitlines()]
    rows = {state: cells for name, state, *cells in lines if name == fault}
    own = [(state, rows.get(state, rows.get("others"))) for state in FAULT_STATES]
    return [[fault, state, *cells] for state, cells in own]


def is_as_expected(fault, rows):
    """Whether the rows match the table, in which "x?" is x or nothing, and "x/y" is
    either x or y."""
    return all(
        was in cell.replace("?", "/").split("/")
        for row, expected in zip(rows, expected_rows(fault))
        for was, cell in zip(row, expected)
    )


class FaultyLlmswap(Llmswap):
    """llmswap with a clock that a file in its folder moves, and earlier suspicions."""

    def __init__(self, fault):
        super().__init__("")
        program = self.program = self.folder / "llmswap"
        mark = f"{FAMILY}={self.token}"
        executable(program, f'exec {fake_command(port="")[:-8]} "$@" {mark}')
        self.folder.chmod(0o755)
        self.fake = f"{program} --port ${{PORT}}"
        self.text = FAULT_INI.replace("GATE", str(self.gate))
        if fault == "port taken":
            self.text = self.text.replace("--load-until", "--bind-late --load-until")
        self.write(self.text.replace("FAKE", self.fake))
        words = [*PYTHON, "-c", FAULT_LAUNCHER, str(self.folder)]
        words += [os.path.dirname(llmswap_file())]
        self._args[: self._args.index(str(self.ini))] = words
        if fault == "fork fails" and os.getuid() == 0:
            self._args[:0] = AS_NOBODY


class Plight:
    """Six models of one llmswap in the six states, their clients, and a fault."""

    def __init__(self, fault):
        self.fault = fault
        self.swap = FaultyLlmswap(fault)
        self.clients = {}  # state -> FaultClient
        self.strangers = {}
        self.servers = {}  # state -> (pid, port); for queued: of the one in its way

    def run(self):
        """The six lines of the table, as they came out."""
        with self.swap, contextlib.ExitStack() as self.at_end:
            self._get_into_states()
            self._strike()
            return self._look()

    # before

    def _get_into_states(self):
        """Bring each model into its state; those that end by themselves come last."""
        if self.fault == "port taken":  # strangers are older than the backends
            self.strangers = {state: Stranger() for state in FAULT_STATES[1:5]}
            for stranger in self.strangers.values():
                self.at_end.callback(stranger.heard)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda step: step(), [self._block, self._lull, self._warm]))
        for state in FAULT_STATES:
            self.clients[state] = FaultClient(self.swap, state)
        gate = str(self.swap.gate)
        self.clients["busy"].ask(stream=True, tokens=10**6, interval=0.05, until=gate)
        self.clients["busy"].has_begun.wait(FAULT_BOUND)
        self.clients["queued"].ask()
        self.clients["loading"].ask()
        eventually(self._find)
        assert self.swap.post("/models/unload", {"model": "unloading"}).status == 200
        self.clients["unloading"].ask()
        eventually(lambda: self._waiting() == 3)
        self.mark = len(self.swap.log())

    def _block(self):
        self.stream = self.swap.stream("blocker", tokens=10**6, interval=0.05)
        next(self.stream.events())
        self.at_end.enter_context(self.stream)

    def _lull(self):
        for model in ("sleeping", "newcomer"):
            answer = self.swap.chat(model)
            assert answer.status == 200, f"{answer.body}\n{self.swap.log()}"
        eventually(lambda: self.swap.states()["sleeping"] == "sleeping")

    def _warm(self):
        for model in ("idle", "busy", "unloading"):
            answer = self.swap.chat(model)
            assert answer.status == 200, f"{answer.body}\n{self.swap.log()}"

    def _waiting(self):
        return self.swap.get("/health").json()["queued"]

    def _find(self):
        """Find all servers; whether they have come so far as to take orders."""
        lines = family(self.swap.token)
        for state in FAULT_STATES:
            name = "blocker" if state == "queued" else state
            mark = rf"fake.pyc --port (\d+) --model {name}\b"
            for pid, line in lines.items():
                if match := re.search(mark, line):
                    self.servers[state] = pid, int(match[1])
        return len(self.servers) == 6 and takes_orders(self.servers["loading"][0])

    # the fault

    def _strike(self):
        strike, self._heal = FAULTS[self.fault]
        strike(self)
        is_left = self.fault == "client leaves"
        for state in () if is_left else ("idle", "sleeping"):
            self.clients[state].ask(**FAULT_WISHES.get(self.fault, {}))
        if is_left:
            eventually(lambda: not self._waiting())
        self.clients["queued"].done.wait(0.3)
        self.swap.gate.touch()
        self.stream.close()

    # after

    def _look(self):
        for client in self.clients.values():
            client.done.wait(FAULT_BOUND if client.is_asking else 0)
        is_end = "SIGTERM" in self.fault
        if not is_end:
            self._heal(self)
        look = self._end if is_end else self._rest
        with contextlib.suppress(AssertionError):  # clients may hear of it first
            eventually(lambda: is_as_expected(self.fault, self._rows(look())), 3.0)
        rows = self._rows(look())
        if not is_end:
            self._ask_again()
        return rows

    def _rows(self, states):
        self.log_text = self.swap.log()[self.mark :]
        return [self._row(state, states[state]) for state in FAULT_STATES]

    def _end(self):
        status = self.swap.process.wait(FAULT_BOUND)
        return dict.fromkeys(FAULT_STATES, f"exit {status}")

    def _rest(self):
        eventually(self._is_at_rest, FAULT_BOUND)
        return self.swap.states()

    def _is_at_rest(self):
        running = self.swap.get("/running").json()["running"]
        return not {"starting", "stopping"} & {each["state"] for each in running}

    def _row(self, state, after):
        """A line of the table."""
        names = f"{state}|blocker" if state == "queued" else state
        lines = re.findall(rf"(?m)^\S+ (?:{names})\b.*", self.log_text)
        client = FAULT_NONSENSE.get((self.fault, state)) or self.clients[state].cell()
        return [self.fault, state, client, fault_words("\n".join(lines)), after]

    def _ask_again(self):
        """After the fault each model serves."""
        again = [FaultClient(self.swap, state) for state in FAULT_STATES]
        for client in again:
            client.ask()
        for client in again:
            client.done.wait(FAULT_BOUND)
            evidence = f"{client.model}: {client.data}\n{self.swap.log()}"
            assert client.outcome == "200", evidence


def fault_words(text):
    """Those of FAULT_WORDS that are in this text."""
    return ", ".join(word.strip() for word in FAULT_WORDS if word in text)


class FaultClient:
    """A client that asks for one model, on a connection it had before the fault."""

    def __init__(self, swap, model):
        self.model = model
        self.connection = swap.connect(FAULT_BOUND)
        self.has_begun, self.done = threading.Event(), threading.Event()
        self.outcome, self.data = "-", b""
        self.is_asking = False
        self.tag = f"mark-{random.randrange(10**9)}"

    def ask(self, **wish):
        """Ask; `outcome` will say how that ended."""
        self.is_asking, self.outcome = True, "hangs"
        threading.Thread(target=self._ask, args=(wish,), daemon=True).start()

    def _ask(self, wish):
        body = {**wish, **chat_body(self.model, tag=self.tag)}
        try:
            with self.connection as connection:
                connection.send("POST", CHAT, body)
                self.outcome = self._hear(connection)
        except socket.timeout:
            pass
        except (BrokenAnswer, OSError):
            self.outcome = "event, cut" if b'data: {"error"' in self.data else "cut"
        finally:
            self.has_begun.set()
            self.done.set()

    def _hear(self, connection):
        status, headers = connection.head()
        for piece in connection.pieces(status, headers):
            self.data += piece
            self.has_begun.set()
        if status != 200:
            return str(status)
        marks = f"{self.model} ".encode(), self.tag.encode()
        is_ours = all(mark in self.data for mark in marks)
        return "200" if is_ours else f"another's answer: {self.data}"

    def cell(self):
        """The outcome, with the reason that was given, in short."""
        if self.outcome in ("200", "cut", "-"):
            return self.outcome
        return f"{self.outcome}: {fault_words(self.data.decode('latin-1'))}"


def takes_orders(pid):
    """Whether a fake server has installed its last handler."""
    caught = re.search(rb"SigCgt:\s+(\w+)", Path(f"/proc/{pid}/status").read_bytes())
    return int(caught[1], 16) >> (signal.SIGRTMIN + max(fake.ORDERS) - 1) & 1


def is_gone(pid):
    """Whether the process is dead, buried or not."""
    stat = llmswap.process_stat(pid)
    return stat is None or stat.state in "ZX"


def is_stopped(pid):
    """Whether none of its threads can run."""
    with contextlib.suppress(OSError):  # a thread ended meanwhile
        stats = [path.read_bytes() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
        return all(b") T " in stat for stat in stats)


def signal_servers(plight, number):
    for pid, _ in reversed(plight.servers.values()):  # first those that end soon
        os.kill(pid, number)


def strike_signal(number):
    """Signal the servers, and wait until it is known that they are dead; a request that
    comes sooner is served, too, but logged otherwise."""

    def strike(plight):
        signal_servers(plight, number)
        for state in ("idle", "sleeping"):
            eventually(lambda: f"{state} ended by itself" in plight.swap.log())

    return strike


def strike_order(name):
    """Order it, and wait until it is obeyed."""

    def strike(plight):
        signal_servers(plight, order_to(name))
        for pid, port in plight.servers.values():
            eventually(lambda: is_gone(pid) or is_obeyed(name, port))

    return strike


def is_obeyed(order, port):
    with contextlib.suppress(OSError):
        with socket.create_connection(("127.0.0.1", port), 5) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            return order == "mad" and sock.recv(100) == fake.RUBBISH[:100]
    return order == "deaf"


def strike_stop(plight):
    """Stop the servers: a thread takes the signal, the others stop a little later."""
    signal_servers(plight, signal.SIGSTOP)
    for pid, _ in plight.servers.values():
        eventually(lambda: is_gone(pid) or is_stopped(pid))


def strike_late(plight):
    """Stopped for longer than it takes to be suspected, for less than hang-timeout."""
    strike_stop(plight)
    threading.Timer(0.6, signal_servers, (plight, signal.SIGCONT)).start()


def strike_port(plight):
    """A stranger takes the port before the backend, or after the backend's death."""
    for state, stranger in plight.strangers.items():
        pid, stranger.port = plight.servers[state]
        if state != "loading":
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: not is_listening(stranger.port))
        stranger.listen()


def heal_port(plight):
    for stranger in plight.strangers.values():
        assert not re.search(b"completions", stranger.heard()), "a stranger was asked"


def rename(old, new):
    def act(plight):
        program = plight.swap.program
        program.with_suffix(old).rename(program.with_suffix(new))

    return act


def limit(kind, soft, victims=FAULT_STATES):
    """Set a soft limit until the clients of these states have been answered."""

    def strike(plight):
        plight.limits = resource.prlimit(plight.swap.pid, kind)
        resource.prlimit(plight.swap.pid, kind, (soft, plight.limits[1]))
        threading.Thread(target=relent, args=(plight,), daemon=True).start()

    def relent(plight):
        for state in victims:
            plight.clients[state].done.wait(FAULT_BOUND)
        heal(plight)

    def heal(plight):
        resource.prlimit(plight.swap.pid, kind, plight.limits)

    return strike, heal


def strike_fork(plight, soft=0):
    """Allow no further process or thread. The process's own user may set that."""
    user = {"user": FAULT_NOBODY} if os.getuid() == 0 else {}
    words = ["prlimit", "--pid", str(plight.swap.pid), f"--nproc={soft}:"]
    subprocess.run(words, check=True, **user)


def heal_fork(plight):
    text = Path(f"/proc/{plight.swap.pid}/limits").read_text()
    strike_fork(plight, re.search(r"Max processes +\S+ +(\S+)", text)[1])


def strike_file(name):
    return lambda plight: (plight.swap.folder / name).touch()


def strike_sleep(plight):
    """Stop everything for a moment, in which the clocks go on by an hour."""
    pids = [plight.swap.pid, *(pid for pid, _ in plight.servers.values())]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    (plight.swap.folder / "slept").touch()
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def strike_leave(plight):
    for client in plight.clients.values():
        if client.is_asking:
            client.connection.sock.shutdown(socket.SHUT_RDWR)


def strike_reload(plight):
    other = plight.swap.fake + " --lines 1"
    plight.swap.reload(plight.swap.text.replace("FAKE", other))
    eventually(lambda: "(reload)" in plight.swap.log())


def strike_term(times):
    def strike(plight):
        for _ in range(times):
            plight.swap.process.terminate()
            time.sleep(0.2)

    return strike


def strike_restart(plight):
    plight.swap.kill()
    eventually(lambda: not family(plight.swap.token), 2)


def nothing(plight):
    pass


FAULTS = {  # what happens, and what ends it
    "exits 0": (strike_signal(signal.SIGRTMIN + 1), nothing),
    "exits 1": (strike_signal(signal.SIGRTMIN + 2), nothing),
    "SIGKILL": (strike_signal(signal.SIGKILL), nothing),
    "hangs": (strike_stop, nothing),
    "closes socket": (strike_order("deaf"), nothing),
    "rubbish": (strike_order("mad"), nothing),
    "late": (strike_late, nothing),
    "port taken": (strike_port, heal_port),
    "binary gone": (rename("", ".away"), rename(".away", "")),
    "disk full": limit(resource.RLIMIT_FSIZE, 0),
    "fork fails": (strike_fork, heal_fork),
    "no descriptors": limit(resource.RLIMIT_NOFILE, 8, FAULT_UNSERVED),
    "clock ahead": (strike_file("ahead"), nothing),
    "clock back": (strike_file("back"), nothing),
    "machine sleeps": (strike_sleep, nothing),
    "client leaves": (strike_leave, nothing),
    "SIGHUP": (strike_reload, nothing),
    "SIGTERM": (strike_term(1), nothing),
    "SIGTERM twice": (strike_term(2), nothing),
    "restart": (strike_restart, lambda plight: plight.swap.start()),
}
FAULT_NONSENSE = {  # why the fault does not concern this state
    ("port taken", "queued"): "-: it has none yet",
    ("port taken", "unloading"): "-: it still has it",
    ("client leaves", "idle"): "-: nobody asks",
    ("client leaves", "sleeping"): "-: nobody asks",
}
FAULT_WISHES = {"disk full": {"filler": "x" * 3 * 2**20}}


def run_faults(names):
    """Yield (the plight, its rows) of each fault, four of them side by side."""
    plights = [Plight(name) for name in names]
    with ThreadPoolExecutor(4) as pool:
        yield from zip(plights, pool.map(Plight.run, plights))


def can_be_nobody():
    """Whether the limits of processes can be tried: in some containers root may not
    become another user, or that one not run this Python."""
    python = [sys.executable, "-S", "-c", ""]
    return os.getuid() != 0 or not subprocess.call([*AS_NOBODY, *python])


def faults_main(argv):
    """Let the faults named, or all, happen, and print the table; the exit status."""
    if "--help" in argv:
        print(FAULTS_USAGE)
        return 0
    names, status = argv or list(FAULTS), 0
    if "fork fails" in names and not can_be_nobody():
        print("Left out, as root cannot become another user here: fork fails")
        names = [name for name in names if name != "fork fails"]
    title = FAULT_ROW.format(*FAULT_TABLE.splitlines()[0].split(" | "))
    print(title, re.sub(r"[^|]", "-", title), sep="\n")
    for plight, rows in run_faults(names):
        print(*(FAULT_ROW.format(*row) for row in rows), sep="\n", flush=True)
        if not is_as_expected(plight.fault, rows):
            print("which is not what the table says:", *expected_rows(plight.fault))
            print(plight.log_text)
            status = 1
    return status
