"""``coconut export``: a trained workdir as a checkpoint for Hugging Face's libraries."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save

from coconut.latent.feedback import FeedbackConfig
from coconut.model import parameters_of, part_of
from coconut.models.huggingface import EXPORT_FIELD, PARTS_FILE, save_pretrained
from coconut.storage_path import StoragePath
from coconut.tokenizers import huggingface_files
from coconut.training.checkpoint import Which
from coconut.training.config import to_json
from coconut.training.loading import load_model


def export(workdir: StoragePath, folder: Path, which: Which | int = "best", *, verify: bool = True) -> None:
    """Writes the decoder and the tokenizer, the latent markers among its special tokens, to ``folder``.

    `transformers` computes the same logits from it. That thoughts are hidden states fed back is not in the files:
    there a loop over ``inputs_embeds`` does it. Where the feedback has a config or parameters, or the model has other
    parts, the loop needs them, too: config.json names them, and `PARTS_FILE` holds their parameters, by the names they
    have in a checkpoint of ours. What only training needs is left out.

    Args:
      workdir: of a trained run.
      folder: where the files go.
      which: the best checkpoint, the latest, or that of a step.
      verify: compare the checkpoint's files with their SHA-256 first.

    Raises:
      CoconutError: the workdir holds no checkpoint, its decoder is of no architecture that `transformers` has, or the
        folder holds something.
    """
    run, model, progress = load_model(workdir, which, verify=verify)
    tokenizer, files = run.tokenizer, huggingface_files(run.tokenizer)
    fields = {
        "method": run.config.method,
        "stage": progress.stage,
        "start_latent_id": tokenizer.start_latent_id,
        "latent_id": tokenizer.latent_id,
        "end_latent_id": tokenizer.end_latent_id,
    }
    if run.config.feedback != FeedbackConfig():
        fields["feedback"] = to_json(run.config.feedback)
    parts = {name: array for name, array in parameters_of(model).items() if part_of(name) != "decoder"}
    if parts:
        fields["parts"] = sorted({part_of(name) for name in parts})
        files = {**files, PARTS_FILE: save({name: np.ascontiguousarray(array) for name, array in parts.items()})}
    config = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id, EXPORT_FIELD: fields}
    save_pretrained(model.decoder, folder, config_fields=config, files=files)
