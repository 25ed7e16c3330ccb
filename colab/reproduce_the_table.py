# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Reproduce the table
#
# Methods of latent reasoning, trained alike on one task and asked the same questions: accuracy with an interval over
# seeds and questions, the price in tokens and passes, and what is left if thoughts are removed, emptied, replaced by
# noise, by their mean, by another question's, or put in another order.
#
# It runs the very function behind `coconut table`. All methods with three seeds take hours on two cores; the three
# methods and one seed below take about ten minutes. Started again it goes on where it stopped.

# %% [markdown]
# ## Install
#
# Where `coconut` is not installed yet, say in `SOURCE` where it comes from: the address of your clone as
# `git+https://...`, a wheel, or a folder. A JAX that is here stays as it is (Colab's own fits its accelerator); where
# there is none, the one for this machine's GPU, TPU or CPU is installed.

# %%
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile

SOURCE = os.environ.get("COCONUT_SOURCE", "")

if importlib.util.find_spec("coconut") is None:
    assert SOURCE, "say in SOURCE where coconut comes from: git+https://ADDRESS, a wheel, or a folder"
    jax = "jax"
    if importlib.util.find_spec("jax") is None:
        gpu, tpu = shutil.which("nvidia-smi"), os.environ.get("TPU_ACCELERATOR_TYPE") or os.path.exists("/dev/accel0")
        jax = "jax[cuda13]" if gpu else "jax[tpu]" if tpu else "jax"
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as pins:
        for name in ("jax", "jaxlib"):
            if importlib.util.find_spec(name) is not None:
                print(f"{name}=={importlib.metadata.version(name)}", file=pins, flush=True)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--constraint", pins.name]
        subprocess.run([*pip, jax, f"coconut-jax[notebook] @ {SOURCE}" if "://" in SOURCE else SOURCE], check=True)

import jax

print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, JAX {jax.__version__}")

# %% [markdown]
# ## The warm-up
#
# A model from scratch first has to learn to follow an edge. All methods start from the same parameters.

# %%
from pathlib import Path

from rich.console import Console

from coconut.commands.quickstart import QuickstartConfig, quickstart

smoke = os.environ.get("COCONUT_NOTEBOOK_SIZE") == "smoke"
outdir = Path("coconut-table")
bindings = QuickstartConfig.smoke().bindings if smoke else ()
quickstart(outdir / "start", config=QuickstartConfig(methods=("coconut",), bindings=bindings), console=Console())

# %% [markdown]
# ## The grid
#
# Every run takes the whole budget, divided over the stages of its own curriculum. Add methods (`simcot`, `codi`,
# `pccot`, `icot`, ...: the files of `gin_configs/methods`) and seeds as you have time.

# %%
from IPython.display import Image, Markdown, display

from coconut.commands.table.budget import Budget
from coconut.commands.table.command import make_table
from coconut.commands.table.grid import TableConfig
from coconut.commands.table.report import describe as describe_table

config = TableConfig(
    task="small_graphs",
    methods=("cot", "coconut") if smoke else ("cot", "no_cot", "coconut"),
    seeds=(0,),
    budget=Budget.parse("12steps" if smoke else "3000steps"),
    output=outdir / "grid",
    bindings=(*bindings, f"RunConfig.init_from = '{(outdir / 'start' / 'warm_up').resolve()}'"),
)
content = make_table(config, console=Console())
display(Markdown(describe_table(content)))

# %%
display(Image(filename=str(outdir / "grid" / "table.png")))
