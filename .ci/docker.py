"""A stand-in for the client of Docker: docker.py run|stop WORD...

The container is a process that is no child of what started it. $DOCKER_STATE holds a
file for each; $DOCKER_RUNS is what runs in it.
"""

import os
import signal
import subprocess
import sys
import time

words, state = sys.argv[2:], os.environ["DOCKER_STATE"]


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
    command = [sys.executable, "-I", "-S", os.environ["DOCKER_RUNS"], "--port"]
    command += [value_of("-p").split(":")[1], *after]
    box = subprocess.Popen(command, start_new_session=True)
    with open(f"{state}/{name}", "w") as file:
        file.write(str(box.pid))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: box.send_signal(number))
    status = box.wait()
    os.remove(f"{state}/{name}")  # as --rm has it
    sys.exit(status)


stop(words[0]) if sys.argv[1] == "stop" else run(value_of("--name"))
