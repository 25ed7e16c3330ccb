"""What loading a checkpoint costs: peak memory against its bound, seconds, and the way there and back, bit for bit.

    python -m experiments.benchmarks.load_pretrained

A random Llama-style checkpoint is written in several files. A fresh process then loads it and reports the peak of its
resident memory. Counted is all of the process: the decoder (on a CPU the result is host memory), pages of mapped files
and JAX's own, less what the process held before it called `load_pretrained` (interpreter and libraries). The bound on
what this is above the decoder's own bytes is 1.3 times the largest file plus one layer. Linux only.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from coconut.models.config import DecoderConfig, ExecutionConfig, RotaryScaling
from coconut.models.huggingface import load_pretrained, read_config, save_pretrained
from coconut.models.parameters import abstract_decoder, decoder_of, decoder_parameters
from experiments import ending
from experiments.benchmarks import timing


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is written and loaded.

    Attributes:
      decoder: the model, in the dtype of the files.
      max_shard_bytes: size of one file.
    """

    decoder: DecoderConfig
    max_shard_bytes: int


def _llama_style(**sizes: Any) -> DecoderConfig:
    return DecoderConfig(
        position_embedding="rotary",
        rotary_base=500_000.0,
        rotary_scaling=RotaryScaling(factor=32.0),
        normalization="rmsnorm",
        mlp="swiglu",
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        tied_head=False,
        param_dtype="bfloat16",
        **sizes,
    )


WORKLOAD = Workload(
    _llama_style(
        vocab_size=64_000,
        num_layers=16,
        embed_dim=1536,
        num_heads=24,
        num_kv_heads=8,
        mlp_dim=4096,
        max_positions=131_072,
    ),
    max_shard_bytes=300 * 10**6,
)
SMOKE = Workload(
    _llama_style(
        vocab_size=500,
        num_layers=2,
        embed_dim=64,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=128,
        max_positions=128,
    ),
    max_shard_bytes=100_000,
)


def write_random(workload: Workload, folder: Path) -> None:
    """Writes a checkpoint of normal numbers."""
    rng = np.random.default_rng(0)
    parameters = {
        name: jax.device_put(
            (0.02 * rng.standard_normal(leaf.shape, np.float32) + name.endswith("scale")).astype(ml_dtypes.bfloat16)
        )
        for name, leaf in decoder_parameters(abstract_decoder(workload.decoder)).items()
    }
    save_pretrained(
        decoder_of(workload.decoder, ExecutionConfig(dtype=workload.decoder.param_dtype), parameters),
        folder,
        max_shard_bytes=workload.max_shard_bytes,
    )


def load(folder: Path, layout: str, dtype: str | None) -> dict[str, Any]:
    """Loads a checkpoint and measures this process, which should have done nothing else."""
    config = dataclasses.replace(read_config(folder), param_dtype=dtype or "bfloat16")
    execution = ExecutionConfig(scan_layers=layout == "stacked")
    # Memory that JAX takes once, whatever is loaded, should not count as the loading's.
    jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
    before = resident_bytes("VmRSS")
    start = time.perf_counter()
    decoder = load_pretrained(folder, config=config, execution=execution)
    jax.block_until_ready(jax.tree.leaves(decoder))
    seconds = time.perf_counter() - start
    peak = resident_bytes("VmHWM") - before
    parameters = decoder_parameters(decoder)
    result = sum(leaf.nbytes for leaf in parameters.values())
    layers = sum(leaf.nbytes for name, leaf in parameters.items() if name.startswith("layers."))
    largest = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    bound = int(1.3 * largest + layers / config.num_layers)
    return {
        "layout": layout,
        "param_dtype": config.param_dtype,
        "seconds": seconds,
        "decoder_bytes": result,
        "peak_bytes": peak,
        "beyond_decoder_bytes": peak - result,
        "bound_beyond_decoder_bytes": bound,
        "within_bound": peak - result <= bound,
    }


def resident_bytes(field: str) -> int:
    """What this process has resident now (``VmRSS``), or had at most (``VmHWM``). Linux only.

    Not `resource.getrusage`: a process inherits the peak of the one that started it.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def there_and_back(folder: Path, scratch: Path) -> bool:
    """Whether `transformers` finds every tensor unchanged in what we write of what we have loaded."""
    import torch
    from transformers import AutoModelForCausalLM

    save_pretrained(load_pretrained(folder), scratch)
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, scratch))
    return before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def main() -> None:
    """Runs the benchmark, or in a process of its own one of its loads."""
    options = timing.parser(__doc__ or "")
    options.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--layout", default="one by one", help=argparse.SUPPRESS)
    options.add_argument("--dtype", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.load:
        print(json.dumps(load(arguments.load, arguments.layout, arguments.dtype)))
        return
    workload = SMOKE if arguments.smoke else WORKLOAD
    with ending.by_exception(), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_random(workload, folder)
        files = [file.stat().st_size for file in folder.glob("*.safetensors")]
        report = timing.Report("load_pretrained", arguments)
        sizes = {"bytes": sum(files), "files": len(files), "largest_file_bytes": max(files)}
        loads = []
        for layout in ("one by one", "stacked"):
            for dtype in ("bfloat16", "float32"):
                runs = [_run(folder, layout, dtype) for _ in range(arguments.repeats or 1)]
                # The first may read from disk, and the worst peak is what a bound is about.
                worst = max(runs, key=lambda run: run["peak_bytes"])
                loads.append({**worst, "seconds": [run["seconds"] for run in runs]})
                report.add("loads", loads)
                print(loads[-1], file=sys.stderr)
        report.add("checkpoint", sizes)
        report.add("decoder", dataclasses.asdict(workload.decoder))
        unchanged = there_and_back(folder, Path(temporary) / "again")
        report.add("unchanged_through_load_save_and_transformers", unchanged)
    report.finish()


def _run(folder: Path, layout: str, dtype: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "experiments.benchmarks.load_pretrained"]
    command += ["--load", str(folder), "--layout", layout, "--dtype", dtype]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
