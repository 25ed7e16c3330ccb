"""What a model card says of where a model comes from: its data, its training, what was measured, how to cite it."""

import contextlib
from pathlib import Path
from typing import Any

from coconut.datasets import SPLITS
from coconut.storage_path import StoragePath, as_path
from coconut.training.checkpoint import Checkpoints
from coconut.training.progress import Progress
from coconut.training.run import Run, folder_of_run
from coconut.training.workdir import read_run_file

CITATION = """@article{hao2024training,
  title = {Training Large Language Models to Reason in a Continuous Latent Space},
  author = {Hao, Shibo and Sukhbaatar, Sainbayar and Su, DiJia and Li, Xian and Hu, Zhiting and Weston, Jason and
    Tian, Yuandong},
  journal = {arXiv preprint arXiv:2412.06769},
  year = {2024}
}"""


def origin(workdir: StoragePath | str, run: Run, progress: Progress) -> str:
    """The sections of a model card that say where the model comes from, in Markdown.

    Whatever the run does not say is left out: no figure stands here that the run did not record.

    Args:
      workdir: of the run, or a quickstart's folder.
      run: the run.
      progress: of the checkpoint that the card is of.

    Raises:
      CoconutError: the workdir holds no run, or the checkpoint's manifest is damaged.
    """
    workdir = folder_of_run(as_path(workdir))
    started = read_run_file(workdir).get("started")
    started = started if isinstance(started, dict) else {}
    with contextlib.closing(Checkpoints(workdir, read_only=True)) as checkpoints:
        validation = checkpoints.manifest(progress.step).validation
    # Of a run that trains a scorer, "accuracy" is that of the best of several trajectories.
    accuracy = validation.get("accuracy_of_one", validation.get("accuracy"))
    parts = [
        "## Data\n\n" + _data(run),
        "## Training\n\n" + _training(run, progress, started),
        "## Measured\n\n" + _measured(accuracy),
        "## Limits\n\n" + _LIMITS,
        "## Citation\n\n" + f"```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(parts) + "\n"


_LIMITS = """- Made for research on how models reason. It was not checked for use by people.
- Thoughts are no text: what a model thinks cannot be read as its reasoning. Whether its answers depend on its thoughts
  is a question to measure (`coconut evaluate --interventions noise,other`).
- A model like this one answers questions like those it was trained on."""


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _name(source: str) -> str:
    """A repository or a relative path as it is; of a folder of this machine the name alone."""
    return Path(source).name if Path(source).is_absolute() else source


def _data(run: Run) -> str:
    data, rows = run.config.data, {"task": f"`{run.config.data.task}`"}
    for split in SPLITS:
        source = getattr(data, split)
        if source:
            what = f"{source:,} generated questions" if isinstance(source, int) else f"`{_name(source)}`"
            digest = run.splits.get(split)
            rows[split] = what + (f", SHA-256 {digest[:12]}" if digest else "")
    if data.options:
        rows["options"] = f"`{dict(data.options)}`"
    rows["tokenizer"] = f"`{data.tokenizer}`" + (f" of `{_name(data.tokenizer_path)}`" if data.tokenizer_path else "")
    return _table(rows)


def _training(run: Run, progress: Progress, started: dict[str, Any]) -> str:
    config, curriculum = run.config, run.config.curriculum
    rows: dict[str, Any] = {
        "method": f"`{config.method}`",
        "stage": f"{progress.stage} of {curriculum.first_stage} to {curriculum.final_stage}",
        "optimizer steps": f"{progress.step:,} of {config.pipeline.batch_size} examples",
        "learning rate": f"{config.optimizer.learning_rate:g} ({config.optimizer.decay}), AdamW",
        "seed": config.seed,
        "dtype": f"`{config.execution.dtype}`, parameters `{config.decoder.param_dtype}`",
    }
    if progress.seconds:
        rows["seconds"] = f"{progress.seconds:,.0f}, without compilation and evaluation"
    for name, source in (("started from", config.pretrained), ("started from the run", config.init_from)):
        if source is not None:
            rows[name] = f"`{_name(source)}`"
    hardware, versions = started.get("hardware"), started.get("versions")
    if isinstance(hardware, dict):
        rows["hardware"] = f"{hardware.get('devices')} x {hardware.get('device')}, {hardware.get('processor')}"
    if isinstance(versions, dict):
        rows["versions"] = ", ".join(f"{name} {versions[name]}" for name in ("coconut-jax", "jax") if name in versions)
    if isinstance(started.get("commit"), str):
        rows["commit"] = f"`{started['commit']}`"
    return _table(rows)


def _measured(accuracy: float | None) -> str:
    if accuracy is None:
        return "This checkpoint was not validated. `coconut evaluate --workdir WORKDIR` measures it on the test split."
    return (
        f"{100 * accuracy:.1f} % of the validation questions, which also chose between checkpoints. The figure to\n"
        "report is that of the test split: `coconut evaluate --workdir WORKDIR`."
    )
