import os
import signal
import subprocess
import sys
import types

import psutil
import pytest

from perennial import machine

GB = 10**9
V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
UNLIMITED_V1 = 9223372036854771712


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Writes the files of a made-up system with 10 GB free."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=10 * GB))

    def write(own, groups):
        files = {"proc/self/cgroup": own}
        for place, (limit, used, cache) in groups.items():
            names = ("limit_in_bytes", "usage_in_bytes") if place.startswith(V1) else ("max", "current")
            files |= {f"{place}/memory.{names[0]}": f"{limit}\n", f"{place}/memory.{names[1]}": f"{used}\n"}
            files[f"{place}/memory.stat"] = f"anon 1\ninactive_file {cache}\ntotal_inactive_file {cache}\n"
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("own", "groups", "free"),
    [
        ("0::/\n", {V2: (3 * GB, GB, 0)}, 2 * GB),
        ("0::/\n", {V2: (90 * GB, GB, 0)}, 10 * GB),
        ("0::/\n", {V2: ("max", GB, 0)}, 10 * GB),
        ("0::/\n", {V2: (3 * GB, 3 * GB, 2 * GB)}, 2 * GB),
        ("0::/\n", {V2: (3 * GB, 4 * GB, 0)}, 0),
        ("0::/job/step\n", {f"{V2}/job/step": ("max", GB, 0), f"{V2}/job": (4 * GB, GB, 0)}, 3 * GB),
        ("0::/hidden/by/the/container\n", {V2: (5 * GB, GB, 0)}, 4 * GB),
        ("4:cpu,memory:/job\n1:cpu:/\n0::/\n", {f"{V1}/job": (3 * GB, GB, 0), V1: (UNLIMITED_V1, 0, 0)}, 2 * GB),
        ("4:memory:/job\n", {f"{V1}/job": (UNLIMITED_V1, GB, 0)}, 10 * GB),
        ("3:cpuset:/job\n", {f"{V1}/job": (3 * GB, GB, 0)}, 10 * GB),
    ],
)
def test_free_memory_is_what_the_system_has_and_containers_and_jobs_allow(own, groups, free, system):
    assert machine.free_memory(system(own, groups)) == free


def test_free_memory_is_known_without_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=10 * GB))
    assert machine.free_memory(tmp_path) == 10 * GB


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 2})
    assert machine.core_numbers() == [2, 5]
    assert machine.cores() == 2


def test_a_system_that_cannot_pin_processes_has_all_its_cores_and_starts_them_anywhere(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "sched_setaffinity")
    assert machine.core_numbers() == [0, 1, 2]
    with machine.pinned(2):
        assert machine.cores() == 3


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux pins processes")
def test_processes_started_while_pinned_stay_on_the_core_and_this_one_gets_its_own_back():
    before = os.sched_getaffinity(0)
    core = max(before)
    with machine.pinned(core):
        said = subprocess.run(
            [sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"], capture_output=True, check=True
        )
    assert said.stdout.decode().strip() == str({core})
    assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_a_child_ends_with_its_parent():
    code = (
        "import os, subprocess; from perennial import machine; "
        "subprocess.Popen(['sleep', '60'], preexec_fn=machine.end_with_parent); "
        "os.kill(os.getpid(), 9)"
    )
    # What it would say is at its end when the child, which could say something too, is gone.
    parent = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=30)
    assert parent.returncode == -signal.SIGKILL


def test_a_system_that_cannot_end_children_with_their_parent_starts_them_all_the_same(monkeypatch):
    monkeypatch.setattr(machine, "_LIBC", None)
    assert subprocess.run(["true"], preexec_fn=machine.end_with_parent, check=False).returncode == 0


@pytest.mark.parametrize(("platform", "size"), [("linux", 2048 * 1024), ("darwin", 2048)])
def test_the_peak_is_counted_in_bytes(platform, size, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    assert machine.peak_bytes(types.SimpleNamespace(ru_maxrss=2048)) == size
