"""The whole way of a study: preparation, runs at once, results, interruption, report."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from perennial import config as configuration
from perennial.cli import main
from perennial.errors import PerennialError
from perennial.evaluation.success_matrix import SuccessMatrix
from perennial.storage.run_folder import RunFolder
from perennial.studies import _execution, _results
from perennial.studies.base import Entry, Preparation
from toyhouse.study import STUDY

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """The seed-0 half of the toy study, run in one go."""
    folder = tmp_path_factory.mktemp("study") / "toy"
    command(folder).wait(timeout=240)
    return folder


def command(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    line = [sys.executable, "-m", "perennial", "study", "toyhouse.study", "-o", str(folder)]
    chosen = arguments or ("--methods", "sequential", "l2", "--seeds", "0")
    return subprocess.Popen(
        [*line, *chosen], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_every_run_leaves_one_result_with_what_its_folder_says(done):
    for row in ("sequential", "sequential-reversed", "l2"):
        result = _results.load(done / "results" / row / "seed0.json")
        run = RunFolder.open(done / "runs" / row / "seed0")
        assert (result.row, result.seed) == (row, 0)
        assert set(result.matrices) == {("id", "sampled"), ("id", "greedy")}
        for (variant, decoder), matrix in result.matrices.items():
            assert matrix.to_json() == SuccessMatrix.from_run(run, decoder, variant).to_json()
        assert [len(phase) for phase in result.training] == [2, 2]
        steps = sum(line["env_steps"] for line in run.rows("metrics"))
        assert result.cost["train_env_steps"] == steps
        kept = sum(f.stat().st_size for f in max((run.path / "tasks").iterdir()).rglob("*.safetensors"))
        assert result.cost["kept_bytes"] == kept
        assert result.cost["peak_bytes"] > 100e6
    own, anchored = (_results.load(done / "results" / row / "seed0.json") for row in ("sequential", "l2"))
    assert anchored.cost["kept_bytes"] > own.cost["kept_bytes"]  # the anchor


def test_results_do_not_say_where_they_were_made(done):
    text = (done / "results" / "l2" / "seed0.json").read_text()
    assert str(done) not in text
    assert json.loads(text)["config"]["policy"]["checkpoint"] == "{folder}/base"


def test_preparations_that_no_chosen_method_needs_are_not_made(done):
    assert (done / "demos").is_dir()
    assert not (done / "never").exists()


def test_an_interrupted_study_goes_on_and_ends_with_the_same_numbers(done, tmp_path):
    folder = tmp_path / "toy"
    (folder / "runs").mkdir(parents=True)
    (folder / "study.json").write_bytes((done / "study.json").read_bytes())
    (folder / "base").symlink_to(done / "base")
    (folder / "demos").symlink_to(done / "demos")
    first = command(folder, "--methods", "l2", "--seeds", "0", "--jobs", "1")
    metrics = folder / "runs" / "l2" / "seed0" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < until:
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 130, said
    assert not (folder / "results").exists()
    again = command(folder, "--methods", "l2", "--seeds", "0", "--jobs", "1")
    said, _ = again.communicate(timeout=240)
    assert again.returncode == 0, said
    one, two = (json.loads((f / "results" / "l2" / "seed0.json").read_text()) for f in (done, folder))
    for key in ("matrices", "training", "config", "command"):
        assert one[key] == two[key]


def test_a_killed_study_leaves_no_run_at_work(done, tmp_path):
    folder = tmp_path / "toy"
    (folder / "runs").mkdir(parents=True)
    (folder / "study.json").write_bytes((done / "study.json").read_bytes())
    for name in ("base", "demos"):
        (folder / name).symlink_to(done / name)
    study = command(folder, "--methods", "l2", "--seeds", "0", "--jobs", "1")
    metrics = folder / "runs" / "l2" / "seed0" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < until:
        time.sleep(0.02)
    runs = psutil.Process(study.pid).children()
    study.kill()
    study.wait()
    gone, alive = psutil.wait_procs(runs, timeout=30)
    assert gone
    assert not alive


def test_what_is_done_is_not_run_again(done):
    before = (done / "runs" / "l2" / "seed0.log").stat().st_mtime_ns
    again = command(done)
    said, _ = again.communicate(timeout=120)
    assert "3 of 3 runs of the study are done." in said
    assert (done / "runs" / "l2" / "seed0.log").stat().st_mtime_ns == before


def test_a_failed_run_does_not_stop_the_others(done, tmp_path):
    folder = tmp_path / "toy"
    (folder / "runs" / "l2").mkdir(parents=True)
    (folder / "study.json").write_bytes((done / "study.json").read_bytes())
    for name in ("base", "demos"):
        (folder / name).symlink_to(done / name)
    (folder / "runs" / "l2" / "seed0").mkdir()
    (folder / "runs" / "l2" / "seed0" / "something").write_text("in the way")
    study = command(folder, "--methods", "l2", "joint", "--seeds", "0")
    said, _ = study.communicate(timeout=240)
    assert study.returncode == 2
    assert "1 of 2 runs failed" in said
    assert "l2/seed0.log" in said.replace("\n", "")
    assert (folder / "results" / "joint" / "seed0.json").exists()


def test_a_folder_of_something_else_is_refused(tmp_path, done):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(PerennialError, match="is not empty and holds no study"):
        _execution.claim("toyhouse.study", tmp_path)
    with pytest.raises(PerennialError, match=r"holds the study 'toyhouse.study', not 'other'"):
        _execution.claim("other", done)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_a_kill_left_of_the_study_file_does_not_count(tmp_path):
    (tmp_path / ".study.json.new.4711.partial").write_text('{"study"')
    _execution.claim("toyhouse.study", tmp_path)
    assert _results.study_name(tmp_path) == "toyhouse.study"


def test_a_result_made_with_other_settings_is_not_taken_for_this_one(done, tmp_path):
    entry = Entry(STUDY, "l2", "given", 0)
    assert _results.has(done, entry)
    place = _results.path(tmp_path, entry)
    place.parent.mkdir(parents=True)
    content = json.loads(_results.path(done, entry).read_text())
    place.write_text(json.dumps(content | {"config": content["config"] | {"seed": 3}}))
    with pytest.raises(PerennialError, match="other settings"):
        _results.has(tmp_path, entry)
    place.write_text("{")
    with pytest.raises(PerennialError, match="damaged"):
        _results.has(tmp_path, entry)


def test_a_damaged_study_file_or_number_of_jobs_is_a_sentence(tmp_path, capsys):
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(PerennialError, match=r"study\.json cannot be read"):
        _execution.claim("toyhouse.study", tmp_path)
    with pytest.raises(SystemExit):
        main(["study", "toyhouse.study", "-o", str(tmp_path / "new"), "--jobs", "-1"])
    assert "--jobs is -1" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_unfinished_run_of_a_study_that_was_moved_is_still_its_own(tmp_path):
    entry, folder = Entry(STUDY, "l2", "given", 0), tmp_path / "new"
    settings = json.dumps(configuration.to_json(entry.config())).replace("{folder}", str(tmp_path / "old"))
    run = tmp_path / "old" / "runs" / entry.name
    RunFolder.create(run, "toyhouse.preset", json.loads(settings), {}).close()
    (tmp_path / "old" / "base").mkdir()
    (tmp_path / "old").rename(folder)
    _execution._check_same(folder / "runs" / entry.name, folder, entry)
    (folder / "base").rmdir()
    with pytest.raises(PerennialError, match="other settings"):
        _execution._check_same(folder / "runs" / entry.name, folder, entry)


def test_a_preparation_that_was_interrupted_is_made_again(tmp_path, monkeypatch):
    made = []

    def run(command, check, preexec_fn):
        made.append(command[3])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(_execution.subprocess, "run", run)
    (tmp_path / "demos").mkdir()
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "manifest.json").write_text("{}")
    _execution._prepare(STUDY, tmp_path, [Entry(STUDY, "l2", "given", 0)], Console())
    assert made == ["demos"]


def test_what_was_prepared_by_another_command_is_refused(tmp_path, monkeypatch):
    made = []

    def run(command, check, preexec_fn):
        made.append(command[3])
        (tmp_path / made[-1]).mkdir()
        (tmp_path / made[-1] / "manifest.json").write_text("{}")
        return subprocess.CompletedProcess(command, 0)

    def prepare(study):
        _execution._prepare(study, tmp_path, [Entry(study, "l2", "given", 0)], Console())

    one, other = (
        dataclasses.replace(STUDY, preparations=(Preparation("demos", ("demos", "{folder}/demos", *extra), ("*",)),))
        for extra in ((), ("--count", "9"))
    )
    monkeypatch.setattr(_execution.subprocess, "run", run)
    prepare(one)
    prepare(one)
    with pytest.raises(PerennialError, match=r"demos was made by `perennial demos .*, but .* --count 9`; delete it"):
        prepare(other)
    (tmp_path / "demos.prepared.json").unlink()  # as before commands were written down
    prepare(other)
    assert made == ["demos"]


def test_a_log_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "runs").write_text("in the way")
    progress = _execution._progress(Console())
    with pytest.raises(PerennialError, match=r"l2/seed0\.log could not be written"):
        _execution._start(tmp_path, Entry(STUDY, "l2", "given", 0), 0, progress)


def test_an_error_in_the_study_leaves_no_run_behind(done, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))
    folder = tmp_path / "toy"
    folder.mkdir()
    for name in ("base", "demos"):
        (folder / name).symlink_to(done / name)
    (folder / "study.json").write_bytes((done / "study.json").read_bytes())
    others, started = set(psutil.Process().children()), []

    def fail(folder, entry):
        started.extend({*psutil.Process().children()} - others)
        raise RuntimeError("a full disk, say")

    monkeypatch.setattr(_execution, "_share", fail)
    with pytest.raises(RuntimeError, match="full disk"):
        _execution.execute(STUDY, "toyhouse.study", folder, [Entry(STUDY, "l2", "given", 0)], 1, Console())
    assert started
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in started)


def test_a_dry_run_prints_the_commands_and_makes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["study", "toyhouse.study", "--seeds", "1", "--methods", "joint", "--dry-run"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line == Entry(STUDY, "joint", "given", 1).command()
    assert list(tmp_path.iterdir()) == []


def test_the_report_of_a_study_needs_its_results_only(done, tmp_path, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "study.json").write_bytes((done / "study.json").read_bytes())
    (copy / "results").symlink_to(done / "results")
    main(["report", str(copy), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [row["row"] for row in found["rows"]] == ["sequential", "l2", "sequential-reversed"]
    assert len(found["missing"]) == 5
