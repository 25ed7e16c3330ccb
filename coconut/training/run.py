"""What identifies a run, and the file that says so: ``run.json``."""

import dataclasses
import fnmatch
import json
import logging
from collections.abc import Collection, Mapping
from typing import Any

import jax

from coconut.errors import CoconutError
from coconut.extensions import imported_extensions, require_extensions
from coconut.pages import Markers, Placing
from coconut.storage import exists, read_text, write_atomically
from coconut.storage_path import StoragePath
from coconut.tokenizers import Tokenizer
from coconut.training.config import RunConfig, differences, run_config_from_json, to_json

LOG = logging.getLogger(__name__)
RUN_FILE = "run.json"

FREE = (
    "execution.*",
    "microbatches",
    "pipeline.threads",
    "pipeline.prefetch",
    "evaluation_batch_size",
    "log_every",
    "save_every",
    "keep_latest",
    "max_skipped_steps",
    "norm_alert_factor",
)
"""Fields of a `RunConfig` in which a run may go on with another value: how it is run, and what is noted of it."""
BY_NAME = ("optimizer.*", "decoder.dropout", "evaluate_every", "sampling.*", "halting", "halting.*")
"""Fields that change the numbers: with another value a run goes on where the user names them."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What identifies a run: it is written once into the workdir, and a checkpoint is no use without it.

    Attributes:
      config: the resolved configuration, its vocabulary known.
      tokenizer: the tokenizer.
      data: fingerprint of the training data and its order.
    """

    config: RunConfig
    tokenizer: Tokenizer
    data: str

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
            if not (_fits(name, BY_NAME) and _has(to_json(self.config), name)):
                raise CoconutError(f"--allow {name}: only fields of {', '.join(BY_NAME)} can be allowed to change")
        if not exists(workdir / RUN_FILE):
            return {}
        found = differences(_identity(Run.load(workdir)), _identity(self))
        changed = {name.removeprefix("config."): what for name, what in found.items()}
        refused = {name: what for name, what in changed.items() if not _fits(name, (*FREE, *allow))}
        if refused:
            can = sorted(name for name in refused if _fits(name, BY_NAME))
            hint = (
                "" if len(can) < len(refused) else "\nTo go on all the same: " + " ".join(f"--allow {x}" for x in can)
            )
            lines = "\n  ".join(f"{name}: {what}" for name, what in refused.items())
            raise CoconutError(f"{workdir} holds another run. What differs:\n  {lines}{hint}")
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
        content = {**_identity(self), "imports": list(imported_extensions()), "tokenizer": self.tokenizer.to_json()}
        if changed:
            for name, what in changed.items():
                LOG.warning("going on from step %d with another %s: %s", step, name, what)
            earlier = _read_json(path).get("changes", [])
            content["changes"] = [*earlier, {"from_step": step, "fields": dict(changed)}]
        write_atomically(path, json.dumps(content, indent=1))

    @classmethod
    def load(cls, workdir: StoragePath) -> "Run":
        """Reads ``run.json``.

        Raises:
          CoconutError: there is none, it is malformed, its tokenizer is not the one it was written with, or it needs a
            module that was not imported (`coconut.extensions`).
        """
        path = workdir / RUN_FILE
        if not exists(path):
            raise CoconutError(f"{workdir} holds no run: {path} is missing")
        content = _read_json(path)
        for key in ("config", "tokenizer", "tokenizer_fingerprint", "data_fingerprint"):
            if key not in content:
                raise CoconutError(f"{path}: {key!r} is missing")
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
        return cls(config, tokenizer, content["data_fingerprint"])


def _fits(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _has(content: Any, name: str) -> bool:
    for part in name.split("."):
        if not isinstance(content, Mapping) or part not in content:
            return False
        content = content[part]
    return True


def _identity(run: Run) -> dict[str, Any]:
    """What tells two runs apart, as JSON holds it."""
    content = {
        "config": to_json(run.config),
        "tokenizer_fingerprint": run.tokenizer.fingerprint,
        "data_fingerprint": run.data,
    }
    return json.loads(json.dumps(content))


def _read_json(path: StoragePath) -> Any:
    text = read_text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise CoconutError(f"{path}: {error}") from error
