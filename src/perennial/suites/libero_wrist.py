"""LIBERO with the camera at the wrist beside the third person's, for policies with two views."""

from __future__ import annotations

from typing import ClassVar

from perennial.suites.libero import THIRD_PERSON, WRIST, Libero, Protocol


class LiberoWrist(Libero):
    """`libero` with two pictures in each observation."""

    name: ClassVar[str] = "libero_wrist"
    protocol: ClassVar[Protocol] = Protocol(cameras=(THIRD_PERSON, WRIST))
