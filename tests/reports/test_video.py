import errno
import sys
from pathlib import Path

import numpy as np
import pytest

from perennial.errors import PerennialError
from perennial.reports import video


def moving_square(frames=24, height=96, width=128):
    pictures = np.full((frames, height, width, 3), (40, 90, 140), np.uint8)
    for frame in range(frames):
        pictures[frame, 30:60, 3 * frame : 3 * frame + 30] = (230, 60, 50)
    return pictures


def decode(path):
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        facts = stream.codec_context.name, stream.pix_fmt, float(stream.average_rate)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]), facts


def test_decoded_frames_are_close_to_the_encoded_ones(tmp_path):
    frames = moving_square()
    video.encode(frames, tmp_path / "a" / "film.mp4", fps=25)
    decoded, facts = decode(tmp_path / "a" / "film.mp4")
    assert facts == ("h264", "yuv420p", 25.0)
    assert decoded.shape == frames.shape
    error = np.abs(decoded.astype(int) - frames)
    assert error.mean() < 3
    # The order of the frames is kept: each decoded frame is nearest to its own original.
    distances = np.abs(decoded[:, None].astype(int) - frames[None]).mean((2, 3, 4))
    assert distances.argmin(1).tolist() == list(range(len(frames)))


def test_odd_sizes_repeat_the_last_row_and_column(tmp_path):
    frames = moving_square(4, 31, 45)
    video.encode(frames, tmp_path / "film.mp4")
    decoded, _ = decode(tmp_path / "film.mp4")
    assert decoded.shape == (4, 32, 46, 3)
    assert np.abs(decoded[:, 31].astype(int) - decoded[:, 30]).mean() < 6


def test_the_same_frames_give_the_same_bytes(tmp_path):
    video.encode(moving_square(), tmp_path / "a.mp4")
    video.encode(moving_square(), tmp_path / "b.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_failed_encoding_leaves_the_old_video_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "film.mp4"
    path.write_bytes(b"old")

    def full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(PerennialError, match="disk is full"):
        video.encode(moving_square(), path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["film.mp4"]


def test_missing_pyav_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(PerennialError, match=r"-e '\.\[metaworld\]'"):
        video.encode(moving_square(), tmp_path / "film.mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "frames",
    [np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 8, 8, 4), np.uint8)],
)
def test_other_arrays_are_refused(tmp_path, frames):
    with pytest.raises(PerennialError, match=r"uint8 \[F, H, W, 3\]"):
        video.encode(frames, tmp_path / "film.mp4")
