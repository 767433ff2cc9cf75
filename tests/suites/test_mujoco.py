import os
import subprocess
import sys
from unittest.mock import MagicMock

import numpy as np
import pytest

from perennial.errors import PerennialError
from perennial.suites import _mujoco
from perennial.suites._mujoco import Painter, borrow, choose_gl, give_back, render_check


@pytest.fixture
def machine(monkeypatch):
    """Says which libraries and device nodes there are."""

    def describe(libraries, gpu):
        monkeypatch.setenv("MUJOCO_GL", "")  # remembered, so that what is chosen does not reach other tests
        monkeypatch.delenv("MUJOCO_GL")
        monkeypatch.delitem(sys.modules, "mujoco", raising=False)
        monkeypatch.setattr(_mujoco, "_loadable", lambda backend: backend in libraries)
        monkeypatch.setattr(_mujoco.Path, "exists", lambda path: gpu and str(path) == "/dev/nvidia0")

    return describe


@pytest.mark.parametrize(
    ("libraries", "gpu", "chosen"),
    [
        ({"egl", "osmesa"}, False, "osmesa"),
        ({"egl", "osmesa"}, True, "egl"),
        ({"egl"}, False, "egl"),
        ({"osmesa"}, True, "osmesa"),
    ],
)
def test_a_gpu_is_used_where_there_is_one(machine, libraries, gpu, chosen):
    machine(libraries, gpu)
    assert choose_gl() == os.environ["MUJOCO_GL"] == chosen


def test_the_users_choice_is_respected(machine, monkeypatch):
    machine({"egl", "osmesa"}, True)
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    assert choose_gl() == os.environ["MUJOCO_GL"] == "glfw"


def test_a_choice_that_draws_nothing_is_refused(machine, monkeypatch):
    machine({"egl"}, True)
    for wrong in ("opengl", "disabled"):
        monkeypatch.setenv("MUJOCO_GL", wrong)
        with pytest.raises(PerennialError, match=f"MUJOCO_GL is '{wrong}', .* set it to egl, osmesa or glfw, or unset"):
            choose_gl()
    monkeypatch.setenv("MUJOCO_GL", "OSMesa")
    with pytest.raises(PerennialError, match=r"MUJOCO_GL is 'OSMesa', but there is no libOSMesa\.so\.8; install"):
        choose_gl()
    monkeypatch.setenv("MUJOCO_GL", "EGL ")
    assert choose_gl() == "EGL "


def test_a_painter_that_cannot_draw_says_so(monkeypatch):
    mujoco, model = MagicMock(), MagicMock()
    mujoco.Renderer.side_effect = RuntimeError("no display")
    model.vis.global_.offwidth = model.vis.global_.offheight = 64
    monkeypatch.setitem(sys.modules, "mujoco", mujoco)
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(PerennialError, match=r"cannot draw with MUJOCO_GL=glfw \(no display\); .* unset MUJOCO_GL"):
        Painter(model, "front", 64, fast=True)


def test_a_mujoco_that_was_imported_before_has_chosen_itself(machine, monkeypatch):
    machine({"egl", "osmesa"}, True)
    mujoco, model = MagicMock(), MagicMock()
    mujoco.Renderer.side_effect = RuntimeError("no display")
    model.vis.global_.offwidth = model.vis.global_.offheight = 64
    monkeypatch.setitem(sys.modules, "mujoco", mujoco)
    assert choose_gl() == "glfw"
    assert "MUJOCO_GL" not in os.environ
    with pytest.raises(
        PerennialError, match=r"\(no display\), because it was imported before .* MUJOCO_GL to osmesa or egl"
    ):
        Painter(model, "front", 64, fast=True)


def test_without_a_library_the_package_to_install_is_named(machine):
    machine(set(), True)
    with pytest.raises(PerennialError, match="libosmesa6"):
        choose_gl()
    assert "MUJOCO_GL" not in os.environ


class FakePainter:
    def __init__(self):
        self.closed = False

    def close(self):
        self.closed = True


def test_a_shared_painter_lives_as_long_as_somebody_holds_it():
    built = []

    def build():
        built.append(FakePainter())
        return built[-1]

    one, two = borrow("key", build), borrow("key", build)
    assert one is two
    assert len(built) == 1
    give_back("key")
    assert not one.closed
    give_back("key")
    assert one.closed
    three = borrow("key", build)
    assert three is not one
    give_back("key")


def test_painters_that_nobody_closed_are_closed_at_exit():
    painters = [borrow(key, FakePainter) for key in ("one", "two")]
    _mujoco._close_all()
    assert all(painter.closed for painter in painters)
    assert not _mujoco._shared


@pytest.mark.simulator
def test_the_check_draws_a_red_box_on_green_ground():
    picture = render_check().astype(int)
    assert picture.shape == (64, 64, 3)
    centre, corner = picture[34, 32], picture[60, 4]
    assert centre[0] > 2 * centre[1:].max()
    assert corner[1] > 1.5 * corner[[0, 2]].max()


@pytest.mark.simulator
@pytest.mark.parametrize("backend", ["egl", "osmesa"])
def test_leaving_without_closing_is_silent(backend):
    if not _mujoco._loadable(backend):
        pytest.skip(f"there is no {backend} library")
    code = (
        "from perennial.suites.metaworld import MetaWorld; e = MetaWorld().make('reach-v3'); e.reset(); "
        "e.render(); e.film(32)"
    )
    environment = {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "Error" not in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.simulator
def test_one_painter_serves_all_environments_of_a_task():
    from perennial.suites.metaworld import MetaWorld

    environments = [MetaWorld().make("reach-v3") for _ in range(3)]
    images = []
    for index, environment in enumerate(environments):
        environment.reset(options={"split": "training", "index": index % 2})
        images.append(environment.render())
    assert len([key for key in _mujoco._shared if key[0] == "reach-v3"]) == 1
    np.testing.assert_array_equal(images[0], images[2])
    assert not np.array_equal(images[0], images[1])
    for environment in environments:
        environment.close()
    assert not [key for key in _mujoco._shared if key[0] == "reach-v3"]


@pytest.mark.simulator
def test_closing_one_environment_leaves_the_pictures_of_others_as_they_were():
    from perennial.suites.metaworld import MetaWorld

    first, second = (MetaWorld().make(task) for task in ("faucet-open-v3", "drawer-open-v3"))
    for environment in (first, second):
        environment.reset(options={"split": "training", "index": 0})
    first.render()
    before = second.render().copy()
    first.close()
    np.testing.assert_array_equal(second.render(), before)
    second.close()
