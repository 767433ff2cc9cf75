"""Episode videos: H.264 in MP4, yuv420p, which every browser plays."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from perennial.errors import PerennialError, not_installed
from perennial.storage import atomic

QUALITY = 22
"""x264's constant rate factor: 0 is lossless, 51 the worst; 22 keeps a 240-pixel episode below 150 kB."""


def encode(frames: np.ndarray, path: Path, fps: int = 20) -> None:
    """Write `frames` to `path`, whole or not at all.

    Args:
        frames: uint8 [F, H, W, 3] with at least one frame; an odd last row or column is repeated once, because
            yuv420p halves the colour resolution.
        path: ends in .mp4; its folder is made if it is missing.
        fps: frames a second.

    Raises:
        PerennialError: the frames have another shape or type, PyAV is not installed, or the disk is full.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise PerennialError(
            f"A video needs frames uint8 [F, H, W, 3], all at least 1, not {frames.dtype} {list(frames.shape)}."
        )
    try:
        import av
    except ImportError as error:
        raise not_installed("PyAV, which videos need,", "metaworld", error) from error
    height, width = frames.shape[1:3]
    even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    film = io.BytesIO()
    with av.open(film, "w", format="mp4") as container:
        # x264's output depends on the number of threads, and a run's files should not depend on the machine.
        options = {"crf": str(QUALITY), "preset": "slow", "threads": "1"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = even.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in even:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
    atomic.write_bytes(path, film.getvalue())
