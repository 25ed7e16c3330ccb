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
# # Inside a thought
#
# What do a model's continuous thoughts hold, and do its answers depend on them? This notebook trains Coconut on small
# graphs (about four minutes on two CPU cores), or takes a run of yours, and looks: it replaces thoughts by noise, by
# their mean, by another question's; stops early; reads them through the model's own head; and draws what the model
# would write next.
#
# It runs the very functions behind `coconut inspect`.

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
# ## A trained model
#
# Set `COCONUT_WORKDIR` to a run of yours. Set `COCONUT_NOTEBOOK_SIZE=smoke` to run everything at a size that learns
# nothing, in a minute or two.

# %%
from pathlib import Path

from rich.console import Console

from coconut.commands.quickstart import QuickstartConfig, quickstart

smoke = os.environ.get("COCONUT_NOTEBOOK_SIZE") == "smoke"
workdir = Path(os.environ.get("COCONUT_WORKDIR", "coconut-inside/coconut"))
if not workdir.exists():
    bindings = QuickstartConfig.smoke().bindings if smoke else ()
    quickstart(workdir.parent, config=QuickstartConfig(methods=("coconut",), bindings=bindings), console=Console())

# %% [markdown]
# ## Interventions
#
# Each row does something to thoughts and answers the same questions again. `n` counts the questions that have such
# thoughts; *changed* the answers that become another one. Look at the last thought against the others, and at what
# happens if those behind an altered thought are made again of it.

# %%
from IPython.display import HTML, Image, Markdown, display

from coconut.commands.inspect.command import InspectConfig, describe, inspect_workdir

output = Path("coconut-inside/inspected")
size = {"questions": 8, "interventions": ("noise",), "beyond": 0} if smoke else {"questions": 200}
config = InspectConfig(output=output, **size)
found = inspect_workdir(workdir, config, command="colab/inside_a_thought", console=Console())
display(Markdown(describe(found, output)))

# %% [markdown]
# ## The figures

# %%
for figure in found["figures"]:
    display(Image(filename=str(output / figure["file"])), Markdown(figure["caption"]))

# %% [markdown]
# ## The page
#
# Every question with its graph, a slider over its thoughts, and a button for each intervention. It is one file; to
# look at it on its own, download `coconut-inside/inspected/index.html` and open it.

# %%
import html

page = html.escape((output / "index.html").read_text(), quote=True)
display(HTML(f'<iframe srcdoc="{page}" width="100%" height="900"></iframe>'))

# %% [markdown]
# ## An intervention of your own
#
# An alteration is a function of the thoughts `[K, D]` of all questions. This one takes away what a thought has in the
# direction of the first principal component of all thoughts.

# %%
import dataclasses

import numpy as np

from coconut.analysis.interventions import Intervention, intervene
from coconut.commands.evaluate import questions_of, subject_of
from coconut.evaluation.answers import AnswerConfig, thoughts_of_questions
from coconut.evaluation.interventions import without_directions
from coconut.training.loading import load_model

run, model, progress = load_model(workdir)
subject, examples = subject_of(run, model, progress), questions_of(run, "test")[: config.questions]
asked = AnswerConfig(batch_size=len(examples), sampling=run.config.sampling)
thoughts = np.concatenate(thoughts_of_questions(*subject.asked, [subject.tokenize(x) for x in examples], asked))
component = np.linalg.svd(thoughts - thoughts.mean(0), full_matrices=False)[2][:1]
mine = Intervention(kind="without the first component", alter=without_directions(component))
effect = intervene(subject, examples, asked, [mine]).outcomes[0].effect
print({name: value for name, value in dataclasses.asdict(effect).items() if name in ("examples", "accuracy", "flips")})
