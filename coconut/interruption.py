"""Ctrl-C and SIGTERM: noticed from the first line of a command to its last, and never lost.

Python raises KeyboardInterrupt wherever it happens to be. In a callback of a library, or while an object is deleted,
the exception is printed and forgotten. So the signal is also noted, and whoever begins or goes on with long work asks.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Notice:
    """What the handler knows.

    Attributes:
      requested: whether a signal has come.
      waits: whether the work under way stops by itself once it is asked to; nothing is raised then.
    """

    def __init__(self) -> None:
        self.requested = False
        self.waits = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The first signal is noted, and raised where nobody waits for it; a second one is raised in any case."""
        del number, frame
        again, self.requested = self.requested, True
        if again or not self.waits:
            raise KeyboardInterrupt


_notice: _Notice | None = None


@contextlib.contextmanager
def interruptible(signals: tuple[signal.Signals, ...] = SIGNALS) -> Iterator[None]:
    """Notices the signals until its end; inside another one it changes nothing. In the main thread only.

    Raises:
      KeyboardInterrupt: a signal came, and nobody waited for it; where a library has swallowed it, `check` raises it.
    """
    global _notice
    if _notice is not None:
        yield
        return
    _notice = _Notice()
    before = {number: signal.signal(number, _notice.handle) for number in signals}
    try:
        yield
    finally:
        _notice = None
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def awaited() -> Iterator[Callable[[], bool]]:
    """Inside, a signal is only noted; the function that is given says whether one has come."""
    notice = _notice
    if notice is None:
        yield lambda: False
        return
    before, notice.waits = notice.waits, True
    try:
        yield lambda: notice.requested
    finally:
        notice.waits = before


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Inside `awaited`: here a signal is raised all the same, at once where it came before."""
    notice = _notice
    if notice is None:
        yield
        return
    before, notice.waits = notice.waits, False
    try:
        check()
        yield
    finally:
        notice.waits = before


def check(error: Exception | None = None) -> None:
    """Raises what a library may have swallowed, or turned into ``error``.

    Raises:
      KeyboardInterrupt: a signal has come.
    """
    if _notice is not None and _notice.requested:
        raise KeyboardInterrupt(*([] if error is None else [f"{type(error).__name__}: {error}"])) from error
