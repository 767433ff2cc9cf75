import contextlib
import importlib.metadata
import io
import json
import platform
import types
from pathlib import Path

import psutil
import pytest
from packaging.requirements import Requirement
from rich.console import Console

from perennial import cli, doctor
from perennial.doctor import Check, Probe

GB = doctor.GIGABYTE
DREW, CRASHED = Probe(True, "osmesa draws"), Probe(False, "crashed with SIGSEGV")


@pytest.mark.parametrize(
    ("version", "status"),
    [("3.10.14", "problem"), ("3.11.0", "ok"), ("3.12.4", "ok"), ("3.13.9", "ok"), ("3.14.0", "problem")],
)
def test_python(version, status):
    assert doctor.python_check(version).status == status


@pytest.mark.parametrize(
    ("installed", "metaworld", "status", "word"),
    [
        (None, False, "warning", "not installed"),
        ("3.2.6", False, "warning", "older"),
        ("3.2.7", False, "ok", "3.2.7"),
        ("3.3.0", False, "ok", "3.3.0"),
        ("3.3.0", True, "ok", "3.3.0"),
        ("3.3.2", False, "ok", "3.3.2"),
        ("3.3.2", True, "warning", "belong to 3.3.0"),
        ("3.3.3", False, "warning", "darker"),
        ("3.3.10", True, "warning", "darker"),
        ("3.4.0", False, "problem", "LIBERO"),
        ("3.10.1", True, "problem", "LIBERO"),
        ("4.0.0", True, "problem", "MuJoCo 3"),
    ],
)
def test_mujoco(installed, metaworld, status, word):
    check = doctor.mujoco_check(installed, metaworld)
    assert check.status == status
    assert word in check.finding


@pytest.mark.parametrize(
    ("installed", "extra", "status"),
    [
        ("5.23.0", "vla", "ok"),
        ("5.5", "vla", "ok"),
        ("5.6.0rc1", "vla", "ok"),
        ("4.57.1", "vla", "problem"),
        ("6.0", "vla", "problem"),
        (None, "vla", "warning"),
        (None, "", "problem"),
    ],
)
def test_libraries_are_held_to_the_declared_range(installed, extra, status):
    check = doctor.library_check("transformers", installed, Requirement("transformers>=5.5,<6"), extra)
    assert check.status == status
    assert (check.fix == "") == (status == "ok")
    assert f"-e '.[{extra}]'" in check.fix or status == "ok" or not extra


def test_a_local_build_label_of_torch_does_not_matter():
    assert doctor.library_check("torch", "2.13.0+cpu", Requirement("torch>=2.7")).status == "ok"


def test_the_declared_range_is_the_one_of_the_package():
    assert doctor.declared("transformers").specifier.contains("5.5")
    assert not doctor.declared("transformers").specifier.contains("6.0")


@pytest.mark.parametrize(
    ("gpu", "nvidia", "status"),
    [("H200, 144 GB", True, "ok"), (None, False, "ok"), (None, True, "warning")],
)
def test_compute(gpu, nvidia, status):
    check = doctor.compute_check(8, gpu, nvidia)
    assert check.status == status
    assert (gpu or "8 CPU threads") in check.finding


@pytest.mark.parametrize(
    ("result", "status"), [(DREW, "ok"), (CRASHED, "problem"), (Probe(False, "no answer within 5 s"), "problem")]
)
def test_rendering(result, status):
    check = doctor.render_check(result)
    assert (check.status, check.finding) == (status, result.said)
    assert ("libosmesa6" in check.fix) == (status == "problem")


@pytest.mark.parametrize(("free", "status"), [(4 * GB, "ok"), (4 * GB - 1, "warning"), (0, "warning")])
def test_memory(free, status):
    assert doctor.memory_check(free).status == status


@pytest.mark.parametrize(("free", "status"), [(2 * GB, "ok"), (2 * GB - 1, "warning")])
def test_disk(free, status):
    check = doctor.disk_check(free, Path("here"))
    assert check.status == status
    assert "here" in check.finding


@pytest.mark.parametrize(("cores", "load", "status"), [(2, 0.3, "ok"), (2, 2.0, "ok"), (2, 2.1, "warning")])
def test_processor(cores, load, status):
    assert doctor.processor_check(cores, load).status == status


def test_a_runs_folder_that_does_not_exist_yet_is_not_made(tmp_path):
    assert doctor.runs_check(tmp_path / "a" / "runs").status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_runs_folder_that_is_a_file_is_a_problem(tmp_path):
    (tmp_path / "runs").write_text("")
    check = doctor.runs_check(tmp_path / "runs")
    assert check.status == "problem"
    assert str(tmp_path / "runs") in check.finding


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that even root may not write")
def test_a_runs_folder_that_may_not_be_written_is_a_problem():
    check = doctor.runs_check(Path("/proc/runs"))
    assert check.status == "problem"
    assert "/proc cannot be written" in check.finding


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('first'); print('last')", Probe(True, "last")),
        ("pass", Probe(True, "nothing was said")),
        ("raise SystemExit('no picture')", Probe(False, "no picture")),
        ("raise ValueError('broken')", Probe(False, "ValueError: broken")),
        ("import os; os.kill(os.getpid(), 11)", Probe(False, "crashed with SIGSEGV")),
    ],
)
def test_a_probe_survives_whatever_happens_in_the_other_process(code, expected):
    assert doctor.probe(code) == expected


def test_a_probe_that_hangs_is_ended():
    assert doctor.probe("import time; time.sleep(60)", seconds=0.5) == Probe(False, "no answer within 0 s")


class Fake(doctor.Suite):
    name = "fake"

    def make(self, task, variant="id", image_size=64):
        raise NotImplementedError

    def doctor(self):
        return [Check("fake simulator", "ok", "1.0")]


def test_suites_speak_for_their_own_simulators_and_a_broken_one_is_a_problem(monkeypatch):
    def find(room, name, base):
        if name == "broken":
            raise ImportError("no simulator")
        return Fake

    monkeypatch.setattr(doctor, "discovery", types.SimpleNamespace(names=lambda room: ["broken", "fake"], find=find))
    broken, fake = doctor.suite_checks()
    assert (broken.name, broken.status, broken.finding) == ("suite broken", "problem", "ImportError: no simulator")
    assert fake == Check("fake simulator", "ok", "1.0")


def report(checks):
    out = io.StringIO()
    doctor.print_report(checks, Console(file=out, width=200))
    return out.getvalue()


def test_the_report_names_every_finding_and_its_fix():
    text = report([Check("disk", "ok", "[bold]12 GB"), Check("MuJoCo", "problem", "4.0.0", "pip install 'x[y]'")])
    assert "[bold]12 GB" in text
    assert "-> pip install 'x[y]'" in text
    assert text.endswith("Not ready: 1 ok, 0 warnings, 1 problems.\n")


@pytest.mark.parametrize(
    ("statuses", "code", "verdict"),
    [(["ok"], 0, "Ready"), (["ok", "warning"], 0, "Ready"), (["warning", "problem"], 1, "Not ready")],
)
def test_only_a_problem_is_a_failure(statuses, code, verdict, monkeypatch):
    checks = [Check("x", status, "y") for status in statuses]
    assert f"{verdict}: " in report(checks)
    monkeypatch.setattr(doctor, "diagnose", lambda: checks)
    with pytest.raises(SystemExit) if code else contextlib.nullcontext(SystemExit(0)) as stopped:
        cli.main(["doctor"])
    assert getattr(stopped, "value", stopped).code == code


def test_the_diagnosis_covers_the_machine_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "probe", lambda code: Probe(False, "asked"))
    monkeypatch.setattr(doctor, "suite_checks", list)
    checks = {check.name: check for check in doctor.diagnose()}
    machine = {"Python", "torch", "compute", "memory", "disk", "processor", "runs folder"}
    libraries = {"transformers", "peft", "MuJoCo"}
    assert machine | libraries <= checks.keys() <= machine | libraries | {"rendering"}
    assert checks["torch"].finding == importlib.metadata.version("torch")
    assert list(tmp_path.iterdir()) == []


def test_the_description_of_the_machine_is_plain_json_and_does_not_change():
    first = doctor.describe_machine()
    assert json.loads(json.dumps(first)) == first == doctor.describe_machine()
    assert first["torch"] == importlib.metadata.version("torch")
    assert first["cores"] > 0
    assert first["memory_gb"] == round(psutil.virtual_memory().total / GB)


def test_a_run_writes_down_the_simulators_that_are_installed_and_no_others(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", {"robosuite": "1.4.0", "hf-libero": "0.1.4"}.get)
    described = doctor.describe_machine()
    assert (described["robosuite"], described["hf-libero"]) == ("1.4.0", "0.1.4")
    assert not {"mujoco", "metaworld", "mani_skill"} & described.keys()


def test_the_processor_is_named_even_where_the_kernel_does_not_tell(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path: "model name : Fast 9000\nmodel name : Fast 9001\n")
    assert doctor.processor_name() == "Fast 9000"
    monkeypatch.setattr(Path, "read_text", lambda path: "processor : 0\n")
    assert doctor.processor_name() == (platform.processor() or platform.machine()) != ""


@pytest.mark.simulator
def test_this_machine_draws():
    """Where simulator tests run at all, the doctor's own probe has drawn a picture."""
    assert doctor.render_check(doctor.probe(doctor.DRAW)).status == "ok"


def test_a_black_picture_is_not_drawing():
    blank = "import perennial.suites._mujoco as m, numpy as np; m.render_check = lambda: np.zeros((8, 8, 3), np.uint8)"
    drawn = doctor.probe(f"{blank}\n{doctor.DRAW}")
    assert not drawn.succeeded
    assert drawn.said.endswith("draws an empty picture")
