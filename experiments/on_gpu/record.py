"""The file of a part: what it has measured, written after each measurement, and what became of the part."""

import contextlib
import importlib.metadata
import json
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coconut.errors import CoconutError
from coconut.storage import write_atomically

UNFINISHED, DONE, STOPPED, FAILED = "unfinished", "done", "stopped at its limit", "failed"
"""What a part can be: its process was ended from outside; all is measured; it ran too long; something did not work."""

PACKAGES = ("torch", "transformers", "triton", "jax-cuda13-plugin", "jax-cuda12-plugin")
"""Further packages on which the numbers of a GPU depend."""

Measurement = Callable[["Progress"], Mapping[str, Any]]
"""Measures something; what it has on the way it may give to the `Progress`."""
Progress = Callable[[Mapping[str, Any]], None]


class Record:
    """The JSON file of a part.

    Attributes:
      path: where it is.
      content: ``part``, ``smoke``, ``state``; ``runs``, one entry for each time that the part was begun, with machine,
        versions, commit and command; ``measurements`` by name, with the ``run`` that made them; ``failed``, those that
        did not work and why.
    """

    def __init__(self, output: Path, part: str, *, smoke: bool) -> None:
        """Reads the file if it is there.

        Raises:
          CoconutError: it holds numbers of tiny sizes where real ones are asked for, or the reverse.
        """
        self.path = output / f"{part}.json"
        self.content: dict[str, Any] = {"part": part, "smoke": smoke, "state": UNFINISHED}
        self.content |= {"runs": [], "measurements": {}, "failed": {}}
        if self.path.exists():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))
            if self.content["smoke"] != smoke:
                raise CoconutError(f"{self.path}: smoke = {self.content['smoke']}; give --output another folder")

    @property
    def state(self) -> str:
        """What became of the part."""
        return self.content["state"]

    def end(self, state: str) -> None:
        """Says what became of the part."""
        self.content["state"] = state
        self.write()

    def write(self) -> None:
        """Writes the file, completely or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.content, indent=1) + "\n")

    def measure(self, measurements: Mapping[str, Measurement], provenance: Mapping[str, Any]) -> None:
        """Makes those that are missing, in order, and writes each as soon as it is there.

        One that raises is noted, and the others follow; the next time it is tried again.
        """
        runs: list[dict[str, Any]] = self.content["runs"]
        runs.append({"started": time.strftime("%Y-%m-%d %H:%M:%S %z"), **provenance})
        self.content |= {"state": UNFINISHED, "failed": {}}
        self.write()
        for name, measurement in measurements.items():
            if name in self.content["measurements"]:
                continue
            print(f"--- {self.content['part']}: {name}", flush=True)
            start = time.perf_counter()
            try:
                result = dict(measurement(self._progress(name)))
            # Whatever a library raises on a device it does not know: the other measurements are worth having.
            except Exception as error:
                traceback.print_exc()
                self.content["failed"][name] = f"{type(error).__name__}: {error}"[:2_000]
            else:
                seconds = time.perf_counter() - start
                self.content["measurements"][name] = {"run": len(runs) - 1, "seconds_in_all": seconds, **result}
                self.content.get("on the way", {}).pop(name, None)
            self.write()
        self.end(FAILED if self.content["failed"] else DONE)

    def _progress(self, name: str) -> Progress:
        def note(result: Mapping[str, Any]) -> None:
            run = len(self.content["runs"]) - 1
            self.content.setdefault("on the way", {})[name] = {"run": run, **result}
            self.write()

        return note


def machine() -> dict[str, Any]:
    """What else than `coconut.provenance.provenance` says identifies a GPU and what drives it."""
    found: dict[str, Any] = {"packages": {}}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["packages"][name] = importlib.metadata.version(name)
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20)
        found["nvidia_smi"] = answer.stdout.strip()
    return found
