"""The checkpoints of a workdir; the one module that knows Orbax.

Each is a folder named after its step: the arrays as Orbax writes them, and a manifest (`coconut.training.manifest`). On
a disk it is written under another name, flushed, and renamed; in an object store it counts from its manifest on.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, TypeVar

import jax
import optax
import orbax.checkpoint as ocp

from coconut.errors import CoconutError, NotFiniteError
from coconut.model import Parameters, part_of
from coconut.models.stacking import in_layout_of
from coconut.storage import by_first_process, exists, explained, files_below, make_folder, move, remove, sync_below
from coconut.storage_path import StoragePath, as_path, is_remote
from coconut.training.manifest import MANIFEST, DamagedError, Manifest, digests
from coconut.training.progress import Progress
from coconut.training.state import TrainState
from coconut.training.workdir import CHECKPOINTS

LOG = logging.getLogger(__name__)
Which = Literal["best", "latest"]
Note = Callable[[str, Mapping[str, Any]], None]
"""Writes down an event: its kind and what belongs to it."""
Reason = Literal["damaged", "diverged", "later"]
"""Why a checkpoint was set aside: it is not what was saved; nothing finite came of it; the user went back before it."""
Read = TypeVar("Read")

SET_ASIDE = "set_aside"
SAVING, REMOVING, REPLACED = ".saving-", ".removing-", ".replaced-"
ARRAYS = "state"
JUMP = 10.0
"""Factor by which the norm of all parameters may change between two checkpoints before it is said."""
MOST_TURNOVERS = 1000
"""Times that a reader looks again where training has removed the checkpoint it was reading."""


class Checkpoints:
    """The checkpoints of one workdir.

    A checkpoint is proven when the model was seen to give finite numbers: by a later step that was not skipped, or as
    it was saved. Kept are the latest proven ones, the best of the proven, and what is not proven yet, which displaces
    nothing. Of one stage the most accurate on the validation split is best, and of equals the latest; a later stage is
    always better than an earlier one.

    What is found to be damaged is set aside: moved into ``checkpoints/set_aside``, and the next one is used. A reader
    passes it over.

    Args:
      workdir: of the run.
      run: what identifies the run, as JSON holds it.
      keep_latest: proven checkpoints that are kept beside the best.
      read_only: change nothing: another process may be training here.
      verify: compare each file with its SHA-256 before it is used.
      note: is told what is saved, restored and set aside.
    """

    def __init__(
        self,
        workdir: StoragePath | str,
        run: Mapping[str, Any] | None = None,
        *,
        keep_latest: int = 2,
        read_only: bool = False,
        verify: bool = True,
        note: Note = lambda kind, values: None,
    ) -> None:
        folder = as_path(workdir) / CHECKPOINTS
        # Orbax wants an absolute path.
        self._folder = folder if is_remote(folder) else folder.absolute()
        self._run, self._keep_latest, self._read_only = run or {}, keep_latest, read_only
        self._verify, self._note = verify, note
        self._checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        self._passed_over: dict[int, str] = {}
        if not read_only:
            by_first_process(self._clear)

    # --- What there is --------------------------------------------------------------------------------------------

    def manifests(self) -> dict[int, Manifest]:
        """The manifest of each good checkpoint by its step; only manifests are read."""
        found: dict[int, Manifest] = {}
        for step in self.steps():
            if step in self._passed_over:
                continue
            try:
                found[step] = self.manifest(step)
            except DamagedError as error:
                self._give_up(step, error)
        return found

    def steps(self) -> list[int]:
        """The steps of all checkpoints, good or not, in order."""
        if not exists(self._folder):
            return []
        with explained(self._folder):
            names = [path.name for path in self._folder.iterdir()]
        # In an object store a checkpoint without a manifest is still being written, or was never finished.
        whole = lambda name: not is_remote(self._folder) or exists(self._folder / name / MANIFEST)
        return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name and whole(name))

    def manifest(self, step: int) -> Manifest:
        """What a checkpoint says of itself.

        Raises:
          DamagedError: it is not as it was written, or it is of another step.
        """
        manifest = Manifest.read(self._at(step))
        if manifest.progress.step != step:
            raise DamagedError(f"{self._at(step)}: its manifest is that of step {manifest.progress.step}")
        return manifest

    def set_aside(self) -> list[str]:
        """The names of what was set aside: ``STEP.REASON``."""
        folder = self._folder / SET_ASIDE
        if not exists(folder):
            return []
        with explained(folder):
            return sorted(path.name for path in folder.iterdir())

    def step(self, which: Which) -> int | None:
        """The step of the best checkpoint or of the latest; None where there is none."""
        manifests = self.manifests()
        if not manifests:
            return None
        return max(manifests) if which == "latest" else _best(manifests)

    # --- Saving ---------------------------------------------------------------------------------------------------

    def save(
        self,
        state: TrainState,
        progress: Progress,
        validation: Mapping[str, float],
        *,
        proven: bool = False,
        broken: bool = False,
    ) -> None:
        """Saves, and returns when the checkpoint is on disk, or in the object store, for good.

        Args:
          state: the arrays.
          progress: the rest.
          validation: metrics of the validation split; ``accuracy`` ranks checkpoints of one stage. May be empty.
          proven: whether the model was seen to give finite numbers.
          broken: save parameters that are not finite, too: to be looked at.

        Raises:
          NotFiniteError: a parameter is not finite.
          CoconutError: a metric is not finite, or the disk or the store refuses; earlier checkpoints
            stay as they are.
        """
        bad = {name: value for name, value in validation.items() if not math.isfinite(value)}
        if bad:
            raise CoconutError(f"validation metrics are not finite, and nothing was saved: {bad}")
        norm = float(jax.jit(optax.tree.norm)(state.parameters))
        if not math.isfinite(norm):
            if not broken:
                raise NotFiniteError(f"the parameters of step {progress.step} are not finite, and nothing was saved")
        else:
            self._look_for_jump(norm, progress.step)
        remote, target = is_remote(self._folder), self._at(progress.step)
        temporary = target if remote else self._folder / f"{SAVING}{progress.step}"
        try:
            by_first_process(lambda: _make_anew(temporary))
            self._checkpointer.save(temporary / ARRAYS, args=ocp.args.PyTreeSave(_tree(state)))
            by_first_process(lambda: sync_below(temporary))
            manifest = Manifest(
                progress=progress,
                validation=validation,
                proven=proven,
                parameter_norm=norm,
                run=self._run,
                files=digests(temporary, files_below(temporary)),
            )
            by_first_process(lambda: manifest.write(temporary))
            if not remote:
                by_first_process(lambda: self._put_in_place(progress.step, temporary))
        # tensorstore and Orbax raise what they like for a full disk: OSError, ValueError, their own.
        except Exception as error:
            with contextlib.suppress(CoconutError):
                by_first_process(lambda: remove(temporary))
            raise CoconutError(f"the checkpoint of step {progress.step} could not be saved: {error}") from error
        self._note("save", {"step": progress.step, "stage": progress.stage, "proven": proven, **validation})
        self._prune()

    def _look_for_jump(self, norm: float, step: int) -> None:
        """Says so where the parameters are of another order of magnitude than those of the checkpoint before."""
        manifests = self.manifests()
        before = max((other for other in manifests if other < step), default=None)
        if before is None:
            return
        was = manifests[before].parameter_norm
        if not was / JUMP <= norm <= was * JUMP:
            LOG.warning("step %d: the norm of all parameters is %.3g; at step %d it was %.3g", step, norm, before, was)
            self._note("parameters_jumped", {"step": step, "norm": norm, "before": before, "norm_before": was})

    def _put_in_place(self, step: int, temporary: StoragePath) -> None:
        """Gives a checkpoint its name; one of the same step, saved before it was validated, is there till then."""
        target, replaced = self._at(step), self._folder / f"{REPLACED}{step}"
        if exists(target):
            move(target, replaced)
        move(temporary, target)
        remove(replaced)

    def _prune(self) -> None:
        """Removes what need not be kept, now that something newer is there for good."""
        manifests = self.manifests()
        unproven = _unproven(manifests)
        latest = sorted(manifests.keys() - unproven)[-self._keep_latest :]
        keep = {*latest, *unproven, _best(manifests)}
        for step in sorted(manifests.keys() - keep):
            by_first_process(lambda step=step: self._remove(step))

    def _remove(self, step: int) -> None:
        """Removes a checkpoint so that no half of it is ever taken for a whole one."""
        place = self._at(step)
        if is_remote(place):
            remove(place / MANIFEST)
        elif exists(place):
            place, kept = self._folder / f"{REMOVING}{step}", place
            remove(place)
            move(kept, place)
        remove(place)

    def _clear(self) -> None:
        """Removes what a killed process left half written or half removed."""
        make_folder(self._folder)
        if not exists(self._folder):
            return  # An object store has no empty folders.
        with explained(self._folder):
            leftovers = [path for path in self._folder.iterdir() if path.name.startswith((SAVING, REMOVING, REPLACED))]
        for path in leftovers:
            step = path.name.removeprefix(REPLACED)
            if step.isdecimal() and not exists(self._folder / step):
                move(path, self._folder / step)
            else:
                remove(path)

    # --- Setting aside --------------------------------------------------------------------------------------------

    def put_aside(self, step: int, reason: Reason, why: str) -> None:
        """Moves a checkpoint to where it is kept but never used."""
        names = [f"{step}.{reason}", *(f"{step}.{reason}.{number}" for number in range(2, 1000))]
        name = next(name for name in names if not exists(self._folder / SET_ASIDE / name))
        by_first_process(lambda: move(self._at(step), self._folder / SET_ASIDE / name))
        LOG.warning("the checkpoint of step %d was set aside as %s: %s", step, self._folder / SET_ASIDE / name, why)
        self._note("set_aside", {"step": step, "reason": reason, "why": why})

    def put_aside_broken(self, last_good: int, why: str) -> None:
        """Sets aside what nothing finite came of, behind the last step whose gradient was."""
        for step, manifest in self.manifests().items():
            if step >= last_good and not manifest.proven:
                self.put_aside(step, "diverged", why)

    def put_aside_later(self, step: int) -> None:
        """Goes back to a checkpoint: those behind it are set aside.

        Raises:
          CoconutError: there is no such checkpoint.
        """
        self._check_exists(step)
        for later in [other for other in self.steps() if other > step]:
            self.put_aside(later, "later", f"the run goes on from step {step}")

    def _give_up(self, step: int, error: DamagedError) -> None:
        if self._read_only and not exists(self._at(step)):
            return  # Training has removed it in the meantime.
        if self._read_only:
            LOG.warning("the checkpoint of step %d is damaged and not used: %s", step, error)
            self._passed_over[step] = str(error)
        else:
            self.put_aside(step, "damaged", str(error))

    # --- Restoring ------------------------------------------------------------------------------------------------

    def newest_good(self, which: Which | int, read: Callable[[int], Read]) -> Read | None:
        """What ``read`` makes of the best or the latest checkpoint, or of that of a step; None where there is none.

        A damaged one is set aside, or passed over, and the next is tried. One that was asked for by its step is the
        only one tried.

        Raises:
          CoconutError: all checkpoints are damaged, or were; the one asked for is, or does not exist; or ``read``
            raises it.
        """
        if isinstance(which, int):
            self._check_exists(which)
            return read(which)
        for _ in range(MOST_TURNOVERS):
            if (step := self.step(which)) is None:
                self._check_none_damaged()
                return None
            try:
                return read(step)
            except DamagedError as error:
                self._give_up(step, error)
        raise CoconutError(f"{self._folder}: checkpoints are removed faster than they can be read")

    def _check_exists(self, step: int) -> None:
        if step not in self.steps():
            known = ", ".join(map(str, self.steps())) or "none"
            raise CoconutError(f"{self._folder} holds no checkpoint of step {step}; there are: {known}")

    def _check_none_damaged(self) -> None:
        damaged = {str(self._at(step)): why for step, why in self._passed_over.items()}
        damaged |= {
            str(self._folder / SET_ASIDE / name): "set aside" for name in self.set_aside() if ".damaged" in name
        }
        if damaged:
            lines = "\n  ".join(f"{place}: {why}" for place, why in damaged.items())
            raise CoconutError(
                f"{self._folder}: no checkpoint is left that is whole. Damaged are:\n  {lines}\nTo begin from the "
                "start, remove them."
            )

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, Progress]:
        """The arrays and the rest of one checkpoint.

        Args:
          step: a step that was saved.
          abstract: shapes and dtypes that are expected. Layers may be stacked there and one by one in the checkpoint,
            or the other way around.

        Raises:
          DamagedError: it is not what was saved.
          CoconutError: the checkpoint holds other arrays, and the message names the first; or it is another run's.
        """
        items, progress = self._restore(step, _tree(abstract))
        return TrainState(**items), progress

    def restore_parameters(
        self, step: int, abstract: Parameters, left_out: Collection[str] = ()
    ) -> tuple[Parameters, Progress]:
        """The parameters of one checkpoint without its optimizer, and the rest.

        Args:
          step: a step that was saved.
          abstract: shapes and dtypes that are expected. Layers may be stacked there and one by one in the checkpoint,
            or the other way around.
          left_out: names of parts that the checkpoint may hold besides.

        Raises:
          DamagedError: it is not what was saved.
          CoconutError: the checkpoint holds other parameters; the message names the first.
        """
        items, progress = self._restore(step, {"parameters": abstract}, left_out)
        return items["parameters"], progress

    def verify(self, step: int) -> Manifest:
        """Compares every file of a checkpoint with what was saved.

        Raises:
          DamagedError: naming the first file that is not.
        """
        manifest = self.manifest(step)
        manifest.verify(self._at(step))
        return manifest

    def arrays(self, step: int) -> dict[str, Any]:
        """Shape and dtype of each array of a checkpoint, as a tree of names.

        Raises:
          DamagedError: Orbax cannot read it.
        """
        read: Any = self._checkpointer.metadata
        return self._tried(step, lambda: read(self._at(step) / ARRAYS).item_metadata.tree)

    def _restore(
        self, step: int, expected: dict[str, Any], left_out: Collection[str] = ()
    ) -> tuple[dict[str, Any], Progress]:
        manifest = self.verify(step) if self._verify else self.manifest(step)
        there = self.arrays(step)
        wanted, expected = expected, in_layout_of(there["parameters"].keys(), expected)
        self._check(step, there, expected, left_out)
        restored: Any = self._tried(
            step,
            lambda: self._checkpointer.restore(
                self._at(step) / ARRAYS,
                args=ocp.args.PyTreeRestore(
                    item=expected,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(expected),
                    partial_restore=True,
                ),
            ),
        )
        self._note("restore", {"step": step, "verified": self._verify})
        if expected is wanted:
            return restored, manifest.progress
        # Stacked there and one by one here, or the other way around.
        places = jax.tree.map(lambda x: x.sharding, wanted)
        change = jax.jit(lambda tree: in_layout_of(wanted["parameters"], tree), out_shardings=places)
        return change(restored), manifest.progress

    def _tried(self, step: int, read: Callable[[], Read]) -> Read:
        try:
            return read()
        # Orbax and tensorstore raise what they like of a file that is not as they wrote it, or that is gone.
        except Exception as error:
            # What was just found whole is not damaged, unless it has been removed since.
            whole = self._verify and exists(self._at(step) / MANIFEST)
            kind = CoconutError if whole else DamagedError
            raise kind(f"{self._at(step)} cannot be read ({type(error).__name__}: {error})") from error

    def _check(self, step: int, there: Mapping[str, Any], expected: Any, left_out: Collection[str]) -> None:
        """Orbax would pad or cast what does not fit, and leave out what nobody asked for: compare first."""
        saved = {_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(there)[0]}
        for path, leaf in jax.tree_util.tree_flatten_with_path(expected)[0]:
            name = _path(path)
            if name not in saved:
                raise CoconutError(f"{self._at(step)}: array {name!r} is missing")
            own, here = (tuple(saved[name].shape), str(saved[name].dtype)), (tuple(leaf.shape), str(leaf.dtype))
            if own != here:
                raise CoconutError(f"{self._at(step)}: array {name!r} is {own} there, {here} here")
        for name in there["parameters"].keys() - expected["parameters"].keys():
            if part_of(name) not in left_out:
                raise CoconutError(f"{self._at(step)}: parameter {name!r} is none of this run's model")

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._checkpointer.close()

    def _at(self, step: int) -> StoragePath:
        return self._folder / str(step)


def _make_anew(folder: StoragePath) -> None:
    remove(folder)
    make_folder(folder)


def _best(manifests: Mapping[int, Manifest]) -> int:
    """The step of the best checkpoint: of the proven ones, where there are any."""
    proven = manifests.keys() - _unproven(manifests) or manifests.keys()
    return max(proven, key=lambda step: manifests[step].rank)


def _unproven(manifests: Mapping[int, Manifest]) -> set[int]:
    """The checkpoints whose parameters no step has gone on from: skipped steps leave them as they were."""
    if not manifests:
        return set()
    newest = max(manifests)
    last_good = newest - manifests[newest].progress.skipped_in_a_row
    return {step for step, manifest in manifests.items() if step >= last_good and not manifest.proven}


def _tree(state: TrainState) -> dict[str, Any]:
    items = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: item for name, item in items.items() if item is not None}


def _path(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
