"""What to change in a run, so that it fits the chips or is faster on them."""

from jax.sharding import Mesh

from coconut.commands.plan.roofline import Roofline
from coconut.training.config import RunConfig


def suggestions(config: RunConfig, mesh: Mesh) -> tuple[str, ...]:
    """What would need less memory, what costs least first."""
    rows = config.pipeline.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"] * config.microbatches)
    found = []
    if mesh.shape["data"] > 1:
        found.append(f"--mesh fsdp={mesh.shape['fsdp'] * mesh.shape['data']}: parameters and optimizer in more shards")
    if not config.execution.scan_layers:
        found.append("ExecutionConfig.scan_layers = True: buffers of one layer serve them all")
    if config.execution.remat != "full":
        found.append("ExecutionConfig.remat = 'full': activations are recomputed, for a third more arithmetic")
    if config.execution.gather == "step":
        found.append("ExecutionConfig.gather = 'pass': no device holds all matrices, which move more often")
    if rows > 1:
        found.append(f"RunConfig.microbatches = {2 * config.microbatches}: half the rows at a time")
    if config.execution.dtype != "bfloat16":
        found.append("ExecutionConfig.dtype = 'bfloat16': activations of half the size")
    if not found:
        found.append("a larger slice, or a mesh with more of tensor or sequence")
    return tuple(found)


def faster(config: RunConfig, mesh: Mesh, times: Roofline) -> str | None:
    """What would help most where the chips are TPUs; it may need more memory, which a plan of it says."""
    more_rows = f"PipelineConfig.batch_size = {2 * config.pipeline.batch_size}"
    if config.execution.dtype != "bfloat16":
        return "ExecutionConfig.dtype = 'bfloat16': half the bytes, and products at a chip's full speed"
    if times.bound == "interconnect":
        if mesh.shape["fsdp"] > 1 and config.execution.gather == "pass":
            return "ExecutionConfig.gather = 'step': matrices are gathered once a step, and not for each pass of it"
        if mesh.shape["tensor"] > 1:
            return "a mesh with less of tensor: it sums the columns of every layer over its chips"
        return f"{more_rows}: the same matrices are gathered, and gradients summed, for twice the rows"
    if config.execution.remat == "full":
        return "ExecutionConfig.remat = 'dots': products are kept, about a quarter less arithmetic"
    return f"{more_rows}: the same matrices are read for twice the rows" if times.bound == "memory" else None
