"""README and the pages: tables, names, commands and snippets are true, and the site is built without a warning."""

import ast
import contextlib
import dataclasses
import functools
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from sphinx.util.inventory import InventoryFile

from coconut import extensions
from coconut.commands.configuration import CONFIGS, resolve_run
from coconut.commands.flags import check_together, parse_arguments
from coconut.commands.main import EXIT_DONE, main
from coconut.commands.quickstart import QuickstartConfig, quickstart
from coconut.latent.feedback import FEEDBACKS
from coconut.methods import METHODS
from coconut.models.huggingface.configuration import read_config
from coconut.tasks import TASKS
from coconut.training.rewards import REWARDS
from tests.tiny_huggingface import write_model
from tests.tiny_models import process_environment, quick_compilation

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def script(name: str) -> ModuleType:
    """One of the scripts in docs, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = script("make_tables").pages()
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


class Block(NamedTuple):
    """A block of code.

    Attributes:
      language: bash or python.
      text: the code.
      why_not: why nobody runs it here; empty where it is run.
    """

    language: str
    text: str
    why_not: str

    @property
    def file(self) -> str | None:
        """The file it is, by its first line."""
        found = re.match(r"# (\w+\.(?:py|gin))\n", self.text)
        return found and found[1]

    @property
    def commands(self) -> list[list[str]]:
        """The words of each ``coconut`` command; a variable of a loop is 0."""
        lines = re.sub(r"\$\w+", "0", self.text.replace("\\\n", " ")).splitlines()
        found = [re.search(r"(?:^\s*|&& )(coconut .*?)(?: &)?$", line) for line in lines]
        return [shlex.split(match[1])[1:] for match in found if match]


def blocks(page: Path) -> list[Block]:
    """The blocks of code of a page, in order."""
    found = re.finditer(r"(?:<!-- not run: (.+?) -->\n)?```(\w+)\n(.*?)```", page.read_text(), re.DOTALL)
    return [Block(match[2], match[3], match[1] or "") for match in found]


def own_files(page: Path) -> dict[str, str]:
    return {block.file: block.text for block in blocks(page) if block.file}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_tables_are_those_of_the_recorded_results(page: Path) -> None:
    text = page.read_text()
    assert script("make_tables").with_tables(text) == text, "run: python docs/make_tables.py"


def test_the_readme_has_its_tables() -> None:
    assert re.findall(r"<!-- table: (\w+) -->", (ROOT / "README.md").read_text()) == ["speed", "results"]


def test_pictures_are_those_that_are_drawn() -> None:
    drawn = script("draw_figures")
    assert {path.stem for path in drawn.FOLDER.glob("*.svg")} == drawn.FIGURES.keys()
    for name, figure in drawn.FIGURES.items():
        assert (drawn.FOLDER / f"{name}.svg").read_text() == str(figure()), "run: python docs/draw_figures.py"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_names_and_files_exist(page: Path) -> None:
    text = page.read_text()
    own = set(re.findall(r"class (\w+Options)", text))
    configs = {config.__name__: config for config in (*CONFIGS, *(method.options for method in METHODS.values()))}
    for name, field in re.findall(r"\b([A-Z]\w*(?:Config|Options))\.(\w+)", text):
        if name not in own:
            assert field in {own.name for own in dataclasses.fields(configs[name])}, f"{name}.{field}"
    paths = re.findall(r"\b(?:gin_configs|experiments|tests|docs|colab|coconut|pallas_kernels)/[\w./-]+\w", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    for path in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        made = "reference/" in path or "build/" in path
        assert made or (page.parent / path).exists(), path
    for module in re.findall(r"`((?:coconut|pallas_kernels)\.[\w.]+)`", text):
        parts = module.split(".")
        found = next(i for i in range(len(parts), 0, -1) if is_module(parts[:i]))
        target: Any = importlib.import_module(".".join(parts[:found]))
        for part in parts[found:]:
            target = getattr(target, part)


def is_module(parts: Sequence[str]) -> bool:
    path = ROOT.joinpath(*parts)
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def test_extras_exist() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        extra
        for page in PAGES
        for text in re.findall(r"pip install -e \"\.\[([\w,]+)\]", page.read_text())
        for extra in text.split(",")
    }
    assert {"docs", "test", "tpu"} <= named <= known.keys()


def test_the_official_options_are_all_there() -> None:
    """Those of its README and of its YAML files."""
    page = (DOCS / "from_pytorch.md").read_text()
    rows = [row.split("|")[1:3] for row in page.splitlines() if row.startswith("| `")]
    named = {name for theirs, _ in rows for name in re.findall(r"`(\w+)`", theirs)}
    assert named >= {
        *("project", "save_path", "name", "only_eval", "coconut", "cot", "no_thoughts", "no_cot", "c_thought"),
        *("epochs_per_stage", "max_latent_stage", "pad_latent_to_max", "save_only_improve", "uniform_prob", "model_id"),
        *("load_model_path", "seed", "resume", "bf16", "train_path", "val_path", "reset_optimizer", "debug"),
        *("batch_size_training", "gradient_accumulation_steps", "num_epochs", "lr", "weight_decay"),
    }
    assert all("`" in ours for _, ours in rows)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_parse_and_runs_resolve(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in own_files(page).items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        assert block.language in ("bash", "python", "yaml"), block.language
        for command in block.commands:
            options = parse_arguments(command)
            check_together(options)
            on_the_hub = "the hub says its architecture" in block.why_not
            if options.command in ("train", "plan") and not (options.imports or on_the_hub):
                resolve_run(options.gin_file, options.gin_binding)


# --- What is run -------------------------------------------------------------------------------------------------

SMALL = {
    "DataConfig.train": 24,
    "DataConfig.validation": 4,
    "DataConfig.test": 6,
    "DecoderConfig.num_layers": 1,
    "DecoderConfig.embed_dim": 16,
    "CurriculumConfig.steps_per_stage": 2,
    "CurriculumConfig.advance_window": 1,
    "PipelineConfig.batch_size": 4,
    "RunConfig.evaluate_every": None,
    "RunConfig.evaluation_batch_size": 8,
    "RunConfig.log_every": 1,
    "RunConfig.save_every": None,
    "SamplingConfig.max_new_tokens": 4,
}
ONE_STAGE = {"CurriculumConfig.max_latent_stage": 1, "CurriculumConfig.last_stage": 1}
REGISTERS: Sequence[dict[str, Any]] = (TASKS, METHODS, FEEDBACKS, REWARDS)


def in_small(command: Sequence[str]) -> list[str]:
    """The command at a size that learns nothing, with two seeds. What else it says itself stands behind, and wins."""
    if command[0] == "inspect":
        return ["inspect", "--interventions", "noise", "--beyond", "0", *command[1:]]
    if command[0] != "train":
        return list(command)
    command = ["0..1" if word == "0..2" else word for word in command]
    drawing = any(name in word for word in command for name in ("reinforcement.gin", "scorer.gin"))
    sizes = {"CurriculumConfig.epochs_per_stage": None, "CurriculumConfig.total_epochs": None, **SMALL}
    sizes |= {} if drawing else ONE_STAGE
    bindings = [f"--gin_binding={name}={value}" for name, value in sizes.items()]
    if drawing:
        bindings += ["--gin_binding=PipelineConfig.batch_size=2"]
    return [command[0], *bindings, *command[1:]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as it is behind ``coconut quickstart``, in which all pages work one after the other."""
    folder = tmp_path_factory.mktemp("documentation")
    bindings = tuple(f"{name} = {value!r}" for name, value in (SMALL | ONE_STAGE).items())
    with quick_compilation():
        quickstart(folder / "quickstart", config=QuickstartConfig(methods=("coconut", "cot"), bindings=bindings))
    return folder


@contextlib.contextmanager
def nothing_stays() -> Iterator[None]:
    """What a page registers is gone behind it, so that other tests see what the package has."""
    before = [dict(register) for register in REGISTERS]
    path, modules = list(sys.path), set(sys.modules)
    try:
        yield
    finally:
        for register, content in zip(REGISTERS, before, strict=True):
            register.clear()
            register.update(content)
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if "." not in name:
                del sys.modules[name]
        extensions._IMPORTED.clear()


@functools.cache
def run_command(folder: Path, words: tuple[str, ...]) -> int:
    """A command is run once, on whatever page it stands."""
    return main(in_small(words))


def run_python(text: str, names: dict[str, Any]) -> None:
    if "openai-community/gpt2" in text:
        pytest.importorskip("torch")
        # No network: a small random GPT-2 stands for the published one.
        text = text.replace("openai-community/gpt2", str(write_model(Path("gpt2"), "gpt2")))
    exec(compile(text, "a page", "exec"), names)


RUN = [
    page for page in PAGES if any(not block.why_not for block in blocks(page) if block.language in ("bash", "python"))
]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_what_a_page_shows_works(
    page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    with nothing_stays(), quick_compilation():
        for block in blocks(page):
            if block.file:
                Path(block.file).write_text(block.text)
            if block.why_not:
                continue
            if block.language == "python" and not (block.file or "").endswith(".gin") and "register" not in block.text:
                run_python(block.text, names)
            for command in block.commands:
                # The fixture is a quickstart; what a dry run resolves is tested above, and it compiles for seconds.
                if command[0] != "quickstart" and "--dry_run" not in command:
                    assert run_command(folder, tuple(command)) == EXIT_DONE, (command, capsys.readouterr().err)


def test_a_copy_of_a_checkpoint_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    [example] = [
        block.text
        for block in blocks(DOCS / "how_to/hugging_face.md")
        if "gpt2" in block.text and block.language == "python"
    ]
    run_python(example, {})
    assert read_config(tmp_path / "copy_of_gpt2") == read_config(tmp_path / "gpt2")


def test_the_readmes_own_example_is_short() -> None:
    [example] = [block.text for block in blocks(ROOT / "README.md") if block.language == "python"]
    assert len(example.splitlines()) < 30


def public_names() -> Iterator[str]:
    """The functions and classes of all modules that say what they are."""
    for package in ("coconut", "pallas_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            tree = ast.parse(path.read_text())
            if ast.get_docstring(tree) and not any(part.startswith("_") for part in parts):
                defined = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
                yield from (".".join([*parts, node.name]) for node in defined if not node.name.startswith("_"))


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_has_every_public_name(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "trees"), str(DOCS)]
    environment = process_environment(devices=1)
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").exists()
    with (tmp_path / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, page: page)  # pyright: ignore[reportArgumentType]
    documented = {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}
    assert sorted(set(public_names()) - documented) == []
