"""A program that is told to end first ends what it has started."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def by_exception() -> Iterator[None]:
    """Within this, SIGTERM and SIGHUP raise `SystemExit` in the main thread.

    By themselves they end Python without a `finally`, and processes that it has started go on. SIGKILL still does.
    """

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
