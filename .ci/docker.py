"""A stand-in for the client of Docker: docker.py STATE PROGRAM run|stop WORD...

The container is a process that is no child of what started it. The folder STATE holds a
file for each; PROGRAM is what runs in it.
"""

# no more imports: each call is a start of Python
import os
import signal
import sys
import time

state, program, verb, *words = sys.argv[1:]


def value_of(name):
    return words[words.index(name) + 1]


def stop(name):
    with open(f"{state}/{name}") as file:
        pid = int(file.read())
    os.kill(pid, signal.SIGTERM)
    while os.path.exists(f"/proc/{pid}/cwd"):
        time.sleep(0.01)
    print(name)


def run(name):
    """Be the client of a container until that ends."""
    if os.path.exists(f"{state}/{name}"):
        sys.exit("docker: the container name is already in use")
    after = words[words.index("--port") + 2 :]  # the port within is not that without
    command = [sys.executable, "-I", "-S", program, "--port"]
    command += [value_of("-p").split(":")[1], *after]
    box = os.fork()
    if not box:
        os.setsid()
        os.execv(sys.executable, command)
    os.makedirs(state, exist_ok=True)
    with open(f"{state}.{name}", "w") as file:
        file.write(str(box))
    os.replace(f"{state}.{name}", f"{state}/{name}")  # once it is whole
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(box, number))
    status = os.waitpid(box, 0)[1]
    os.remove(f"{state}/{name}")  # as --rm has it
    sys.exit(os.waitstatus_to_exitcode(status))


stop(words[0]) if verb == "stop" else run(value_of("--name"))
