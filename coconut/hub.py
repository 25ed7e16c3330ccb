"""Checkpoints from the Hugging Face hub."""

import os
from pathlib import Path

from coconut.errors import CoconutError

# Only data: configuration, what tokenizers are made of, and weights as safetensors. Never pickles or code.
DESCRIPTION = (
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "tokenizer.model",
    "original/tokenizer.model",
)
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def local_folder(path_or_repo: str | os.PathLike[str], revision: str | None = None, *, weights: bool = False) -> Path:
    """The folder of a checkpoint: ``path_or_repo`` itself, or a repository's files in the hub's local cache.

    Args:
      path_or_repo: a folder, or the id of a repository, also with a revision: ``openai-community/gpt2@607a30d``.
      revision: branch, tag or commit of a repository.
      weights: whether the weights are wanted, too.

    Raises:
      CoconutError: see `download`; or a folder was given a revision, or a name that no folder can have.
    """
    folder = Path(path_or_repo)
    try:
        found = folder.is_dir()
    except OSError as error:
        raise CoconutError(f"{folder!s:.80}: cannot be looked at: {error.strerror}") from error
    if not found:
        name, _, after = os.fspath(path_or_repo).partition("@")
        return download(name, revision or after or None, weights=weights)
    if revision is not None:
        raise CoconutError(f"revision = {revision!r}: {folder} is a folder, only a repository has revisions")
    return folder


def download(repo: str | os.PathLike[str], revision: str | None = None, *, weights: bool = False) -> Path:
    """The folder of a repository's files in the local cache, downloaded where they are not there.

    Args:
      repo: its id, such as ``openai-community/gpt2``.
      revision: branch, tag or commit.
      weights: whether the weights are wanted, too.

    Raises:
      CoconutError: the name is neither a folder nor that of a repository, or the repository cannot be reached.
    """
    name = os.fspath(repo)
    try:
        from huggingface_hub import snapshot_download  # Lazy: local folders need no hub.
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise CoconutError(
            f"{name} is no folder; to look for it on the Hugging Face hub, install 'coconut-jax[hf]'"
        ) from error
    patterns = [*DESCRIPTION, *(WEIGHTS if weights else ())]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise CoconutError(f"{name} is neither a folder nor the id of a repository: {error}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CoconutError(
            f"{name} is no folder, and no repository of the Hugging Face hub that can be reached: {error}"
        ) from error
