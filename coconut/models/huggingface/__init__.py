"""Checkpoints in Hugging Face's layout: ``config.json`` and safetensors, read and written without torch."""

from coconut.models.huggingface.configuration import read_config
from coconut.models.huggingface.load import load_pretrained, load_weights
from coconut.models.huggingface.save import save_pretrained

__all__ = ["load_pretrained", "load_weights", "read_config", "save_pretrained"]
