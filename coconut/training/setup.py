"""What stands before the first step: data, tokenizer, resolved config, initial parameters. Bad input is found here."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from safetensors.numpy import load_file

from coconut.batching import stage_shape
from coconut.datasets import Dataset, load_dataset, make_tokenizer
from coconut.errors import CoconutError
from coconut.hub import local_folder
from coconut.latent.feedback import draws
from coconut.latent.scorer import DECODER_PART
from coconut.methods import METHODS, get_method
from coconut.model import Model, Parameters, Template, parameters_of
from coconut.models.adapters import merge_adapters
from coconut.models.config import DecoderConfig, Family
from coconut.models.decoder import Decoder
from coconut.models.huggingface import (
    PARTS_FILE,
    agreed_config,
    export_fields,
    is_our_export,
    load_multi_token,
    load_pretrained,
)
from coconut.models.multi_token import MULTI_TOKEN
from coconut.models.parameters import decoder_of, decoder_parameters
from coconut.models.stacking import in_layout_of
from coconut.models.vocabulary import copy_token, resize_vocabulary
from coconut.pipeline import pipeline_fingerprint
from coconut.sharding import check_heads, placed
from coconut.storage import exists
from coconut.storage_path import StoragePath, parse_path
from coconut.tokenizers import TokenizedExample, Tokenizer, validate_ids
from coconut.training.config import RunConfig, differences, to_json
from coconut.training.loading import load_model
from coconut.training.run import RUN_FILE, Run, split_fingerprint
from coconut.training.samplers import check_samples
from coconut.training.state import (
    REFERENCE,
    TrainState,
    fresh_model,
    fresh_parts,
    make_state,
    template_of,
    with_adapters,
)

# Fields of a decoder that may differ from those of the run it starts from: they do not change what its parameters mean.
NOT_THE_MODEL = (
    "max_positions",  # with learned positions the shape of their table says more
    "dropout",
    "param_dtype",
    "embedding_stddev",
    "kernel_stddev",
    "offset_bias",
    "family",
)


def prepare(
    config: RunConfig, dataset: Dataset | None = None, workdir: StoragePath | None = None
) -> tuple[Run, Dataset, list[TokenizedExample]]:
    """The data of a run, its config with the vocabulary filled in, and its tokenized training examples.

    Examples that are too long, where they may be dropped, are in neither of the two.

    Args:
      config: the run.
      dataset: its data, where they are loaded already.
      workdir: where it may have begun already; what it began from is then not looked at, and may be gone.

    Raises:
      CoconutError: data that cannot be read, splits that overlap, a vocabulary that is not the tokenizer's, a model to
        start from that is another one, examples longer than the model's positions, none with the steps that the method
        learns from, a stop head that is missing, samples that cannot be drawn, thoughts that cannot be packed, a
        tracker whose package is missing.
    """
    config.tracking.check_packages()
    dataset = load_dataset(config.data) if dataset is None else dataset
    tokenizer = make_tokenizer(config.data, dataset.splits["train"])
    decoder = dataclasses.replace(
        config.decoder, vocab_size=vocabulary_size(config, tokenizer, workdir), family=family_name(config, workdir)
    )
    config = dataclasses.replace(config, decoder=decoder)
    if config.adapter is not None:
        rows = token_ids(config.adapter.trained_rows, tokenizer, f"{type(config.adapter).__name__}.trained_rows")
        config = dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, trained_rows=rows))
        jax.eval_shape(lambda: fresh_model(config))  # whose targets are looked at
    examples = dataset.tokenized("train", tokenizer)
    for index, example in enumerate(examples):
        validate_ids(example.ids, decoder.vocabulary, f"training example {index}")
    check_steps(config, examples)
    run = Run(config, tokenizer, data="")
    fitting = fit_to_positions(examples, run)
    check_halting(config)
    check_packing(config)
    if config.drawing is not None:
        stages = range(config.curriculum.first_stage, config.curriculum.final_stage + 1)
        check_samples(config, fitting, [run.placing(stage) for stage in stages])
    fingerprint = pipeline_fingerprint(fitting, tokenizer, config.pipeline, seed=config.seed)
    splits = {name: split_fingerprint(split) for name, split in dataset.splits.items()}
    if len(fitting) < len(examples):
        left = set(fitting)
        train = [text for text, ids in zip(dataset.splits["train"], examples, strict=True) if ids in left]
        dataset = dataclasses.replace(dataset, splits={**dataset.splits, "train": train})
    return dataclasses.replace(run, data=fingerprint, splits=splits), dataset, fitting


def check_steps(config: RunConfig, examples: Sequence[TokenizedExample]) -> None:
    """Looks whether the data have the steps that the method learns from.

    Raises:
      CoconutError: no example has one.
    """
    if get_method(config.method).needs_steps and not any(example.steps for example in examples):
        others = ", ".join(name for name, method in METHODS.items() if not method.needs_steps)
        raise CoconutError(
            f"RunConfig.method = {config.method!r} learns from steps, and none of the {len(examples)} training "
            f"examples has any (methods that need none: {others})"
        )


def token_ids(tokens: Sequence[str | int], tokenizer: Tokenizer, field: str) -> tuple[int, ...]:
    """The ids of tokens that a config names, each once, in rising order.

    Args:
      tokens: ids; ``start_latent``, ``latent``, ``end_latent`` and ``eos``, whatever a tokenizer calls them; names of
        special tokens; or texts that are one token.
      tokenizer: of the run.
      field: of the config, for the error message.

    Raises:
      CoconutError: one is no token.
    """
    known = {
        "start_latent": tokenizer.start_latent_id,
        "latent": tokenizer.latent_id,
        "end_latent": tokenizer.end_latent_id,
        "eos": tokenizer.eos_id,
        **tokenizer.special_token_ids(),
    }
    found = set()
    for token in tokens:
        ids = [token] if isinstance(token, int) else [known[token]] if token in known else tokenizer.encode(token)
        if len(ids) != 1:
            raise CoconutError(
                f"{field} = {tuple(tokens)!r}: the tokenizer makes {len(ids)} tokens of {token!r}, not one"
            )
        found.add(ids[0])
    return tuple(sorted(found))


def check_halting(config: RunConfig) -> None:
    """Looks whether the model has the stop head that ends blocks, before it is first asked: at a validation.

    Raises:
      CoconutError: it has none.
    """
    if config.halting is not None and config.halting.has_head:
        parts = jax.eval_shape(lambda: fresh_parts(config))
        if "halt" not in parts:
            raise CoconutError(
                f"RunConfig.halting: HaltingConfig.stop = {config.halting.stop!r} needs a part named 'halt', and the "
                f"model of method = {config.method!r} has only {', '.join(sorted(parts))}"
            )


def check_packing(config: RunConfig) -> None:
    """Looks whether thoughts of rows that hold several examples can be made as the config says.

    Raises:
      CoconutError: the feedback draws; it draws by rows.
    """
    if config.pipeline.examples_per_row > 1 and draws(jax.eval_shape(lambda: fresh_parts(config))["feedback"]):
        raise CoconutError(
            f"PipelineConfig.examples_per_row = {config.pipeline.examples_per_row!r}: FeedbackConfig.kind = "
            f"{config.feedback.kind!r} draws thoughts by rows, and a row has one draw"
        )


def vocabulary_size(config: RunConfig, tokenizer: Tokenizer, workdir: StoragePath | None) -> int:
    """Rows of the embedding: the tokenizer's ids, or more where the checkpoint a run starts from has more.

    ``DecoderConfig.vocab_size`` may ask for still more: a number that a mesh's tensor axis divides. They are no tokens.

    Raises:
      CoconutError: ``DecoderConfig.vocab_size`` asks for fewer, the tokenizer has ids that the pretrained embedding has
        no rows for (beside the markers), ``marker_token`` is not one token, or ``init_from`` holds a run with another
        tokenizer.
    """
    rows = tokenizer.vocab_size
    if workdir is not None and exists(workdir / RUN_FILE):
        rows = Run.load(workdir).config.decoder.vocabulary
    elif config.pretrained is not None:
        there, own = agreed_config(config.pretrained, _without_vocabulary(config.decoder)).vocabulary, rows
        while own - 1 in (tokenizer.start_latent_id, tokenizer.latent_id, tokenizer.end_latent_id):
            own -= 1
        if own > there:
            raise CoconutError(
                f"RunConfig.pretrained = {config.pretrained!r}: its embedding has {there} rows, but the tokenizer has "
                f"{own} ids beside the markers"
            )
        rows = max(rows, there)
        _marker_source(config, tokenizer)
    elif config.init_from is not None:
        other = Run.load(parse_path(config.init_from))
        if other.tokenizer.fingerprint != tokenizer.fingerprint:
            raise CoconutError(f"RunConfig.init_from = {config.init_from!r}: its tokenizer is another one")
        theirs, ours = (to_json(_without_vocabulary(decoder)) for decoder in (other.config.decoder, config.decoder))
        found = differences(theirs, ours)
        if lines := [f"{name}: {found[name]}" for name in found if name not in NOT_THE_MODEL]:
            raise CoconutError(
                f"RunConfig.init_from = {config.init_from!r}: its decoder is another one:\n  " + "\n  ".join(lines)
            )
        rows = other.config.decoder.vocabulary
    asked = config.decoder.vocab_size
    if asked is not None and asked < rows:
        raise CoconutError(f"DecoderConfig.vocab_size = {asked}: this run has {rows} token ids")
    return rows if asked is None else asked


def family_name(config: RunConfig, workdir: StoragePath | None) -> Family | None:
    """``DecoderConfig.family``, or where nothing is said there that of what the run starts from."""
    if config.decoder.family is not None:
        return config.decoder.family
    if workdir is not None and exists(workdir / RUN_FILE):
        return Run.load(workdir).config.decoder.family
    if config.pretrained is not None:
        return agreed_config(config.pretrained, _without_vocabulary(config.decoder)).family
    return None if config.init_from is None else Run.load(parse_path(config.init_from)).config.decoder.family


def fit_to_positions(examples: Sequence[TokenizedExample], run: Run) -> list[TokenizedExample]:
    """The examples that fit the model's positions at every stage; others are an error, or dropped with a count.

    Raises:
      CoconutError: some do not fit and ``DataConfig.drop_too_long`` is off, or none fits.
    """
    config, limit = run.config, run.config.decoder.max_positions
    writers = get_method(config.method).pages.values()
    stages = range(config.curriculum.first_stage, config.curriculum.final_stage + 1)
    # Almost always all of them fit, which the widest columns of the whole set show at once.
    first = run.placing(stages[0])
    if max(stage_shape(examples, write, first, stages=stages).positions for write in writers) <= limit:
        return list(examples)
    placings = [run.placing(stage) for stage in stages]
    lengths = [
        max(stage_shape([example], write, placing).positions for write in writers for placing in placings)
        for example in examples
    ]
    fitting = [example for example, length in zip(examples, lengths, strict=True) if length <= limit]
    dropped = len(examples) - len(fitting)
    if not dropped:
        return fitting
    message = (
        f"{dropped} of {len(examples)} training examples do not fit DecoderConfig.max_positions = {limit}; the longest "
        f"needs {max(lengths)} positions"
    )
    if not config.data.drop_too_long:
        raise CoconutError(f"{message} (DataConfig.drop_too_long = True drops them)")
    if not fitting:
        raise CoconutError(f"{message}, and nothing is left")
    logging.getLogger(__name__).warning("%s: dropped", message)
    return fitting


def abstract_state(
    config: RunConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[Template, TrainState]:
    """How to make the run's model, and the shapes of its train state with the places they have on a mesh.

    Raises:
      CoconutError: an array cannot be split over the mesh; the message names the array and the dimension.
    """
    check_heads(config.decoder.num_heads, config.decoder.kv_heads, mesh)
    model = jax.eval_shape(lambda: fresh_model(config))
    template = template_of(config, model)
    state = jax.eval_shape(lambda model: make_state(template, parameters_of(model), optimizer, config.spikes), model)
    return template, placed(state, template.axes, mesh)


def initial_state(run: Run, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state a run starts from, each array made, or loaded, in the place it has on the mesh.

    Raises:
      CoconutError: see `initial_model`.
    """
    template, expected = abstract_state(run.config, optimizer, mesh)
    places = jax.tree.map(lambda x: x.sharding, expected)
    if run.config.pretrained is None and run.config.init_from is None:
        make = lambda: make_state(template, parameters_of(fresh_model(run.config)), optimizer, run.config.spikes)
        return jax.jit(make, out_shardings=places)()
    parameters = jax.device_put(parameters_of(initial_model(run, mesh)), places.parameters)
    make = lambda parameters: make_state(template, parameters, optimizer, run.config.spikes)
    return jax.jit(make, out_shardings=places)(parameters)


def initial_model(run: Run, mesh: Mesh | None = None) -> Model:
    """The model a run starts from: fresh, of a pretrained checkpoint, or with the parameters of ``init_from``.

    The decoder is taken: with its adapters where both runs configure these alike, else merged with them. A part is
    taken, too, where the other run has it and it means the same: the feedback where both runs configure it alike,
    another part where its parameters fit. Else a part that is a decoder like the model's is a copy of it, and any other
    is fresh.

    Raises:
      CoconutError: ``init_from`` holds no checkpoint or one of another shape, or ``pretrained`` cannot be loaded.
    """
    config = run.config
    if config.pretrained is not None:
        decoder = _pretrained_decoder(run, mesh)
        parts = dict(_exported_parts(config, _copies_in(fresh_parts(config), decoder)))
        if MULTI_TOKEN in parts:
            parts[MULTI_TOKEN] = (
                load_multi_token(config.pretrained, parts[MULTI_TOKEN], mesh=mesh) or parts[MULTI_TOKEN]
            )
        return Model(with_adapters(config, decoder), _with_reference(parts, decoder))
    if config.init_from is None:
        return fresh_model(config)
    other, loaded, _ = load_model(
        parse_path(config.init_from), config.init_checkpoint, mesh, execution=config.execution, train_only=True
    )
    decoder = loaded.decoder
    merged = merge_adapters(decoder)
    parts = _copies_in(fresh_parts(config), merged)
    if other.config.adapter != config.adapter:
        decoder = with_adapters(config, merged)
    for name in (parts.keys() & loaded.parts.keys()) - {REFERENCE}:  # which is the model that is loaded here
        there = loaded.parts[name]
        same = other.config.feedback == config.feedback if name == "feedback" else _alike(there, parts[name])
        # Another weight of its term makes no other module of it.
        same |= name == MULTI_TOKEN and _named_shapes(there) == _named_shapes(parts[name])
        parts[name] = there if same else parts[name]
    parts = _with_reference(parts, merged)
    expected = jax.eval_shape(lambda: fresh_model(config))
    where = f"RunConfig.init_from = {config.init_from!r}"
    found = matching(parameters_of(Model(decoder, parts)), parameters_of(expected), where)
    return Template.of(expected).model(found)


def _read_by_copies(parts: Mapping[str, Any], decoder: Decoder) -> dict[str, Any]:
    """The parts, those that are the same model as one that was trained with its numbers."""
    same = lambda part: (
        isinstance(part, Decoder)
        and all(name in NOT_THE_MODEL for name in differences(to_json(part.config), to_json(decoder.config)))
    )
    return {name: _with_numbers_of(decoder, part) if same(part) else part for name, part in parts.items()}


def _with_numbers_of(trained: Decoder, decoder: Decoder) -> Decoder:
    """A decoder with the numbers of another one.

    Raises:
      CoconutError: it has other parameters.
    """
    named = lambda decoder: {f"decoder.{name}": value for name, value in decoder_parameters(decoder).items()}
    own = in_layout_of(named(decoder), named(trained))
    # Arrays of its own: a train step gives its state away, each array once.
    dtype = jnp.dtype(decoder.config.param_dtype)
    own = {name.removeprefix("decoder."): jnp.array(value, dtype) for name, value in own.items()}
    return decoder_of(decoder.config, decoder.execution, own)


def _copies_in(parts: Mapping[str, Any], decoder: Decoder) -> dict[str, Any]:
    """The parts of `_read_by_copies`, with a scorer that starts as a copy of the decoder."""
    scorer = {DECODER_PART: _with_numbers_of(decoder, parts[DECODER_PART])} if DECODER_PART in parts else {}
    return {**_read_by_copies(parts, decoder), **scorer}


def _with_reference(parts: Mapping[str, Any], decoder: Decoder) -> dict[str, Any]:
    """The parts, their reference with the numbers that the run starts from; as they are where there is none."""
    if REFERENCE not in parts:
        return dict(parts)
    own = {name: jax.tree.map(jnp.array, parts[name]) for name in parts[REFERENCE] if name != "decoder"}
    return {**parts, REFERENCE: {**own, "decoder": _with_numbers_of(decoder, parts[REFERENCE]["decoder"])}}


def _exported_parts(config: RunConfig, fresh: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parts that an export of ours holds beside its decoder, where they mean the same; the others fresh."""
    assert config.pretrained is not None
    folder = local_folder(config.pretrained)
    if not (folder / PARTS_FILE).exists():
        return fresh
    there, stored = export_fields(folder), load_file(folder / PARTS_FILE)
    parts = {}
    for name, part in fresh.items():
        own = parameters_of(Model(cast(Any, None), {name: part}))
        fits = all(key in stored and stored[key].shape == value.shape for key, value in own.items())
        if name == "feedback" and there.get("feedback") != to_json(config.feedback):
            fits = False
        taken = [jnp.asarray(stored[key], value.dtype) if fits else value for key, value in own.items()]
        parts[name] = jax.tree.unflatten(jax.tree.structure(part), taken)
    return parts


def _alike(first: Any, second: Any) -> bool:
    """Whether two parts have the same arrays in the same places."""
    shapes = lambda tree: [x.shape for x in jax.tree.leaves(tree)]
    return jax.tree.structure(first) == jax.tree.structure(second) and shapes(first) == shapes(second)


def _named_shapes(part: Any) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in parameters_of(Model(cast(Any, None), {"part": part})).items()}


def _pretrained_decoder(run: Run, mesh: Mesh | None) -> Decoder:
    """The pretrained decoder, its vocabulary the run's, the latent markers copies of another token."""
    config, tokenizer = run.config, run.tokenizer
    assert config.pretrained is not None
    like = _marker_source(config, tokenizer)
    decoder = load_pretrained(
        config.pretrained, config=_without_vocabulary(config.decoder), execution=config.execution, mesh=mesh
    )
    if config.decoder.vocabulary > decoder.config.vocabulary:
        decoder = resize_vocabulary(decoder, config.decoder.vocabulary, copy_from=like)
    if not is_our_export(config.pretrained):  # whose markers have learnt what they mean
        markers = [tokenizer.start_latent_id, tokenizer.latent_id, tokenizer.end_latent_id]
        decoder = copy_token(decoder, markers, copy_from=like)
    return decoder_of(config.decoder, config.execution, decoder_parameters(decoder))


def _without_vocabulary(decoder: DecoderConfig) -> DecoderConfig:
    return dataclasses.replace(decoder, vocab_size=None)


def _marker_source(config: RunConfig, tokenizer: Tokenizer) -> int:
    ids = tokenizer.encode(config.marker_token)
    if len(ids) != 1:
        raise CoconutError(
            f"RunConfig.marker_token = {config.marker_token!r}: the tokenizer makes {len(ids)} tokens of it, not one"
        )
    return ids[0]


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
