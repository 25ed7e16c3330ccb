"""The train loop, to be read from top to bottom."""

import contextlib
import dataclasses
import logging
import math
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from coconut import interruption
from coconut.curriculum import has_learnt, may_advance
from coconut.datasets import Dataset
from coconut.errors import CoconutError, DivergedError, NotFiniteError
from coconut.methods import get_method
from coconut.methods.method import Method, Views
from coconut.model import Model
from coconut.pages import Placing
from coconut.pipeline import BatchSource, make_iterator
from coconut.provenance import provenance
from coconut.sharding import make_mesh, own_rows, replicated
from coconut.storage import exists, hold, make_folder
from coconut.storage_path import StoragePath, as_path
from coconut.tokenizers import TokenizedExample
from coconut.training.checkpoint import Checkpoints
from coconut.training.clock import Clock, Doing
from coconut.training.config import RunConfig
from coconut.training.divergence import save_bundle
from coconut.training.events import Events
from coconut.training.metrics import Meter, MetricsLog, SkippedSteps, progress_bar
from coconut.training.norms import NormAlert
from coconut.training.optimizer import learning_rate_at, make_optimizer
from coconut.training.progress import Progress
from coconut.training.rollouts import make_learning
from coconut.training.routing import make_routing
from coconut.training.run import BY_NAME, RUN_FILE, Run, changes_metrics, tracked, write_cell
from coconut.training.setup import abstract_state, initial_state, prepare
from coconut.training.state import TrainState, restart_optimizer, restart_spikes
from coconut.training.step import make_loss
from coconut.training.trackers.feeding import open_trackers
from coconut.types import Schedule

LOG = logging.getLogger(__name__)

Validate = Callable[[Model, Run, Dataset, int], Mapping[str, float]]
"""(model, run, data set, stage) -> metrics of the validation split, ``accuracy`` among them; empty without one."""

LookAtStep = Callable[[RunConfig, Mesh, Sequence[Schedule], jax.stages.Compiled], None]
"""(run, devices, the spans of the batches, the program): told of the first train step that is compiled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a call of `train` ended.

    Attributes:
      run: the resolved run.
      model: the model at the end.
      progress: where it stands; ``progress.finished`` is False where the call was interrupted.
      compilations: train-step programs compiled by this call.
      clock: the seconds of this call by what was done in them (`coconut.training.clock`).
    """

    run: Run
    model: Model
    progress: Progress
    compilations: int
    clock: Mapping[Doing, float]


def train(
    config: RunConfig,
    workdir: StoragePath | str,
    *,
    mesh: Mesh | None = None,
    dataset: Dataset | None = None,
    validate: Validate = lambda model, run, dataset, stage: {},
    look_at_step: LookAtStep = lambda config, mesh, schedules, step: None,
    allow: Collection[str] = (),
    from_step: int | None = None,
    verify: bool = True,
    cell: Mapping[str, Any] | None = None,
    console: Console | None = None,
    started: float | None = None,
) -> TrainResult:
    """Trains a run to its end, or goes on where it was stopped.

    The same config, seed and versions give the same bits, however often the run was killed and started again. A first
    Ctrl-C (or SIGTERM) saves a checkpoint and returns; a second one is Python's own. One that comes before the first
    step raises KeyboardInterrupt. Where a checkpoint is damaged it is set aside, and the run goes on from the one
    before.

    Args:
      config: the run.
      workdir: where checkpoints, metrics and the resolved config go; made if missing. A text may
        also be one of Google Cloud Storage, ``gs://BUCKET/FOLDER``.
      mesh: the devices (`coconut.sharding.make_mesh`); None for all there are, each with its own rows. A run may go on
        on another mesh, to the same numbers up to rounding.
      dataset: what `load_dataset` gives for ``config.data``, where it is at hand already.
      validate: measures the validation split.
      look_at_step: told of the first train step that is compiled.
      allow: fields of the config, such as ``optimizer.learning_rate``, in which a run may go on with another value
        although that changes its numbers. How it is run may differ in any case (`coconut.training.run.FREE`).
      from_step: go back to the checkpoint of this step, and set later ones aside; None for the latest that is whole.
      verify: compare each file of the checkpoint with its SHA-256 first.
      cell: of a sweep that the run belongs to; kept in the workdir, for `coconut runs`.
      console: where the progress bar goes; standard error if None.
      started: when the clock of this call began, by `time.perf_counter`; None for now.

    Raises:
      CoconutError: bad input (before any long work starts), a workdir that holds another run or that another process
        trains in, a checkpoint that cannot be saved, none that is whole.
      DivergedError: ``config.max_skipped_steps`` steps in a row were skipped, or the model gives nothing finite where
        it is validated or done. What `coconut.training.divergence.replay` needs to do that step again is in the
        workdir.
    """
    workdir, clock = as_path(workdir), Clock(started)
    with clock.doing("reading"):
        run, dataset, examples = prepare(config, dataset, workdir)
    make_folder(workdir)
    with clock.running(), hold(workdir), contextlib.closing(Events(workdir)) as events:
        changed = run.check(workdir, allow)
        if cell is not None:
            write_cell(workdir, cell)
        events.write("start", {"command": shlex.join(sys.argv), "changed": changed, **provenance()})
        for split, messages in dataset.left_out.items():
            events.write("left_out", {"split": split, "records": messages})
        with _ending(events), contextlib.ExitStack() as opened:
            checkpoints = Checkpoints(
                workdir, run.identity(), keep_latest=config.keep_latest, verify=verify, note=events.write
            )
            opened.callback(checkpoints.close)
            if from_step is not None:
                checkpoints.put_aside_later(from_step)
            return _train(
                *(run, dataset, examples, workdir, checkpoints, events),
                changed=changed,
                # Where run.json is gone, a checkpoint has to be of this very run.
                allow=(*allow, *(BY_NAME if exists(workdir / RUN_FILE) else ())),
                mesh=make_mesh() if mesh is None else mesh,
                validate=validate,
                look_at_step=look_at_step,
                console=console,
                clock=clock,
            )


def _train(
    run: Run,
    dataset: Dataset,
    examples: list[TokenizedExample],
    workdir: StoragePath,
    checkpoints: Checkpoints,
    events: Events,
    *,
    changed: Mapping[str, str],
    allow: Collection[str],
    mesh: Mesh,
    validate: Validate,
    look_at_step: LookAtStep,
    console: Console | None,
    clock: Clock,
) -> TrainResult:
    """`train`, once the input is known to be good and the workdir to be this run's."""
    config, curriculum, method = run.config, run.config.curriculum, get_method(run.config.method)
    rows = own_rows(mesh, config.pipeline.batch_size, config.microbatches, config.pipeline.examples_per_row)
    optimizer = make_optimizer(config.optimizer)
    template, expected = abstract_state(config, optimizer, mesh)
    learning = make_learning(config, template, optimizer, mesh, tokenizer=run.tokenizer, dataset=dataset)
    state, progress = _restored(run, checkpoints, expected, allow) or (
        initial_state(run, optimizer, mesh),
        Progress(stage=curriculum.first_stage),
    )
    # Before run.json is: a start that ends between the two finds the same difference again.
    trackers = open_trackers(config.tracking, tracked(run, workdir, progress.step), differs=changes_metrics(changed))
    run.save(workdir, changed=changed, step=progress.step)
    log = MetricsLog(workdir, start=progress.step, trackers=trackers)
    log_meter, window_meter = Meter(progress.log), Meter(progress.window)
    skips = SkippedSteps(total=progress.skipped, in_a_row=progress.skipped_in_a_row)
    norm_alert = NormAlert(config.norm_alert_factor)
    loss = make_loss(template, learning.method, options=config.options, microbatches=config.microbatches)
    routing = make_routing(config, template)
    programs: dict[tuple[Schedule, ...], jax.stages.Compiled] = {}
    key = jax.jit(jax.random.key, out_shardings=replicated(mesh))(config.seed)
    longest_chain = max((sum(map(len, example.written_steps)) for example in examples), default=0)
    host: Views = {}

    def diverged(why: str, **numbers: Any) -> DivergedError:
        """What to raise, once everything that explains it is on disk."""
        log.write("diverged", progress.step, {"stage": progress.stage, **numbers})
        log.flush()
        # Samples are in no bundle: the questions, the checkpoint and the run's seed make them again.
        kept = host if config.drawing is None else {}
        bundle = save_bundle(workdir, run, state, progress, kept, rows) if kept else None
        events.write("diverged", {"step": progress.step, "why": why, "bundle": str(bundle), **numbers})
        checkpoints.put_aside_broken(progress.step - skips.in_a_row, why)
        hint = "" if bundle is None else f". To do that step again: coconut replay {bundle}"
        return DivergedError(f"{why}; the latest checkpoint is that of step {checkpoints.step('latest')}{hint}")

    def measured(views: Views | None) -> tuple[Mapping[str, float], bool]:
        """The validation of this step, and whether the model is seen to give finite numbers."""
        # Several processes have to do the same: there a signal waits.
        interruptible = interruption.raised() if jax.process_count() == 1 else contextlib.nullcontext()
        with clock.doing("validating"), interruptible:
            try:
                validation = validate(template.model(state.parameters), run, dataset, progress.stage)
                if progress.finished and not validation and views is not None:
                    # No later step will show it.
                    value = float(loss(state.parameters, views, key))
                    if not math.isfinite(value):
                        raise NotFiniteError(f"the loss of its last batch is {value}")
            except NotFiniteError as error:
                raise diverged(f"after step {progress.step} the model is broken: {error}") from error
        if validation:
            log.write("validation", progress.step, {"stage": progress.stage, **validation})
        return validation, bool(validation) or progress.finished

    interruption.check()
    with (
        clock.doing("training"),
        jax.set_mesh(mesh),
        progress_bar(console) as bar,
        stop_asked() as interrupted,
        contextlib.closing(log),
    ):
        task = bar.add_task(config.method, numbers="")
        if progress.validation_due:
            ended = progress.stage_ended and progress.stage == curriculum.final_stage
            progress = dataclasses.replace(progress, validation_due=False, finished=ended)
            validation, proven = measured(None)
            log.flush()
            with clock.doing("saving"):
                checkpoints.save(state, progress, validation, proven=proven and bool(validation))
        stopping = False
        while not (progress.finished or stopping):
            # --- A stage begins, or goes on.
            if progress.stage_ended:
                progress = progress.next_stage()
            stage, is_last = progress.stage, progress.stage == curriculum.final_stage
            source = BatchSource(
                *(examples, run.tokenizer, learning.method, run.placing(stage), config.pipeline),
                seed=config.seed,
                stage_start=progress.step - progress.stage_step,
                rows=rows,
            )
            iterator = make_iterator(source, config.pipeline, start=progress.step)
            if progress.stage_step and progress.data is not None:
                iterator.set_state(dict(progress.data))
            length = source.stage_length
            validate_every = source.batches_per_epoch if config.evaluate_every == "epoch" else config.evaluate_every
            bar.reset(task, total=length, completed=progress.stage_step, description=f"{config.method} stage {stage}")
            since = time.perf_counter()

            while not (progress.stage_ended or stopping):
                # --- One step. The device runs ahead of the host until something needs its numbers.
                at_stage, at_epoch = progress.stage_step == 0, progress.step % source.batches_per_epoch == 0
                if progress.step and (
                    {"never": False, "stage": at_stage, "epoch": at_epoch}[curriculum.reset_optimizer]
                    or _method_restarts(method, run.placing(stage), progress, length, longest_chain)
                ):
                    state = restart_optimizer(template, state, optimizer)
                if at_stage:
                    state = restart_spikes(state)
                learning_rate = learning_rate_at(
                    config.optimizer,
                    step=progress.step,
                    stage_step=progress.stage_step,
                    stage_steps=length,
                    is_last_stage=is_last,
                )
                try:
                    given = learning.views(state, iterator, progress.step)
                except NotFiniteError as error:
                    raise diverged(f"behind step {progress.step} the model is broken: {error}") from error
                host, views = given.host[-1], given.device
                arguments = (state, views, np.float32(learning_rate), key)
                schedules = tuple(view.schedule for view in views.values())
                if schedules not in programs:
                    started = time.perf_counter()
                    bar.update(task, numbers="compiling")
                    with clock.doing("compiling"):
                        programs[schedules] = learning.step.lower(*arguments).compile()
                        if len(programs) == 1:
                            look_at_step(config, mesh, schedules, programs[schedules])
                    seconds = time.perf_counter() - started + learning.compile_seconds()
                    log.write("compile", progress.step, {"stage": stage, "compile_seconds": seconds})
                    since += seconds
                state, metrics = programs[schedules](*arguments)
                for meter in (log_meter, window_meter):
                    meter.add({**metrics, **given.metrics})
                skips.add(metrics, progress.step + 1, given.examples)
                progress = dataclasses.replace(progress, step=progress.step + 1, stage_step=progress.stage_step + 1)

                # --- Every so many steps.
                at_end = progress.stage_step == length
                at_log = at_end or progress.step % config.log_every == 0
                at_window = progress.stage_step % curriculum.advance_window == 0
                at_save = config.save_every is not None and progress.step % config.save_every == 0
                at_validation = validate_every is not None and progress.step % validate_every == 0
                # Asked once a step: whoever sets it later stops the next step, which is saved, too.
                stopping = interrupted(progress.step)
                if not (at_log or at_window or at_save or at_validation or stopping):
                    continue
                averages, skipped_in_a_row = log_meter.averages(), skips.count()
                now = time.perf_counter()
                for step, ids, why in skips.seen:
                    LOG.warning("step %d was skipped: its gradient %s; examples %s", step, why, ids)
                    events.write("skip", {"step": step, "stage": stage, "why": why, "examples": ids})
                progress = dataclasses.replace(
                    progress,
                    seconds=progress.seconds + now - since,
                    skipped=skips.total,
                    skipped_in_a_row=skips.in_a_row,
                )
                if skipped_in_a_row >= config.max_skipped_steps:
                    raise diverged(
                        f"{skipped_in_a_row} steps in a row had a gradient that is not finite, the last of them up to "
                        f"step {progress.step}",
                        skipped_in_a_row=skipped_in_a_row,
                        learning_rate=learning_rate,
                        **averages,
                    )
                learnt = False
                if at_window:
                    window = window_meter.averages()
                    # Steps that were skipped measured nothing.
                    learnt = may_advance(curriculum, stage) and window["skipped"] < 1 and has_learnt(curriculum, window)
                    window_meter = Meter()
                seconds = progress.seconds - progress.log_seconds
                bar.update(task, completed=progress.stage_step, numbers=_numbers(log_meter, seconds))
                if at_log:
                    rates = {"learning_rate": learning_rate, "seconds": progress.seconds}
                    alert = norm_alert.look(averages, progress.step)
                    routed = routing(state, views, key)
                    log.write("train", progress.step, {"stage": stage, **averages, **routed, **alert, **rates})
                    try:
                        if shown := learning.shown(state, source[0]):
                            log.write("rollouts", progress.step, {"stage": stage, **shown})
                    except NotFiniteError as error:
                        raise diverged(f"behind step {progress.step} the model is broken: {error}") from error
                    learning.compile_seconds()  # Which are no part of what follows.
                    since = time.perf_counter()
                    log_meter = Meter()
                    progress = dataclasses.replace(progress, log_seconds=progress.seconds)
                if at_end or learnt:
                    window_meter = Meter()
                    # None where no metric decides: a stage that just ends after its steps.
                    judged = learnt if may_advance(curriculum, stage) else None
                    outcome = {"stage": stage, "steps": progress.stage_step, "learnt": judged}
                    log.write("stage", progress.step, outcome)
                    events.write("stage", {"step": progress.step, **outcome})
                    if judged is False and jax.process_index() == 0:
                        bar.console.print(f"stage {stage} was not learnt within {length} steps: going on all the same")
                    progress = progress.end_stage(outcome, finished=is_last)

                # --- Measure and save.
                validation: Mapping[str, float] = {}
                proven = False
                if at_validation or progress.stage_ended:
                    try:
                        validation, proven = measured(views)
                    except KeyboardInterrupt:
                        # Saved at once; the run begins with this validation when it goes on.
                        progress = dataclasses.replace(progress, validation_due=True, finished=False)
                        stopping = True
                # Skipped steps changed nothing, and what no longer gives finite gradients must not displace what does.
                at_save = at_save and not skips.in_a_row
                if at_save or validation or progress.stage_ended or stopping:
                    progress = dataclasses.replace(
                        progress, data=iterator.get_state(), log=log_meter.sums, window=window_meter.sums
                    )
                    # A resumed run writes the lines after its checkpoint again, never those before it.
                    log.flush()
                    try:
                        with clock.doing("saving"):
                            checkpoints.save(state, progress, validation, proven=proven)
                    except NotFiniteError as error:
                        raise diverged(str(error)) from error
                since = time.perf_counter()
        log.outcome = "finished" if progress.finished else "stopped"
    return TrainResult(
        run=run,
        model=template.model(state.parameters),
        progress=progress,
        compilations=len(programs),
        clock=clock.seconds(),
    )


def _restored(
    run: Run, checkpoints: Checkpoints, expected: TrainState, allow: Collection[str]
) -> tuple[TrainState, Progress] | None:
    """The newest checkpoint that is whole; None where there is none yet."""
    curriculum = run.config.curriculum

    def read(step: int) -> tuple[TrainState, Progress]:
        where = f"the checkpoint of step {step}"
        run.check_checkpoint(checkpoints.manifest(step).run, where, allow)
        state, progress = checkpoints.restore(step, expected)
        progress.check_stage(curriculum.first_stage, curriculum.final_stage, where)
        return state, progress

    return checkpoints.newest_good("latest", read)


def _method_restarts(method: Method, placing: Placing, progress: Progress, length: int, longest_chain: int) -> bool:
    """Whether the method asks for another optimizer at this step, by its own number here and at the step before.

    A stage's first step looks at the end of the stage before, as if that had lasted its time.
    """
    at = lambda stage, share: method.restarts(dataclasses.replace(placing, stage=stage, progress=share), longest_chain)
    step = progress.stage_step
    before = at(placing.stage, (step - 1) / length) if step else at(placing.stage - 1, math.nextafter(1.0, 0.0))
    return at(placing.stage, step / length) != before


@contextlib.contextmanager
def _ending(events: Events) -> Iterator[None]:
    """Writes down how a call of `train` ended."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(CoconutError):  # The disk that is full may be why.
            events.write("stop", {"error": type(error).__name__, "message": str(error)})
        raise
    events.write("stop", {})


@contextlib.contextmanager
def stop_asked() -> Iterator[Callable[[int], bool]]:
    """Whether to stop behind a step, given its number.

    A process stops after its first SIGINT or SIGTERM; the second one acts as usual. Several processes agree on the step
    to stop behind after a signal to any of them: JAX tells the others of a SIGTERM, which is how a preemption is
    announced, and a SIGINT is passed on as one.
    """
    several, passed_on = jax.process_count() > 1, False
    with contextlib.ExitStack() as noticing:
        if threading.current_thread() is threading.main_thread():
            signals = (signal.SIGINT,) if several else interruption.SIGNALS
            noticing.enter_context(interruption.interruptible(signals))
        noticed = noticing.enter_context(interruption.awaited())

        def asked(step: int) -> bool:
            nonlocal passed_on
            if not several:
                return noticed()
            if noticed() and not passed_on:
                passed_on = True
                signal.raise_signal(signal.SIGTERM)
            return bool(multihost_utils.reached_preemption_sync_point(step))

        yield asked


def _numbers(meter: Meter, seconds: float) -> str:
    """What the bar shows of the steps since the last line of metrics, which took so many seconds."""
    averages, tokens = meter.averages(), meter.sums["tokens"][0]
    loss, accuracy = (averages.get(name, float("nan")) for name in ("loss", "accuracy"))  # All steps may be skipped.
    return f"loss {loss:.3f}  accuracy {accuracy:.3f}  {tokens / max(seconds, 1e-9):,.0f} tokens/s"
