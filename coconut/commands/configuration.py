"""Gin: from files and bindings to a resolved `RunConfig`.

Only this module knows gin. It makes the config dataclasses configurable under their own names, so that
``DecoderConfig.embed_dim = 256`` in a file sets that field; the library itself never meets gin.
"""

import contextlib
import copy
import dataclasses
import difflib
import re
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import gin
import gin.config

from coconut.commands.shipped import SHIPPED, SHIPPED_IN, shipped_files
from coconut.curriculum import CurriculumConfig
from coconut.datasets import DataConfig
from coconut.errors import CoconutError
from coconut.hub import local_folder
from coconut.latent.feedback import FeedbackConfig
from coconut.latent.generate import SamplingConfig
from coconut.latent.halting import HaltingConfig
from coconut.latent.policies.config import PolicyConfig
from coconut.methods import METHODS
from coconut.methods.method import NoOptions
from coconut.methods.multi_token import MultiTokenConfig
from coconut.models.adapters import AdapterConfig
from coconut.models.config import DecoderConfig, ExecutionConfig
from coconut.models.experts_config import ExpertsConfig
from coconut.models.huggingface import agreed_config, read_config
from coconut.models.latent_config import LatentAttentionConfig, YarnRotaryScaling
from coconut.models.local_config import LocalAttentionConfig
from coconut.models.rotary_config import LinearRotaryScaling, LongRotaryScaling, RotaryScaling
from coconut.models.singular_values import SingularValueConfig
from coconut.pipeline import PipelineConfig
from coconut.storage import exists
from coconut.storage_path import StoragePath, parse_path
from coconut.training.config import RunConfig
from coconut.training.optimizer import OptimizerConfig
from coconut.training.reinforcement import ReinforcementConfig
from coconut.training.run import RUN_FILE, Run
from coconut.training.scoring import ScorerConfig
from coconut.training.spikes import SpikeConfig
from coconut.training.trackers.writer import TrackingConfig

CONFIGS = (
    AdapterConfig,
    CurriculumConfig,
    DataConfig,
    DecoderConfig,
    ExecutionConfig,
    ExpertsConfig,
    FeedbackConfig,
    HaltingConfig,
    LatentAttentionConfig,
    LinearRotaryScaling,
    LocalAttentionConfig,
    LongRotaryScaling,
    MultiTokenConfig,
    OptimizerConfig,
    PipelineConfig,
    PolicyConfig,
    ReinforcementConfig,
    RotaryScaling,
    RunConfig,
    SamplingConfig,
    ScorerConfig,
    SingularValueConfig,
    SpikeConfig,
    TrackingConfig,
    YarnRotaryScaling,
)
_configurables: dict[str, Any] = {}


def _make_configurable() -> None:
    """Makes the config dataclasses known to gin, those of the registered methods' options among them."""
    options = [method.options for method in METHODS.values() if method.options is not NoOptions]
    for config in (*CONFIGS, *options):
        if config.__name__ not in _configurables:
            _configurables[config.__name__] = gin.external_configurable(config, module="coconut")


_reading: list[Path] = []
"""The gin files that are being read, each included by the one before."""


def _found(path: str) -> Path | None:
    """The file that is meant: beside the one that includes it, from the working directory, or ours."""
    places = [*(file.parent for file in _reading[-1:]), Path()]
    places += [SHIPPED_IN] if path.startswith(f"{SHIPPED}/") else []
    return next((place / path for place in places if (place / path).is_file()), None)


@contextlib.contextmanager
def _open(path: str) -> Iterator[IO[str]]:
    file = _found(path)
    assert file is not None
    _reading.append(file)
    try:
        with file.open(encoding="utf-8") as opened:
            yield opened
    finally:
        _reading.pop()
        # Where a later file binds another value, nothing would tell that this one had read a macro.
        _read_macros.update(_macros_read())


# One reader in the place of gin's two, the second of which looks for a package of that name, and so imports what it
# finds in a folder of the user's.
gin.config.register_file_reader(_open, lambda path: _found(path) is not None)
del gin.config._FILE_READERS[:-1]


def resolve_run(
    gin_files: Sequence[str],
    bindings: Sequence[str] = (),
    *,
    shared: bool = False,
    workdir: StoragePath | None = None,
) -> RunConfig:
    """The run that gin files and bindings describe; later files and bindings win.

    Where they leave out a size that every decoder needs, such as ``DecoderConfig.num_layers``, all that they leave out
    of the decoder is that of the checkpoint the run starts from: ``RunConfig.pretrained``, or ``init_from``.

    Args:
      gin_files: paths from the working directory; what one includes is first looked for beside it. A
        ``gin_configs/...`` that is in neither place is one of those that come with the package.
      bindings: such as ``OptimizerConfig.learning_rate=1e-3``.
      shared: several runs share the bindings, so that some may be for a config that this one has not.
      workdir: of the run, where it may have begun: what it began from is then not looked at, and may be gone.

    Raises:
      CoconutError: a file is missing, a name is unknown (with the nearest known one), a value has the wrong type,
        nothing reads a macro or a binding, a dataclass rejects a value, the checkpoint cannot be read, or what is
        bound contradicts it.
    """
    gin.clear_config()
    _make_configurable()
    _read_macros.clear()
    try:
        for path in gin_files:
            gin.parse_config_file(path)
    except Exception as error:
        raise CoconutError(_explain(error)) from error
    for binding in bindings:
        try:
            gin.parse_config(binding)
        except Exception as error:
            raise CoconutError(_explain_binding(binding, error)) from error
    _check_macros()
    try:
        _bind_decoder_of_checkpoint(workdir)
        gin.finalize()
        run = _configurables["RunConfig"]()
    except CoconutError:
        raise
    except Exception as error:
        raise CoconutError(_explain(error)) from error
    if not shared:
        _check_read(bindings)
    return run


def _bind_decoder_of_checkpoint(workdir: StoragePath | None) -> None:
    """Binds what is not bound of the decoder, where that is too little to make one and the run starts from one.

    Raises:
      CoconutError: see `resolve_run`.
    """
    fields = {field.name: field for field in dataclasses.fields(DecoderConfig)}
    bound = gin.config.get_bindings("DecoderConfig", resolve_references=False)
    if all(name in bound for name, field in fields.items() if field.default is dataclasses.MISSING):
        return
    pretrained, init_from = _bound("pretrained"), _bound("init_from")
    if workdir is not None and exists(workdir / RUN_FILE):
        there, pretrained = Run.load(workdir).config.decoder, None
    elif isinstance(pretrained, str):
        there = read_config(local_folder(pretrained))
    elif isinstance(init_from, str):
        there = Run.load(parse_path(init_from)).config.decoder
    else:
        return
    for name in fields:
        # The vocabulary is the tokenizer's, or the checkpoint's if that is larger: `coconut.training.setup`.
        if name not in bound and name != "vocab_size":
            gin.bind_parameter(f"DecoderConfig.{name}", getattr(there, name))
    if isinstance(pretrained, str):
        agreed_config(pretrained, dataclasses.replace(_configurables["DecoderConfig"](), vocab_size=None))


def _bound(field: str) -> Any:
    """What a field of the run is bound to, macros read; None where it is not bound."""
    bound = gin.config.get_bindings("RunConfig", resolve_references=False)
    return copy.deepcopy(bound.get(field))  # Gin reads a macro as it is copied.


def operative_config() -> str:
    """The gin text of what was bound, to be kept beside the resolved JSON."""
    return gin.config_str()


_read_macros: set[str] = set()


def _macros_read() -> set[str]:
    """The macros that some binding reads."""
    references = gin.config.iterate_references(gin.config._CONFIG)
    return {"/".join(found.scopes) for found in references if found.config_key[1] == "gin.macro"}


def _check_macros() -> None:
    """Gin takes whatever name has no dot for a macro's.

    Raises:
      CoconutError: nothing reads it.
    """
    known = _read_macros | _macros_read()
    bound = {scope: values["value"] for (scope, name), values in gin.config._CONFIG.items() if name == "gin.macro"}
    for name, value in bound.items():
        if name not in known:
            nearest = fields_named(name) or difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
            raise CoconutError(f"{name} = {value!r}: nothing reads a macro of this name.{hint}")


def _check_read(bindings: Sequence[str]) -> None:
    """Looks whether the run has what was bound.

    Raises:
      CoconutError: a binding is for a config that nothing makes, or for a scope that nothing opens.
    """
    made = {(scope, selector.rpartition(".")[2]) for scope, selector in gin.config._OPERATIVE_CONFIG}
    for binding in bindings:
        bound = re.match(r"\s*(?:([\w./]+)/)?(?:\w+\.)*?(\w+)\.\w+\s*=", binding)
        if bound and bound.groups("") not in made:
            name = "/".join(part for part in bound.groups() if part)
            raise CoconutError(f"{binding}: nothing in this run reads it, there is no {name}")


def fields_named(field: str) -> list[str]:
    """The fields of that name, as gin binds them: ``RunConfig.seed``."""
    _make_configurable()
    fields = {name: [x.name for x in dataclasses.fields(config)] for name, config in _configurables.items()}
    return [
        f"{name}.{field}"
        for name, own in sorted(fields.items(), key=lambda item: item[0] != "RunConfig")
        if field in own
    ]


FILES_WITH = {
    "RunConfig.method": "methods/METHOD.gin",
    "DataConfig": "tasks/TASK.gin",
    "DecoderConfig": "models/MODEL.gin",
    "RunConfig": "base.gin",
}
"""Where the shipped files bind a field, or those of a config."""


def _explain_binding(binding: str, error: Exception) -> str:
    """What is wrong with a binding; most often text without its quotes."""
    name, equals, value = binding.partition("=")
    name, value = name.strip(), value.strip()
    if not equals:
        return f"{binding!r}: a binding is NAME=VALUE"
    if not isinstance(error, (SyntaxError, tokenize.TokenError)) and "Failed to parse token" not in str(error):
        return _explain(error)
    if value.title() in ("True", "False", "None"):
        return f"{binding}: Python writes it {value.title()}"
    return f"{binding}: text stands in quotes, which the shell must leave: --gin.{name}=\"'{value}'\""


def _explain(error: Exception) -> str:
    """Gin's message, with the nearest known name where one is unknown."""
    text = str(error).strip()
    if missing := re.search(r"Unable to open file: (.*)\. Searched config paths: .*?\.(\n.*)?$", text, re.DOTALL):
        nearest = difflib.get_close_matches(missing.group(1), shipped_files(), 1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        return f"{missing.group(1)}: there is no such gin file{hint}{missing.group(2) or ''}"
    if missing := re.search(r"(\w+)\.__init__\(\) missing \d+ required .*?argument.*?: (.*)", text):
        name, field = missing.group(1), re.findall(r"'(\w+)'", missing.group(2))[0]
        files = FILES_WITH.get(f"{name}.{field}") or FILES_WITH.get(name)
        return f"{name}.{field} is missing" + (f"; {SHIPPED}/{files} binds it" if files else "")
    if missing := re.search(r"(\w+)/macro.value set to `%gin.REQUIRED`", text):
        return f"{missing.group(1)} is missing: --gin.{missing.group(1)}=\"'...'\""
    if unquoted := re.search(r"Failed to parse token '(.*?)'(.*)", text, re.DOTALL):
        return f"{unquoted.group(1)}: text stands in quotes{unquoted.group(2)}"
    if unknown := re.search(r"No configurable matching '([\w./]+)'", text):
        nearest = _nearest(unknown.group(1), list(_configurables))
        return f"{text.splitlines()[0].rstrip('.')}. Did you mean {nearest!r}?"
    if unknown := re.search(r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", text):
        name = unknown.group(1).rpartition(".")[2]
        # A field of another config is rather that one than one of a similar name.
        own = [field.name for field in dataclasses.fields(_configurables[name])]
        nearest = [*fields_named(unknown.group(2)), f"{name}.{_nearest(unknown.group(2), own)}"][0]
        return f"unknown field '{name}.{unknown.group(2)}'. Did you mean '{nearest}'?"
    return text


def _nearest(name: str, known: Sequence[str]) -> str:
    return difflib.get_close_matches(name, known, 1, 0.0)[0]
