"""Where the time of a call goes, by the clock on the wall.

A run's own ``seconds`` are those of its steps. They leave out reading, compiling, validating and saving, which are most
of the time of a short run, and somebody waits for all of it.
"""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Literal

import jax

Doing = Literal["starting", "reading", "compiling", "training", "validating", "saving"]

COMPILE_EVENTS = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")
"""What JAX says of each program that it lowers and compiles, or takes from its cache."""


class Clock:
    """Seconds by what was done in them; together they are all that passed since ``started``.

    Programs that are compiled while something else goes on, as a validation's are at its first call, count as
    compiling: their lowering and compilation, not their tracing, of which JAX counts nested parts twice.
    """

    def __init__(self, started: float | None = None) -> None:
        """Starts it.

        Args:
          started: of `time.perf_counter`, where "starting" began; None for now.
        """
        self._since = time.perf_counter() if started is None else started
        self._doing: Doing = "starting"
        self._seconds: dict[Doing, float] = {}
        self._thread = threading.get_ident()

    def _add(self, doing: Doing, seconds: float) -> None:
        self._seconds[doing] = self._seconds.get(doing, 0.0) + seconds

    def _now(self, doing: Doing) -> Doing:
        now, before = time.perf_counter(), self._doing
        self._add(before, now - self._since)
        self._since, self._doing = now, doing
        return before

    @contextlib.contextmanager
    def doing(self, doing: Doing) -> Iterator[None]:
        """What is done inside; behind it, what was done before goes on."""
        before = self._now(doing)
        try:
            yield
        finally:
            self._now(before)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Hears of programs that are compiled inside."""

        def heard(event: str, duration_secs: float, **kwargs: str | int) -> None:
            del kwargs
            # Other threads compile beside what is done here.
            if event in COMPILE_EVENTS and self._doing != "compiling" and threading.get_ident() == self._thread:
                self._add("compiling", duration_secs)
                self._add(self._doing, -duration_secs)

        jax.monitoring.register_event_duration_secs_listener(heard)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(heard)

    def seconds(self) -> Mapping[Doing, float]:
        """Seconds so far, in the order in which each was first done."""
        self._now(self._doing)
        return dict(self._seconds)


def told(seconds: Mapping[Doing, float]) -> str:
    """``167 s by the clock: starting 5, reading 12, compiling 40, training 70, validating 36, saving 4``."""
    parts = ", ".join(f"{doing} {spent:.0f}" for doing, spent in seconds.items())
    return f"{sum(seconds.values()):,.0f} s by the clock: {parts}"
