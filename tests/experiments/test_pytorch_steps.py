"""The loops of thoughts that ours is compared with compute what ours computes."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from coconut.models.config import DecoderConfig
from coconut.training.optimizer import OptimizerConfig
from experiments.benchmarks.pytorch_steps import TorchTrainer

DECODER = DecoderConfig(vocab_size=23, num_layers=2, embed_dim=16, num_heads=2, max_positions=32)
TOKENS = np.random.default_rng(0).integers(0, 23, (3, 13))
THOUGHTS, ANSWER = 3, 4


def gradients(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return {name: x.grad.clone() for name, x in trainer.model.named_parameters() if x.grad is not None}


def test_both_loops_have_one_loss_and_one_gradient():
    trainer = TorchTrainer(DECODER, OptimizerConfig())
    ids = trainer.ids(TOKENS)
    losses = [loss(ids, THOUGHTS, ANSWER) for loss in (trainer.loss_from_cache, trainer.loss_by_lists)]
    torch.testing.assert_close(*losses)
    first, second = (gradients(trainer, loss) for loss in losses)
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, second[name], msg=name)
