"""What identifies a run, and the file that says so: ``run.json``."""

import dataclasses
import fnmatch
import hashlib
import json
import logging
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax

from coconut.errors import CoconutError
from coconut.extensions import imported_extensions, require_extensions
from coconut.pages import Markers, Placing
from coconut.provenance import provenance
from coconut.storage import exists, explained, write_atomically
from coconut.storage_path import StoragePath, as_path, is_remote
from coconut.tokenizers import Tokenizer
from coconut.training.config import RunConfig, differences, run_config_from_json, to_json
from coconut.training.trackers.feeding import name_of
from coconut.training.trackers.writer import TrackedRun
from coconut.training.workdir import RUN_FILE, SWEEP_FILE, read_run_file
from coconut.types import Example

LOG = logging.getLogger(__name__)

FREE = (
    "execution.*",
    "microbatches",
    "pipeline.examples_per_row",
    "pipeline.threads",
    "pipeline.prefetch",
    "evaluation_batch_size",
    "log_every",
    "save_every",
    "keep_latest",
    "max_skipped_steps",
    "norm_alert_factor",
    "tracking.*",
)
"""Fields of a `RunConfig` in which a run may go on with another value: how it is run, and what is noted of it."""
UNSEEN = ("pipeline.threads", "pipeline.prefetch", "save_every", "keep_latest", "max_skipped_steps", "tracking.*")
"""Those of `FREE` that change no line of ``metrics.jsonl``, not even by rounding."""
BY_NAME = (
    *("optimizer.*", "decoder.dropout", "evaluate_every", "sampling.*", "halting", "halting.*"),
    *("data.validation", "data.test", "splits.validation", "splits.test"),
)
"""What changes the numbers, or what they are measured on: if it differs, a run goes on where the user names it."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What identifies a run: it is written once into the workdir, and a checkpoint is no use without it.

    Attributes:
      config: the resolved configuration, its vocabulary known.
      tokenizer: the tokenizer.
      data: fingerprint of the training data and its order.
      splits: fingerprint of each split (`split_fingerprint`); empty for a run of a version that wrote none.
    """

    config: RunConfig
    tokenizer: Tokenizer
    data: str
    splits: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def placing(self, stage: int) -> Placing:
        """What the run's pages are written by at a stage."""
        config, markers = self.config, Markers.of(self.tokenizer)
        return Placing(curriculum=config.curriculum, stage=stage, options=config.options, markers=markers)

    def check(self, workdir: StoragePath, allow: Collection[str] = ()) -> dict[str, str]:
        """Checks that the workdir holds no other run.

        Fields that its config did not have yet, when it was written, have their defaults.

        Args:
          workdir: of the run; it may be new.
          allow: fields among `BY_NAME` that may differ, beside those of `FREE`: ``optimizer.learning_rate``.

        Returns:
          The fields that differ and may, and what they are there and here.

        Raises:
          CoconutError: it holds another run, and the message lists what differs; or ``allow`` names a field that can
            never differ.
        """
        for name in allow:
            if not (_fits(name, BY_NAME) and _has({**to_json(self.config), "splits": self.splits}, name)):
                raise CoconutError(f"--allow {name}: only fields of {', '.join(BY_NAME)} can be allowed to change")
        if not exists(workdir / RUN_FILE):
            return {}
        return self._compare(Run.load(workdir).identity(), f"{workdir} holds another run", allow)

    def check_checkpoint(self, identity: Mapping[str, Any], where: str, allow: Collection[str] = ()) -> None:
        """Checks that a checkpoint is of this run: `check`, of what its manifest says.

        Raises:
          CoconutError: it is another run's; the message begins with ``where`` and lists what differs.
        """
        if not isinstance(identity.get("config"), Mapping):
            raise CoconutError(f"{where}: its manifest does not say of which run it is")
        # Fields that there were not yet have their defaults.
        config = to_json(run_config_from_json(identity["config"], f"{where}: config"))
        self._compare({**identity, "config": json.loads(json.dumps(config))}, f"{where} is of another run", allow)

    def _compare(self, there: Mapping[str, Any], message: str, allow: Collection[str]) -> dict[str, str]:
        here = self.identity()
        if not there.get("splits"):  # A version that wrote none.
            here = {name: value for name, value in here.items() if name != "splits"}
            there = {name: value for name, value in there.items() if name != "splits"}
        found = differences(there, here)
        changed = {name.removeprefix("config."): what for name, what in found.items()}
        refused = {name: what for name, what in changed.items() if not _fits(name, (*FREE, *allow))}
        if refused:
            can = sorted(name for name in refused if _fits(name, BY_NAME))
            hint = (
                "" if len(can) < len(refused) else "\nTo go on all the same: " + " ".join(f"--allow {x}" for x in can)
            )
            lines = "\n  ".join(f"{name}: {what}" for name, what in refused.items())
            raise CoconutError(f"{message}. What differs:\n  {lines}{hint}")
        return changed

    def save(self, workdir: StoragePath, *, changed: Mapping[str, str], step: int) -> None:
        """Writes ``run.json``; of several processes the first one does.

        Args:
          workdir: of the run.
          changed: what `check` found. Where a run goes on with other fields, the file says which and since when.
          step: optimizer steps taken so far.
        """
        path = workdir / RUN_FILE
        if jax.process_index() != 0 or (exists(path) and not changed):
            return
        content = {**self.identity(), "imports": list(imported_extensions()), "tokenizer": self.tokenizer.to_json()}
        if exists(path):
            content["started"] = read_run_file(workdir).get("started")
        else:
            content["started"] = {"command": shlex.join(sys.argv), **provenance()}
        if changed:
            for name, what in changed.items():
                LOG.warning("going on from step %d with another %s: %s", step, name, what)
            earlier = read_run_file(workdir).get("changes", [])
            content["changes"] = [*earlier, {"from_step": step, "fields": dict(changed)}]
        write_atomically(path, json.dumps(content, indent=1))

    @classmethod
    def load(cls, workdir: StoragePath | str) -> "Run":
        """Reads ``run.json``.

        Raises:
          CoconutError: there is none, it is malformed, its tokenizer is not the one it was written with, or it needs a
            module that was not imported (`coconut.extensions`).
        """
        path = as_path(workdir) / RUN_FILE
        if not exists(path):
            raise _no_run(path.parent)
        content = read_run_file(path.parent)
        for key in ("config", "tokenizer", "tokenizer_fingerprint", "data_fingerprint"):
            if key not in content:
                raise CoconutError(f"{path}: {key!r} is missing")
        splits = content.get("splits", {})
        if not (isinstance(splits, dict) and all(isinstance(value, str) for value in splits.values())):
            raise CoconutError(f"{path}: splits = {splits!r:.80}: must be a fingerprint for each split")
        imports = content.get("imports", [])
        if not (isinstance(imports, list) and all(isinstance(name, str) for name in imports)):
            raise CoconutError(f"{path}: imports = {imports!r}: must be a list of names of modules")
        require_extensions(imports, str(path))
        tokenizer = Tokenizer.from_json(content["tokenizer"], f"{path}: tokenizer")
        if tokenizer.fingerprint != content["tokenizer_fingerprint"]:
            raise CoconutError(
                f"{path}: the tokenizer's fingerprint is {tokenizer.fingerprint}, but the checkpoint was written with "
                f"{content['tokenizer_fingerprint']}"
            )
        config = run_config_from_json(content["config"], f"{path}: config")
        if tokenizer.vocab_size > config.decoder.vocabulary:
            raise CoconutError(
                f"{path}: the tokenizer has {tokenizer.vocab_size} ids, the decoder {config.decoder.vocabulary}"
            )
        return cls(config, tokenizer, content["data_fingerprint"], splits)

    def identity(self) -> dict[str, Any]:
        """What tells two runs apart, as JSON holds it."""
        content = {
            "config": to_json(self.config),
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "data_fingerprint": self.data,
            "splits": dict(self.splits),
        }
        return json.loads(json.dumps(content))


def write_cell(workdir: StoragePath, cell: Mapping[str, Any]) -> None:
    """Writes which cell of a sweep the run of a workdir is; of several processes the first one does."""
    if jax.process_index() == 0:
        write_atomically(workdir / SWEEP_FILE, json.dumps(cell, indent=1) + "\n")


def changes_metrics(changed: Collection[str]) -> bool:
    """Whether what `Run.check` found changes the metrics of the steps to come: their numbers, or which are logged."""
    return any(not _fits(name, UNSEEN) for name in changed)


def tracked(run: Run, workdir: StoragePath, start: int) -> TrackedRun:
    """What trackers are told of a run that is started with ``start`` steps taken."""
    tracking = run.config.tracking
    return TrackedRun(
        workdir=workdir,
        start=start,
        name=tracking.name or name_of(workdir),
        project=tracking.project,
        tags=tracking.tags,
        config=run.identity()["config"],
        provenance=provenance(),
    )


def folder_of_run(workdir: StoragePath | str) -> StoragePath:
    """The folder itself, or the Coconut run of a quickstart, where it is the folder of one.

    Raises:
      CoconutError: it is neither; the message names the runs in it.
    """
    workdir = as_path(workdir)
    if exists(workdir / RUN_FILE):
        return workdir
    if all(exists(workdir / name / RUN_FILE) for name in ("coconut", "warm_up")):
        return workdir / "coconut"
    raise _no_run(workdir)


def _no_run(workdir: StoragePath) -> CoconutError:
    """Says that a folder is no workdir, and which ones are in it, as in those of a quickstart or a table."""
    inside = "; there are runs in it, name one: " if (runs := _runs_in(workdir)) else ""
    return CoconutError(f"{workdir} holds no run: {workdir / RUN_FILE} is missing{inside}{', '.join(runs)}")


def _runs_in(folder: StoragePath, depth: int = 3) -> list[str]:
    # An object store has no folders to walk through.
    if is_remote(folder):
        return []
    with explained(folder):
        found = [path for levels in range(1, depth + 1) for path in folder.glob("*/" * levels + RUN_FILE)]
    return sorted(str(path.parent) for path in found)


def split_fingerprint(examples: Sequence[Example]) -> str:
    """A SHA-256 of a split: every text and graph in it, in order; 64 hexadecimal digits."""
    digest = hashlib.sha256()
    # What `dataclasses.asdict` says, which copies every leaf: of 50,000 graphs that took half of a run's preparation.
    fields = lambda part: {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    encode = json.JSONEncoder(sort_keys=True, default=fields).encode
    for example in examples:
        digest.update(encode(example).encode() + b"\n")
    return digest.hexdigest()


def _fits(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _has(content: Any, name: str) -> bool:
    for part in name.split("."):
        if not isinstance(content, Mapping) or part not in content:
            return False
        content = content[part]
    return True
