"""Off-screen pictures from MuJoCo without a display."""

from __future__ import annotations

import atexit
import ctypes
import ctypes.util
import os
import sys
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np

from perennial.errors import PerennialError, not_installed

HIDDEN_GROUP = 5
"""Geometry group that policies never see; `film` shows it."""

_WINDOWED = ("glfw", "glx", "enable", "enabled", "on", "true", "1")
_LIBRARIES = {"osmesa": ("OSMesa", "libOSMesa.so.8"), "egl": ("EGL", "libEGL.so.1")}


def _loadable(backend: str) -> bool:
    name, file = _LIBRARIES[backend]
    if ctypes.util.find_library(name):
        return True
    try:
        ctypes.CDLL(file)
    except OSError:
        return False
    return True


def choose_gl() -> str:
    """Choose how MuJoCo draws, and tell it by the environment variable MUJOCO_GL; to be called before importing it.

    A value that is already set is respected if MuJoCo can draw with it. A machine with a GPU device node uses EGL if
    it can; any other uses the software renderer OSMesa if it can. A MuJoCo that was imported before has chosen itself.

    Raises:
        PerennialError: there is no OpenGL library that can draw without a display, or not the one asked for.
    """
    os.environ.setdefault("LP_NUM_THREADS", "1")
    if chosen := os.environ.get("MUJOCO_GL"):
        backend = chosen.lower().strip()
        if backend not in (*_LIBRARIES, *_WINDOWED):
            raise PerennialError(
                f"MUJOCO_GL is {chosen!r}, with which MuJoCo draws nothing; set it to egl, osmesa or glfw, or unset it."
            )
        if backend in _LIBRARIES and not _loadable(backend):
            raise PerennialError(
                f"MUJOCO_GL is {chosen!r}, but there is no {_LIBRARIES[backend][1]}; install it or unset MUJOCO_GL."
            )
        return chosen
    if "mujoco" in sys.modules:
        return "glfw"
    gpu = any(Path(node).exists() for node in ("/dev/nvidia0", "/dev/dri"))
    for backend in ("egl", "osmesa") if gpu else ("osmesa", "egl"):
        if _loadable(backend):
            os.environ["MUJOCO_GL"] = backend
            return backend
    raise PerennialError(
        "No OpenGL library that can draw without a display was found, so MuJoCo cannot make images: "
        "install the Debian package libosmesa6 (`apt-get install libosmesa6`)."
    )


def _cannot_draw(error: Exception) -> str:
    if backend := os.environ.get("MUJOCO_GL"):
        return (
            f"MuJoCo cannot draw with MUJOCO_GL={backend} ({error}); "
            "install the Debian package libosmesa6 or unset MUJOCO_GL."
        )
    return (
        f"MuJoCo cannot draw without a display ({error}), because it was imported before Perennial could choose how; "
        "set the environment variable MUJOCO_GL to osmesa or egl before Python starts, or import it later."
    )


class Painter:
    """Draws square pictures of the states of one compiled model, from one of its cameras.

    It draws any `MjData` that belongs to a copy of the model with the same shapes, colours and textures.

    Args:
        model: `mujoco.MjModel`; its quality settings are changed.
        camera: name of a camera of the model, the one that is looked through by default.
        size: side of the pictures in pixels.
        fast: no multisampling, shadows, reflections or sky, and nothing of `HIDDEN_GROUP`; about 15 times faster.

    Raises:
        PerennialError: MuJoCo cannot draw here.
    """

    def __init__(self, model: Any, camera: str, size: int, *, fast: bool) -> None:
        import mujoco

        model.vis.quality.offsamples = 0 if fast else 4
        model.vis.quality.shadowsize = 1024
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, size)
        model.vis.global_.offheight = max(model.vis.global_.offheight, size)
        self._camera = camera
        self._option = mujoco.MjvOption()
        self._option.geomgroup[HIDDEN_GROUP] = not fast
        try:
            self._renderer = mujoco.Renderer(model, size, size)
        except Exception as error:  # the OpenGL layers raise errors of many unrelated types
            raise PerennialError(_cannot_draw(error)) from error
        if fast:
            flag = mujoco.mjtRndFlag
            for off in (flag.mjRND_SHADOW, flag.mjRND_REFLECTION, flag.mjRND_SKYBOX):
                self._renderer.scene.flags[off] = False

    def paint(self, data: Any, camera: str = "") -> np.ndarray:
        """The picture of `data`, uint8 [size, size, 3], from another camera of the model if one is named."""
        self._renderer.update_scene(data, camera or self._camera, self._option)
        picture: np.ndarray = self._renderer.render()
        return picture

    def close(self) -> None:
        """Free the drawing resources, then the OpenGL context.

        `mujoco.Renderer.close` frees them in the opposite order, so it would delete the textures and meshes of
        whichever other context is current by then.
        """
        self._renderer._gl_context.make_current()
        self._renderer._mjr_context.free()
        self._renderer._mjr_context = None
        self._renderer.close()


_shared: dict[Hashable, tuple[Painter, int]] = {}


def borrow(key: Hashable, build: Callable[[], Painter]) -> Painter:
    """The painter called `key` of this process, built if nobody holds it; each `borrow` needs one `give_back`."""
    painter, holders = _shared.get(key) or (build(), 0)
    # Registered after MuJoCo's own exit handlers, hence run before them: a context that outlives its display complains.
    atexit.unregister(_close_all)
    atexit.register(_close_all)
    _shared[key] = (painter, holders + 1)
    return painter


def give_back(key: Hashable) -> None:
    """Stop using the painter called `key`; it is closed when nobody uses it any more."""
    painter, holders = _shared.pop(key)
    if holders > 1:
        _shared[key] = (painter, holders - 1)
    else:
        painter.close()


def _close_all() -> None:
    """Close every painter."""
    while _shared:
        _shared.popitem()[1][0].close()


_CHECK = """
<mujoco>
  <worldbody>
    <light pos="0 0 3"/>
    <camera name="front" pos="0 -1 0.5" xyaxes="1 0 0 0 0.45 0.9"/>
    <geom type="plane" size="1 1 .1" rgba=".2 .4 .2 1"/>
    <geom type="box" size=".1 .1 .1" pos="0 0 .1" rgba=".9 .1 .1 1"/>
  </worldbody>
</mujoco>
"""


def render_check() -> np.ndarray:
    """Draw a red box on green ground, uint8 [64, 64, 3], to see that drawing works on this machine.

    Raises:
        PerennialError: MuJoCo is not installed or cannot draw here.
    """
    choose_gl()
    try:
        import mujoco
    except ImportError as error:
        raise not_installed("MuJoCo", "metaworld", error) from error
    model = mujoco.MjModel.from_xml_string(_CHECK)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    painter = Painter(model, "front", 64, fast=True)
    try:
        return painter.paint(data)
    finally:
        painter.close()
