"""A stand-in for nvidia-smi, with one GPU of 24 GiB: nvidia_smi.py FOLDER [QUERY].

The file `gpu.json` in FOLDER says what each process holds of it: {"mark": WORD of the
command line that makes it one of ours, "sizes": {another WORD: MiB}, "row": FORMAT}.
The queries are appended to the file `asked` there.
"""

import json
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
with open(f"{folder}/asked", "a") as file:
    file.write(f"{query}\n")
with open(f"{folder}/gpu.json") as file:
    shown = json.load(file)
rows = list(held_by_processes(shown["mark"], shown["sizes"]))
if query.startswith("--query-gpu"):
    print(f"24576, {sum(size for _, size in rows)}")
else:
    print(*(shown["row"] % row for row in rows), sep="\n")
