"""Which implementation of an op is meant: the names that all ops share, and what is said of those that do not apply."""

from collections.abc import Callable, Mapping
from types import ModuleType

from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.platform import log_once, platform

IMPLEMENTATIONS = ("auto", "reference", "xla", "tpu", "gpu")


def resolve(
    implementation: str,
    interpret: bool | pltpu.InterpretParams,
    *,
    kernels: Mapping[str, ModuleType],
    operand: Array,
    choose: Callable[[str], str],
    about: str,
) -> str:
    """The implementation to use, never ``auto``.

    Args:
      implementation: one of `IMPLEMENTATIONS`.
      interpret: whether a kernel is to run on any platform.
      kernels: modules of the op's kernels by platform, each with ``refusal(operand)``: why it does not take such an
        operand, or None.
      operand: what the kernels judge by.
      choose: what ``auto`` means on a platform.
      about: the op and its operands, for messages.

    Raises:
      ValueError: the implementation is unknown or does not apply; the message says why.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: it is one of {', '.join(IMPLEMENTATIONS)}")
    if interpret and implementation not in kernels:
        raise ValueError(f"interpret is for the kernels {' and '.join(kernels)}, not for {implementation!r}")
    target = platform()
    if implementation == "auto":
        chosen = choose(target)
        log_once(f"{about} on {target}: {chosen}")
        return chosen
    if implementation in kernels:
        if target != implementation and not interpret:
            raise ValueError(
                f"implementation={implementation!r} does not apply: this program is for a {target}; "
                "interpret=True runs the kernel anywhere, slowly"
            )
        if reason := kernels[implementation].refusal(operand):
            raise ValueError(f"implementation={implementation!r} does not apply to {about}: {reason}")
    return implementation
