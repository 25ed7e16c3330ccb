"""`coconut data`: splits that share no question, with everything that was left out counted; and reports on any task."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest

from coconut.commands.data import prepare_report, prepare_splits, show, statistics_report
from coconut.commands.main import EXIT_BAD_INPUT, EXIT_DONE, main
from coconut.datasets import DataConfig, load_dataset
from coconut.errors import CoconutError
from coconut.tasks import get_task, load_examples, save_examples
from coconut.types import Example


def problem(number: int, steps: int = 1) -> Example:
    return Example(question=f"What is {number}?", steps=("<<1+1=2>>",) * steps, answer=str(number))


def write(path: Path, *examples: Example) -> str:
    save_examples(path, examples)
    return str(path)


def test_training_gives_way_to_validation_and_both_to_test(tmp_path):
    spaced = Example(question=" What  is 3?", steps=(), answer="3")
    train = write(tmp_path / "a.json", *(problem(number) for number in (1, 2, 2, 3, 4)), problem(5, steps=0))
    validation = write(tmp_path / "b.json", problem(4), problem(6), spaced)
    test = write(tmp_path / "c.json", problem(7), problem(6))
    config = DataConfig(task="gsm8k", train=train, validation=validation, test=test)
    splits = prepare_splits(tmp_path / "new" / "data", config)
    counts = {
        split.split: (split.read, split.overlapping, split.without_steps, split.dropped, split.repeated)
        for split in splits
    }
    assert list(counts) == ["train", "validation", "test"]
    assert counts == {"train": (6, 2, 1, 0, 1), "validation": (3, 1, 1, 0, 0), "test": (2, 0, 0, 0, 0)}
    written = {split.split: load_examples(split.file) for split in splits}
    assert written["train"] == [problem(1), problem(2), problem(2), problem(5, steps=0)]
    assert written["validation"] == [problem(4), spaced]
    assert written["test"] == [problem(7), problem(6)]
    assert sorted(os.listdir(tmp_path / "new" / "data")) == ["test.json", "train.json", "validation.json"]
    assert re.search(r"\| train +\| \S+a\.json +\| 6 +\| 2 +\| 1 +\| 0 +\| 1 +\| 4 ", prepare_report(splits))
    # What was written is a data set without overlaps, as it was not before.
    files = {split.split: str(split.file) for split in splits}
    load_dataset(DataConfig(task="gsm8k", train=files["train"], validation=files["validation"], test=files["test"]))
    with pytest.raises(CoconutError, match="also in"):
        load_dataset(config)


def test_training_questions_without_steps_are_dropped_on_request(tmp_path):
    both = (problem(1), problem(2, steps=0))
    train, test = write(tmp_path / "a.json", *both), write(tmp_path / "b.json", problem(3, steps=0))
    config = DataConfig(task="gsm8k", train=train, test=test)
    splits = {split.split: split for split in prepare_splits(tmp_path, config, drop_without_steps=True)}
    assert (splits["train"].without_steps, splits["train"].dropped) == (1, 1)
    assert load_examples(tmp_path / "train.json") == [problem(1)]
    assert load_examples(tmp_path / "test.json") == [problem(3, steps=0)]
    assert not (tmp_path / "validation.json").exists()


def test_nothing_is_written_before_everything_was_read(tmp_path):
    good, bad = write(tmp_path / "a.json", problem(1)), tmp_path / "bad.txt"
    bad.write_text("What is 1?||<<1+1=2>> #### 1\nWhat?\n")
    with pytest.raises(CoconutError, match=r"bad\.txt: record 1 \(line 2\)"):
        prepare_splits(tmp_path / "out", DataConfig(task="gsm8k", train=str(bad), test=good))
    with pytest.raises(CoconutError, match="nothing is left of 1 questions, 1 of which are in another split"):
        prepare_splits(tmp_path / "out", DataConfig(task="gsm8k", train=good, test=good))
    assert not (tmp_path / "out").exists()
    with pytest.raises(CoconutError, match=r"a\.json: cannot be made"):
        prepare_splits(tmp_path / "a.json", DataConfig(task="multiplication", train=5))


@pytest.mark.parametrize(
    ("task", "options"), [("multiplication", {"digits": [1, 2]}), ("prontoqa", {"hops": 2}), ("prosqa", {})]
)
def test_generated_splits_are_those_of_a_run(tmp_path, task, options):
    config = DataConfig(task=task, train=30, validation=5, test=6, options=options, seed=3)
    prepare_splits(tmp_path, config)
    expected = load_dataset(config).splits
    for split, examples in expected.items():
        assert load_examples(tmp_path / f"{split}.json") == examples


@pytest.mark.slow
def test_prontoqa_is_split_as_coconut_does(tmp_path, shared_data, capsys):
    file = str(shared_data / "prontoqa_5hop_0shot_random.json")
    arguments = ["data", "prepare", "--task", "prontoqa", "--output", str(tmp_path)]
    assert main([*arguments, "--train", f"{file}[:9000]", "--validation", f"{file}[9000:9200]"]) == EXIT_DONE
    assert re.search(r"9,000 \| 0 .* 9,000 .*\n.* 200 +\| 0 .* 200 ", capsys.readouterr().out)
    whole = get_task("prontoqa").load(file)
    assert load_examples(tmp_path / "train.json") == whole[:9000]
    assert load_examples(tmp_path / "validation.json") == whole[9000:]


@pytest.mark.slow
def test_gsm8k_without_its_known_overlap(tmp_path, shared_data, capsys):
    train, validation = str(shared_data / "gsm8k_train.jsonl"), str(shared_data / "icot_gsm8k_valid.txt")
    arguments = ["data", "prepare", "--task", "gsm8k", "--train", train, "--validation", validation]
    assert main([*arguments, "--output", str(tmp_path), "--drop_without_steps"]) == EXIT_DONE
    assert re.search(r"7,473 \| 500 +\| 89 +\| 89 +\| 0 +\| 6,884 ", capsys.readouterr().out)
    assert len(load_examples(tmp_path / "train.json")) == 6884


def test_a_bad_source_is_one_message(tmp_path, capsys):
    arguments = ["data", "prepare", "--task", "gsm8k", "--output", str(tmp_path), "--train"]
    assert main([*arguments, "missing.jsonl"]) == EXIT_BAD_INPUT
    assert "missing.jsonl: cannot be read" in capsys.readouterr().err
    assert main([*arguments, "10"]) == EXIT_BAD_INPUT
    assert "'gsm8k' cannot be generated" in capsys.readouterr().err


def test_statistics_of_every_task(tmp_path):
    path = tmp_path / "questions.json"
    save_examples(path, get_task("prontoqa").generate(40, seed=0, hops=3))
    report = statistics_report(path)
    assert report == statistics_report(path, "prontoqa")
    assert "40 questions of" in report and "(prontoqa); 0 repeated, 0 without steps" in report
    assert re.search(r"\| steps +\| 4.00 +\| 0.00 +\| 4: 1.000", report)
    assert re.search(r"facts and rules +\| 17.00", report)
    assert re.search(r"named in more sentences +\| 100.0", report)
    save_examples(path, get_task("prosqa").generate(10, seed=0))
    assert "(prosqa)" in statistics_report(path) and "farther from its nearest person" in statistics_report(path)
    save_examples(
        path, [problem(1), problem(1, steps=3), problem(2, steps=0), Example(question="?", steps=(), answer="x")]
    )
    report = statistics_report(path)
    assert "1 repeated, 2 without steps" in report and "3 of 4 answers are numbers" in report
    assert re.search(r"\| steps +\| 1.00 +\| 1.22 +\| 0: 0.500  1: 0.250  3: 0.250 ", report)
    assert re.search(r"\| 1 +\| 50.0 +\|", report) and "shortcut" not in report


def test_files_in_a_tasks_own_format_need_its_name(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("What is 1?||<<1+1=2>> #### 1,000\n")
    with pytest.raises(CoconutError, match=r"lines\.txt.*needs --task"):
        show(path, 1)
    assert show(path, 3, "gsm8k") == "[0] What is 1?\n  <<1+1=2>>\n  -> 1000"
    assert "1 questions of" in statistics_report(path, "gsm8k")
    with pytest.raises(CoconutError, match="--count = 0"):
        show(path, 0, "gsm8k")


def test_part_of_a_file(tmp_path):
    path = write(tmp_path / "a.json", *map(problem, range(5)))
    task = get_task("gsm8k")
    assert task.load(f"{path}[:2]") == [problem(0), problem(1)]
    assert task.load(f"{path}[3:]") == [problem(3), problem(4)]
    assert task.load(f"{path}[1:2]") == [problem(1)]
    assert task.load(f"{path}[:]") == list(map(problem, range(5)))
    with pytest.raises(CoconutError, match=re.escape("a.json[5:9]: no such records") + ".*holds 5"):
        task.load(f"{path}[5:9]")
    odd = tmp_path / "odd[0:1]"  # A file of that name is that file.
    odd.write_text(json.dumps([{"question": "a", "steps": [], "answer": "b"}] * 2))
    assert len(task.load(odd)) == 2


def test_prepare_does_not_overwrite_what_it_reads(tmp_path: Path) -> None:
    prepare_splits(tmp_path, DataConfig(task="multiplication", train=20, options={"digits": [2, 2]}))
    before = (tmp_path / "train.json").read_bytes()
    for source in ("train.json", "train.json[:10]"):
        with pytest.raises(CoconutError, match="would be overwritten"):
            prepare_splits(tmp_path, DataConfig(task="multiplication", train=str(tmp_path / source)))
    assert (tmp_path / "train.json").read_bytes() == before


def test_statistics_say_what_they_leave_out(tmp_path):
    lost = get_task("prosqa").generate(3, seed=0)
    # Its target cannot be reached any more.
    graph = lost[0].graph
    assert graph is not None
    graph = dataclasses.replace(graph, edges=tuple(edge for edge in graph.edges if edge[1] != graph.target))
    lost[0] = dataclasses.replace(lost[0], graph=graph)
    report = statistics_report(Path(write(tmp_path / "a.json", *lost)), "prosqa")
    assert "1 of 3 questions are left out of these statistics; the first is record 0: the target cannot be" in report
    assert "shortest_path" in report and "shortcut rule" in report
    # Without the task's name the first record must not decide alone.
    assert "(prosqa)" in statistics_report(tmp_path / "a.json")
    alien = [*get_task("prontoqa").generate(2, seed=0), Example(question="Is a cat a dog?", steps=(), answer="False")]
    report = statistics_report(Path(write(tmp_path / "b.json", *alien)), "prontoqa")
    assert "1 of 3 questions are left out of these statistics; the first is record 2" in report
    assert "1 of 3 questions are left out of these rules" in report


def test_a_data_set_lists_the_bad_records_it_leaves_out(tmp_path, capsys):
    lines = [json.dumps({"question": f"What is {n}?", "steps": [], "answer": str(n)}) for n in range(3)]
    train = tmp_path / "a.jsonl"
    train.write_text("\n".join([lines[0], "{", lines[1], lines[2]]))
    dataset = load_dataset(DataConfig(task="gsm8k", train=str(train), test=0, skip_bad_records=1))
    assert list(dataset.left_out) == ["train"] and len(dataset.splits["train"]) == 3
    assert re.match(r"\S+a\.jsonl: line 2, column 2: not JSON", dataset.left_out["train"][0])
    with pytest.raises(CoconutError, match="line 2, column 2: not JSON"):
        load_dataset(DataConfig(task="gsm8k", train=str(train)))
    with pytest.raises(CoconutError, match=r"DataConfig\.skip_bad_records = -1"):
        DataConfig(task="gsm8k", train=1, skip_bad_records=-1)
    command = ["data", "prepare", "--task", "gsm8k", "--train", str(train), "--output", str(tmp_path / "out")]
    assert main(command) == EXIT_BAD_INPUT
    assert main([*command, "--skip_bad_records", "1"]) == EXIT_DONE
    assert "left out" in capsys.readouterr().out and len(load_examples(tmp_path / "out" / "train.json")) == 3
