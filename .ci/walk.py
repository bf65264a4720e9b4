"""The walk: random events upon a scheduler in a world of its own, and their judge."""

import collections
import heapq
import math
import random

import llmswap

BROKEN = llmswap.LoadFailed("exit status 1: a file is broken")
STARVED = llmswap.LoadFailed("exit status 1: out of memory", is_out_of_memory=True)
WALK_NAMES = "abcdef"
LONGEST = {"load": 3.0, "wake": 1.0, "stop": 2.0, "sleep": 1.0, "request": 4.0}


def in_words(decision):
    if isinstance(decision, llmswap.Grant):
        return f"grant {decision.ticket.number}"
    if isinstance(decision, llmswap.Refuse):
        return f"refuse {decision.ticket.number}: {decision.problem.code}"
    if isinstance(decision, llmswap.Start):
        return f"{'wake' if decision.is_wake else 'start'} {decision.name}"
    aim = f" for {decision.newcomer}" if decision.newcomer else ""
    return f"{'sleep' if decision.to_sleep else decision.cause} {decision.name}{aim}"


class World:
    """What surrounds a scheduler: a clock, backends that take time, requests that end.

    `seconds(kind, name)` says how long a load, stop, sleep, wake or request takes.
    `witness(decision)` sees each decision before it is carried out.
    """

    def __init__(self, scheduler, seconds, witness=lambda decision: None):
        self.scheduler = scheduler
        self.seconds = seconds
        self.witness = witness
        self.now = 0.0
        self.deadline = math.inf
        self.has_ended = False  # a backend, since the last look
        self.backends = {}  # name -> SimulatedBackend
        self.starts = 0
        self._agenda = []
        self._numbers = iter(range(10**9))  # pickled, unlike itertools.count

    def after(self, seconds, action, *arguments):
        moment = self.now + seconds
        heapq.heappush(self._agenda, (moment, next(self._numbers), action, arguments))

    def next_moment(self):
        planned = self._agenda[0][0] if self._agenda else math.inf
        return min(planned, self.deadline)

    def run_agenda(self):
        while self._agenda and self._agenda[0][0] <= self.now:
            _, _, action, arguments = heapq.heappop(self._agenda)
            action(*arguments)

    def turn(self):
        decisions, self.deadline = self.scheduler.decide(self.now)
        for decision in decisions:
            self.witness(decision)
            self._carry_out(decision)
        return decisions

    def _carry_out(self, decision):
        if isinstance(decision, llmswap.Start):
            self._start(decision)
        elif isinstance(decision, llmswap.Stop):
            self._stop(self.backends[decision.name], decision.to_sleep)
        elif decision.ticket.waiter is not None:
            decision.ticket.waiter(decision)

    def _start(self, order):
        self.starts += 1
        if order.is_wake:
            backend = self.backends[order.name]
        else:
            backend = SimulatedBackend(order.name, order.run)
            self.backends[order.name] = backend
        backend.obey("loading")
        kind = "wake" if order.is_wake else "load"
        seconds = self.seconds(kind, backend.name)
        self.after(seconds, self._come_up, backend, backend.orders)

    def _stop(self, backend, to_sleep):
        backend.obey("falling asleep" if to_sleep else "ending")
        action, kind = (self._sleep, "sleep") if to_sleep else (self.end, "stop")
        self.after(self.seconds(kind, backend.name), action, backend, backend.orders)

    def _come_up(self, backend, orders):
        if backend.orders == orders:
            backend.phase, backend.ready_at = "up", self.now
            self.scheduler.loaded(backend.name, backend.run, self.now)

    def _sleep(self, backend, orders):
        if backend.orders == orders:
            backend.phase = "asleep"
            self.scheduler.slept(backend.name, backend.run, self.now)

    def end(self, backend, orders, failure=None):
        """The backend's process is gone, unless it had another order meanwhile.

        Return the model that is to make room for another try, if there is one.
        """
        if backend.orders == orders and self.backends.get(backend.name) is backend:
            del self.backends[backend.name]
            self.has_ended = True
            return self.scheduler.exited(backend.name, backend.run, self.now, failure)


class SimulatedBackend:
    """One run of a backend: loading, up, falling asleep, asleep, ending, gone."""

    def __init__(self, name, run, phase="loading"):
        self.name = name
        self.run = run
        self.phase = phase
        self.orders = 0
        self.has_served = False
        self.was_asleep = False  # when it was told to stop
        self.ready_at = -math.inf

    def obey(self, phase):
        self.phase = phase
        self.orders += 1


def random_limits(rng):
    budget = rng.choice(({}, {"vram": 8}, {"vram": 8, "ram": 6}))
    sets = rng.choice(((), (), ("ab", "bcd", "ef"), ("abc", "cde")))
    return llmswap.Limits(
        models_max=rng.choice((0, 1, 1, 2, 3)),
        budget=budget,
        sets=tuple(frozenset(each) for each in sets),
        patience=rng.choice((None, None, 0.0, 0.5, 5.0)),
        queue_max=rng.choice((0, 2, 6, 512)),
        queue_timeout=rng.choice((0.0, 0.0, 0.0, 3.0, 10.0)),
    )


def random_spec(rng, limits):
    needs = {
        resource: rng.randint(1, amount)
        for resource, amount in limits.budget.items()
        if rng.random() < 0.8
    }
    return llmswap.ModelSpec(
        needs=needs,
        sleep_needs={each: rng.randint(0, needs[each]) // 2 for each in needs},
        is_local=rng.random() < 0.85,
        is_pinned=rng.random() < 0.15,
        is_pinned_once_loaded=rng.random() < 0.15,
        keep_loaded=rng.random() < 0.2,
        can_sleep=rng.random() < 0.3,
        concurrency=rng.choice((0, 0, 1, 2)),
        idle_timeout=rng.choice((0.0, 0.0, 0.5, 5.0)),
        stop_timeout=rng.choice((0.0, 1.0, 10.0)),
    )


def demand(name, spec):
    return llmswap.ModelUsage(name, int(spec.is_local), spec.needs)


def usable(limits, specs):
    """Those of the specs that fit beside all pinned ones, as the configuration does it.

    A model that could not be pinned beside the other pinned ones is not pinned.
    """
    pins, fit = [], {}
    for name, spec in specs.items():
        if spec.is_pinned and limits.allow(pins + [demand(name, spec)]):
            pins.append(demand(name, spec))
        else:
            specs = {**specs, name: spec._replace(is_pinned=False)}
    for name, spec in specs.items():
        other_pins = [pin for pin in pins if pin.name != name]
        if limits.allow(other_pins + [demand(name, spec)]):
            fit[name] = spec
    return fit


class Walk:
    """Random events upon a scheduler in its own world, and a judge of what it does.

    What the judge knows it has seen itself: it reads the scheduler's counters only to
    compare them with its own. A calm walk has clients and time, and no other events.
    """

    def __init__(self, seed, is_calm=False):
        self.rng = random.Random(seed)
        self.is_calm = is_calm
        limits = random_limits(self.rng)
        if is_calm:
            limits = limits._replace(queue_max=0, queue_timeout=0.0)
        self._begin(limits, usable(limits, self._random_specs(limits)))

    def _begin(self, limits, specs):
        self.budget, self.specs = limits.budget, specs
        self.core = llmswap.Scheduler(limits, self.specs)
        self.world = World(self.core, self._seconds, self._judge)
        self.holds = {}  # name -> the spec of what is held
        self.waiting = {}  # number -> Ticket
        self.leases = {}  # number -> (Ticket, SimulatedBackend)
        self.bounds = {}  # number -> the moment by which it must be settled
        self.cut_at = {}  # SimulatedBackend -> when its leases may be cut
        self.departing = set()  # backends that are to go, by hand or for a reload
        self.replaced = set()  # those that go for a reload
        self.newest = collections.defaultdict(int)  # name -> run
        self.failures = collections.Counter()
        self.retry_at = {}
        self.keep_loaded_at = {}  # name -> when it may be kept loaded after it died
        self.released = set()  # names that are not kept loaded
        self.retry_victim = {}  # name -> the SimulatedBackend stopped for its retry
        self.is_keep_loaded_paused = self.is_closed = False
        self.trace = collections.deque(maxlen=60)

    def _random_specs(self, limits):
        names = WALK_NAMES[: self.rng.randint(2, len(WALK_NAMES))]
        return {name: random_spec(self.rng, limits) for name in names}

    def _seconds(self, kind, name):
        return self.rng.uniform(0.01, LONGEST[kind])

    # events

    def run(self, steps):
        for _ in range(steps):
            self.rng.choice(self._calm_events if self.is_calm else self._events)(self)
            if self.rng.random() < 0.85:
                self.turn()
        self.turn()
        self.run_out()

    def run_out(self):
        """Let every request end; every ticket must be settled within its bound."""
        for number, (ticket, _) in list(self.leases.items()):
            self.world.after(self._seconds("request", ""), self._release, number)
        self._bound_all()
        while self.waiting or self.leases:
            self.expect(self.world.next_moment() < math.inf, "stuck")
            self._pass_time_once()

    def _pass_time_once(self):
        self.world.now = max(self.world.now, self.world.next_moment())
        self._note("-- time")
        self.world.run_agenda()
        self.turn()

    def _pass_time(self):
        until = self.world.now + self.rng.choice((0.0, 0.004, 0.1, 1.0, 5.0))
        while self.world.next_moment() <= until:
            self._pass_time_once()
        self.world.now = until

    def _submit(self):
        if not self.specs:
            return
        name = self.rng.choice(sorted(self.specs))
        kind = self.rng.choice(({}, {}, {}, dict(preemptible=True), dict(manual=True)))
        ticket = self._ask(name, kind)
        if self.is_calm and ticket.number in self.waiting:
            self.bounds[ticket.number] = self._bound(ticket)

    def _ask(self, name, kind):
        ticket = self.core.submit(name, self.world.now, **kind)
        ticket.waiter = self._settled
        self.waiting[ticket.number] = ticket
        self.released.discard(name)
        self.is_keep_loaded_paused = False
        if ticket.manual:
            self._forgive(name)
        self._note(f"submit {ticket.number} {ticket.model.name} {kind}")
        return ticket

    def _withdraw(self):
        candidates = list(self.waiting.values()) + [t for t, _ in self.leases.values()]
        if candidates:
            self._leave(self.rng.choice(candidates))

    def _leave(self, ticket):
        self._note(f"withdraw {ticket.number} {ticket.model.name}")
        self.core.finish(ticket, self.world.now)
        for table in (self.waiting, self.leases, self.bounds):
            table.pop(ticket.number, None)
        self._forget_retry(ticket.model.name)

    def _forget_retry(self, name):
        if not self._waiting_for(name):
            self.retry_victim.pop(name, None)

    def _release(self, number):
        if number in self.leases:
            ticket, _ = self.leases.pop(number)
            self._note(f"release {ticket.number} {ticket.model.name}")
            self.core.finish(ticket, self.world.now)

    def _crash(self):
        if self.world.backends:
            backend = self.rng.choice(list(self.world.backends.values()))
            self._end(backend, self.rng.choice((None, BROKEN)))

    def _starve(self):
        backends = self.world.backends.values()
        loading = [each for each in backends if each.phase == "loading"]
        if loading:
            self._end(self.rng.choice(loading), STARVED)

    def _end(self, backend, failure):
        self._note(f"crash {backend.name} while {backend.phase}: {failure}")
        backend.orders += 1
        victim = self.world.end(backend, backend.orders, failure)
        if victim is None:
            self._learn_of_end(backend, failure)
            self.retry_victim.pop(backend.name, None)
        else:
            self._judge_retry(backend, failure, victim)

    def _judge_retry(self, backend, failure, victim):
        """A load that failed for memory beside others is tried a second time."""
        name = backend.name
        self.expect(failure is STARVED, "tried again, but memory was not short")
        self.expect(backend.phase == "loading", "tried again, but it was loaded")
        self.expect(self._waiting_for(name), "tried again for nobody")
        self.expect(name not in self.retry_victim, "tried a third time")
        is_pinned = self._is_pinned(self.world.backends[victim])
        self.expect(not is_pinned, "a pinned one is to make room")
        self.retry_victim[name] = self.world.backends[victim]

    def _learn(self):
        """The known needs of a model grow or shrink."""
        name = self.rng.choice(sorted(self.specs) or [None])
        if name:
            spec, budget = self.specs[name], self.core.limits.budget
            needs = {
                each: self.rng.randint(spec.sleep_needs[each], max(budget[each], least))
                for each, least in spec.sleep_needs.items() if each in budget
            }
            self._learn_needs(name, needs)

    def _learn_needs(self, name, needs):
        """Learn needs only if they fit beside all pinned models, as the Pool does."""
        specs = {**self.specs, name: self.specs[name]._replace(needs=needs)}
        if usable(self.core.limits, specs) == specs:
            self._note(f"learn {name} {needs}")
            self.specs = specs
            self.core.learn(name, needs)
            self._judge_needs()
            self._bound_all()

    def _learn_of_end(self, backend, failure=None):
        if backend.phase == "up":
            self._forgive(backend.name)
        if backend.phase in ("up", "asleep"):
            if failure is None:
                self.released.add(backend.name)
            else:
                moment = backend.ready_at + llmswap.MAX_BACKOFF
                self.keep_loaded_at[backend.name] = moment
        if backend.phase == "loading":
            self.failures[backend.name] += 1
            surplus = self.failures[backend.name] - 3
            if surplus >= 0:
                self.retry_at[backend.name] = self.world.now + min(60.0, 2.0**surplus)
        if backend in self.replaced:
            self._forgive(backend.name)

    def _forgive(self, name):
        self.failures[name], self.retry_at[name] = 0, -math.inf
        self.keep_loaded_at[name] = -math.inf

    def _sleep_or_wake(self):
        """An unused backend falls asleep by itself, or one wakes."""
        for backend in self.world.backends.values():
            if backend.phase == "up" and not self._in_flight(backend):
                self._note(f"{backend.name} falls asleep by itself")
                backend.phase = "asleep"
                return self.core.slept(backend.name, backend.run, self.world.now)
            if backend.phase == "asleep" and not self._spec(backend).can_sleep:
                self._note(f"{backend.name} wakes by itself")
                backend.phase = "up"
                return self.core.loaded(backend.name, backend.run, self.world.now)

    def _report_late(self):
        """A report crosses with an order, or comes from a backend that is gone."""
        report = self.rng.choice((self.core.loaded, self.core.slept))
        for backend in self.world.backends.values():
            if backend.phase == "ending":
                self._note(f"late {report.__name__} {backend.name}")
                report(backend.name, backend.run, self.world.now)
                if report == self.core.loaded:  # it woke before it was told to stop
                    backend.was_asleep = False
        name = self.rng.choice(WALK_NAMES)
        backend = self.world.backends.get(name)
        if self.newest[name] and backend is None or self.newest[name] > 1:
            old = self.newest[name] if backend is None else backend.run - 1
            report = self.rng.choice((report, self.core.exited))
            report(name, old, self.world.now)

    def _find(self):
        for name in sorted(self.specs):
            model = self.core.models[name]
            if name not in self.world.backends and not model.waiting:
                return self._adopt(name)

    def _adopt(self, name):
        run = self.core.adopted(name, self.world.now)
        self.released.discard(name)
        self._note(f"found {name}")
        self.world.backends[name] = backend = SimulatedBackend(name, run)
        self.world.after(self._seconds("load", name), self.world._come_up, backend, 0)
        self.holds[name] = self.specs[name]
        self.newest[name] = run

    def _unload(self):
        names = sorted({*self.specs, *self.world.backends})
        if names:
            self._unload_one(self.rng.choice(names))

    def _unload_one(self, name):
        self._note(f"unload {name}")
        self.core.unload(name, self.world.now, llmswap.ModelUnloaded(name))
        self.released.add(name)
        self._learn_of_unload(name)

    def _unload_all(self):
        self._note("unload_all")
        self.core.unload_all(self.world.now, llmswap.ModelUnloaded("all unloaded"))
        self.is_keep_loaded_paused = True
        for name in self.core.models:
            self._learn_of_unload(name)

    def _learn_of_unload(self, name):
        self.retry_victim.pop(name, None)  # its tickets are refused
        backend = self.world.backends.get(name)
        if backend is not None and backend not in self.cut_at:
            self.departing.add(backend)
            self.cut_at[backend] = self.world.now + self._spec(backend).stop_timeout

    def _keep_alive(self):
        if self.specs:
            seconds = self.rng.choice((-1, 0, 0.3, 4))
            self.core.keep_alive(self.rng.choice(sorted(self.specs)), seconds)

    def _configure(self):
        """A reload: new limits, and models changed, removed, added or as they were."""
        limits = self.rng.choice((self.core.limits, random_limits(self.rng)))
        less = self.rng.choice((0, 0, 3))
        budget = {each: amount - less for each, amount in self.budget.items()}
        limits = limits._replace(budget=budget)
        fresh = self._random_specs(limits)
        mixed = {**self.specs, **fresh}
        for name in sorted(mixed):
            if name in self.specs and self.rng.random() < 0.5:
                mixed[name] = self.specs[name]
            elif self.rng.random() < 0.3:
                del mixed[name]
        specs = usable(limits, mixed)
        changed = [name for name in specs if self._has_changed(name, specs)]
        changed += [name for name in specs if self.rng.random() < 0.1]
        self._reload(limits, specs, changed)

    def _reload(self, limits, specs, changed):
        self._note(f"configure {limits} {specs} changed {changed}")
        self.core.configure(limits, specs, changed)
        for name, backend in self.world.backends.items():
            if name in changed or name not in specs:
                self.departing.add(backend)
                self.replaced.add(backend)
            elif backend not in self.replaced:
                self.holds[name] = specs[name]
        for name in set(changed) | set(self.specs) - set(specs):
            self._forgive(name)
        self.specs = specs
        self.released.clear()
        self._bound_all()

    def _has_changed(self, name, specs):
        old, new = self.specs.get(name), specs[name]
        free = dict(is_pinned=False, is_pinned_once_loaded=False, keep_loaded=False)
        free.update(concurrency=0, idle_timeout=0)
        return old is None or old._replace(**free) != new._replace(**free)

    def _close(self):
        if self.rng.random() < 0.02:
            self._note("close")
            self.is_closed = True
            self.core.close(llmswap.ShuttingDown("it ends"))

    _calm_events = [_submit] * 4 + [_withdraw] + [_pass_time] * 4
    _events = _calm_events * 3 + [
        _crash, _crash, _sleep_or_wake, _report_late, _find, _unload, _keep_alive,
        _keep_alive, _unload_all, _configure, _close, _learn, _learn, _learn,
        _starve, _starve, _starve,
    ]

    # the judge

    def turn(self):
        for backend in self.world.backends.values():
            if backend.phase == "up":
                self._forgive(backend.name)
                self.retry_victim.pop(backend.name, None)
        self._judge_needs()
        if self.world.has_ended:  # there may be room to count all that was learned
            self.world.has_ended = False
            for name, spec in self.specs.items():
                self.core.learn(name, spec.needs)
            self._judge_needs()
        decisions = self.world.turn()
        self._judge_starts([d for d in decisions if isinstance(d, llmswap.Start)])
        self._judge_counters()
        self._judge_queue()
        self._judge_kept()
        self._judge_rest()
        return decisions

    def _note(self, text):
        self.trace.append(f"{self.world.now:9.3f}  {text}")

    def tell(self, fault):
        return "\n".join([fault, str(self.core.limits), str(self.specs), *self.trace])

    def expect(self, truth, fault):
        if not truth:
            raise AssertionError(self.tell(fault))

    def _judge(self, decision):
        self._note(in_words(decision))
        getattr(self, f"_judge_{type(decision).__name__.lower()}")(decision)

    def _spec(self, backend):
        return self.holds[backend.name]

    def _waiting_for(self, name):
        return [each for each in self.waiting.values() if each.model.name == name]

    def _in_flight(self, backend):
        leases = self.leases.values()
        return [each for each, of in leases if of is backend and not each.preemptible]

    def _judge_grant(self, grant):
        ticket, name = grant.ticket, grant.ticket.model.name
        backend = self.world.backends.get(name)
        is_up = backend is not None and backend.phase == "up"
        self.expect(is_up, "granted, but not loaded")
        self.expect(ticket.run == backend.run, "granted of another run")
        self.expect(backend not in self.departing, "granted by one that is to go")
        self.expect(not self.is_closed, "granted although closed")
        oldest = min(each.number for each in self._waiting_for(name))
        self.expect(ticket.number == oldest, "granted out of order")
        concurrency = self.specs[name].concurrency
        if concurrency and not ticket.preemptible and not ticket.manual:
            self.expect(len(self._in_flight(backend)) < concurrency, "one too many")

    def _judge_refuse(self, refusal):
        ticket, problem = refusal.ticket, refusal.problem
        self.expect(isinstance(problem, llmswap.APIError), "refused without a reason")
        self.expect(ticket.run is None, "refused, though it was granted")
        if isinstance(problem, llmswap.ModelPinned):
            self.expect(self._is_shut_out(ticket.model), "refused though no pin matters")

    def _settled(self, decision):
        ticket = self.waiting.pop(decision.ticket.number, None)
        if ticket is None:
            return  # refused at once, but withdrawn before the decision
        self._forget_retry(ticket.model.name)
        bound = self.bounds.pop(ticket.number, math.inf)
        self.expect(self.world.now <= bound + 1e-6, f"{ticket.number} waited beyond {bound}")
        if isinstance(decision, llmswap.Grant):
            backend = self.world.backends[ticket.model.name]
            backend.has_served = True
            if not ticket.manual:
                self.leases[ticket.number] = ticket, backend
                seconds = self._seconds("request", backend.name)
                self.world.after(seconds, self._release, ticket.number)

    def _judge_start(self, start):
        name, backend = start.name, self.world.backends.get(start.name)
        victim = self.retry_victim.get(name)
        is_in_the_way = (
            victim in self.world.backends.values() and victim.phase != "asleep"
            and demand("", self.specs[name])[1:] != (0, {})
            and not self._is_fixed(victim) and not self._waiting_for(victim.name)
        )
        self.expect(not is_in_the_way, "tried again before there was more room")
        self.expect(not self.is_closed, "started although closed")
        is_kept, moments = not self._waiting_for(name), [-math.inf]
        if is_kept or self.specs[name].is_local:
            moments.append(self.retry_at.get(name, -math.inf))
        if is_kept:
            is_wanted = self.specs[name].keep_loaded and name not in self.released
            is_paused = self.is_keep_loaded_paused
            self.expect(is_wanted and not is_paused, "started for nobody")
            self.expect(not self.waiting, "started for nobody while somebody waits")
            moments.append(self.keep_loaded_at.get(name, -math.inf))
        self.expect(self.world.now >= max(moments), "did not back off")
        if start.is_wake:
            self.expect(backend.phase == "asleep", "woken, but it did not sleep")
            self.expect(backend.run == start.run, "woken as another")
            self.expect(backend not in self.departing, "woken, but it is to go")
        else:
            self.expect(backend is None, "started twice")
            self.expect(start.run > self.newest[name], "an old run")
            self.newest[name] = start.run
            self.holds[name] = self.specs[name]

    def _judge_starts(self, starts):
        """After all decisions: what is held fits, and no older ticket was robbed."""
        held = [self._held_by(backend) for backend in self.world.backends.values()]
        for start in starts:
            if demand("", self.holds[start.name])[1:] == (0, {}):
                continue
            self.expect(self.core.limits.allow(held), f"no room for {start.name}")
            if self._waiting_for(start.name):
                self._judge_precedence(start.name)

    def _held_by(self, backend):
        spec = self._spec(backend)
        ended_asleep = backend.phase == "ending" and backend.was_asleep
        if backend.phase == "asleep" or ended_asleep:
            places = int(spec.is_local and not spec.can_sleep)
            return llmswap.ModelUsage(backend.name, places, spec.sleep_needs)
        return demand(backend.name, spec)

    def _judge_precedence(self, name):
        """It fits beside what older tickets wait for and what cannot be moved."""
        number = min(each.number for each in self._waiting_for(name))
        wanted = {
            backend.name: self._held_by(backend)
            for backend in self.world.backends.values()
            if backend not in self.departing and self._is_fixed(backend)
        }
        for each in self.waiting.values():
            if each.number < number:
                wanted[each.model.name] = demand(each.model.name, each.model.spec)
        wanted[name] = demand(name, self.holds[name])
        is_its_turn = self.core.limits.allow(wanted.values())
        self.expect(is_its_turn, f"{name} started before its turn")

    def _is_fixed(self, backend):
        is_loading = backend.phase == "loading"
        is_wanted = is_loading and bool(self._waiting_for(backend.name))
        return self._is_pinned(backend) or is_wanted

    def _is_pinned(self, backend):
        spec = self._spec(backend)
        was_up = backend.ready_at > -math.inf
        return spec.is_pinned or spec.is_pinned_once_loaded and was_up

    def _is_shut_out(self, model):
        """Whether a model is down and cannot be loaded as long as the pinned ones stay."""
        backend = self.world.backends.get(model.name)
        is_down = backend is None or backend.phase == "asleep"
        pins = [
            self._held_by(each)
            for each in self.world.backends.values()
            if each not in (*self.departing, backend) and self._is_pinned(each)
            and each.phase in ("loading", "up", "asleep")
        ]
        needed = demand(model.name, model.spec)
        is_local = needed[1:] != (0, {})
        return is_down and is_local and not self.core.limits.allow([needed, *pins])

    def _judge_stop(self, stop):
        backend = self.world.backends[stop.name]
        backend.was_asleep = backend.phase == "asleep"
        self.expect(stop.run == backend.run, "stopped another")
        self.expect(backend.phase in ("loading", "up", "asleep"), "stopped twice")
        busy = self._in_flight(backend)
        getattr(self, f"_judge_{stop.cause}")(stop, backend, busy)
        if not stop.to_sleep:
            self.departing.add(backend)

    def _judge_unload(self, stop, backend, busy):
        is_time = self.world.now >= self.cut_at[backend] or backend.phase == "loading"
        self.expect(not busy or is_time, "cut before its time")

    _judge_shutdown = _judge_unload

    def _judge_reload(self, stop, backend, busy):
        self.expect(backend in self.departing, "no reload removed or changed it")
        self.expect(not busy, "a reload cut a request")

    def _judge_idle(self, stop, backend, busy):
        users = [each for each, of in self.leases.values() if of is backend]
        users += self._waiting_for(backend.name)
        self.expect(not users, "it was not idle")
        spec = self.specs[backend.name]
        self.expect(not spec.is_pinned and not spec.keep_loaded, "it was to stay")

    def _judge_evicted(self, stop, backend, busy):
        name = backend.name
        self.expect(not busy, "evicted while busy")
        self.expect(not self._is_pinned(backend), "evicted though pinned")
        newcomers = self._waiting_for(stop.newcomer)
        self.expect(newcomers, "evicted for nobody")
        waiters = self._waiting_for(name)
        is_loading = backend.phase == "loading"
        self.expect(is_loading == (stop.cause == "abandoned"), "a wrong cause")
        self.expect(not (is_loading and waiters), "killed while loading for someone")
        for waiter in waiters:
            is_older = waiter.number < min(each.number for each in newcomers)
            may_go = not is_older or backend.phase == "asleep"
            self.expect(may_go, "an older one waited")
            is_reserved = waiter.arrived <= backend.ready_at and not backend.has_served
            self.expect(not is_reserved, "evicted before it served")

    _judge_abandoned = _judge_evicted

    def _judge_needs(self):
        """The needs counted for running backends grow only within the limits."""
        grown, limits = set(), self.core.limits.budget
        for name, backend in self.world.backends.items():
            before = self._held_by(backend).needs
            needs = self.core.models[name].spec.needs
            self.holds[name] = self.holds[name]._replace(needs=needs)
            after = self._held_by(backend).needs
            grown |= {each for each in after if after[each] > before.get(each, 0)}
        held = [self._held_by(backend) for backend in self.world.backends.values()]
        for each in grown & limits.keys():
            total = sum(usage.needs.get(each, 0) for usage in held)
            self.expect(total <= limits[each], f"more {each} counts than there is")

    def _judge_counters(self):
        for name, model in self.core.models.items():
            backend = self.world.backends.get(name)
            leases = [each for each, of in self.leases.values() if of is backend]
            loose = sum(each.preemptible for each in leases)
            facts = len(self._waiting_for(name)), len(leases) - loose, loose
            counted = model.waiting, model.in_flight, model.preemptible
            self.expect(counted == facts, f"{name} counts {counted}, not {facts}")
            self.expect(model.is_held == (backend is not None), f"{name} is not held")
        self.expect(self.core.queued == len(self.waiting), "a wrong length of queue")

    def _judge_queue(self):
        limits = self.core.limits
        self.expect(not self.is_closed or not self.waiting, "waits at a closed door")
        longest = limits.queue_max or math.inf
        self.expect(len(self.waiting) <= longest, "the queue is too long")
        for ticket in self.waiting.values():
            waited = self.world.now - ticket.arrived
            longest = (limits.queue_timeout or math.inf) + 1e-9
            self.expect(waited < longest, f"{ticket.number} waits too long")
            is_shut_out = self._is_shut_out(ticket.model)
            self.expect(not is_shut_out, f"{ticket.number} waits for pinned models")

    def _judge_kept(self):
        """If nobody waits, a kept model that fits is loaded, or a time named for it."""
        if self.waiting or self.is_closed or self.is_keep_loaded_paused:
            return
        held = [self._held_by(backend) for backend in self.world.backends.values()]
        for name, spec in self.specs.items():
            is_missed = spec.keep_loaded and name not in self.world.backends
            fits = self.core.limits.allow([*held, demand(name, spec)])
            if is_missed and fits and name not in self.released:
                moments = (times.get(name, -math.inf)
                           for times in (self.retry_at, self.keep_loaded_at))
                is_soon = self.world.now < max(moments) >= self.world.deadline
                self.expect(is_soon, f"{name} is not kept loaded")

    def _judge_rest(self):
        """A second decision changes nothing, and no ticket is stuck."""
        again, deadline = self.core.decide(self.world.now)
        self.expect(not again, f"decided more on second thoughts: {again}")
        self.expect(deadline == self.world.deadline, "has another deadline")
        self.expect(deadline > self.world.now, "its deadline is now")
        moving = ("loading", "ending", "falling asleep")
        backends = self.world.backends.values()
        goes_on = any(each.phase in moving or self._in_flight(each) for each in backends)
        self.expect(not self.waiting or deadline < math.inf or goes_on, "stuck")

    # bounds

    def _bound_all(self):
        for ticket in self.waiting.values():
            self.bounds[ticket.number] = self._bound(ticket)

    def _bound(self, ticket):
        """When the ticket must have been settled if nothing but requests interferes."""
        ahead = [each for each in self.waiting.values() if each.number < ticket.number]
        models = {each.model.name for each in ahead} | {ticket.model.name}
        patience = self.core.limits.patience
        if patience is None:
            patience = max(1.0, 2 * LONGEST["load"] + LONGEST["stop"])
        drain, stop = LONGEST["request"], LONGEST["sleep"] + LONGEST["stop"]
        swap = patience + drain + stop + LONGEST["load"]
        queue = (len(ahead) + len(self.leases) + 1) * LONGEST["request"]
        return self.world.now + (len(models) + 1) * swap + queue
