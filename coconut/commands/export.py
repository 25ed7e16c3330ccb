"""``coconut export``: a trained workdir as a checkpoint for Hugging Face's libraries."""

from pathlib import Path

from coconut.errors import CoconutError
from coconut.latent.feedback import Identity
from coconut.models.huggingface import EXPORT_FIELD, save_pretrained
from coconut.storage_path import StoragePath
from coconut.tokenizers import huggingface_files
from coconut.training.checkpoint import Which, load_model


def export(workdir: StoragePath, folder: Path, which: Which = "best") -> None:
    """Writes the decoder and the tokenizer, the latent markers among its special tokens, to ``folder``.

    `transformers` computes the same logits from it. That thoughts are hidden states fed back is not in the files:
    there a loop over ``inputs_embeds`` does it.

    Raises:
      CoconutError: the workdir holds no checkpoint, its decoder is of no architecture that `transformers` has, its
        thoughts pass a feedback that the files have no place for, or the folder holds something.
    """
    run, model, progress = load_model(workdir, which)
    if not isinstance(model.feedback, Identity):
        raise CoconutError(
            f"{workdir}: FeedbackConfig.kind = {run.config.feedback.kind!r} is part of the model, and a checkpoint for "
            "transformers has no place for it"
        )
    tokenizer = run.tokenizer
    fields = {
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id,
        EXPORT_FIELD: {
            "method": run.config.method,
            "stage": progress.stage,
            "start_latent_id": tokenizer.start_latent_id,
            "latent_id": tokenizer.latent_id,
            "end_latent_id": tokenizer.end_latent_id,
        },
    }
    save_pretrained(model.decoder, folder, config_fields=fields, files=huggingface_files(tokenizer))
