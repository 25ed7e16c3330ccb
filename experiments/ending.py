"""A program that is told to end first ends what it has started."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def by_exception() -> Iterator[None]:
    """Within this, SIGTERM and SIGHUP raise `SystemExit` in the main thread.

    By themselves they end Python without a `finally`, and processes that it has started go on. SIGKILL still does. A
    signal that is handled or ignored already, as SIGHUP under ``nohup``, is left alone, and so is a second one.
    """
    taken = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_DFL]

    def end(number: int, _: FrameType | None) -> None:
        for other in taken:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
