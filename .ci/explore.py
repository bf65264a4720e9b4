"""The exploration: every order of events in small worlds of the scheduler."""

import itertools
import marshal
import math
import pickle

import llmswap

from walk import BROKEN, STARVED, Walk, World

ROOM = llmswap.Limits(models_max=1, patience=1.0)
HALF = dict(needs={"vram": 2})
PIN_LOADED = dict(is_pinned_once_loaded=True)
CAN_SLEEP = dict(needs={"vram": 2}, sleep_needs={"vram": 1}, can_sleep=True)


class SmallWorld:
    """Three models, the faults and operators' actions, and the kinds of tickets."""

    def __init__(self, limits=None, faults="crash", kinds=({},), reloads=(), **specs):
        self.limits = ROOM._replace(**limits or {})
        self.faults = faults.split()
        self.kinds = kinds
        self.specs = {n: llmswap.ModelSpec(**specs.get(n, {})) for n in "abc"}
        self.reloads = [self._reload(**changes) for changes in reloads]

    def _reload(self, limits=None, **changes):
        """The limits and specs after a reload, and the names of the changed models."""
        mixed = {**self.specs, **changes}
        specs = {name: spec for name, spec in mixed.items() if spec is not None}
        changed = [name for name in specs if name in changes]
        return self.limits._replace(**limits or {}), specs, changed


SMALL_WORLDS = {
    "one": SmallWorld(),
    "strict": SmallWorld(dict(patience=0.0)),
    "learned": SmallWorld(dict(patience=None)),
    "two": SmallWorld(dict(models_max=2)),
    "budget": SmallWorld(
        dict(models_max=0, budget={"vram": 3}), b=HALF, c=dict(needs={"vram": 3}),
        a=dict(needs={"vram": 1}),
    ),
    "sets": SmallWorld(dict(models_max=0, sets=(frozenset("ab"), frozenset("bc")))),
    "pin": SmallWorld(dict(models_max=2), a=dict(is_pinned=True)),
    "pin loaded": SmallWorld(
        dict(models_max=2), faults="unload reload", a=PIN_LOADED, b=PIN_LOADED,
        reloads=(dict(c=llmswap.ModelSpec(**PIN_LOADED)), dict(a=llmswap.ModelSpec())),
    ),
    "kept": SmallWorld(faults="fail unload", a=dict(keep_loaded=True)),
    "kept pinned": SmallWorld(
        dict(patience=0.0), faults="unload_all close", a=dict(keep_loaded=True),
        b=dict(keep_loaded=True, **PIN_LOADED),
    ),
    "kept asleep": SmallWorld(
        dict(models_max=0, budget={"vram": 3}), faults="",
        a=dict(keep_loaded=True, **CAN_SLEEP), b=dict(needs={"vram": 3}),
        c=dict(needs={"vram": 3}),
    ),
    "elsewhere": SmallWorld(a=dict(is_local=False)),
    "narrow": SmallWorld(a=dict(concurrency=1), b=dict(concurrency=1)),
    "idle": SmallWorld(a=dict(idle_timeout=0.5), faults="crash keep_alive"),
    "sleep": SmallWorld(
        dict(models_max=0, budget={"vram": 3}), a=CAN_SLEEP, b=CAN_SLEEP, c=CAN_SLEEP,
    ),
    "learning": SmallWorld(
        dict(models_max=0, budget={"vram": 3}), a=HALF, b=HALF, faults="learn crash",
        c=dict(needs={"vram": 1}),
    ),
    "starving": SmallWorld(dict(models_max=2), faults="starve"),
    "starving asleep": SmallWorld(
        dict(models_max=0, budget={"vram": 4}), a=CAN_SLEEP, b=CAN_SLEEP, c=CAN_SLEEP,
        faults="starve",
    ),
    "self-sleep": SmallWorld(dict(models_max=2), faults="doze doze_late"),
    "preemptible": SmallWorld(kinds=({}, dict(preemptible=True)), faults="unload"),
    "manual": SmallWorld(
        kinds=({}, dict(manual=True)), faults="unload", a=dict(stop_timeout=1.0)
    ),
    "failing": SmallWorld(faults="fail"),
    "reload": SmallWorld(
        faults="reload",
        reloads=(
            dict(a=llmswap.ModelSpec()), dict(a=None), dict(limits=dict(models_max=2)),
        ),
    ),
    "adopted": SmallWorld(dict(patience=0.0), faults="adopt crash"),
    "closing": SmallWorld(faults="close unload_all", a=dict(stop_timeout=1.0)),
    "short queue": SmallWorld(dict(queue_max=2, queue_timeout=1.0)),
}


class PlainWorld(World):
    """A world that plans nothing: each order of events is tried."""

    def after(self, *_):
        pass


class Explored(Walk):
    """One state of a small world; the random walk's events happen on demand."""

    def __init__(self, name, tickets, faults):
        self.small = SMALL_WORLDS[name]
        self.rng = None
        self._begin(self.small.limits, self.small.specs)
        self.world = PlainWorld(self.core, self._seconds, self._judge)
        self.core._numbers = iter(range(1, 1000))  # as in World
        self.core._runs = iter(range(1, 1000))
        self.left = {"tickets": tickets, "faults": faults}
        self.path = ()

    def _seconds(self, kind, name):
        return 0.0

    def events(self):
        """Yield (what may happen, whether it must in the end)."""
        for name, backend in self.world.backends.items():
            if backend.phase in ("loading", "ending", "falling asleep"):
                yield (backend.phase.split()[0], name), True
        for at, (ticket, _) in enumerate(self.leases.values()):
            yield ("finish", at), not ticket.preemptible
        if self.world.deadline < math.inf:
            yield ("wait", None), True
        if self.left["tickets"]:
            asked = itertools.product(self._askable(), self.small.kinds)
            yield from ((("ask", each), False) for each in asked)
        if self.left["faults"]:
            yield from ((("leave", at), False) for at in range(len(self.waiting)))
            for fault in self.small.faults:
                yield from (((fault, each), False) for each in self._targets(fault))

    def _askable(self):
        """The models to ask for; of equal unused ones only the first."""
        seen = []
        for name in sorted(self.specs):
            model = self.core.models[name]
            if model.changed_at is None and not model.waiting:
                if model.spec in seen and not self.small.limits.sets:
                    continue
                seen.append(model.spec)
            yield name

    def _targets(self, fault):
        backends, models = self.world.backends, self.core.models
        if phases := FAULTY_PHASES.get(fault):
            return [name for name in backends if backends[name].phase in phases]
        if fault == "adopt":
            is_used = lambda model: model.is_held or model.waiting  # noqa: E731
            return [name for name in self.specs if not is_used(models[name])]
        targets = {
            "learn": itertools.product(self.specs, (1, 3)),
            "reload": range(len(self.small.reloads)),
            "unload_all": [None],
            "close": [] if self.is_closed else [None],
        }
        return targets.get(fault, sorted(models))

    def do(self, event):
        """Let the event happen, and let the scheduler decide."""
        self.path += (event,)
        kind, target = event
        self._note(f"-- {kind} {target}")
        self.left["tickets"] -= kind == "ask"
        self.left["faults"] -= kind == "leave" or kind in self.small.faults
        backend = self.world.backends.get(target) if isinstance(target, str) else None
        EXPLORED_EVENTS[kind](self, target, backend)
        self.turn()

    def ended(self, backend):
        self._learn_of_end(backend)
        self.world.end(backend, backend.orders)

    def fail(self, name, backend):
        """The fourth failed load in a row: the next one must wait."""
        self.failures[name] += 3
        self.core.models[name].failures += 3
        self._end(backend, BROKEN)

    def sleep_or_wake(self, name, backend):
        is_up = backend.phase == "up"
        backend.phase = "asleep" if is_up else "up"
        report = self.core.slept if is_up else self.core.loaded
        report(name, backend.run, self.world.now)

    def report_late(self, name, backend):
        self.core.slept(name, backend.run, self.world.now)
        self.core.loaded(name, backend.run, self.world.now)

    def wait(self):
        self.world.now = self.world.deadline

    def close(self):
        self.is_closed = True
        self.core.close(BROKEN)  # pickled, unlike ShuttingDown

    def key(self):
        """All of this state that matters to what can follow, as bytes."""
        core, now = self.core, self.world.now
        held = sorted(core.held.values(), key=llmswap.ModelState.last_used)
        ages = [(model.name, model.last_grant < model.ready_at) for model in held]
        models = [self._key_of(model, now) for model in core.models.values()]
        tickets = [
            (t.model.name, age(t.arrived, now), t.preemptible, t.manual)
            for t in core._queue.values()
        ]
        leases = sorted(
            (of.name, self.world.backends.get(of.name) is of, ticket.preemptible)
            for ticket, of in self.leases.values()
        )
        left, limit = [*self.left.values()], core.limits.models_max
        rest = left, self.is_closed, self.is_keep_loaded_paused, limit
        return marshal.dumps((ages, models, tickets, leases, rest), 2)

    def _key_of(self, model, now):
        backend = self.world.backends.get(model.name)
        drains_for = model.drains_for and list(self.waiting).index(
            model.drains_for.number
        )
        row = [
            model.name, model.state.value, model.changed_at is None, model.in_flight,
            model.preemptible, model.failures, ahead(model.retry_at, now),
            ahead(model.keep_loaded_at, now), model.is_released,
            repr(model.spec), model.evicted_for and model.evicted_for.name,
            repr(self.specs.get(model.name)),
            model.retry_victim and model.retry_victim.name,
            model.load_seconds, model.stop_seconds,
            sorted(min(round(pause, 6), 8.0) for pause in model.pauses),
            None if model.pause_began is None else age(model.pause_began, now),
        ]
        if backend is None:
            return row
        return row + [
            age(model.ready_at, now), age(model.idle_since, now), model.idle_timeout,
            age(model.started_at, now) if backend.phase == "loading" else None,
            age(model.changed_at, now) if backend.phase.endswith("ing") else None,
            None if model.unload_by is None else ahead(model.unload_by, now),
            drains_for,
            model.stop_cause, model.ready_at > -math.inf, model.is_asleep,
            repr(model.replacement),
            backend.phase, backend.has_served, backend.was_asleep,
            backend in self.departing, backend in self.replaced, backend in self.cut_at,
            repr(self.holds[model.name]),
            [t.arrived <= backend.ready_at for t in self._waiting_for(model.name)],
        ]


FAULTY_PHASES = {  # a fault: the phases in which it can happen to a backend
    "crash": ("loading", "up", "asleep", "falling asleep", "ending"),
    "fail": ("loading",),
    "starve": ("loading",),
    "doze": ("up", "asleep"),
    "doze_late": ("ending",),
}
EXPLORED_EVENTS = {  # functions of the state, the target, and its backend if any
    "loading": lambda state, name, of: state.world._come_up(of, of.orders),
    "ending": lambda state, name, of: state.ended(of),
    "falling": lambda state, name, of: state.world._sleep(of, of.orders),
    "finish": lambda state, at, _: state._release(list(state.leases)[at]),
    "wait": lambda state, *_: state.wait(),
    "ask": lambda state, target, _: state._ask(*target),
    "leave": lambda state, at, _: state._leave(list(state.waiting.values())[at]),
    "crash": lambda state, name, of: state._end(of, BROKEN),
    "fail": Explored.fail,
    "starve": lambda state, name, of: state._end(of, STARVED),
    "learn": lambda state, each, _: state._learn_needs(each[0], {"vram": each[1]}),
    "doze": Explored.sleep_or_wake,
    "doze_late": Explored.report_late,
    "unload": lambda state, name, _: state._unload_one(name),
    "unload_all": lambda state, *_: state._unload_all(),
    "keep_alive": lambda state, name, _: state.core.keep_alive(name, 0),
    "reload": lambda state, at, _: state._reload(*state.small.reloads[at]),
    "adopt": lambda state, name, _: state._adopt(name),
    "close": lambda state, *_: state.close(),
}


def age(moment, now):
    return min(round(now - moment, 6), llmswap.MAX_PATIENCE)


def ahead(moment, now):
    return max(round(moment - now, 6), 0.0)


def explore(name, tickets, faults):
    """Go through every state of a small world; return of each the states that must
    follow, and the trace if a ticket waits.

    An AssertionError tells the events that lead to a fault.
    """
    start = Explored(name, tickets, faults)
    start.turn()
    numbers, followers, traces = {start.key(): 0}, [[]], [None]
    stack = [(0, start)]
    while stack:
        number, state = stack.pop()
        events = list(state.events())
        frozen = pickle.dumps(state, -1) if len(events) > 1 else None
        twins = [state, *(pickle.loads(frozen) for _ in events[1:])]
        for (event, is_due), twin in zip(events, twins):
            twin.do(event)
            follower = numbers.setdefault(twin.key(), len(numbers))
            if follower == len(followers):
                followers.append([])
                traces.append(twin.tell("waits") if twin.waiting else None)
                stack.append((follower, twin))
            if is_due:
                followers[number].append(follower)
    return followers, traces
