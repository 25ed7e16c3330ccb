"""How a run that learns from samples of its model draws them, and whether it can."""

from collections.abc import Sequence

from coconut.batching import page_shape
from coconut.errors import CoconutError
from coconut.latent.generate import SamplingConfig
from coconut.latent.policies.config import make_policy
from coconut.latent.sampling import Sampler
from coconut.methods import get_method
from coconut.model import Model
from coconut.pages import Placing, Thoughts, given
from coconut.tokenizers import TokenizedExample, Tokenizer
from coconut.training.config import RunConfig


def make_sampler(config: RunConfig, tokenizer: Tokenizer, model: Model) -> Sampler:
    """How a run samples from its model to learn from rewards, or to train a scorer.

    Raises:
      CoconutError: the policy does not fit the model or the method.
    """
    assert config.drawing is not None
    policy, method = config.drawing.policy, get_method(config.method)
    return Sampler(
        policy=make_policy(policy, model.decoder, model.parts, vocab_size=tokenizer.vocab_size),
        sampling=SamplingConfig(max_new_tokens=config.sampling.max_new_tokens, temperature=config.drawing.temperature),
        halt=model.parts["halt"] if policy.learnt_stop else None,
        least=policy.least,
        think=method.think(config.options),
        latent_id=tokenizer.latent_id,
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
    )


def check_samples(config: RunConfig, examples: Sequence[TokenizedExample], placings: Sequence[Placing]) -> None:
    """Looks whether a run can sample from what its method writes, at every stage, before anything is trained.

    Args:
      config: of the run, which has a ``reinforcement`` or a ``scorer``.
      examples: the questions.
      placings: of the run's stages.

    Raises:
      CoconutError: a scorer has no model to start from; a page has several blocks of thoughts, or thoughts behind what
        the model writes, or none where a policy is to draw some; the model ends its blocks in a way that samples do not
        know, or answers with more thoughts than it samples; or a question, its thoughts and what may be written need
        more positions than there are.
    """
    assert config.drawing is not None
    policy, method = config.drawing.policy, get_method(config.method)
    field = "scorer" if config.reinforcement is None else "reinforcement"
    if config.scorer is not None and config.pretrained is None and config.init_from is None:
        raise CoconutError(
            "RunConfig.scorer: needs the model whose thoughts are scored (RunConfig.init_from or pretrained)"
        )
    plain = policy.kind == "deterministic" and not policy.learnt_stop
    for placing in placings:
        pages = [method.write_to_answer(example, placing) for example in examples]
        where = f"RunConfig.{field}: the method {method.name!r} at stage {placing.stage}"
        read = [given(page) for page in pages]
        if any(isinstance(part, Thoughts) for page, own in zip(pages, read, strict=True) for part in page[len(own) :]):
            raise CoconutError(f"{where} has thoughts behind what the model writes: samples know one block, before it")
        shape = page_shape(read)
        blocks = [count for count in shape.thoughts if count]
        if len(blocks) > 1:
            raise CoconutError(f"{where} writes {len(blocks)} blocks of thoughts before an answer: samples know one")
        if not plain and not (blocks and method.feeds_back(config.options)):
            what = "a learnt stop" if policy.kind == "deterministic" else f"PolicyConfig.kind = {policy.kind!r}"
            raise CoconutError(f"{where} has no block of thoughts that {what} could be about")
        if method.halting(placing) is not None and not policy.learnt_stop:
            raise CoconutError(
                f"{where} opens or ends blocks by itself: samples know a stop head alone (PolicyConfig.learnt_stop)"
            )
        if policy.learnt_stop and config.halting is not None and config.halting.most > max(blocks):
            raise CoconutError(
                f"HaltingConfig.most = {config.halting.most}: samples have at most {max(blocks)} thoughts, those of a "
                f"page, and so must answers ({where})"
            )
        needed = shape.columns + config.sampling.max_new_tokens
        if config.decoder.position_embedding == "learned" and needed > config.decoder.max_positions:
            raise CoconutError(
                f"DecoderConfig.max_positions = {config.decoder.max_positions}: a question, its thoughts and "
                f"SamplingConfig.max_new_tokens = {config.sampling.max_new_tokens} need {needed} ({where})"
            )
