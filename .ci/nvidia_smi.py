"""A stand-in for nvidia-smi, with one GPU of 24 GiB: nvidia_smi.py FOLDER [QUERY].

The file `gpu` in FOLDER says what each process holds of it: the WORD of a command line
that makes a process one of ours, the FORMAT of a row, and lines with another WORD and
its MiB. The queries that were answered are appended to the file `asked` there.
"""

import os
import sys


def held_by_processes(mark, sizes):
    """Yield (pid, MiB) of each process."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                words = file.read().split("\0")
        except OSError:
            continue
        for word in sizes if mark in words else ():
            if word in words:
                yield pid, int(sizes[word])


folder, query = (*sys.argv[1:], "")[:2]
with open(f"{folder}/gpu") as file:
    mark, shape, *lines = file.read().splitlines()
rows = list(held_by_processes(mark, dict(line.rsplit(" ", 1) for line in lines)))
if query.startswith("--query-gpu"):
    print(f"24576, {sum(size for _, size in rows)}")
else:
    print(*(shape % row for row in rows), sep="\n")
sys.stdout.flush()
with open(f"{folder}/asked", "a") as file:
    file.write(f"{query}\n")
