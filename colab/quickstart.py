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
# # Reasoning in continuous thoughts, in ten minutes
#
# A question is a small directed graph, a root and two candidates: which of the two lies below the root?
# **Coconut** (Hao et al. 2024) answers after a few *continuous thoughts*: the last hidden state, fed back as the next
# input instead of a word. This notebook trains it from scratch beside its controls, on two CPU cores in about
# ten minutes, and then looks into the thoughts.
#
# It runs the very functions behind the commands `coconut quickstart` and `coconut generate`.

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
# ## Train and compare
#
# Each method gets the same graphs. With its thoughts removed, and for the controls that write no reasoning, expect a
# coin's 50 %: the graphs are drawn so that no shortcut tells the candidates apart. Set `COCONUT_NOTEBOOK_SIZE=smoke`
# to run everything at a size that learns nothing, in a minute or so.

# %%
from pathlib import Path

from IPython.display import Image, Markdown, display
from rich.console import Console

from coconut.commands.quickstart import QuickstartConfig, quickstart, table

outdir = Path("coconut-quickstart")
config = QuickstartConfig.smoke() if os.environ.get("COCONUT_NOTEBOOK_SIZE") == "smoke" else QuickstartConfig()
results = quickstart(outdir, config=config, console=Console())
display(Markdown(table(results)))

# %% [markdown]
# ## The pictures
#
# Validation accuracy and training loss, with the stages of Coconut's curriculum; one question's graph with the node
# that the model would write next after each number of thoughts, as a step or as its answer; and accuracy by the number
# of thoughts at test time, of written answers and of the choice between the two options.

# %%
for name in ("learning_curves", "beliefs", "accuracy_by_thoughts"):
    display(Image(filename=str(outdir / f"{name}.png")))

# %% [markdown]
# ## Ask the model
#
# The trained model answers a question it has not seen. Each thought is read through the model's own output layer:
# the symbols it is nearest to, although none was ever written.

# %%
from coconut.commands.generate import answer_question, describe
from coconut.datasets import load_split, text_format_of
from coconut.training.loading import load_model

run, model, progress = load_model(outdir)
example = load_split(run.config.data, "test")[1]
reply = answer_question(run, model, progress, example.question)
print(example.question)
print(describe(reply))
print(f"the right answer: {example.answer}")

# %% [markdown]
# ## Look inside
#
# Stop the model after 0, 1, 2, ... thoughts and ask what it would write next: its belief over the nodes. With the
# answer's prefix forced this is the answer it would give; without, the next step of reasoning it would write.

# %%
from coconut.analysis.plots import plot_belief
from coconut.analysis.probes import belief_over_nodes
from coconut.methods import get_method
from coconut.tokenizers import encode_example

method, text_format = get_method(run.config.method), text_format_of(run.config.data)
assert example.graph is not None
for forced, title in ((None, "the answer it would give"), ("", "the step it would write next")):
    beliefs = belief_over_nodes(
        model,
        run.tokenizer,
        method,
        run.placing(progress.stage),
        example,
        encode_example(run.tokenizer, example, text_format),
        text_format,
        max_thoughts=run.config.curriculum.max_thoughts,
        forced=forced,
    )
    picture = outdir / f"{'answer' if forced is None else 'step'}_belief.png"
    plot_belief(example.graph, beliefs, picture, title)
    display(Image(filename=str(picture)))

# %% [markdown]
# Thoughts can also be compared with the embeddings of the nodes, in the groups of Zhu et al. 2025: a thought that
# holds a search frontier is nearer to the nodes just reached than to others.

# %%
import numpy as np

from coconut.analysis.paths import group_means
from coconut.analysis.probes import node_token_ids, thought_neighbors

thoughts = reply.answer.thought_inputs
if thoughts is not None and len(thoughts):
    values = thought_neighbors(model, thoughts, node_token_ids(run.tokenizer, example.graph), measure="cosine")
    for group, means in group_means(example.graph, values).items():
        print(f"{group:12}", np.round(means, 2))
