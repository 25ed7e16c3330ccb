"""The glossary, and the records that travel through the house.

Axis letters, used in every shape comment and einsum of this project:

====== =====================================================================
``B``  rows of a batch
``P``  prompt columns (question, and the start marker where there is one)
``K``  latent columns of a block (continuous thoughts, or the pauses of a control)
``S``  scored columns (steps, answer, EOS; whatever stands between them)
``T``  all columns of a batch
``C``  columns a query may look back on (a cache)
``L``  layers
``N``  query heads
``M``  key/value heads (grouped queries: ``N`` is a multiple of ``M``)
``H``  width of one head
``D``  width of the model
``F``  width of the MLP
``V``  vocabulary entries
====== =====================================================================
"""

import dataclasses
from typing import Any, no_type_check

import jax
from jaxtyping import Array, Bool, Float, Int

from coconut.errors import CoconutError

IGNORED_LABEL = -100
"""The label of a column that carries no loss (the field's convention)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graph:
    """The graph behind a ProsQA-like question.

    Attributes:
      symbols: name of each node, by node id.
      edges: directed ``(parent, child)`` node-id pairs.
      root: the node asked about.
      target: the option reachable from ``root``.
      negative: the option not reachable from ``root``.
    """

    symbols: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]
    root: int
    target: int
    negative: int


@dataclasses.dataclass(frozen=True)
class Think:
    """A step of an example that is not written: a block of thoughts, which every method puts where it stands.

    Attributes:
      count: how many thoughts.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise CoconutError(f"Think.count = {self.count!r}: must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One question of any task, as text.

    Attributes:
      question: the prompt, without a trailing newline.
      steps: the reasoning: the text of each written step, and the blocks of thoughts between them; may be empty.
      answer: the answer, without a prefix such as ``###``.
      graph: the graph behind the question, for tasks that have one.
    """

    question: str
    steps: tuple[str | Think, ...]
    answer: str
    graph: Graph | None = None

    @property
    def written_steps(self) -> tuple[str, ...]:
        """The steps that are text."""
        return tuple(step for step in self.steps if isinstance(step, str))


# --- Spans ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Language:
    """Columns that hold tokens, passed through the decoder in parallel.

    Attributes:
      length: number of columns.
      scored: how many of the last columns may carry a label; logits are made for these alone.
    """

    length: int
    scored: int = 0

    def __post_init__(self) -> None:
        if self.length < 1 or not 0 <= self.scored <= self.length:
            raise CoconutError(f"a language span needs length >= 1 and 0 <= scored <= length, got {self}")


@dataclasses.dataclass(frozen=True)
class Latent:
    """Columns that hold continuous thoughts, made one after the other.

    Attributes:
      length: number of columns; a row may use fewer, from the left.
      together: how many columns are made in one pass. In a packed row these are one thought of each of its examples:
        the first of all of them, then the second of all of them, and so on.
    """

    length: int
    together: int = 1

    def __post_init__(self) -> None:
        if self.length < 1:
            raise CoconutError(f"a latent span needs length >= 1, got {self}")
        if self.together < 1 or self.length % self.together:
            raise CoconutError(f"a latent span makes as many columns in each pass, got {self}")


Span = Language | Latent
Schedule = tuple[Span, ...]
"""How a sequence alternates between the two modes. Static: one schedule, one compiled program."""


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Aligned rows of one fixed shape.

    A row is one example. In a packed batch (`coconut.packing`) it holds ``G`` of them, which see nothing of each other.

    Attributes:
      schedule: the spans; their lengths sum to ``T``. Static under jit.
      tokens: token ids; the latent marker's id in latent columns, the padding id where ``valid`` is False.
      positions: the position of each column in its own example, counted over valid columns; 0 where not valid.
      valid: whether the column belongs to the row.
      labels: the token a scored column must predict *at* that column, else ``IGNORED_LABEL``. It is predicted from
        the valid column before it.
      pieces: which piece of the scored text a labelled column belongs to: 0 for the first that follows what is given,
        one more for each step, each start marker the model has to write, and the answer; -1 elsewhere.
      answers: whether the labelled column belongs to the answer.
      before_answer: the column from whose state the answer itself begins, behind its prefix (``###``): the last valid
        one before it. -1 for a row that only fills the batch. ``[B, G]`` in a packed batch.
      examples: index of each row's example in its data set; -1 for a row that only fills the batch. ``[B, G]`` in a
        packed batch.
      members: in a packed batch, which of the row's examples each column belongs to, from 0 to ``G - 1``; 0 where not
        valid. None where each row is one example.
    """

    schedule: Schedule = dataclasses.field(metadata={"static": True})
    tokens: Int[Any, "B T"]
    positions: Int[Any, "B T"]
    valid: Bool[Any, "B T"]
    labels: Int[Any, "B T"]
    pieces: Int[Any, "B T"]
    answers: Bool[Any, "B T"]
    before_answer: Int[Any, "B *G"]
    examples: Int[Any, "B *G"]
    members: Int[Any, "B T"] | None = None

    @property
    def examples_per_row(self) -> int | None:
        """``G`` of a packed batch; None where each row is one example."""
        return None if self.members is None else self.examples.shape[1]


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """What a rollout leaves; jit drops what nobody uses.

    Attributes:
      hidden: hidden states after the final norm of every column, where they were asked for.
      predictors: hidden states that predict the scored columns of the schedule, in order: for each the state of the
        valid column before it. ``S`` counts the scored columns of all spans.
      thoughts: one array for each latent span, the inputs its columns received; zero in columns a row does not use.
      past: the segments (`coconut.models.cache.Segment`) a continuation may attend to.
      last: hidden state of each row's last valid column; what a following thought is made of, or the next token. In a
        packed batch that of each example.
      states: what lies between the layers (`Decoder.observe`) at the columns that were asked for; None where none were.
    """

    hidden: Float[Array, "B T D"] | None
    predictors: Float[Array, "B S D"]
    thoughts: tuple[Float[Array, "B K D"], ...]
    past: tuple[Any, ...]
    last: Float[Array, "B *G D"]
    states: Float[Array, "_ B O D"] | None = None
