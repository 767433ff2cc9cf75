import json
import os
import re
import subprocess
import sys

import pytest

from perennial.errors import PerennialError
from perennial.storage.cells import Cell, Outcome
from perennial.storage.logs import JsonLines
from perennial.storage.run_folder import RunFolder

CONFIG = {"seed": 0, "tasks": {"trained": ["a", "b"], "held_out": ["c"]}}


def create(path):
    return RunFolder.create(path, "demo", CONFIG, {"torch": "2.13.0"})


def weights(number):
    return lambda folder: (folder / "weights.bin").write_bytes(bytes([number]) * 100)


def steps(run, first, last):
    """Log and commit iterations, as a run does."""
    for number in range(first, last + 1):
        run.log("metrics", {"event": "iteration", "iteration": number})
        run.log("timings", {"event": "iteration", "iteration": number, "seconds": 0.5})
        run.commit(weights(number), {"cursor": number})


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_a_new_run_says_what_it_is(tmp_path):
    with create(tmp_path / "runs" / "r") as run:
        assert run.latest() is None
    content = json.loads((tmp_path / "runs" / "r" / "run.json").read_text())
    assert content == {
        "format": 1,
        "perennial": "0.1.0",
        "preset": "demo",
        "path": str(tmp_path / "runs" / "r"),
        "config": CONFIG,
        "environment": {"torch": "2.13.0"},
    }
    assert RunFolder.open(tmp_path / "runs" / "r").header == content


def test_a_run_finds_again_what_was_moved_with_it(tmp_path):
    study, elsewhere = tmp_path / "study", tmp_path / "elsewhere"
    for folder in (study / "base", elsewhere):
        folder.mkdir(parents=True)
    checkpoint, gone = str(study / "base"), str(study / "gone")
    config = {"policy": {"checkpoint": checkpoint}, "recipe": [{"a": str(elsewhere), "b": gone, "c": "bundled:x"}]}
    RunFolder.create(study / "runs" / "l2" / "seed0", "demo", config, {}).close()
    study.rename(tmp_path / "archive")
    found = RunFolder.open(tmp_path / "archive" / "runs" / "l2" / "seed0").header["config"]
    assert found["policy"]["checkpoint"] == str(tmp_path / "archive" / "base")
    assert found["recipe"] == [{"a": str(elsewhere), "b": gone, "c": "bundled:x"}]


def test_a_folder_with_anything_in_it_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / ".draft.new.1.partial").write_text("mine too")
    with pytest.raises(PerennialError, match=f"not empty; .*`perennial resume {tmp_path}`"):
        create(tmp_path)
    assert sorted(child.name for child in tmp_path.iterdir()) == [".draft.new.1.partial", "thesis.tex"]


def test_a_run_killed_before_it_began_can_begin_again(tmp_path):
    (tmp_path / ".lock").write_text("1\n")
    (tmp_path / ".run.json.new.99.partial").write_text('{"form')
    with create(tmp_path) as run:
        assert run.header["preset"] == "demo"


def test_what_is_no_run_folder(tmp_path):
    with pytest.raises(PerennialError, match=r"not a run folder.*no run\.json"):
        RunFolder.open(tmp_path)
    (tmp_path / "run.json").write_text('{"format"')
    with pytest.raises(PerennialError, match=r"run\.json is damaged"):
        RunFolder.open(tmp_path)
    (tmp_path / "run.json").write_text('{"format": 2, "config": {}}')
    with pytest.raises(PerennialError, match="has format 2, but this Perennial reads format 1"):
        RunFolder.open(tmp_path)


def test_the_last_two_commits_are_kept(tmp_path):
    with create(tmp_path / "r") as run:
        steps(run, 1, 5)
        latest = run.latest()
    assert sorted(child.name for child in (tmp_path / "r" / "commits").iterdir()) == ["000004", "000005"]
    assert (latest.number, latest.state["cursor"], latest.warning) == (5, 5, "")
    assert (latest.path / "weights.bin").read_bytes() == bytes([5]) * 100


def test_resuming_forgets_what_was_logged_after_the_commit(tmp_path):
    with create(tmp_path / "r") as run:
        steps(run, 1, 3)
        expected = {name: (tmp_path / "r" / f"{name}.jsonl").read_bytes() for name in ("metrics", "timings")}
        run.log("metrics", {"event": "iteration", "iteration": 4})
        run.write_cell(Cell(1, "greedy", "id", "a"), [True], [7])
        for task in ("a", "b"):
            place = {"row": 1, "decoder": "greedy", "variant": "id", "task": task}
            run.log("timings", {"event": "evaluation", **place, "seconds": 2.0})
        run.log("timings", {"event": "iteration", "iteration": 4})
    with (tmp_path / "r" / "metrics.jsonl").open("a") as file:
        file.write('{"event": "iter')
    assert [row["iteration"] for row in RunFolder.open(tmp_path / "r").rows("metrics")] == [1, 2, 3, 4]
    with RunFolder.open_locked(tmp_path / "r") as run:
        assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == expected["metrics"]
        # The cell of a exists and is not played again, so its time stays; that of b was not written.
        kept = json.dumps({"event": "evaluation", **place, "task": "a", "seconds": 2.0}).encode() + b"\n"
        assert (tmp_path / "r" / "timings.jsonl").read_bytes() == expected["timings"] + kept
        steps(run, 4, 4)
        assert [row["iteration"] for row in run.rows("metrics")] == [1, 2, 3, 4]
        assert run.latest().number == 4


def test_resuming_before_the_first_commit_starts_with_empty_logs(tmp_path):
    with create(tmp_path / "r") as run:
        run.log("metrics", {"iteration": 1})
    with RunFolder.open_locked(tmp_path / "r") as run:
        assert run.latest() is None
        assert run.rows("metrics") == []


def test_a_log_shorter_than_the_commit_says_is_an_error(tmp_path):
    with create(tmp_path / "r") as run:
        steps(run, 1, 2)
    (tmp_path / "r" / "metrics.jsonl").write_text("")
    with pytest.raises(PerennialError, match=r"metrics\.jsonl has 0 bytes, but had \d+"):
        RunFolder.open_locked(tmp_path / "r")


def test_a_number_that_is_none_is_no_metric(tmp_path):
    with create(tmp_path / "r") as run:
        with pytest.raises(PerennialError, match=r"metrics\.jsonl is NaN or infinite: \{'loss': nan\}"):
            run.log("metrics", {"loss": float("nan")})
        assert run.rows("metrics") == []


def test_a_damaged_newest_commit_falls_back_to_the_older_one_and_says_so(tmp_path):
    with create(tmp_path / "r") as run:
        steps(run, 1, 3)
    flip(tmp_path / "r" / "commits" / "000003" / "weights.bin")
    with RunFolder.open_locked(tmp_path / "r") as run:
        latest = run.latest()
        assert latest.number == 2
        assert re.search(r"000003/weights\.bin is damaged.*Going on from the older commit 000002\.", latest.warning)
        assert [row["iteration"] for row in run.rows("metrics")] == [1, 2]
        steps(run, 3, 3)
        assert (run.latest().number, run.latest().warning) == (3, "")
        assert run.latest().state["cursor"] == 3


def test_when_every_commit_is_damaged_the_newest_file_is_named(tmp_path):
    with create(tmp_path / "r") as run:
        steps(run, 1, 2)
    flip(tmp_path / "r" / "commits" / "000001" / "weights.bin")
    flip(tmp_path / "r" / "commits" / "000002" / "state.json")
    with pytest.raises(PerennialError, match=r"000002/state\.json is damaged.*no older commit"):
        RunFolder.open_locked(tmp_path / "r")
    (tmp_path / "r" / "run.json").stat()  # nothing was deleted
    assert (tmp_path / "r" / "commits" / "000001").is_dir()


def test_a_run_whose_configuration_was_changed_does_not_go_on(tmp_path):
    with create(tmp_path / "r") as run:
        steps(run, 1, 1)
    path = tmp_path / "r" / "run.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(PerennialError, match=r"run\.json was changed after the run began"):
        RunFolder.open_locked(tmp_path / "r")


CHILD = """
import sys
from pathlib import Path
from perennial.storage.run_folder import RunFolder
run = RunFolder.open_locked(Path(sys.argv[1]))
if sys.argv[2] == "hold":
    print("locked", flush=True)
    sys.stdin.read()
run.log("metrics", {"iteration": 3})
run.commit(lambda folder: (folder / "weights.bin").write_bytes(bytes([3]) * 100), {"cursor": 3})
"""


@pytest.mark.parametrize("where", ["save", "rename"])
def test_a_run_killed_in_the_middle_of_a_commit_goes_on_from_the_former_one(tmp_path, where):
    with create(tmp_path / "r") as run:
        steps(run, 1, 2)
    environment = {**os.environ, "PERENNIAL_KILL_AT": where}
    child = subprocess.run([sys.executable, "-c", CHILD, tmp_path / "r", "go"], env=environment, check=False)
    assert child.returncode == -9
    assert len(list((tmp_path / "r" / "commits").glob(".000003.*.partial"))) == 1
    assert len(RunFolder.open(tmp_path / "r").rows("metrics")) == 3
    with RunFolder.open_locked(tmp_path / "r") as run:
        assert sorted(child.name for child in (tmp_path / "r" / "commits").iterdir()) == ["000001", "000002"]
        latest = run.latest()
        assert (latest.number, latest.state["cursor"], latest.warning) == (2, 2, "")
        assert (latest.path / "weights.bin").read_bytes() == bytes([2]) * 100
        assert [row["iteration"] for row in run.rows("metrics")] == [1, 2]


def test_only_one_process_writes_and_a_dead_one_does_not_block(tmp_path):
    create(tmp_path / "r").close()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, tmp_path / "r", "hold"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout.readline() == b"locked\n"
        with pytest.raises(PerennialError, match=f"Process {child.pid} is writing to {tmp_path / 'r'}"):
            RunFolder.open_locked(tmp_path / "r")
        assert RunFolder.open(tmp_path / "r").header["preset"] == "demo"
    finally:
        child.kill()
        child.communicate()
    with RunFolder.open_locked(tmp_path / "r") as run:
        steps(run, 1, 1)


def test_the_lock_is_given_back_when_opening_fails(tmp_path):
    with create(tmp_path / "r") as run:
        steps(run, 1, 1)
    manifest = tmp_path / "r" / "commits" / "000001" / "manifest.json"
    content = manifest.read_bytes()
    manifest.unlink()
    with pytest.raises(PerennialError, match=r"manifest\.json is missing") as caught:
        RunFolder.open_locked(tmp_path / "r")
    assert caught.tb, "the traceback keeps the folder that failed to open alive"
    manifest.write_bytes(content)
    with RunFolder.open_locked(tmp_path / "r") as run:
        assert run.latest().number == 1


@pytest.mark.parametrize("line", [b"[1]", b"3", b"{", b"\xff"])
def test_a_line_of_a_log_that_is_no_object_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"event": "iteration"}\n' + line + b"\n")
    with pytest.raises(PerennialError, match=r"metrics\.jsonl is damaged: a line is no JSON object"):
        JsonLines(path).rows()


def test_cells_come_back_and_damaged_or_misplaced_ones_do_not_exist(tmp_path):
    with create(tmp_path / "r") as run:
        first, second = Cell(0, "sampled", "id", "a"), Cell(2, "greedy", "ood_val", "b")
        run.write_cell(first, [True, False], [7, 150])
        run.write_cell(second, [0, 1], [150, 3])
        assert run.cells() == {first: Outcome((1, 0), (7, 150)), second: Outcome((0, 1), (150, 3))}
        path = tmp_path / "r" / "evaluations" / "00" / "sampled" / "id" / "a.json"
        content = json.loads(path.read_text())
        assert content.pop("sha256")
        assert content == {
            "row": 0,
            "decoder": "sampled",
            "variant": "id",
            "task": "a",
            "successes": [1, 0],
            "env_steps": [7, 150],
        }
        misplaced = tmp_path / "r" / "evaluations" / "01" / "sampled" / "id" / "a.json"
        misplaced.parent.mkdir(parents=True)
        misplaced.write_bytes(path.read_bytes())
        assert not run.has_cell(Cell(1, "sampled", "id", "a"))
        path.write_text(path.read_text().replace("150", "151"))
        assert run.cell(first) is None
        assert run.cells() == {second: Outcome((0, 1), (150, 3))}
        run.write_cell(first, [True, True], [1, 1])
        assert run.has_cell(first)


def test_the_adapter_after_a_task(tmp_path):
    with create(tmp_path / "r") as run:
        folder = run.save_task(1, "a", weights(1))
        assert folder == run.task(1, "a") == tmp_path / "r" / "tasks" / "01-a"
        run.save_task(1, "a", weights(2))  # a run killed before its commit does this again
        assert (run.task(1, "a") / "weights.bin").read_bytes() == bytes([2]) * 100
        flip(folder / "weights.bin")
        with pytest.raises(PerennialError, match=r"01-a/weights\.bin is damaged"):
            run.task(1, "a")


def test_free_paths_are_counted(tmp_path):
    assert RunFolder.free_path("demo-seed0", tmp_path) == tmp_path / "demo-seed0"
    (tmp_path / "demo-seed0").mkdir()
    assert RunFolder.free_path("demo-seed0", tmp_path) == tmp_path / "demo-seed0-2"
    (tmp_path / "demo-seed0-2").mkdir()
    assert RunFolder.free_path("demo-seed0", tmp_path) == tmp_path / "demo-seed0-3"
