import sys
import threading

import pytest

from perennial import discovery
from perennial.errors import PerennialError
from perennial.tracking.base import Tracker

pytest.importorskip("tensorboard")


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_the_event_file_holds_every_scalar(tmp_path):
    before = threading.active_count()
    tracker = discovery.find("tracking", "tensorboard", Tracker).open(tmp_path)
    tracker.log(0, {"success": 0.25, "kl": 0.5})
    tracker.log(7, {"success": 0.75})
    tracker.close()
    assert threading.active_count() == before  # the thread that writes is done, so nothing is still on its way
    assert scalars(tmp_path) == {"success": [(0, 0.25), (7, 0.75)], "kl": [(0, 0.5)]}


def test_a_resumed_run_goes_on_in_the_same_folder(tmp_path):
    kind = discovery.find("tracking", "tensorboard", Tracker)
    for step in (0, 1):
        tracker = kind.open(tmp_path)
        tracker.log(step, {"success": float(step)})
        tracker.close()
    assert set(scalars(tmp_path)["success"]) == {(0, 0.0), (1, 1.0)}


def test_missing_tensorboard_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(PerennialError, match=r"-e '\.\[tensorboard\]'"):
        discovery.find("tracking", "tensorboard", Tracker).open(tmp_path)
    assert list(tmp_path.iterdir()) == []
