"""A stand-in for systemctl that keeps its units in the folder $STAND_IN."""

import os, sys, time  # and no more: each call is a start of Python

words = sys.argv[1:]
folder = os.environ["STAND_IN"]
with open(folder + "/calls", "a") as calls:
    calls.write(" ".join(words) + "\n")
cut = words.index("--")
options, names = words[:cut], words[cut + 1 :]
verb = next(word for word in options if not word.startswith("-"))
assert options[0] in ("--user", "--system")


def path(name, suffix):
    return os.path.join(folder, name + "." + suffix)


def read(name, suffix):
    try:
        with open(path(name, suffix)) as file:
            return file.read().strip()
    except OSError:
        return ""


def alive(name):
    try:
        with open("/proc/%s/stat" % (read(name, "pid") or "x")) as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def state(name):
    if alive(name):
        return "active"
    if os.path.exists(path(name, "restarts")):
        return "activating"
    status = read(name, "status")
    if not status and read(name, "pid"):
        return "active"  # it ended, which systemd has not noticed yet
    return "failed" if status not in ("", "0") else "inactive"


def stop(name, number):
    if alive(name):
        os.kill(int(read(name, "pid")), number)
        while alive(name) or not read(name, "status"):
            time.sleep(0.01)
        open(path(name, "status"), "w").write("0")


def start(name):
    for suffix in "status", "pid":
        if os.path.exists(path(name, suffix)):
            os.unlink(path(name, suffix))
    script = "%s & echo $! >%s; wait $!; s=$?; sleep 0.1; echo $s >%s" % (
        read(name, "cmd"),
        path(name, "pid"),
        path(name, "status"),
    )
    if not os.fork():
        os.setsid()
        log = os.open(path(name, "log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for fd, target in enumerate((os.open("/dev/null", 0), log, log)):
            os.dup2(target, fd)
        os.execv("/bin/sh", ["/bin/sh", "-c", script])
    while not read(name, "pid"):
        time.sleep(0.005)
    time.sleep(0.02)


for name in names:
    if os.path.exists(path(name, "hang-" + verb)):
        time.sleep(1000)
    if verb == "is-active":
        print(state(name))
    elif verb == "show":
        print("LoadState=" + ("loaded" if read(name, "cmd") else "not-found"))
        now = state(name)
        print("ActiveState=" + now)
        is_known = now == "active" and not os.path.exists(path(name, "forks"))
        if not os.path.exists(path(name, "target")):
            print("MainPID=" + (read(name, "pid") if is_known else "0"))
        status = "0" if now == "activating" else read(name, "status") or "0"
        print("Result=" + ("success" if status == "0" else "exit-code"))
        print("ExecMainStatus=" + status)
    elif verb == "reset-failed":
        open(path(name, "status"), "w").write("0")
    elif verb == "start" and not read(name, "cmd"):
        sys.exit("Unit %s not found." % name)
    elif verb == "start" and state(name) == "failed":
        sys.exit("Start request repeated too quickly.")
    elif verb == "start" and not alive(name):
        start(name)
    elif verb == "restart":
        open(path(name, "restarts"), "w").close()
        stop(name, 15)
        start(name)
        os.unlink(path(name, "restarts"))
    elif verb == "stop":
        stop(name, 15)
    elif verb == "kill":
        stop(name, 9)
