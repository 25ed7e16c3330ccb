"""Gin: from files and bindings to a resolved `RunConfig`.

Only this module knows gin. It makes the config dataclasses configurable under their own names, so that
``DecoderConfig.embed_dim = 256`` in a file sets that field; the library itself never meets gin.
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Sequence

import gin

from coconut.curriculum import CurriculumConfig
from coconut.datasets import DataConfig
from coconut.evaluation.answers import AnswerConfig
from coconut.latent.generate import SamplingConfig
from coconut.models.config import DecoderConfig
from coconut.pipeline import PipelineConfig
from coconut.training.config import RunConfig
from coconut.training.optimizer import OptimizerConfig
from coconut.types import CoconutError

CONFIGS = (
    AnswerConfig,
    CurriculumConfig,
    DataConfig,
    DecoderConfig,
    OptimizerConfig,
    PipelineConfig,
    RunConfig,
    SamplingConfig,
)
_configurables = {config.__name__: gin.external_configurable(config, module="coconut") for config in CONFIGS}


def resolve_run(gin_files: Sequence[str], bindings: Sequence[str] = ()) -> RunConfig:
    """The run that gin files and bindings describe; later files and bindings win.

    Args:
      gin_files: paths from the working directory; ``gin_configs/...`` is found wherever this package is installed.
      bindings: such as ``OptimizerConfig.learning_rate=1e-3``.

    Raises:
      CoconutError: a file is missing, a name is unknown (with the nearest known one), a value has the wrong type, or
        a dataclass rejects it.
    """
    gin.clear_config()
    try:
        gin.parse_config_files_and_bindings(list(gin_files), list(bindings))
        config = _configurables["RunConfig"]()
    except CoconutError:
        raise
    except Exception as error:
        raise CoconutError(_explain(error)) from error
    check_types(config)
    return config


def operative_config() -> str:
    """The gin text of what was bound, to be kept beside the resolved JSON."""
    return gin.config_str()


def check_types(config: object) -> None:
    """Checks the types of all fields, which gin does not.

    Raises:
      CoconutError: naming the field, the value and the type.
    """
    assert dataclasses.is_dataclass(config)
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if dataclasses.is_dataclass(value):
            check_types(value)
        elif not _fits(value, hint):
            kind = getattr(hint, "__name__", None) or str(hint)
            raise CoconutError(f"{type(config).__name__}.{field.name} = {value!r}: must be {kind}")


def _fits(value: object, hint: typing.Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin is not None and (origin is typing.Union or origin.__name__ == "UnionType"):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if origin is tuple:
        return isinstance(value, (tuple, list))
    if origin is not None:
        return isinstance(value, origin)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _explain(error: Exception) -> str:
    """Gin's message, with the nearest known name where one is unknown."""
    text = str(error).strip()
    fields = {f"{config.__name__}.{field.name}" for config in CONFIGS for field in dataclasses.fields(config)}
    unknown = re.search(r"No configurable matching '([\w./]+)'", text)
    if unknown:
        known = [config.__name__ for config in CONFIGS]
        return f"{text.splitlines()[0].rstrip('.')}. Did you mean {difflib.get_close_matches(unknown.group(1), known, 1, 0.0)[0]!r}?"
    unknown = re.search(r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", text)
    if unknown:
        wrong = f"{unknown.group(1)}.{unknown.group(2)}"
        own = [name for name in fields if name.startswith(unknown.group(1).rpartition(".")[2] + ".")]
        return f"unknown field {wrong!r}. Did you mean {difflib.get_close_matches(wrong, own, 1, 0.0)[0]!r}?"
    return text
