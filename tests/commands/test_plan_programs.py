"""What `coconut plan` reads from the texts of compiled programs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from coconut.commands.plan.collectives import Collective, collectives
from coconut.commands.plan.program import flops, memory_traffic, open_loops, parse


def text_of(function: Any, *arguments: Any) -> str:
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert text is not None
    return text


def test_a_loops_products_count_as_often_as_it_runs() -> None:
    w = jnp.ones((16, 16))

    def body(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.sin(carry @ w), None

    program = parse(text_of(lambda x: jax.lax.scan(body, x, None, length=5)[0] @ w[:, :4], jnp.ones((8, 16))))
    assert flops(program) == 5 * 2 * 8 * 16 * 16 + 2 * 8 * 16 * 4
    assert flops(program, loops_once=True) == 2 * 8 * 16 * 16 + 2 * 8 * 16 * 4


def test_what_the_text_says_is_what_the_compiler_counts() -> None:
    """Where no loop runs more than once and little is no matrix product, both count the same."""

    def loss(weights: list[jax.Array], x: jax.Array) -> jax.Array:
        for w in weights:
            x = jnp.tanh(x @ w)
        return jnp.square(x).sum()

    compiled = jax.jit(jax.grad(loss)).lower([jnp.ones((256, 256))] * 3, jnp.ones((64, 256))).compile()
    analysis, program = compiled.cost_analysis(), parse(compiled.as_text() or "")
    assert analysis is not None
    assert 0.99 * analysis["flops"] < flops(program) <= analysis["flops"]
    assert memory_traffic(program) == pytest.approx(analysis["bytes accessed"], rel=0.02)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "VALID"},
        {"padding": [(3, 2)], "window_strides": (2,)},
        {"padding": [(4, 4)], "lhs_dilation": (5,), "window_strides": (4,)},
        {"padding": [(1, 3)], "rhs_dilation": (2,)},
    ],
)
def test_products_of_a_convolution_are_those_with_a_real_input(options: dict[str, Any]) -> None:
    given, kernel = jnp.ones((2, 7, 3)), jnp.ones((4, 3, 5))

    def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
        settings = {"window_strides": (1,), **options}
        return jax.lax.conv_general_dilated(x, w, dimension_numbers=("NWC", "WIO", "NWC"), **settings)

    # Every product of ones adds one.
    assert flops(parse(text_of(convolve, given, kernel))) == 2 * int(convolve(given, kernel).sum())


# As the TPU compiler writes: trip counts in conditions, groups as axes of a mesh, one collective in two fusions, fast
# memory as S(1).
TPU_TEXT = """
%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %start = (bf16[8,16]{1,0}, bf16[8,64]{1,0}) fusion(%x), kind=kCustom, calls=%start_computation
  %done = bf16[8,64]{1,0:S(1)} fusion(%start), kind=kCustom, calls=%done_computation
  %permute = (bf16[8,16]{1,0}, bf16[8,16]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=9
  %count = s32[]{:T(128)} get-tuple-element(%p), index=0
  %step = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%count, %step)
  ROOT %t = (s32[]{:T(128)}, bf16[8,16]{1,0}) tuple(%next, %x)
}

%start_computation (a: bf16[8,16]) -> bf16[8,64] {
  %a = bf16[8,16]{1,0:S(1)} parameter(0)
  ROOT %gather.1 = bf16[8,64]{1,0} all-gather(%a), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'a'}
}

%done_computation (b: bf16[8,16]) -> bf16[8,64] {
  %b = bf16[8,16]{1,0:S(1)} parameter(0)
  ROOT %gather.2 = bf16[8,64]{1,0:S(1)} all-gather(%b), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'a'}
}

%condition (q: (s32[], bf16[8,16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %q = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (arg: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %arg = (s32[], bf16[8,16]{1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[8,16]{1,0}) while(%arg), condition=%condition, body=%body
}
"""


def test_collectives_of_a_tpu_program() -> None:
    gather = Collective(kind="all-gather", elements=512, bytes=1024, group=4, times=12)
    permute = Collective(kind="collective-permute", elements=128, bytes=256, group=0, times=12)
    assert sorted(collectives(TPU_TEXT), key=lambda found: found.kind) == [gather, permute]
    # A reduce-scatter is a fusion with an all-reduce in it.
    scatter = TPU_TEXT.replace("start_computation", "all-reduce-scatter.1").replace("%gather.1 = ", "%reduce.1 = ")
    scatter = scatter.replace("all-gather(%a), channel_id=7", "all-reduce(%a), channel_id=8")
    expected = Collective(kind="reduce-scatter", elements=128, bytes=256, group=4, times=12)
    assert expected in collectives(scatter)
    unknown = TPU_TEXT.replace("direction=LT", "direction=NE")
    with pytest.raises(ValueError, match="does not say how often"):
        collectives(unknown)
    assert {found.times for found in collectives(unknown, turns=5)} == {5}
    unrolled = TPU_TEXT.replace("%step = s32[]{:T(128)} constant(1)", "%step = s32[]{:T(128)} constant(2)")
    assert {found.times for found in collectives(unrolled)} == {6}
    ring = TPU_TEXT.replace("{'a'}", '{\'a\'}, "debug":"\\nUniDirectionNDRingStrategy{colors:4 phases:2 cores:{4 4}}"')
    assert dataclasses.replace(gather, dimensions=2) in collectives(ring)


def test_loops_whose_number_of_turns_is_data() -> None:
    w = jnp.ones((16, 16))
    text = text_of(lambda x, n: jax.lax.fori_loop(0, n, lambda _, x: jnp.sin(x @ w), x), jnp.ones((8, 16)), 3)
    program = parse(text)
    assert (open_loops(program), flops(program), flops(program, turns=7)) == (1, 4096, 7 * 4096)


def test_kernels_say_what_they_cost() -> None:
    call = '%kernel = bf16[8,16] custom-call(%x), backend_config={"cost_estimate":{"flops":"321","x":"1"}}'
    program = parse(TPU_TEXT.replace("%permute =", f"{call}\n  %permute ="))
    assert flops(program) == 12 * 321


def test_what_is_sliced_out_of_an_array_counts_as_the_slice() -> None:
    def scanned(stacked: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda carry, x: (carry + jnp.sin(x), None), jnp.zeros(stacked.shape[1:]), stacked)[0]

    one, many = (memory_traffic(parse(text_of(scanned, jnp.ones((n, 256, 256))))) for n in (4, 64))
    assert one > 4 * 256 * 256 * 4
    assert many < 17 * one  # Not 256 times as much.


# As the TPU compiler writes a layer of a scan: its product takes a slice of the stacked matrices by a fusion in the
# fusion, and writes into slices of two stacked results at once.
STACKS = """
%take (m: bf16[12,16,32], i: s32[]) -> bf16[16,32] {
  %m = bf16[12,16,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %slice = bf16[1,16,32]{2,1,0} dynamic-slice(%m, %i, %i, %i), dynamic_slice_sizes={1,16,32}
  ROOT %squeezed = bf16[16,32]{1,0} bitcast(%slice)
}

%layer (a: bf16[12,8,32], b: f32[12,8,32], x: bf16[8,16], w: bf16[12,16,32], n: s32[]) -> (bf16[12,8,32], ...) {
  %a = bf16[12,8,32]{2,1,0} parameter(0)
  %b = f32[12,8,32]{2,1,0} parameter(1)
  %x = bf16[8,16]{1,0} parameter(2)
  %w = bf16[12,16,32]{2,1,0} parameter(3)
  %n = s32[] parameter(4)
  %matrix = bf16[16,32]{1,0} fusion(%w, %n), kind=kLoop, calls=%take
  %product = bf16[8,32]{1,0} convolution(%x, %matrix), dim_labels=bf_io->bf
  %row = bf16[1,8,32]{2,1,0} bitcast(%product)
  %wide = f32[1,8,32]{2,1,0} convert(%row)
  %first = bf16[12,8,32]{2,1,0} dynamic-update-slice(%a, %row, %n, %n, %n)
  %second = f32[12,8,32]{2,1,0} dynamic-update-slice(%b, %wide, %n, %n, %n)
  %named = f32[12,8,32]{2,1,0} bitcast(%second)
  ROOT %all = (bf16[12,8,32]{2,1,0}, f32[12,8,32]{2,1,0}, bf16[8,32]{1,0}) tuple(%first, %named, %product)
}

ENTRY %main (x: bf16[8,16], w: bf16[12,16,32], n: s32[]) -> bf16[8,32] {
  %x = bf16[8,16]{1,0} parameter(0)
  %w = bf16[12,16,32]{2,1,0} parameter(1)
  %n = s32[] parameter(2)
  %a = bf16[12,8,32]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %b = f32[12,8,32]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %made = (bf16[12,8,32]{2,1,0}, f32[12,8,32]{2,1,0}, bf16[8,32]{1,0}) fusion(%a, %b, %x, %w, %n), calls=%layer
  ROOT %last = bf16[8,32]{1,0} get-tuple-element(%made), index=2
}
"""


def test_a_layer_of_stacked_arrays_counts_as_one_layer() -> None:
    read = 2 * 8 * 16 + 2 * 16 * 32 + 4  # The columns, one matrix, and its number.
    written = 2 * 8 * 32 + 4 * 8 * 32 + 2 * 8 * 32
    assert memory_traffic(parse(STACKS)) == read + written
    # What is written into a stack in fast memory does not move.
    made = "%made = (bf16[12,8,32]{2,1,0}, f32[12,8,32]{2,1,0"
    assert memory_traffic(parse(STACKS.replace(made, f"{made}:S(1)"))) == read + written - 4 * 8 * 32
    # A stack that the fusion makes itself, or converts, is written whole.
    filled = "%zeros = f32[12,8,32]{2,1,0} broadcast(%n), dimensions={}\n  %second ="
    made_here = STACKS.replace("%second =", filled).replace("slice(%b, %wide", "slice(%zeros, %wide")
    assert memory_traffic(parse(made_here)) == read + written + 4 * 11 * 8 * 32
    converted = "%low = bf16[12,8,32]{2,1,0} convert(%b)\n  %first ="
    made_of = STACKS.replace("%first =", converted).replace("slice(%a, %row", "slice(%low, %row")
    assert memory_traffic(parse(made_of)) == read + written + 4 * 12 * 8 * 32 + 2 * 11 * 8 * 32
    # Where something else uses the stack, all of it is read.
    used = "%sum = bf16[12,16,32]{2,1,0} add(%w, %w)\n  %matrix ="
    assert memory_traffic(parse(STACKS.replace("%matrix =", used, 1))) == read + written + 2 * 11 * 16 * 32
