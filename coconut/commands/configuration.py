"""Gin: from files and bindings to a resolved `RunConfig`.

Only this module knows gin. It makes the config dataclasses configurable under their own names, so that
``DecoderConfig.embed_dim = 256`` in a file sets that field; the library itself never meets gin.
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gin
import gin.config

from coconut.curriculum import CurriculumConfig
from coconut.datasets import DataConfig
from coconut.errors import CoconutError
from coconut.latent.feedback import FeedbackConfig
from coconut.latent.generate import SamplingConfig
from coconut.latent.halting import HaltingConfig
from coconut.latent.policies.config import PolicyConfig
from coconut.methods import METHODS
from coconut.methods.method import NoOptions
from coconut.models.adapters import AdapterConfig
from coconut.models.config import DecoderConfig, ExecutionConfig, RotaryScaling
from coconut.pipeline import PipelineConfig
from coconut.training.config import RunConfig
from coconut.training.optimizer import OptimizerConfig
from coconut.training.reinforcement import ReinforcementConfig
from coconut.training.scoring import ScorerConfig

CONFIGS = (
    AdapterConfig,
    CurriculumConfig,
    DataConfig,
    DecoderConfig,
    ExecutionConfig,
    FeedbackConfig,
    HaltingConfig,
    OptimizerConfig,
    PipelineConfig,
    PolicyConfig,
    ReinforcementConfig,
    RotaryScaling,
    RunConfig,
    SamplingConfig,
    ScorerConfig,
)
_configurables: dict[str, Any] = {}


def _make_configurable() -> None:
    """Makes the config dataclasses known to gin, those of the registered methods' options among them."""
    options = [method.options for method in METHODS.values() if method.options is not NoOptions]
    for config in (*CONFIGS, *options):
        if config.__name__ not in _configurables:
            _configurables[config.__name__] = gin.external_configurable(config, module="coconut")


SHIPPED = "gin_configs"
"""The folder of the gin files that come with the package: within it in a wheel, beside it in a checkout."""

PACKAGE = Path(__file__).parents[1]
SHIPPED_IN = PACKAGE if (PACKAGE / SHIPPED).is_dir() else PACKAGE.parent


def _is_shipped(path: str) -> bool:
    return path.startswith(f"{SHIPPED}/") and (SHIPPED_IN / path).is_file()


def _open_shipped(path: str) -> Any:
    return (SHIPPED_IN / path).open(encoding="utf-8")


# What gin is asked for, also by an include, is a file of that path, or else ours. Gin's own second reader goes: it
# looks for a package of that name, and so imports what it finds in a folder of the user's.
del gin.config._FILE_READERS[1:]
gin.config.register_file_reader(_open_shipped, _is_shipped)


def resolve_run(gin_files: Sequence[str], bindings: Sequence[str] = ()) -> RunConfig:
    """The run that gin files and bindings describe; later files and bindings win.

    Args:
      gin_files: paths from the working directory. A ``gin_configs/...`` that does not exist there is one of those that
        come with the package.
      bindings: such as ``OptimizerConfig.learning_rate=1e-3``.

    Raises:
      CoconutError: a file is missing, a name is unknown (with the nearest known one), a value has the wrong type, or
        a dataclass rejects it.
    """
    gin.clear_config()
    _make_configurable()
    try:
        gin.parse_config_files_and_bindings(list(gin_files), list(bindings))
        return _configurables["RunConfig"]()
    except CoconutError:
        raise
    except Exception as error:
        raise CoconutError(_explain(error)) from error


def operative_config() -> str:
    """The gin text of what was bound, to be kept beside the resolved JSON."""
    return gin.config_str()


def _explain(error: Exception) -> str:
    """Gin's message, with the nearest known name where one is unknown."""
    text = str(error).strip()
    if unknown := re.search(r"No configurable matching '([\w./]+)'", text):
        nearest = _nearest(unknown.group(1), list(_configurables))
        return f"{text.splitlines()[0].rstrip('.')}. Did you mean {nearest!r}?"
    if unknown := re.search(r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", text):
        name = unknown.group(1).rpartition(".")[2]
        fields = {name: [x.name for x in dataclasses.fields(config)] for name, config in _configurables.items()}
        # A field of another config is rather that one than one of a similar name.
        elsewhere = [f"{other}.{field}" for other, own in fields.items() for field in own if field == unknown.group(2)]
        nearest = elsewhere[0] if elsewhere else f"{name}.{_nearest(unknown.group(2), fields[name])}"
        return f"unknown field '{name}.{unknown.group(2)}'. Did you mean '{nearest}'?"
    return text


def _nearest(name: str, known: Sequence[str]) -> str:
    return difflib.get_close_matches(name, known, 1, 0.0)[0]
