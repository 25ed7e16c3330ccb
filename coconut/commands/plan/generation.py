"""Answering a batch of questions on a slice: the real programs of `coconut.latent.generate`, compiled for its chips."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from coconut.commands.plan.cost import Cost, cost_of, memory_of
from coconut.commands.plan.hardware import Slice
from coconut.commands.plan.planning import Columns, refused_memory
from coconut.latent.generate import Continuation, Prefix, decode, prefill_program, think_program
from coconut.mesh import MeshConfig
from coconut.sharding import make_mesh, replicated
from coconut.training.config import RunConfig
from coconut.training.optimizer import make_optimizer
from coconut.training.setup import abstract_state
from coconut.types import Language, Latent


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """What answering a batch needs and how fast it could be.

    Attributes:
      topology: name of the slice.
      mesh: sizes of the mesh's axes.
      batch_size: questions answered together.
      prompt: columns of a question.
      thoughts: of a row.
      new_tokens: of a row, none of which ends before.
      fits: whether every phase fits a chip's memory.
      capacity: bytes of it.
      memory: bytes of a chip in each phase: ``prefill``, ``thoughts``, ``decoding``.
      phases: what each costs; decoding with all of the new tokens. Without those that the compiler refused.
      seconds: of the whole batch, as expected; 0 where a phase does not fit.
    """

    topology: str
    mesh: Mapping[str, int]
    batch_size: int
    prompt: int
    thoughts: int
    new_tokens: int
    fits: bool
    capacity: float
    memory: Mapping[str, int]
    phases: Mapping[str, Cost]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self) | {"phases": {name: cost.to_json() for name, cost in self.phases.items()}}


def make_generation_plan(
    config: RunConfig, where: Slice, mesh_config: MeshConfig, columns: Columns, batch_size: int
) -> GenerationPlan:
    """Compiles prefill, thoughts and decoding.

    Args:
      config: the run; its ``sampling`` says how many tokens a row may have.
      where: the slice.
      mesh_config: its mesh.
      columns: of a training batch, of which generation reads the prompt.
      batch_size: questions answered together.

    Raises:
      CoconutError: the mesh does not match the devices or does not split an array evenly, or the columns make no batch.
    """
    mesh = make_mesh(mesh_config, where.devices)
    schedule = columns.schedule(config)
    prompt = next(span.length for span in schedule if isinstance(span, Language))
    # Later blocks are the model's own choice: it writes before them.
    thoughts = next((span.length for span in schedule if isinstance(span, Latent)), 0)
    template, state = abstract_state(config, make_optimizer(config.optimizer), mesh)
    model = template.model(state.parameters)
    memory: dict[str, int] = {}
    phases: dict[str, Cost] = {}

    def compiled(name: str, lowered: jax.stages.Lowered, turns: int = 1) -> jax.stages.Compiled | None:
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            memory[name] = sum(refused_memory(error).values())
            return None
        memory[name], phases[name] = sum(memory_of(program).values()), cost_of(program, where, turns=turns)
        return program

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))

    with jax.set_mesh(mesh):
        tokens, valid = array(jnp.int32, batch_size, prompt), array(jnp.bool_, batch_size, prompt)
        lowered = prefill_program.lower(model.decoder, tokens, valid, None)
        prefix = _behind(None, compiled("prefill", lowered), lowered)
        if thoughts and prefix is not None:
            counts = array(jnp.int32, batch_size)
            lowered = think_program.lower(model.decoder, model.feedback, prefix, counts, room=thoughts)
            prefix = _behind(prefix, compiled("thoughts", lowered), lowered)
        if prefix is not None:
            key = jax.eval_shape(lambda: jax.random.key(0)).dtype
            forced = array(jnp.int32, batch_size, 1) if thoughts else None
            lowered = decode.lower(
                *(model.decoder, prefix, array(jnp.bool_, batch_size), array(key, batch_size)),
                forced=forced,
                sampling=config.sampling,
                eos_id=0,
            )
            compiled("decoding", lowered, turns=config.sampling.max_new_tokens)
    fits = "decoding" in phases and max(memory.values()) <= where.chip.memory
    return GenerationPlan(
        topology=where.name,
        mesh=dict(mesh.shape),
        batch_size=batch_size,
        prompt=prompt,
        thoughts=thoughts,
        new_tokens=config.sampling.max_new_tokens,
        fits=fits,
        capacity=where.chip.memory,
        memory=memory,
        phases=phases,
        seconds=sum(cost.roofline.expected for cost in phases.values()) if fits else 0.0,
    )


def _behind(before: Prefix | None, program: jax.stages.Compiled | None, lowered: jax.stages.Lowered) -> Prefix | None:
    """What a phase hands on, in the places the compiler chose."""
    if program is None:
        return None
    outputs = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        lowered.out_info,
        program.output_shardings,
    )
    following = outputs if isinstance(outputs, Continuation) else outputs[0]
    return following.behind(() if before is None else before.past)
