"""A model of ours as EleutherAI's lm-evaluation-harness asks it (`lm_eval.api.model.LM`).

Importing this module makes it the model ``coconut`` of that library, which ``lm_eval.simple_evaluate(model="coconut",
model_args={"workdir": ...})`` builds; ``coconut lm-eval`` does the same with flags. It needs the extra ``lm-eval``.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from coconut.commands.evaluate_pretrained import refuse_thinker
from coconut.curriculum import CurriculumConfig
from coconut.errors import CoconutError
from coconut.evaluation.answers import AnswerConfig, answer_questions
from coconut.evaluation.likelihood import log_likelihoods
from coconut.evaluation.reading import given_pages
from coconut.hub import local_folder
from coconut.latent.feedback import Identity
from coconut.latent.generate import SamplingConfig
from coconut.latent.halting import HaltingConfig
from coconut.methods import get_method
from coconut.methods.method import Method
from coconut.model import Model
from coconut.models.huggingface import load_pretrained
from coconut.pages import Ids, Markers, Page, Placing, Text, count_thoughts, question_alone
from coconut.sharding import make_mesh
from coconut.storage_path import StoragePath
from coconut.tokenizers import Tokenizer, load_tokenizer
from coconut.training.checkpoint import Which
from coconut.training.loading import load_model
from coconut.training.metrics import progress_bar

try:
    # The library looks for its own models only as long as there is none, so they have to come before ours.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise CoconutError("the evaluation harness needs `pip install coconut-jax[lm-eval]`") from error

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names that tasks have for one number, in the order in which the library itself looks for them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """Who is asked.

    Attributes:
      model: the model.
      tokenizer: its tokenizer.
      method: how a question is written down.
      placing: the stage it has reached, and its method's options.
      sampling: how it writes where a task says nothing.
      halting: when its blocks of thoughts are over; None for what the method says.
      batch_size: its own.
      info: what to say of it in results.
    """

    model: Model
    tokenizer: Tokenizer
    method: Method
    placing: Placing
    sampling: SamplingConfig
    halting: HaltingConfig | None
    batch_size: int
    info: Mapping[str, Any]


def asked_run(workdir: StoragePath | str, which: Which | int, mesh: Mesh, *, verify: bool = True) -> Asked:
    """The checkpoint of a run, asked as ``coconut generate`` asks it.

    Raises:
      CoconutError: the workdir holds no run, or no checkpoint that is whole.
    """
    run, model, progress = load_model(workdir, which, mesh, verify=verify)
    config = run.config
    return Asked(
        model=model,
        tokenizer=run.tokenizer,
        method=get_method(config.method),
        placing=run.placing(progress.stage),
        sampling=SamplingConfig(max_new_tokens=config.sampling.max_new_tokens),
        halting=config.halting,
        batch_size=config.evaluation_batch_size,
        info={"workdir": str(workdir), "method": config.method, "step": progress.step, "stage": progress.stage},
    )


def asked_pretrained(folder: str, mesh: Mesh) -> Asked:
    """A published model, which goes on from what it reads. Where a task says nothing it writes 256 tokens at most.

    Raises:
      CoconutError: it cannot be read, or it is an export of a model that thinks.
    """
    refuse_thinker(folder)
    tokenizer = load_tokenizer(local_folder(folder))
    decoder = load_pretrained(folder, mesh=mesh)
    if (highest := tokenizer.vocab_size - 4) >= decoder.config.vocabulary:
        raise CoconutError(
            f"{folder}: the tokenizer has the id {highest}, but the embedding has {decoder.config.vocabulary} rows"
        )
    return Asked(
        model=Model(decoder, {"feedback": Identity()}),
        tokenizer=tokenizer,
        method=get_method("cot"),
        placing=Placing(curriculum=CurriculumConfig(), stage=0, options=None, markers=Markers.of(tokenizer)),
        sampling=SamplingConfig(max_new_tokens=256),
        halting=None,
        batch_size=AnswerConfig.batch_size,
        info={"pretrained": folder},
    )


class CoconutLM(LM):
    r"""A run, or a published model, that answers the harness's requests.

    A context is read word for word: no line break is added behind it, as a run's own questions may have one. A task for
    such a run writes it itself (``doc_to_text: "{{question}}\n"``).

    *Where thoughts stand.* Behind the context the model gets what its method writes behind a question: for Coconut the
    start marker, the thoughts, the end marker. What is written, or whose probability is asked for, comes after them. So
    ``generate_until`` is ``context <start> thoughts <end> text``, and ``loglikelihood`` is ``context <start> thoughts
    <end> continuation``. ``loglikelihood_rolling`` cuts a text into windows, each of as much as the model has positions
    for: ``token <start> thoughts <end> window``, where the one token is what stands before the window (before the first
    the token that the vocabulary wants before a text, else EOS), or more where the last window is shorter. With
    ``thoughts=0`` the markers stay, and nothing is between them. Methods without markers put nothing in between.

    *Where text is cut into tokens.* With markers between them, context and continuation are cut apart, as in training.
    With nothing between them they are cut as one text, and the spaces at the end of the context belong to the
    continuation: the library's own models do the same.

    Log-probabilities are those of `coconut.evaluation.likelihood.log_likelihoods`.

    Args:
      workdir: of a run, or a quickstart's folder.
      pretrained: in its place, a checkpoint of Hugging Face's layout, or the id of a repository.
      which: the best checkpoint of the run, the latest, or that of a step.
      verify: compare the checkpoint's files with their SHA-256 first.
      thoughts: of every block; None for the trained number, 0 for none.
      max_new_tokens: tokens of an answer, EOS included, where a task says nothing; None for the run's own, or 256.
      batch_size: rows run together; None for the run's own, or 64.
      seed: of the draws, where a task samples.
      truncate: cut contexts that are too long from the left, and count them (`truncated`); they are an error if not.
      mesh: the devices; None for all there are.
      console: where the progress bar goes; standard error if None.

    Attributes:
      truncated: contexts that were cut so far.

    Raises:
      CoconutError: none or both of the two models are named, or the model cannot be loaded or has no thoughts.
    """

    def __init__(
        self,
        workdir: StoragePath | str | None = None,
        pretrained: str | None = None,
        *,
        which: Which | int = "best",
        verify: bool = True,
        thoughts: int | None = None,
        max_new_tokens: int | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        truncate: bool = False,
        mesh: Mesh | None = None,
        console: Console | None = None,
    ):
        super().__init__()
        if (workdir is None) == (pretrained is None):
            raise CoconutError("give --workdir, of a run, or --pretrained, a model that was never trained here")
        self._mesh = make_mesh() if mesh is None else mesh
        if workdir is not None:
            asked = asked_run(workdir, which, self._mesh, verify=verify)
        else:
            assert pretrained is not None
            asked = asked_pretrained(pretrained, self._mesh)
        if max_new_tokens is not None:
            asked = dataclasses.replace(
                asked, sampling=dataclasses.replace(asked.sampling, max_new_tokens=max_new_tokens)
            )
        self._asked, self._thoughts, self._seed = asked, thoughts, seed
        self._batch_size = asked.batch_size if batch_size is None else batch_size
        AnswerConfig(batch_size=self._batch_size, thoughts=thoughts, seed=seed)  # Looks at their values.
        self._truncate, self._console = truncate, console
        self.truncated = 0
        page = self._page(asked.placing, thoughts)
        # Markers stand there also where no thought does.
        self._between, self._apart = _columns(page) - 1, len(page) > 1

    def get_model_info(self) -> dict[str, Any]:
        """What the library writes among its results."""
        return {**self._asked.info, "thoughts": self._thoughts, "truncate": self._truncate, "seed": self._seed}

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation) the log-probability in nats, and whether greedy decoding would write it.

        Raises:
          CoconutError: a request does not fit the model's positions; see `log_likelihoods` for others.
        """
        pairs = []
        for index, request in enumerate(requests):
            context, continuation = self._encode_pair(*request.args)
            what = f"a continuation of {len(continuation)} tokens"
            # Its last token is only predicted.
            pairs.append((self._fitting(context, len(continuation) - 1, index, what), continuation))
        return self._score(pairs, "log-likelihoods")

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """For each text its log-probability in nats, in windows that do not overlap.

        Raises:
          CoconutError: the model has positions for no window; see `log_likelihoods` for others.
        """
        longest = self._asked.model.decoder.config.max_positions - self._between
        if longest < 1:
            raise CoconutError(f"--thoughts {self._thoughts}: they leave no positions for a text")
        pairs, owners = [], []
        for index, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self._asked.tokenizer.encode(request.args[0]),
                prefix_token=self._prefix[-1],
                max_seq_len=longest,
                context_len=1,
            )
            for context, window in map(make_disjoint_window, windows):
                pairs.append((context, window))
                owners.append(index)
        sums = [0.0] * len(requests)
        for index, (score, _) in zip(owners, self._score(pairs, "windows"), strict=True):
            sums[index] += score
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """For each (context, settings) what the model writes, up to the first of the texts it is to stop at.

        The settings ``until``, ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``min_p`` and the number of new
        tokens, by any name that the library knows, are followed; without ``do_sample`` or a temperature the likeliest
        token is taken. The n-th of the requests that share settings and an order of length has the n-th key of the
        seed.

        Raises:
          CoconutError: another setting, one out of range, or a context that does not fit the model's positions.
        """
        groups: dict[tuple[SamplingConfig, int], list[tuple[int, Ids]]] = {}
        stops = []
        for index, request in enumerate(requests):
            context, settings = list(request.args)  # Their type says that there is one.
            sampling, until = read_settings(settings, self._asked.sampling)
            stops.append(until)
            what = f"room for {sampling.max_new_tokens} new tokens (--gen_kwargs max_gen_toks=N asks for others)"
            ids = self._fitting(self._question(context), self._room(sampling), index, what)
            question = np.asarray(ids, np.int32)
            groups.setdefault((sampling, len(question).bit_length()), []).append((index, question))
        texts = [""] * len(requests)
        for (sampling, _), group in groups.items():
            config = AnswerConfig(
                batch_size=self._batch_size,
                sampling=sampling,
                thoughts=self._thoughts,
                seed=self._seed,
                halting=self._asked.halting,
            )
            examples = [question_alone(question, self._asked.placing.curriculum) for _, question in group]
            with jax.set_mesh(self._mesh), self._progress("answering", len(group)) as advance:
                for answer in answer_questions(*self._whom, examples, config, advance=advance):
                    texts[group[answer.example][0]] = answer.text
        return [cut(text, until) for text, until in zip(texts, stops, strict=True)]

    @property
    def _whom(self) -> tuple[Model, Tokenizer, Method, Placing]:
        return self._asked.model, self._asked.tokenizer, self._asked.method, self._asked.placing

    @property
    def _prefix(self) -> list[int]:
        """What stands before a text that has no context."""
        return self._asked.tokenizer.leading_ids or [self._asked.tokenizer.eos_id]

    def _question(self, context: str) -> list[int]:
        tokenizer = self._asked.tokenizer
        return [*tokenizer.leading_ids, *tokenizer.encode(context)] or self._prefix

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        tokenizer = self._asked.tokenizer
        if self._apart or not context:
            return self._question(context), tokenizer.encode(continuation)
        kept = context.rstrip()
        continuation, context = context[len(kept) :] + continuation, kept
        alone, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
        return self._question(context), whole[len(alone) :]

    def _page(self, placing: Placing, thoughts: int | None) -> Page:
        """What the model is given of a question of one token."""
        example = question_alone(np.zeros(1, np.int32), placing.curriculum)
        [page] = given_pages(self._asked.method, placing, [example], thoughts)
        return page

    def _room(self, sampling: SamplingConfig) -> int:
        """The columns that `answer_questions` keeps free behind the first thoughts."""
        placing = self._asked.placing
        last = dataclasses.replace(placing, stage=placing.curriculum.final_stage)
        room = sampling.max_new_tokens + max(_columns(self._page(last, None)) - 1 - self._between, 0)
        halting = self._asked.halting or self._asked.method.halting(placing)
        if halting is not None and self._thoughts is not None:
            return room + halting.room // halting.most * max(self._thoughts, 1)
        return room if halting is None else room + halting.room

    def _fitting(self, context: list[int], behind: int, index: int, what: str) -> list[int]:
        """The context, or its end where it is too long and may be cut.

        Args:
          context: its ids.
          behind: columns that are needed behind it and behind what the method writes there.
          index: of the request.
          what: they are for.

        Raises:
          CoconutError: it may not be cut, or all of it would have to go.
        """
        limit = self._asked.model.decoder.config.max_positions
        most = limit - self._between - behind
        if len(context) <= most:
            return context
        if not self._truncate or most < 1:
            cut = "" if most < 1 else " (--truncate leaves out its beginning)"
            raise CoconutError(
                f"request {index}: DecoderConfig.max_positions = {limit}: a context of {len(context)} tokens, "
                f"{self._between} of markers and thoughts and {what} are too many{cut}"
            )
        self.truncated += 1
        return context[-most:]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], what: str) -> list[tuple[float, bool]]:
        thinks = count_thoughts(self._page(self._asked.placing, None)) > 0
        if self._asked.halting is not None and self._thoughts is None and thinks:
            raise CoconutError(
                f"RunConfig.halting = {self._asked.halting}: the model itself ends its thoughts; the log-probability "
                "of a text needs a given number of them (--thoughts K)"
            )
        if not pairs:
            return []
        contexts = [np.asarray(context, np.int32) for context, _ in pairs]
        continuations = [np.asarray(own, np.int32) for _, own in pairs]
        with jax.set_mesh(self._mesh), self._progress(what, len(pairs)) as advance:
            scores, greedy = log_likelihoods(
                *self._whom,
                contexts,
                continuations,
                thoughts=self._thoughts,
                batch_size=self._batch_size,
                advance=advance,
            )
        return [(float(score), bool(own)) for score, own in zip(scores, greedy, strict=True)]

    @contextlib.contextmanager
    def _progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        console = Console(stderr=True) if self._console is None else self._console
        with progress_bar(console) as bar:
            task_id = bar.add_task(what, total=total, numbers="")
            yield lambda rows: bar.advance(task_id, rows)


# Not a decorator: it would be a plain LM to whoever checks types.
register_model("coconut")(CoconutLM)


def _columns(page: Page) -> int:
    return sum(len(part.ids) for part in page if isinstance(part, Text)) + count_thoughts(page)


def read_settings(settings: Mapping[str, Any], own: SamplingConfig) -> tuple[SamplingConfig, list[str]]:
    """How a task wants to be answered, and the texts that an answer ends at.

    Args:
      settings: the task's ``generation_kwargs``.
      own: how the model writes where they say nothing.

    Raises:
      CoconutError: a setting is not known, has the wrong type, is out of range, or contradicts another.
    """
    left = dict(settings)
    until = left.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    if not (isinstance(until, list | tuple) and all(isinstance(stop, str) for stop in until)):
        raise CoconutError(f"generation_kwargs: until = {until!r}: must be a text or a list of texts")
    until = list(until)
    for name in ("temperature", "top_k", "top_p", "min_p", *_LENGTHS):
        value, whole = left.get(name), name in ("top_k", *_LENGTHS)
        fits = isinstance(value, int) or (isinstance(value, float) and not whole)
        if value is not None and (isinstance(value, bool) or not fits):
            number = "a whole number" if whole else "a number"
            raise CoconutError(f"generation_kwargs: {name} = {value!r}: must be {number}")
    lengths = [name for name in _LENGTHS if left.get(name) is not None]
    if len({left[name] for name in lengths}) > 1:
        raise CoconutError(
            f"generation_kwargs: {' and '.join(lengths)} name different numbers of tokens (to ask for another than the "
            "task does, use the name that it uses)"
        )
    samples = left.pop("do_sample", None)
    if isinstance(samples, str):  # As a command line has it.
        samples = {"true": True, "false": False}.get(samples.lower(), samples)
    if samples is not None and not isinstance(samples, bool):
        raise CoconutError(f"generation_kwargs: do_sample = {samples!r}: must be True or False")
    # As everywhere in that library, a temperature means nothing where it is said that nothing is drawn.
    temperature = float(left.pop("temperature", None) or 0.0)
    temperature = 0.0 if samples is False else temperature
    if samples and not temperature:
        if "temperature" in settings:
            raise CoconutError("generation_kwargs: do_sample = True and temperature = 0 contradict each other")
        temperature = 1.0
    filters = {name: left.pop(name) for name in ("top_k", "top_p", "min_p") if left.get(name) is not None}
    count = int(left[lengths[0]]) if lengths else own.max_new_tokens
    if unknown := sorted(name for name in left if name not in _LENGTHS):
        known = ", ".join(("until", "do_sample", "temperature", "top_k", "top_p", "min_p", *_LENGTHS))
        raise CoconutError(
            f"generation_kwargs: {unknown[0]} = {left[unknown[0]]!r} is not followed here; known: {known}"
        )
    if not temperature:
        # The likeliest token is among those that any of them keeps.
        filters = {}
    return dataclasses.replace(own, max_new_tokens=count, temperature=temperature, **filters), until


def cut(text: str, until: Sequence[str]) -> str:
    """A text up to the first of some others."""
    ends = [text.find(stop) for stop in until if stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))]
