"""What is left to do, and how long it will take by what it took so far."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..records.optimize import Candidate

# Seconds a unit before anything was measured: a build, a timed candidate, a calibration, an evaluated image.
GUESSES = {"build": 6.0, "time": 4.0, "draft": 30.0, "evaluate": 0.01}


@dataclass(frozen=True, kw_only=True)
class View:
    """What a terminal shows at one moment."""

    rows: tuple[Candidate, ...]
    doing: str
    done: int
    total: int | None
    left_s: float | None  # of the whole, an estimate; None while a step takes longer than those before it
    elapsed_s: float


@dataclass
class Agenda:
    """Counts units of each kind of work, and tells `watch` whenever something changes."""

    watch: Callable[[View], None]
    rows: tuple[Candidate, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)  # spent, by kind
    _units: dict[str, float] = field(default_factory=dict)  # done, by kind
    _left: dict[str, float] = field(default_factory=dict)
    _doing: str = ""
    _done: int = 0
    _total: int | None = None
    _since: float = field(default_factory=time.perf_counter)
    _begun: float = 0.0
    _kind: str = ""  # of the step that is being done
    _count: float = 0.0  # its units

    def expect(self, **units: float) -> None:
        """So many units more of each kind; fewer, where they turn out not to be needed."""
        for kind, count in units.items():
            self._left[kind] = max(0.0, self._left.get(kind, 0.0) + count)

    def begin(self, kind: str, doing: str, units: float = 1) -> None:
        self._left[kind] = max(self._left.get(kind, 0.0), units)
        self._kind, self._count, self._begun = kind, units, time.perf_counter()
        self._doing, self._done, self._total = doing, 0, None
        self.tell()

    def end(self, kind: str, units: float = 1) -> None:
        self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - self._begun
        self._units[kind] = self._units.get(kind, 0.0) + units
        self._left[kind] = max(0.0, self._left.get(kind, 0.0) - units)
        self._kind = ""
        self.tell()

    def says(self, doing: str) -> None:
        """What is being drafted: its time is counted until something else begins."""
        self._doing, self._done, self._total = doing, 0, None
        self.tell()

    def phase(self, name: str) -> Callable[[int, int], None]:
        """A progress of its own, as `quantize` takes it."""

        def update(done: int, total: int) -> None:
            self._doing = name
            self.count(done, total)

        return update

    def count(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        self.tell()

    def steps(self, done: int, total: int, what: str) -> None:
        self._doing = what
        self.count(done, total)

    @property
    def left_s(self) -> float | None:
        left = sum(count * self._rate(kind) for kind, count in self._left.items())
        if not self._kind:
            return left
        spent = time.perf_counter() - self._begun
        return None if spent > self._count * self._rate(self._kind) else max(0.0, left - spent)

    def _rate(self, kind: str) -> float:
        done = self._units.get(kind, 0.0)
        return self.seconds[kind] / done if done else GUESSES[kind]

    def tell(self) -> None:
        self.watch(
            View(
                rows=self.rows, doing=self._doing, done=self._done, total=self._total, left_s=self.left_s,
                elapsed_s=time.perf_counter() - self._since,
            )
        )  # fmt: skip
