"""The data pipeline: from a data set and a seed to a resumable stream of batches.

Which examples stand in batch ``i``, at which stage and in which form each, is a pure function of (seed, ``i``, the
run's stage and the batch it began with). Grain brings the prefetching threads and an iterator whose state is saved with
the checkpoint; threads never change the order.
"""

import dataclasses
import functools
import hashlib
import json
import threading
from collections.abc import Sequence
from typing import Any, cast, no_type_check

import grain
import numpy as np

from coconut.batching import Shape, align, stage_shape
from coconut.curriculum import draw_stage, stage_steps
from coconut.errors import CoconutError, check_fields
from coconut.methods.method import Method
from coconut.packing import fits, pack, packed_shapes, part_widths, share_rows, widest_rows
from coconut.pages import Page, Placing
from coconut.tasks.graph_form import EDGE_END, has_graph_form, reorder_graph
from coconut.tokenizers import TokenizedExample, Tokenizer
from coconut.types import Batch, Think


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """How examples become batches.

    Attributes:
      batch_size: examples of a batch over all processes.
      length_buckets: longest prompts of the buckets but the last, in tokens; examples of a bucket share batches, whose
        prompt is no wider than the bucket. Each bucket is one more compiled shape a stage. Empty for one bucket.
      multiple_of: columns of the prompt and of each text behind it are rounded up to a multiple of this.
      shuffle_edges: show each graph question in symbols (`coconut.tasks.graph_form`) with its edges and its two
        candidates in another order every epoch.
      examples_per_row: how many examples share a row in training, one behind the other, which see nothing of each other
        (`coconut.packing`). It saves the padding that one example a row leaves where lengths differ, and costs
        attention, which runs over rows as many times as long, and is dense (``auto`` becomes ``dense``, kernels are
        refused). Must divide ``batch_size``. The batches hold the same examples and a step computes the same up to
        rounding (and other draws of dropout). A stage has at most two compiled shapes a bucket: a narrow one, and one
        that holds any batch. Validation is not packed.
      threads: prefetching threads.
      prefetch: batches made ahead.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    batch_size: int
    length_buckets: tuple[int, ...] = ()
    multiple_of: int = 1
    shuffle_edges: bool = False
    examples_per_row: int = 1
    threads: int = 1
    prefetch: int = 8

    def __post_init__(self) -> None:
        check_fields(self)
        for field in ("batch_size", "multiple_of", "examples_per_row", "threads", "prefetch"):
            value = getattr(self, field)
            if value < 1:
                raise CoconutError(f"PipelineConfig.{field} = {value!r}: must be at least 1")
        if self.batch_size % self.examples_per_row:
            raise CoconutError(
                f"PipelineConfig.examples_per_row = {self.examples_per_row!r}: must divide batch_size = "
                f"{self.batch_size}"
            )
        if list(self.length_buckets) != sorted(set(self.length_buckets)):
            raise CoconutError(f"PipelineConfig.length_buckets = {self.length_buckets!r}: must rise")

    @property
    def rows(self) -> int:
        """Rows of a batch over all processes."""
        return self.batch_size // self.examples_per_row


# Keep other draws of an example and an epoch apart from those of its stage.
_EDGES, _PAGES = 1, 2

# Batches of a bucket that are looked at for the width of packed rows.
_LOOKED_AT = 100


class BatchSource:
    """Batches by number, for one stage of a run; a grain data source.

    Every epoch holds each example once, in an order of its own; the last batch of each bucket is filled up with rows
    that hold nothing. Batch numbers count over the whole run, not from the start of a stage, so the order of the data
    does not depend on when a stage ends. A process may ask for some rows of each batch alone
    (`coconut.sharding.own_rows`).

    Args:
      examples: the data set.
      tokenizer: its tokenizer.
      method: writes the pages: a batch of each kind of them, all of the same examples.
      placing: the run's stage, its curriculum, and the method's options.
      config: how examples become batches.
      seed: of the run.
      stage_start: number of the stage's first batch.
      rows: the rows of each batch to make.

    Attributes:
      shapes: columns of the batches of each bucket, by the name of the page, with one example a row.
      packed_shapes: of the same, where several examples share a row, the shapes that batches come in, the narrowest
        first.
      batches_per_epoch: batches of all buckets together.
      stage_length: batches of the stage, if no metric ends it early.

    Raises:
      CoconutError: there are no examples, a page is none to learn from, or edges cannot be shuffled.
    """

    def __init__(
        self,
        examples: Sequence[TokenizedExample],
        tokenizer: Tokenizer,
        method: Method,
        placing: Placing,
        config: PipelineConfig,
        *,
        seed: int,
        stage_start: int = 0,
        rows: slice = slice(None),
    ):
        if not examples:
            raise CoconutError("the data set is empty")
        if config.shuffle_edges:
            _check_graph_form(examples, tokenizer)
        self._examples, self._tokenizer, self._method = examples, tokenizer, method
        self._placing, self._config, self._seed = placing, config, seed
        self._stage_start, self._own_rows = stage_start, rows
        lengths = [len(example.question) for example in examples]
        bucket_of = np.searchsorted(config.length_buckets, lengths)
        self._buckets = [members for b in range(len(config.length_buckets) + 1)
                         if len(members := np.flatnonzero(bucket_of == b))]  # fmt: skip
        self.shapes: list[dict[str, Shape]] = [
            {
                name: stage_shape((examples[int(i)] for i in members), write, placing, multiple_of=config.multiple_of)
                for name, write in method.pages.items()
            }
            for members in self._buckets
        ]
        self.batches_per_epoch = sum(-(-len(members) // config.batch_size) for members in self._buckets)
        self.stage_length = stage_steps(placing.curriculum, placing.stage, self.batches_per_epoch)
        self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)
        self._lock = threading.Lock()
        self.packed_shapes: list[dict[str, list[Shape]]] = []
        if config.examples_per_row > 1:
            self.packed_shapes = [self._packed_shapes(bucket) for bucket in range(len(self._buckets))]

    def __len__(self) -> int:
        """Without end, as far as grain is concerned: the loop knows when to stop."""
        return 2**40

    def __repr__(self) -> str:
        """Grain compares this when it restores an iterator: no address in it."""
        return f"BatchSource(seed={self._seed}, stage={self._placing.stage})"

    def _plan_epoch(self, epoch: int) -> tuple[list[tuple[int, np.ndarray]], np.ndarray, np.ndarray]:
        """The (bucket, examples) of each batch of an epoch; two draws for an example's stage, one for its page."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, epoch])))
        batches = []
        for bucket, members in enumerate(self._buckets):
            order = rng.permutation(members)
            batches += [
                (bucket, order[start : start + self._config.batch_size])
                for start in range(0, len(order), self._config.batch_size)
            ]
        if len(self._buckets) > 1:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        # Of a generator of their own: methods that draw nothing keep the batches they always had.
        pages = np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, epoch, _PAGES])))
        return batches, rng.random((len(self._examples), 2)), pages.random(len(self._examples))

    def __getitem__(self, number: int) -> dict[str, Batch]:
        """Batch ``number`` of the run, by the name of the page: the rows of it that were asked for."""
        progress = min(max((int(number) - self._stage_start) / self.stage_length, 0.0), 1.0)
        if self._config.examples_per_row == 1:
            _, batches = self._aligned(int(number), progress, self._own_rows)
            return batches
        # Which examples share a row is seen on all of them.
        bucket, batches = self._aligned(int(number), progress, slice(None))
        packed = {}
        for name, batch in batches.items():
            shape = self.shapes[bucket][name]
            widths = part_widths(batch, shape)
            members = share_rows(widths, self._config.rows)
            packed[name] = pack(
                *(batch, shape, members[self._own_rows]),
                next(one for one in self.packed_shapes[bucket][name] if fits(widths, members, one)),
                pad_id=self._tokenizer.eos_id,
                feeds_back=self._method.feeds_back(self._placing.options),
            )
        return packed

    def _packed_shapes(self, bucket: int) -> dict[str, list[Shape]]:
        """The shapes that the packed batches of a bucket come in: from the first ones of the run's first epoch."""
        batches, _, _ = self._epoch(0)
        numbers = [number for number, (of, _) in enumerate(batches) if of == bucket][:_LOOKED_AT]
        needed = {name: np.zeros(1 + len(shape.texts), np.int64) for name, shape in self.shapes[bucket].items()}
        for number in numbers:
            # A page is the longest where the stage begins.
            for name, batch in self._aligned(number, 0.0, slice(None))[1].items():
                widths = part_widths(batch, self.shapes[bucket][name])
                own = widest_rows(widths, share_rows(widths, self._config.rows))
                needed[name] = np.maximum(needed[name], own)
        return {
            name: packed_shapes(
                *(shape, self._config.examples_per_row, needed[name]), multiple_of=self._config.multiple_of
            )
            for name, shape in self.shapes[bucket].items()
        }

    def _aligned(self, number: int, progress: float, rows: slice) -> tuple[int, dict[str, Batch]]:
        """The bucket of a batch, and some of its rows, one example each, by the name of the page."""
        epoch, within = divmod(number, self.batches_per_epoch)
        with self._lock:
            batches, stage_draws, page_draws = self._epoch(epoch)
        bucket, members = batches[within]
        members = np.pad(members, (0, self._config.batch_size - len(members)), constant_values=-1)[rows]
        pages: dict[str, list[Page | None]] = {name: [] for name in self._method.pages}
        for index in members:
            if index < 0:
                for written in pages.values():
                    written.append(None)
                continue
            example = self._examples[index]
            if self._config.shuffle_edges:
                rng = np.random.default_rng([self._seed, epoch, _EDGES, index])
                example = dataclasses.replace(example, question=reorder_graph(example.question, rng))
            stage = draw_stage(self._placing.curriculum, self._placing.stage, example.num_steps, *stage_draws[index])
            placing = dataclasses.replace(self._placing, stage=stage, progress=progress, draw=float(page_draws[index]))
            for name, write in self._method.pages.items():
                pages[name].append(write(example, placing))
        return bucket, {
            name: align(
                written,
                self.shapes[bucket][name],
                pad_id=self._tokenizer.eos_id,
                latent_id=self._tokenizer.latent_id,
                feeds_back=self._method.feeds_back(self._placing.options),
                examples=members.tolist(),
            )
            for name, written in pages.items()
        }


def _check_graph_form(examples: Sequence[TokenizedExample], tokenizer: Tokenizer) -> None:
    if tokenizer.kind != "symbol":
        raise CoconutError(
            f"PipelineConfig.shuffle_edges = True: needs questions in symbols, not {tokenizer.kind!r} ids"
        )
    [edge_end] = tokenizer.encode(EDGE_END)
    for index, example in enumerate(examples):
        if not has_graph_form(example.question, edge_end):
            text = tokenizer.decode(example.question.tolist())
            raise CoconutError(
                f"PipelineConfig.shuffle_edges = True: training example {index} is no graph question: {text!r:.80}"
            )


def make_iterator(source: BatchSource, config: PipelineConfig, *, start: int) -> grain.DatasetIterator:
    """A prefetching, checkpointable iterator over ``source`` from batch ``start`` on."""
    read = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.prefetch)
    iterator = iter(grain.MapDataset.source(cast(Any, source)).to_iter_dataset(read_options=read))
    state = iterator.get_state()
    iterator.set_state({**state, "next_index": start})
    return iterator


def pipeline_fingerprint(
    examples: Sequence[TokenizedExample], tokenizer: Tokenizer, config: PipelineConfig, *, seed: int
) -> str:
    """A hash of all that decides which batch follows which; grain's own state would accept another data set or seed."""
    digest = hashlib.sha256()
    for example in examples:
        for part in (example.question, *example.steps, example.answer):
            # Read as tokens, the letters would be an id that no vocabulary has.
            is_block = isinstance(part, Think)
            ids = f"think {part.count}".encode() if is_block else np.asarray(part, np.int32).tobytes()
            digest.update(ids + b"|")
        digest.update(b"\n")
    settings = {
        "seed": seed,
        "batch_size": config.batch_size,
        "length_buckets": config.length_buckets,
        "multiple_of": config.multiple_of,
        "tokenizer": tokenizer.fingerprint,
    }
    if config.shuffle_edges:
        settings["shuffle_edges"] = True
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()
