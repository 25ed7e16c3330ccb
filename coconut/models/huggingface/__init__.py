"""Checkpoints in Hugging Face's layout: ``config.json`` and safetensors, read and written without torch."""

from coconut.models.huggingface.adapters import load_adapter, save_adapter
from coconut.models.huggingface.configuration import EXPORT_FIELD, export_fields, is_our_export, read_config
from coconut.models.huggingface.load import agreed_config, load_multi_token, load_pretrained, load_weights
from coconut.models.huggingface.save import PARTS_FILE, save_pretrained

__all__ = [
    "EXPORT_FIELD",
    "PARTS_FILE",
    "agreed_config",
    "export_fields",
    "is_our_export",
    "load_adapter",
    "load_multi_token",
    "load_pretrained",
    "load_weights",
    "read_config",
    "save_adapter",
    "save_pretrained",
]
