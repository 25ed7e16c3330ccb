"""Which flags of ``coconut evaluate`` go together."""

import argparse

from coconut.errors import CoconutError


def check_evaluate(options: argparse.Namespace) -> None:
    """Looks whether the flags of ``coconut evaluate`` go together.

    Raises:
      CoconutError: one is missing, or means nothing beside the others; the message names it.
    """
    if (options.workdir is None) == (options.pretrained is None):
        raise CoconutError("give --workdir, of a run, or --pretrained, a model that was never trained here")
    soft = options.method in ("soft_thinking", "swi_reasoning")
    if options.pretrained is None:
        if options.data is not None and options.split is not None:
            raise CoconutError(f"--data {options.data}: --split {options.split} names questions, too; give one of them")
        if options.task is not None and options.data is None and options.split is None:
            raise CoconutError(
                f"--task {options.task}: the run's own questions are of its own task; --data names others"
            )
        of_pretrained = ("prompt", "max_new_tokens")
        if given := [flag for flag in of_pretrained if getattr(options, flag) is not None]:
            raise CoconutError(f"--{given[0]}: a run has its own, this belongs to --pretrained")
        if options.method is not None and not soft:
            raise CoconutError(
                f"--method {options.method}: a run has its own method; --method soft_thinking changes it"
            )
    else:
        if missing := [flag for flag in ("task", "data") if getattr(options, flag) is None]:
            raise CoconutError(f"--{missing[0]} is missing: --pretrained needs it")
        meaningless = {
            "--thoughts": options.thoughts,
            "--halting": options.halting or options.halting_thresholds,
            "--step": options.step is not None,
            f"--which {options.which}": options.which != "best",
            "--skip_verification": options.skip_verification,
            "--split": options.split is not None,
            "--scorer": options.scorer is not None,
            "--allow_overlap": options.allow_overlap,
        }
        if given := [flag for flag, value in meaningless.items() if value]:
            raise CoconutError(
                f"{given[0]}: belongs to --workdir, a model that was never trained here has no such thing"
            )
    if options.thinking and not soft:
        raise CoconutError("--thinking: these are settings of --method soft_thinking and swi_reasoning")
    if soft and (options.halting or options.halting_thresholds):
        raise CoconutError(f"--halting: --method {options.method} says itself when thinking is over, see --thinking")
    if options.samples is None:
        about = ("policy", "budgets", "pass_at", "scorer", "beams", "candidates")
        if given := [flag for flag in about if getattr(options, flag) not in (None, [], ())]:
            raise CoconutError(f"--{given[0]}: says how samples are drawn or measured, it needs --samples")
    elif soft or options.halting or options.halting_thresholds:
        flag = f"--method {options.method}" if soft else "--halting"
        raise CoconutError(
            f"--samples {options.samples}: not with {flag}; a stop of samples is --policy learnt_stop=True"
        )
    if options.plot is not None and not (options.halting_thresholds or options.samples is not None):
        raise CoconutError("--plot draws a curve: it needs --halting_thresholds or --samples")
