"""What stands before the first step: data, tokenizer, resolved config, initial parameters. Bad input is found here."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from coconut.batching import stage_shape
from coconut.datasets import Dataset, load_dataset, make_tokenizer
from coconut.latent.feedback import make_feedback
from coconut.methods import get_method
from coconut.pipeline import pipeline_fingerprint
from coconut.tokenizers import TokenizedExample, validate_ids
from coconut.training.checkpoint import Run, load_model
from coconut.training.config import RunConfig
from coconut.training.state import Model, Parameters, Template, make_model, parameters_of
from coconut.types import CoconutError


def prepare(config: RunConfig, dataset: Dataset | None = None) -> tuple[Run, Dataset, list[TokenizedExample]]:
    """The data of a run, its config with the vocabulary filled in, and its tokenized training examples.

    Args:
      config: the run.
      dataset: its data, where they are loaded already.

    Raises:
      CoconutError: data that cannot be read, splits that overlap, a vocabulary that is not the tokenizer's, examples
        longer than the model's positions.
    """
    dataset = load_dataset(config.data) if dataset is None else dataset
    tokenizer = make_tokenizer(config.data, dataset.splits["train"])
    if config.decoder.vocab_size not in (None, tokenizer.vocab_size):
        raise CoconutError(
            f"DecoderConfig.vocab_size = {config.decoder.vocab_size}: the tokenizer has {tokenizer.vocab_size} ids"
        )
    decoder = dataclasses.replace(config.decoder, vocab_size=tokenizer.vocab_size)
    config = dataclasses.replace(config, decoder=decoder)
    examples = dataset.tokenized("train", tokenizer)
    for index, example in enumerate(examples):
        ids = np.concatenate([example.question, *example.steps, example.answer])
        validate_ids(ids, decoder.vocabulary, f"training example {index}")
    examples = fit_to_positions(examples, config)
    fingerprint = pipeline_fingerprint(examples, tokenizer, config.pipeline, seed=config.seed)
    return Run(config, tokenizer, fingerprint), dataset, examples


def fit_to_positions(examples: Sequence[TokenizedExample], config: RunConfig) -> list[TokenizedExample]:
    """The examples that fit the model's positions at every stage; others are an error, or dropped with a count.

    Raises:
      CoconutError: some do not fit and ``DataConfig.drop_too_long`` is off, or none fits.
    """
    rule, limit = get_method(config.method).rule, config.decoder.max_positions

    def longest(example: TokenizedExample) -> int:
        stages = range(config.curriculum.final_stage + 1)
        return max(stage_shape([example], rule, config.curriculum, stage).columns for stage in stages)

    # Almost always all of them fit, which the widest columns of the whole set show at once.
    bound = max(len(e.question) + sum(map(len, e.steps)) + len(e.answer) for e in examples)
    if bound + config.curriculum.max_thoughts + 2 * rule.markers <= limit:
        return list(examples)
    lengths = [longest(example) for example in examples]
    fitting = [example for example, length in zip(examples, lengths, strict=True) if length <= limit]
    dropped = len(examples) - len(fitting)
    if not dropped:
        return fitting
    message = (
        f"{dropped} of {len(examples)} training examples do not fit DecoderConfig.max_positions = {limit}; the longest "
        f"has {max(lengths)} columns"
    )
    if not config.data.drop_too_long:
        raise CoconutError(f"{message} (DataConfig.drop_too_long = True drops them)")
    if not fitting:
        raise CoconutError(f"{message}, and nothing is left")
    logging.getLogger(__name__).warning("%s: dropped", message)
    return fitting


def initial_model(run: Run) -> Model:
    """The model a run starts from: fresh, or with the parameters of ``init_from``.

    The feedback's own parameters are taken, too, where both runs have the same feedback; else they stay fresh.

    Raises:
      CoconutError: ``init_from`` holds no checkpoint, or one of another tokenizer or another shape.
    """
    config = run.config
    feedback = make_feedback(config.feedback, config.decoder)
    model = make_model(config.decoder, feedback, jax.random.key(config.seed))
    if config.init_from is None:
        return model
    where = f"RunConfig.init_from = {config.init_from!r}"
    other, loaded, _ = load_model(Path(config.init_from), "latest")
    if other.tokenizer.fingerprint != run.tokenizer.fingerprint:
        raise CoconutError(f"{where}: its tokenizer is another one")
    if other.config.feedback != config.feedback:
        loaded = Model(loaded.decoder, feedback)
    return Template.of(model).model(matching(parameters_of(loaded), parameters_of(model), where))


def matching(loaded: Parameters, expected: Parameters, where: str) -> Parameters:
    """The expected ones among the loaded parameters.

    Raises:
      CoconutError: one is missing or of another shape.
    """
    for name, value in expected.items():
        if name not in loaded or loaded[name].shape != value.shape:
            there = loaded[name].shape if name in loaded else "missing"
            raise CoconutError(f"{where}: parameter {name} is {there} there, {value.shape} here")
    return {name: loaded[name].astype(value.dtype) for name, value in expected.items()}
