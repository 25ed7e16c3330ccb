"""A run on a slice, before it is paid for: its real train step, compiled for the slice's chips, and what follows."""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from coconut.batching import page_shape
from coconut.commands.plan.advice import faster, suggestions
from coconut.commands.plan.chips import HERE
from coconut.commands.plan.cost import Cost, cost_of, memory_of
from coconut.commands.plan.hardware import Slice
from coconut.errors import CoconutError
from coconut.mesh import MeshConfig
from coconut.methods import get_method
from coconut.model import Template
from coconut.models.config import DecoderConfig, Remat
from coconut.pages import Markers, Placing, count_thoughts, question_alone, with_thoughts
from coconut.sharding import check_rows, make_mesh, replicated, row_sharding
from coconut.training.config import RunConfig
from coconut.training.optimizer import make_optimizer
from coconut.training.setup import abstract_state
from coconut.training.state import TrainState
from coconut.training.step import make_train_step
from coconut.types import Batch, Latent, Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """Columns of a batch to plan for; a plan reads no data.

    Attributes:
      total: all of them: prompt, thoughts and suffix.
      thoughts: thoughts of each block of a row; None for those of the curriculum's last stage, of a question with as
        many steps as the curriculum replaces at most.
      suffix: columns behind the last thoughts, which are scored.
    """

    total: int
    thoughts: int | None
    suffix: int

    def schedules(self, config: RunConfig) -> dict[str, Schedule]:
        """The spans of the batches of a step: one for each view of the method, all of the same width.

        Raises:
          CoconutError: see `schedule`.
        """
        return {view: self.schedule(config, view) for view in get_method(config.method).pages}

    def schedule(self, config: RunConfig, view: str = "main") -> Schedule:
        """The spans of a batch.

        Raises:
          CoconutError: they leave no prompt, are more than the model's positions, or have thoughts that the method
            has no place for.
        """
        method, one = get_method(config.method), np.zeros(1, np.int32)
        placing = Placing(
            curriculum=config.curriculum,
            stage=config.curriculum.final_stage,
            options=config.options,
            markers=Markers(start=0, latent=0, end=0),
        )
        example = dataclasses.replace(question_alone(one, config.curriculum), answer=one)
        page = method.pages[view](example, placing)
        asked = self.thoughts if view == "main" or count_thoughts(page) else None
        shape = page_shape([page if asked is None else with_thoughts(page, asked)])
        # The question and what follows the last thought have the columns that are left, but for the markers' own.
        unscored = shape.texts[-1] - shape.scored[-1]
        shape = dataclasses.replace(
            shape, texts=(*shape.texts[:-1], self.suffix), scored=(*shape.scored[:-1], self.suffix - unscored)
        )
        prompt = self.total - (shape.columns - shape.prompt)
        if prompt < 1 or self.suffix < 2:
            raise CoconutError(
                f"{self.total} columns with {sum(shape.thoughts)} thoughts and a suffix of {self.suffix}: at least 1 "
                "for the prompt and 2 for the suffix"
            )
        if self.total > config.decoder.max_positions:
            raise CoconutError(f"{self.total} columns: DecoderConfig.max_positions = {config.decoder.max_positions}")
        return dataclasses.replace(shape, prompt=prompt).schedule(feeds_back=method.feeds_back(config.options))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a train step needs and how fast it could be.

    Attributes:
      topology: name of the slice.
      mesh: sizes of the mesh's axes.
      batch_size: rows of a step.
      microbatches: parts they are split into.
      remat: what is recomputed.
      columns: of a row, thoughts included.
      thoughts: of a row.
      parameters: of the model.
      fits: whether the step fits a chip's memory.
      capacity: bytes of it.
      memory: bytes of a chip by kind; of a step that the compiler refused, those of its message.
      model_flops: of the whole step, as the model needs them, without what is recomputed.
      cost: of the step on each chip; None of one that the compiler refused.
      utilisation: share of the chips' peak that the model's own operations use in the expected time.
      tokens_per_day: columns trained on in a day of such steps.
      compile_seconds: what compiling took.
      suggestions: what to change where it does not fit.
      faster: what to change where it fits, that would help most; None of the devices at hand, and where nothing would
        that we know.
    """

    topology: str
    mesh: Mapping[str, int]
    batch_size: int
    microbatches: int
    remat: Remat
    columns: int
    thoughts: int
    parameters: int
    fits: bool
    capacity: float
    memory: Mapping[str, int]
    model_flops: float
    cost: Cost | None = None
    utilisation: float = 0.0
    tokens_per_day: float = 0.0
    compile_seconds: float = 0.0
    suggestions: tuple[str, ...] = ()
    faster: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self) | {"cost": self.cost.to_json() if self.cost else None}


@dataclasses.dataclass(frozen=True)
class Step:
    """A train step that is not compiled yet, and what it would be given."""

    function: Any
    template: Template
    state: TrainState
    views: dict[str, Batch]
    mesh: Mesh

    @functools.cached_property
    def compiled(self) -> jax.stages.Compiled:
        """The real compiler's program, compiled when it is first asked for."""
        place = replicated(self.mesh)
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=place)
        with jax.set_mesh(self.mesh):
            rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=place)
            return self.function.lower(self.state, self.views, rate, key).compile()


def make_step(config: RunConfig, where: Slice, mesh_config: MeshConfig, columns: Columns) -> Step:
    """The train step of a run with abstract arguments in their places on a slice.

    Raises:
      CoconutError: the vocabulary is not set, rows are packed, the mesh does not match the devices or does not split
        an array evenly, the batch does not divide, or the columns make no batch.
    """
    if config.decoder.vocab_size is None:
        raise CoconutError("DecoderConfig.vocab_size is not set: a plan reads no data, so it has to be given")
    if config.pipeline.examples_per_row > 1:
        raise CoconutError(
            f"PipelineConfig.examples_per_row = {config.pipeline.examples_per_row}: a plan knows the columns of one "
            "example, and how wide packed rows are is data; plan with 1"
        )
    schedules, mesh = columns.schedules(config), make_mesh(mesh_config, where.devices)
    check_rows(mesh, config.pipeline.batch_size, config.microbatches)
    optimizer = make_optimizer(config.optimizer)
    template, state = abstract_state(config, optimizer, mesh)
    function = make_train_step(
        *(template, get_method(config.method), optimizer),
        options=config.options,
        microbatches=config.microbatches,
        spikes=config.spikes,
        correction_rate=config.optimizer.correction_rate,
    )
    rows = config.pipeline.batch_size

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=row_sharding(mesh))

    views = {
        view: Batch(
            schedule=schedule,
            **{name: array(jnp.int32, rows, columns.total) for name in ("tokens", "positions", "labels", "pieces")},
            **{name: array(jnp.bool_, rows, columns.total) for name in ("valid", "answers")},
            **{name: array(jnp.int32, rows) for name in ("before_answer", "examples")},
        )
        for view, schedule in schedules.items()
    }
    return Step(function, template, state, views, mesh)


def make_plan(config: RunConfig, where: Slice, mesh_config: MeshConfig, columns: Columns) -> Plan:
    """The plan of a run on a mesh of a slice.

    Raises:
      CoconutError: see `make_step`.
    """
    return read_plan(config, where, make_step(config, where, mesh_config, columns), columns)


def read_plan(config: RunConfig, where: Slice, step: Step, columns: Columns) -> Plan:
    """Compiles a step and reads from its program what it needs."""
    schedules, rows = columns.schedules(config), config.pipeline.batch_size
    about = {
        "topology": where.name,
        "mesh": dict(step.mesh.shape),
        "batch_size": config.pipeline.batch_size,
        "microbatches": config.microbatches,
        "remat": config.execution.remat,
        "columns": columns.total,
        "thoughts": sum(span.length for span in schedules["main"] if isinstance(span, Latent)),
        "parameters": sum(leaf.size for leaf in step.state.parameters.values()),
        "capacity": where.chip.memory,
        "model_flops": sum(model_flops(config.decoder, schedule, rows) for schedule in schedules.values()),
    }
    started = time.perf_counter()
    try:
        compiled = step.compiled
    except jax.errors.JaxRuntimeError as error:
        memory = refused_memory(error)
        return Plan(**about, fits=False, memory=memory, suggestions=suggestions(config, step.mesh))
    seconds = time.perf_counter() - started
    memory = memory_by_kind(compiled, step.state)
    cost = cost_of(compiled, where)
    fits = sum(memory.values()) <= where.chip.memory
    return Plan(
        **about,
        fits=fits,
        memory=memory,
        cost=cost,
        utilisation=about["model_flops"] / (cost.roofline.expected * len(where.devices) * where.chip.flops),
        tokens_per_day=86_400 / cost.roofline.expected * config.pipeline.batch_size * columns.total,
        compile_seconds=seconds,
        suggestions=() if fits else suggestions(config, step.mesh),
        faster=faster(config, step.mesh, cost.roofline) if fits and where.name != HERE else None,
    )


def memory_by_kind(compiled: jax.stages.Compiled, state: TrainState) -> dict[str, int]:
    """Bytes of one device, what goes into a step by kind; see `memory_of`."""
    size = lambda tree: sum(_bytes(leaf) for leaf in jax.tree.leaves(tree))
    memory = memory_of(compiled)
    parameters, optimizer = size(state.parameters), size(state.opt_state)
    batch = max(memory.pop("arguments") - parameters - optimizer, 0)
    return {"parameters": parameters, "optimizer": optimizer, "batch": batch, **memory}


def model_flops(decoder: DecoderConfig, schedule: Schedule, rows: int) -> int:
    """Floating point operations of a train step as the model needs them: two for each product and its sum.

    Three times those of the forward pass (Kaplan et al. 2020, section 2.1): the matrices at every column, attention
    over the columns before, logits at the scored columns.
    """
    width = decoder.embed_dim
    attention, of_pair = _numbers_of_attention(decoder)
    mlps = sum(_numbers_of_mlp(decoder, layer) for layer in range(decoder.num_layers))
    columns = sum(span.length for span in schedule)
    scored = sum(getattr(span, "scored", 0) for span in schedule)
    windows = [decoder.window_of(layer) or columns for layer in range(decoder.num_layers)]
    pairs = sum(min(column, window) for window in windows for column in range(1, columns + 1))
    forward = decoder.num_layers * 2 * columns * attention + 2 * of_pair * pairs + 2 * columns * mlps
    return 3 * rows * (forward + 2 * scored * width * decoder.vocabulary)


def _numbers_of_mlp(decoder: DecoderConfig, layer: int) -> int:
    """The numbers of the matrices of a layer's MLP that a column uses."""
    width, matrices, experts = decoder.embed_dim, 3 if decoder.mlp_is_gated else 2, decoder.experts
    if experts is None or decoder.mlp_of(layer) == "dense":
        return matrices * width * decoder.width_of_mlp
    return width * (experts.count + matrices * (experts.chosen + experts.shared) * experts.width)


def _numbers_of_attention(decoder: DecoderConfig) -> tuple[int, int]:
    """Of a layer's attention: the numbers of its matrices, and the products of a query and a column it looks at."""
    width, heads, sizes = decoder.embed_dim, decoder.num_heads, decoder.latent_attention
    if sizes is None:
        queries, keys = heads * decoder.width_of_head, decoder.kv_heads * decoder.width_of_head
        return 2 * width * (queries + keys), 2 * queries
    asked, between = heads * sizes.query_dim, sizes.query_latent_dim
    queries = width * asked if between is None else (width + asked) * between
    kept = width * (sizes.latent_dim + sizes.rotary_dim)
    expansion = sizes.latent_dim * heads * (sizes.plain_dim + sizes.value_dim)
    return queries + kept + expansion + heads * sizes.value_dim * width, asked + heads * sizes.value_dim


def refused_memory(error: Exception) -> dict[str, int]:
    """What the compiler said a program would have used that does not fit; raises any other error of it."""
    message = str(error)
    if "RESOURCE_EXHAUSTED" not in message:
        raise error
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    if used := re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?)", message):
        return {"needed, as the compiler says": int(float(used[1]) * units[used[2]])}
    return {}


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
