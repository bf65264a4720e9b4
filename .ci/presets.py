"""Random files for llama-server and llmswap, with as many traps as fit, and what
llama-server's router makes of a file."""

import os
import random
import subprocess

from test_llmswap import LLAMA_SERVER, ask, eventually, free_port, is_listening

TRAPS = [
    "1", "0", "on", "off", "true", "false", "enabled", "disabled", "True", "OFF", "no",
    "yes", "auto", "", " ", "a;b", "a#b", "a ; b", "a\t# b", ";", "# c", '"quoted"',
    '"a b"', '{"x":"a#b"}', '{"x": 1}', "x\\", "back\\slash", "a = b", "=", "==c",
    "${PORT}", "$${x}", "${env.HOME}", "é 日本", "a  b", "[x]", "a]b", "-1", "--jinja",
    "a.b=bool:false", "/m/a b.gguf", "~/x", "a\x0bb", "a\u2028b", "a\x85b",
    "\u00a0nbsp\u00a0", "\x0c", "\x0ca\x0c # c", "a,b,,c", "'", '"', "`", "$HOME",
]
CONFIG_NAMES = [
    "m{n}", "m {n}", " m{n} ", "\tm{n}\t", "m{n}:q4_k_m", "u/r{n}:UD-Q4_K_XL", "m{n}#y",
    "m{n};z", "m{n}\nb", "é{n}:é", "m{n}:", "m{n}:x y", "m{n}:a-b-c", "m{n}:v1.5",
    "a:b{n}:c", "M{n}", ":t{n}", "m{n}[", "m{n}=x", "*{n}", "m{n}:Q4_K_M", "m{n}:a.b-",
    "m{n}:-x", "m{n}:ſ-ſ", "m{n}:-aſ", "m{n}:a\nb-c",
]
ALIASES = ["alias", "a", "LLAMA_ARG_ALIAS"]
FORGIVEN = ["load-on-startup", "stop-timeout", "dedup-cache-models", "version",
            "__PRESET_LOAD_ON_STARTUP", "__PRESET_STOP_TIMEOUT"]


class RandomPreset:
    """Writes files that llama-server reads."""

    def __init__(self, seed, table):
        self.chance = random.Random(seed)
        options = {
            key.replace("-", "_") if key.isupper() else key: option
            for key, option in sorted(table.by_key.items())
        }
        self.options = {key: option for key, option in options.items()
                        if option.values < 2 and key not in ALIASES}
        self.keys = [*self.options]

    def text(self, sections=300):
        lines = [self.line(self.keys) for _ in range(self.chance.choice([0, 3]))]
        for number in range(sections):
            lines += self.section(number, sections)
        return self.chance.choice(["\n", "\r\n", "\r"]).join(lines)

    def section(self, number, sections):
        number = self.chance.choice([number, number, self.chance.randrange(sections)])
        name = self.chance.choice(CONFIG_NAMES).format(n=number)
        if self.chance.random() < 0.02:
            name = self.chance.choice(["*", "*", "default"])
        head = self.chance.choice(["[%s]", "[ %s]", "[%s] ; c", "[%s]#c"])
        yield head % name
        if name != "*" and self.chance.random() < 0.1:
            alias = f"x{self.chance.random()}, y{self.chance.random()}#c"
            yield f"{self.chance.choice(ALIASES)} = {alias}"
        keys = self.some_keys()
        for _ in range(self.chance.randrange(8)):
            yield self.chance.choice([self.line(keys)] * 4 + ["", "; c", "  # c", "\t"])

    def some_keys(self):
        """Return a few keys: of many options, or all the spellings of two."""
        few = self.chance.sample(self.keys, 2)
        options = [self.options[key] for key in few]
        spellings = [key for key in self.keys if self.options[key] in options]
        many = [*self.chance.sample(self.keys, 6), "model", "c", "jinja"]
        return self.chance.choice([many, many, spellings])

    def line(self, keys):
        key, value = self.chance.choice(keys), self.chance.choice(TRAPS)
        if self.chance.random() < 0.05:  # but no word that would start a model
            key = self.chance.choice(FORGIVEN)
            value = self.chance.choice(["yes", "x", "", "off", "7", "soon # no"])
        gap = [self.chance.choice(["", " ", "\t", "  "]) for _ in range(3)]
        return f"{key}{gap[0]}={gap[1]}{value}{gap[2]}"


def argvs_of_router(path, *options):
    """{id: argv} of the models that llama-server's router makes of the file."""
    port = free_port()
    environ = {name: value for name, value in os.environ.items()
               if not name.startswith("LLAMA_ARG_")}
    environ.update(HF_HOME=str(path.parent), LLAMA_CACHE=str(path.parent))
    argv = [LLAMA_SERVER, "--models-preset", str(path), "--port", str(port), *options]
    with open(path.with_suffix(".log"), "wb") as log:
        router = subprocess.Popen(argv, stdout=log, stderr=log, env=environ)
    try:
        models = eventually(lambda: is_listening(port) and ask(
            port, "GET", "/models").json().get("data"))
    finally:
        router.kill()
        router.wait()
    return {model["id"]: model["status"]["args"] for model in models}
