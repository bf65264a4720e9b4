"""A model server that maps a model's files slowly, as llama-server does, then is the
fake: mapper.py --map-seconds S --read FILE,FILE --half FILE --then FAKE [FLAG ...]

Halfway it waits until the last of these files exists."""

import mmap
import os
import sys
import time

words = sys.argv[1:]
seconds, paths, half, fake = (
    words[words.index(f"--{name}") + 1]
    for name in ("map-seconds", "read", "half", "then")
)
mapped = []
for path in paths.split(","):
    with open(path, "rb") as file:
        mapped.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
for step in range(40):
    while step == 20 and not os.path.exists(half):
        time.sleep(0.01)
    for each in mapped:
        part = len(each) // 40
        sum(each[step * part : (step + 1) * part : 4096])
    time.sleep(float(seconds) / 40)
os.execv(sys.executable, [sys.executable, "-I", "-S", fake, *words])
