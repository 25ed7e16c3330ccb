"""Questions with thoughts, a tiny model, and the slow way to ask it: one question at a time, unpadded, pass by pass."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from coconut.curriculum import CurriculumConfig
from coconut.evaluation.answers import AnswerConfig
from coconut.evaluation.choices import with_other_option
from coconut.latent.feedback import Identity
from coconut.latent.generate import SamplingConfig
from coconut.model import Model
from coconut.tasks import get_task
from coconut.tokenizers import SYMBOLS, TokenizedExample, encode_example, symbol_tokenizer
from tests.tiny_models import GPT2_STYLE, quick_jit, random_decoder
from tests.tiny_pages import placing_at

# Questions of 3, 2, 1 and no steps, and so of as many thoughts; two of them are the same question.
EXAMPLES = [
    dataclasses.replace(example, steps=example.steps[: 3 - index % 4])
    for index, example in enumerate(get_task("small_graphs").generate(14, 0, config="e8"))
]
EXAMPLES[4] = EXAMPLES[0]
COUNTS = [len(example.steps) for example in EXAMPLES]
QUESTIONS = [example.question for example in EXAMPLES]
TOKENIZER = symbol_tokenizer(sorted({symbol for x in EXAMPLES for symbol in f"{x.question} [A]".split()}))
TOKENIZED = [encode_example(TOKENIZER, example, SYMBOLS) for example in EXAMPLES]
CONFIG = dataclasses.replace(GPT2_STYLE, vocab_size=TOKENIZER.vocab_size, num_layers=1, max_positions=64)
# Attention and MLPs are strong, so that other thoughts give other answers.
STRONG = lambda path, leaf: 4 * leaf if ".kernel" in jax.tree_util.keystr(path) else leaf
DECODER = jax.tree_util.tree_map_with_path(STRONG, random_decoder(CONFIG, seed=3))
MODEL = Model(DECODER, {"feedback": Identity()})
NEW_TOKENS = 3
SETTINGS = AnswerConfig(batch_size=4, sampling=SamplingConfig(max_new_tokens=NEW_TOKENS))
PLACING = placing_at(TOKENIZER, CurriculumConfig(max_latent_stage=3, pad_latent_to_max=False), 4)


@quick_jit
def _states_of(embedded: jax.Array, length: jax.Array) -> jax.Array:
    """Of a row whose first columns are used."""
    columns = jnp.arange(embedded.shape[0])[None]
    hidden, _ = MODEL.decoder.trunk(embedded[None], positions=columns, valid=columns < length, past=())
    return hidden[0]


def embedded(ids: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.asarray(MODEL.decoder.tokens.embedding[...])[np.asarray(ids, int)]


def row_of(example: TokenizedExample, inputs: np.ndarray) -> np.ndarray:
    markers = embedded([TOKENIZER.start_latent_id]), embedded([TOKENIZER.end_latent_id])
    return np.concatenate([embedded(example.question), markers[0], inputs, markers[1]])


def states_of(row: np.ndarray) -> np.ndarray:
    """The hidden states of a row of inputs, after the final norm."""
    padded = np.zeros((CONFIG.max_positions, CONFIG.embed_dim), np.float32)
    padded[: len(row)] = row
    return np.asarray(_states_of(padded, len(row)))[: len(row)]


def logits_behind(row: np.ndarray) -> np.ndarray:
    """What the model would write behind each column of a row."""
    return states_of(row) @ np.asarray(MODEL.decoder.tokens.embedding[...]).T


def slow_answer(example: TokenizedExample, inputs: np.ndarray) -> str:
    row, written = row_of(example, inputs), []
    for _ in range(NEW_TOKENS):
        token = int(logits_behind(row)[-1, : TOKENIZER.vocab_size].argmax())
        if token == TOKENIZER.eos_id:
            break
        written.append(token)
        row = np.concatenate([row, embedded([token])])
    return TOKENIZER.decode(written)


def slow_choice(index: int, inputs: np.ndarray) -> bool:
    scores = []
    for option in (EXAMPLES[index], with_other_option(EXAMPLES[index])):
        encoded = encode_example(TOKENIZER, option, SYMBOLS)
        row = np.concatenate([row_of(encoded, inputs), embedded(encoded.answer)])
        likely = jax.nn.log_softmax(logits_behind(row)[-len(encoded.answer) - 1 : -1])
        scores.append(float(likely[np.arange(len(encoded.answer)), encoded.answer].sum()))
    return scores[0] > scores[1]
