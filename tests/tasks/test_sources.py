"""Where questions are read from: told by content, row by row, and named in every message."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from coconut.commands.main import EXIT_BAD_INPUT, EXIT_DONE, main
from coconut.datasets import DataConfig, load_dataset
from coconut.errors import CoconutError
from coconut.tasks import BadRecords, get_task, load_examples
from coconut.tasks.hub_datasets import HubSource
from coconut.training.run import split_fingerprint
from coconut.types import Example

RECORDS: list[dict[str, Any]] = [
    {"question": f"What is {n}+1?", "steps": [f"<<{n}+1={n + 1}>>"], "answer": f"{n + 1}"} for n in range(5)
]
EXAMPLES = [Example(question=r["question"], steps=tuple(r["steps"]), answer=r["answer"]) for r in RECORDS]
LINES = "\n".join(map(json.dumps, RECORDS))
COLUMNS = {name: [record[name] for record in RECORDS] for name in RECORDS[0]}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt", "a"])
@pytest.mark.parametrize("task", ["text", "gsm8k", "multiplication", "prontoqa"])
@pytest.mark.parametrize(
    "text",
    [LINES, json.dumps(RECORDS), json.dumps(RECORDS, indent=1), json.dumps(COLUMNS), json.dumps(COLUMNS, indent=1)],
)
def test_json_is_told_by_its_content(tmp_path: Path, name: str, task: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert get_task(task).load(tmp_path / name) == EXAMPLES


def test_one_line_is_one_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RECORDS[0]))
    assert load_examples(tmp_path / "a.json") == EXAMPLES[:1]


def write_tables(folder: Path, records: list[dict[str, Any]]) -> dict[str, Path]:
    """The records as Parquet, as both kinds of Arrow, and one without a telling name."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist(records)
    files = {name: folder / name for name in ("a.parquet", "file.arrow", "stream.arrow", "unnamed")}
    for name in ("a.parquet", "unnamed"):
        parquet.write_table(table, files[name], row_group_size=2)
    with pyarrow.ipc.new_file(str(files["file.arrow"]), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    with pyarrow.ipc.new_stream(str(files["stream.arrow"]), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return files


def test_tables_are_read_as_the_same_records_are(tmp_path: Path) -> None:
    # A column that some rows have no value in: the others of a graph's record, or an identifier.
    records = [{**record, "root": None if n else 3} for n, record in enumerate(RECORDS)]
    for path in write_tables(tmp_path, records).values():
        assert get_task("gsm8k").load(path) == EXAMPLES
        assert load_examples(path) == EXAMPLES
    data = DataConfig(task="gsm8k", train=f"{tmp_path / 'a.parquet'}[:3]", test=f"{tmp_path / 'stream.arrow'}[3:]")
    splits = load_dataset(data).splits
    assert (splits["train"], splits["test"]) == (EXAMPLES[:3], EXAMPLES[3:])
    assert split_fingerprint(splits["test"]) != split_fingerprint(splits["train"])


def test_numbers_of_32_bits_are_those_that_were_written(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    kind = pyarrow.float32()
    columns = {"sQuestion": ["a?", "b?"], "lSolutions": pyarrow.array([[0.1], [1e-7]], pyarrow.list_(kind))}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert [example.answer for example in get_task("multiarith").load(tmp_path / "a.parquet")] == ["0.1", "0.0000001"]
    columns = {"input": ["a?"], "target": pyarrow.array([16777217.5], kind)}
    parquet.write_table(pyarrow.table(columns), tmp_path / "b.parquet")
    assert [example.answer for example in get_task("gsm_hard").load(tmp_path / "b.parquet")] == ["16777218"]


def test_a_bad_row_is_named_and_may_be_left_out(tmp_path: Path) -> None:
    records = [*RECORDS[:3], {**RECORDS[3], "answer": None}, {**RECORDS[4], "question": " "}]
    for path in write_tables(tmp_path, records).values():
        with pytest.raises(CoconutError, match=r": row 3: field 'answer' is missing; there are 'question', 'steps'$"):
            get_task("gsm8k").load(path)
        bad = BadRecords(most=2)
        assert get_task("gsm8k").load(path, bad) == EXAMPLES[:3]
        assert bad.reasons[1] == f"{path}: row 4: field 'question' must be a text that is not blank, got ' '"


def test_a_damaged_table_is_one_message(tmp_path: Path) -> None:
    for path in write_tables(tmp_path, RECORDS).values():
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(CoconutError, match=f"{path}: (cannot be read: .|row .*missing)"):
            load_examples(path)
    (tmp_path / "text.parquet").write_text(LINES)
    with pytest.raises(CoconutError, match=r"text\.parquet: cannot be read: Parquet magic bytes not found"):
        load_examples(tmp_path / "text.parquet")


def write_repository(folder: Path) -> Path:
    """A data set as the hub lays it out: two splits of Parquet, and a second configuration."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (folder / "data").mkdir(parents=True)
    for split, part in (("train", RECORDS[:3]), ("test", RECORDS[3:])):
        parquet.write_table(pyarrow.Table.from_pylist(part), folder / "data" / f"{split}-00000-of-00001.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS[:1]), folder / "small.parquet")
    files = "  data_files:\n  - split: {}\n    path: {}\n"
    main_files = files.format("train", "data/train-*") + "  - split: test\n    path: data/test-*\n"
    configs = "- config_name: main\n" + main_files + "- config_name: small\n" + files.format("one", "small.parquet")
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    # The library refuses to run it; that it does not even look at it is its own promise.
    (folder / "anything.py").write_text("raise SystemExit('run')\n")
    return folder


@pytest.fixture
def cached_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's cache is the test's own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.usefixtures("cached_apart")
def test_a_data_set_is_read_by_configuration_and_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = f"hf:{write_repository(tmp_path / 'set')}"
    load = get_task("gsm8k").load
    assert load(f"{source},config=main,split=train") == EXAMPLES[:3]
    assert load(f"{source},split=test+train,config=main[1:3]") == [EXAMPLES[4], EXAMPLES[0]]
    assert load(f"{source},config=small") == EXAMPLES[:1]
    for options, complaint in {
        ",config=main": r"says of no split; there are train, test: add ,split=train",
        ",config=main,split=train+dev": "there is no split 'dev', but train, test",
        ",config=big,split=train": r"cannot be read: BuilderConfig 'big' not found. Available: \['main', 'small'\]",
        "": r"cannot be read: Config name is missing.*'main', 'small'",
    }.items():
        with pytest.raises(CoconutError, match=complaint):
            load(source + options)
    out = tmp_path / "out"
    prepare = [
        "data",
        "prepare",
        "--task",
        "gsm8k",
        "--output",
        str(out),
        "--train",
        f"{source},config=main,split=train",
    ]
    assert main([*prepare, "--test", f"{source},config=main,split=test"]) == EXIT_DONE
    assert load_examples(out / "test.json") == EXAMPLES[3:]
    assert main(["data", "show", "--count", "1", f"{source},config=small"]) == EXIT_DONE
    assert capsys.readouterr().out.endswith("[0] What is 0+1?\n  <<0+1=1>>\n  -> 1\n")


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("hf:whynlp/gsm8k-aug", HubSource(name="whynlp/gsm8k-aug")),
        (
            "hf:openai/gsm8k@e53f048,config=main,split=train+test",
            HubSource(name="openai/gsm8k", revision="e53f048", config="main", split="train+test"),
        ),
        ("hf:openai/gsm8k@refs/pr/3", HubSource(name="openai/gsm8k", revision="refs/pr/3")),
    ],
)
def test_the_parts_of_a_source(text: str, source: HubSource) -> None:
    assert HubSource.parse(text) == source


@pytest.mark.parametrize(
    "text",
    ["hf:", "hf:json", "hf:a/b/c", "hf:a/b@", "hf:a/b,", "hf:a/b,splits=x", "hf:a/b,split=", "hf:a/b,split=x,split=y"],
)
def test_a_malformed_source_says_how_one_is_written(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", text]) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert f"{text}: " in error and "hf:OWNER/NAME[@REVISION][,config=CONFIG][,split=SPLIT]" in error


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(CoconutError, match=r"a\.parquet: .* needs `pip install 'coconut-jax\[parquet\]'`"):
        load_examples(tmp_path / "a.parquet")
    with pytest.raises(CoconutError, match=r"hf:a/b: .* needs `pip install 'coconut-jax\[datasets\]'`"):
        load_examples("hf:a/b")


def test_what_is_no_file_says_how_to_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CoconutError, match=f"{tmp_path}: is a folder; one laid out as a data set is written hf:"):
        load_examples(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CoconutError, match=r"whynlp/gsm8k-aug: cannot be read: .* hub is written hf:whynlp/gsm8k-aug"):
        load_examples("whynlp/gsm8k-aug")
