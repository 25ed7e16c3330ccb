"""``coconut export``: a trained workdir as a checkpoint for Hugging Face's libraries."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save

from coconut.commands.model_card import CARD, LOOP, loop_source, model_card, thinking_fields, without_loop
from coconut.commands.model_origin import origin
from coconut.errors import CoconutError
from coconut.latent.feedback import FeedbackConfig
from coconut.model import Model, parameters_of, part_of
from coconut.models.adapters import AdapterConfig, merge_adapters
from coconut.models.huggingface import EXPORT_FIELD, PARTS_FILE, is_our_export, save_adapter, save_pretrained
from coconut.models.multi_token import MULTI_TOKEN
from coconut.storage_path import StoragePath
from coconut.tokenizers import huggingface_files
from coconut.training.checkpoint import Which
from coconut.training.config import to_json
from coconut.training.loading import load_model
from coconut.training.run import Run


def export(
    workdir: StoragePath | str,
    folder: Path | str,
    which: Which | int = "best",
    *,
    verify: bool = True,
    peft: bool = False,
) -> None:
    """Writes the decoder and the tokenizer, the latent markers among its special tokens, to ``folder``.

    `transformers` computes the same logits from it. That thoughts are hidden states fed back it does not know:
    ``think.py`` beside the weights does it there, in PyTorch, and gives the tokens of ``coconut generate``. A model
    card, README.md, says how; or why there is no such file (`coconut.commands.model_card.without_loop`). Where the
    feedback has a config or parameters, or the model has other parts, config.json names them, and `PARTS_FILE` holds
    their parameters, by the names they have in a checkpoint of ours. What only training needs is left out. Adapters are
    merged into their matrices. A module for further tokens (`coconut.methods.multi_token`) lies among the weights, as
    one layer more, which `transformers` leaves out or uses to draft (DeepSeek V3).

    Args:
      workdir: of a trained run, or a quickstart's folder, which stands for its Coconut run.
      folder: where the files go.
      which: the best checkpoint, the latest, or that of a step.
      verify: compare the checkpoint's files with their SHA-256 first.
      peft: write the adapters alone (`coconut.models.huggingface.save_adapter`), for the checkpoint the run began with;
        `AutoPeftModelForCausalLM` of PEFT gives its embedding the rows of the markers.

    Raises:
      CoconutError: the workdir holds no checkpoint, its decoder is of no architecture that `transformers` has, or the
        folder holds something; with ``peft``, an adapter is not all that the run made of a published checkpoint.
    """
    folder = Path(folder)
    run, model, progress = load_model(workdir, which, verify=verify)
    tokenizer, files = run.tokenizer, huggingface_files(run.tokenizer)
    if peft:
        base = _base_of(run, model)
        assert isinstance(run.config.adapter, AdapterConfig)
        save_adapter(model.decoder, run.config.adapter, folder, base=base, files=files)
        return
    fields = {
        "method": run.config.method,
        "stage": progress.stage,
        "start_latent_id": tokenizer.start_latent_id,
        "latent_id": tokenizer.latent_id,
        "end_latent_id": tokenizer.end_latent_id,
        **thinking_fields(run, progress),
    }
    if run.config.feedback != FeedbackConfig():
        fields["feedback"] = to_json(run.config.feedback)
    # A module for further tokens has a place of its own among the weights.
    parts = {
        name: array for name, array in parameters_of(model).items() if part_of(name) not in ("decoder", MULTI_TOKEN)
    }
    if parts:
        fields["parts"] = sorted({part_of(name) for name in parts})
        files = {**files, PARTS_FILE: save({name: np.ascontiguousarray(array) for name, array in parts.items()})}
    files = {**files, CARD: model_card(run, progress, fields, origin(workdir, run, progress)).encode()}
    if without_loop(run, progress) is None:
        files[LOOP] = loop_source()
    config = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id, EXPORT_FIELD: fields}
    further = model.parts.get(MULTI_TOKEN)
    save_pretrained(merge_adapters(model.decoder), folder, config_fields=config, files=files, multi_token=further)


def _base_of(run: Run, model: Model) -> str:
    """The checkpoint that a run's adapters make its model of.

    Raises:
      CoconutError: there is none.
    """
    config, tokenizer = run.config, run.tokenizer

    def reject(field: str, why: str) -> CoconutError:
        return CoconutError(f"--peft: {field}: {why}; without --peft the whole model is written")

    if config.adapter is None:
        raise reject("RunConfig.adapter = None", "the run has no adapters")
    if not isinstance(config.adapter, AdapterConfig):
        raise reject("RunConfig.adapter", f"PEFT has no place for a {type(config.adapter).__name__}")
    if config.pretrained is None:
        raise reject("RunConfig.pretrained = None", "the run did not start from a checkpoint, which PEFT would load")
    if parts := sorted({part_of(name) for name in parameters_of(model)} - {"decoder"}):
        raise reject(f"method = {config.method!r}", f"PEFT has no place for the parameters of {', '.join(parts)}")
    if not is_our_export(config.pretrained):
        markers = {tokenizer.start_latent_id, tokenizer.latent_id, tokenizer.end_latent_id}
        if not markers <= set(config.adapter.trained_rows):
            raise reject("AdapterConfig.trained_rows", "the markers are not among them, and the checkpoint lacks them")
        if not config.decoder.tied_head:
            raise reject("DecoderConfig.tied_head = False", "the markers' rows of the head are not in the checkpoint")
    return config.pretrained
