"""What can be known of the launch templates without a cluster: their form, their exit codes and their commands."""

import json
import math
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from coconut.commands.flags import check_together, parse_arguments
from coconut.commands.flags_of_runs import cells_of
from coconut.commands.main import EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_INTERRUPTED

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "experiments" / "launch"


def parses(arguments: Sequence[str]) -> Any:
    options = parse_arguments(arguments)
    for file in getattr(options, "gin_file", []):
        assert (ROOT / file).exists()
    return options


@pytest.fixture(autouse=True)
def reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether gs:// can be reached from here is another question."""
    monkeypatch.setattr("coconut.storage_path.importlib.util.find_spec", lambda name: name)


@pytest.fixture
def jobset() -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def test_the_jobset_asks_for_one_whole_slice(jobset: dict[str, Any]) -> None:
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert "kueue.x-k8s.io/queue-name" in jobset["metadata"]["labels"]
    [job] = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert spec["completions"] == spec["parallelism"] == chips // resources["limits"]["google.com/tpu"]
    options = parses(container["args"])
    assert options.distributed
    assert options.mesh.fsdp == chips


def test_the_jobset_restarts_by_our_exit_codes(jobset: dict[str, Any]) -> None:
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    # A pod failure policy needs this, and a job that retries a pod of its own would leave the others waiting.
    assert (spec["template"]["spec"]["restartPolicy"], spec["backoffLimit"]) == ("Never", 0)
    rules = spec["podFailurePolicy"]["rules"]
    assert {rule["action"] for rule in rules} == {"FailJob"}
    exits = [rule["onExitCodes"] for rule in rules if "onExitCodes" in rule]
    names = {container["name"] for container in spec["template"]["spec"]["containers"]}
    assert {rule["containerName"] for rule in exits} == names

    def action(code: int) -> str | None:
        """What becomes of the whole, by the message Kubernetes gives; None for a restart that counts."""
        if not any(code in rule["values"] for rule in exits):
            return None
        message = f"Container train for pod default/x failed with exit code {code} matching FailJob rule at index 1"
        for rule in jobset["spec"]["failurePolicy"]["rules"]:
            if any(re.search(pattern, message) for pattern in rule["onJobFailureMessagePatterns"]):
                return rule["action"]
        return None

    assert action(EXIT_INTERRUPTED) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action(EXIT_BAD_INPUT) == action(EXIT_DIVERGED) == "FailJobSet"
    assert action(1) is action(134) is None


def test_each_pod_of_the_job_array_trains_a_cell_of_its_own() -> None:
    job = yaml.safe_load((LAUNCH / "sweep.yaml").read_text())
    spec, [container] = job["spec"], job["spec"]["template"]["spec"]["containers"]
    assert (job["apiVersion"], job["kind"], spec["completionMode"]) == ("batch/v1", "Job", "Indexed")
    assert spec["template"]["spec"]["restartPolicy"] == "Never" and "backoffLimit" not in spec
    folders = []
    for index in range(spec["completions"]):
        options = parses([word.replace("$(JOB_COMPLETION_INDEX)", str(index)) for word in container["args"]])
        check_together(options)
        folders.append(cells_of(options)[options.cell].folder)
    assert len(set(folders)) == spec["completions"] == len(cells_of(options))
    actions = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert actions == {EXIT_INTERRUPTED: "Ignore", EXIT_BAD_INPUT: "FailIndex", EXIT_DIVERGED: "FailIndex"}


def test_the_script_gives_every_host_the_command(tmp_path: Path) -> None:
    gcloud = tmp_path / "gcloud"
    gcloud.write_text("#!/usr/bin/env python3\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\nsys.exit(3)\n")
    gcloud.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/local/bin:/usr/bin:/bin", "REPOSITORY": "https://x/y", "REVISION": "abc"}
    command = ["train", "--workdir", "gs://b/a run", "--gin_file", "gin_configs/base.gin", "--gin.RunConfig.data='x'"]
    script = ["bash", str(LAUNCH / "tpu_vm.sh")]
    process = subprocess.run([*script, "pod", "zone", *command], env=environment, capture_output=True, text=True)
    assert process.returncode == 3, process.stderr
    *flags, remote = json.loads(process.stdout)
    assert flags == ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=zone", "--worker=all"]
    assert subprocess.run(["bash", "-n"], input=remote.removeprefix("--command="), text=True).returncode == 0
    assert shlex.split(remote.rpartition(".venv/bin/coconut ")[2]) == command
    assert shlex.split(remote.splitlines()[0])[-2:] == ["https://x/y", "abc"]
    for missing, arguments in (("REVISION", ["pod", "zone", "train"]), ("REPOSITORY", ["pod"])):
        rest = {name: value for name, value in environment.items() if name != missing}
        process = subprocess.run([*script, *arguments], env=rest, capture_output=True, text=True)
        assert process.returncode
        assert missing in process.stderr or "usage" in process.stderr


def test_the_image_copies_what_exists() -> None:
    lines = [line.split() for line in (LAUNCH / "Dockerfile").read_text().splitlines() if line.startswith("COPY")]
    sources = [source for line in lines for source in line[1:-1]]
    assert all((ROOT / source).exists() for source in sources)
    assert {"coconut", "pallas_kernels", "gin_configs", "pyproject.toml"} <= set(sources)


def test_the_readme_gives_commands_that_parse() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", (LAUNCH / "README.md").read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [line.split("tpu_vm.sh")[1].split()[2:] for line in lines if "tpu_vm.sh" in line]
    commands += [shlex.split(line)[1:] for line in lines if line.startswith("coconut ")]
    assert sorted(parses(command).command for command in commands) == ["plan", *["train"] * 3]
