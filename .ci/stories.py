"""The stories of the scheduler: an event a line, and the decisions that follow it."""

import math

import llmswap
from walk import BROKEN, STARVED, in_words


class Story:
    """A scheduler with events and decisions written as words."""

    def __init__(self, setting):
        specs, limits = setting_of(setting)
        self.core = llmswap.Scheduler(limits, specs)
        self.tickets = []

    def tell(self, now, text):
        """Let the event happen; return the decisions, and the next deadline."""
        words = text.lstrip("+").split()
        if words[0] in ("loaded", "slept", "crashed", "exited"):
            words.insert(0, "report")
        method = getattr(self, "_" + words[0])
        answer = method(float(now), *words[1:])
        if answer is not None:
            return answer, math.inf
        return ([], math.inf) if text.startswith("+") else self.decide(float(now))

    def decide(self, now):
        decisions, deadline = self.core.decide(now)
        return [in_words(decision) for decision in decisions], deadline

    def _wait(self, now):
        """Nothing but time passes."""

    def _ask(self, now, name, kind=None):
        refusal = llmswap.BadRequest("not loaded")
        kinds = {"no-load": {"load_refusal": refusal}, None: {}}.get(kind, {kind: True})
        self.tickets.append(self.core.submit(name, now, **kinds))

    def _end(self, now, number):
        self.core.finish(self.tickets[int(number) - 1], now)

    def _busy(self, now, name):
        self._ask(now, name)
        words, _ = self.decide(now)
        self._report(now, "loaded", name)
        words += self.decide(now)[0]
        granted = f"grant {len(self.tickets)}"
        assert granted in words
        return [word for word in words if word not in (granted, f"start {name}")]

    def _serve(self, now, name, end):
        words = self._busy(now, name)
        self._end(float(end), len(self.tickets))
        return words + self.decide(float(end))[0]

    def _fail(self, now, name, times=1):
        for _ in range(int(times)):
            self._ask(now, name)
            assert self.decide(now)[0] == [f"start {name}"]
            self._report(now, "exited", name, "broken")
            refusal = f"refuse {len(self.tickets)}: model_start_failed"
            assert self.decide(now)[0] == [refusal]
        return []

    def _report(self, now, event, name, *failure):
        """The backend of this run is loaded, has slept, crashed or exited."""
        problems = [{"broken": BROKEN, "starved": STARVED}[word] for word in failure]
        getattr(self.core, event)(name, self.core.models[name].run, now, *problems)

    def _learn(self, now, name, amount):
        self.core.learn(name, {"vram": int(amount)})

    def _adopted(self, now, name):
        self.core.adopted(name, now)

    def _unload(self, now, name):
        self.core.unload(name, now, llmswap.ModelUnloaded(name))

    def _keep(self, now, name, seconds):
        self.core.keep_alive(name, float(seconds))

    def _reload(self, now, *words):
        setting, _, changed = " ".join(words).partition(" changed ")
        specs, limits = setting_of(setting)
        self.core.configure(limits, specs, changed.split())

    def _soonest(self, now, name, _, *names):
        assert self.core.choose(names).name == name


def setting_of(text):
    """The specs and limits in a line such as "a b(concurrency=1) | patience=0"."""
    models, _, limits = text.partition("|")
    specs = {}
    for word in models.split():
        name, _, pairs = word.rstrip(")").partition("(")
        pairs = pairs.replace("sleeps", "can_sleep=1,needs=8,sleep_needs=2")
        specs[name] = llmswap.ModelSpec(**values_of(pairs.replace(",", " ")))
    return specs, llmswap.Limits(**values_of(limits))


def values_of(text):
    values = dict(pair.split("=") for pair in text.split())
    for key, value in values.items():
        if key in ("needs", "sleep_needs", "budget"):
            values[key] = {"vram": int(value)}
        elif key == "sets":
            values[key] = tuple(map(frozenset, value.split(",")))
        else:
            values[key] = float(value)
    return values
