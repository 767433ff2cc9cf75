import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.demonstrations.dataset import Demonstration, load, read, require_recorded, to_batch
from perennial.demonstrations.record import Settings, record
from perennial.errors import PerennialError
from perennial.testing.toy import ToyPolicy, ToySuite

SETTINGS = Settings(image_size=8, image_every=3)


class Clerk:
    """Passes actions on as they are, so that one sees what a policy is given; K = H tokens, one a step."""

    image_size = 2

    def __init__(self, imitated_steps):
        self.chunk_steps = 1
        self.imitated_steps = imitated_steps
        self.token_steps = np.arange(imitated_steps)

    def encode(self, actions):
        return actions


def demonstration(length, image_every, number=0):
    steps = np.arange(0, length, image_every, dtype=np.int32)
    time = np.arange(length, dtype=np.float32)[:, None] + 1000 * number
    images = np.broadcast_to(steps[:, None, None, None, None], (len(steps), 1, 2, 2, 3)).astype(np.uint8)
    return Demonstration("task", f"sentence {number}", number, images, steps, time, time + 0.5)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    image_every=st.integers(1, 9),
    imitated_steps=st.integers(1, 12),
)
def test_every_row_holds_the_actions_that_follow_its_image(lengths, image_every, imitated_steps):
    demonstrations = [demonstration(length, image_every, number) for number, length in enumerate(lengths)]
    batch = to_batch(demonstrations, Clerk(imitated_steps))
    row = 0
    for number, length in enumerate(lengths):
        for start in range(0, length, image_every):
            assert (batch.observation.images[row] == start).all()
            assert batch.observation.states[row] == start + 1000 * number
            assert batch.observation.instructions[row] == f"sentence {number}"
            for step in range(imitated_steps):
                assert batch.sample[row, step, 0] == min(start + step, length - 1) + 1000 * number + 0.5
                assert batch.mask[row, step] == (start + step < length)
            row += 1
    assert row == len(batch)


def test_images_of_another_size_are_refused(tmp_path):
    record(ToySuite(), "up-left", [0], tmp_path, Settings(image_size=12, image_every=3))
    with pytest.raises(PerennialError, match=r"up-left has images of 12 x 12 pixels, .* --image-size 8"):
        to_batch(load(tmp_path), ToyPolicy())


def test_the_sample_is_the_policys_own(tmp_path):
    record(ToySuite(), "up-left", [0, 1], tmp_path, SETTINGS)
    policy, demonstrations = ToyPolicy(), load(tmp_path)
    batch = to_batch(demonstrations, policy)
    first = demonstrations[0].actions[:2].reshape(-1)
    np.testing.assert_array_equal(batch.sample[0], np.abs(first[:, None] - policy.centres).argmin(1))
    assert batch.temperature == 1
    assert batch.observation.images.shape == (len(batch), 1, 8, 8, 3)
    assert policy.imitation_loss(batch).shape == (len(batch),)


def test_loading_keeps_the_order_that_is_asked_for(tmp_path):
    for task in ("up", "down"):
        record(ToySuite(), task, [2, 0], tmp_path, SETTINGS)
    assert [(d.task, d.initial_state) for d in load(tmp_path, ("up", "down"))] == [
        ("up", 0),
        ("up", 2),
        ("down", 0),
        ("down", 2),
    ]
    assert [d.task for d in load(tmp_path)] == ["down", "down", "up", "up"]


def test_what_cannot_be_loaded_is_explained(tmp_path):
    with pytest.raises(PerennialError, match="perennial demos"):
        load(tmp_path / "nowhere")
    (path,) = record(ToySuite(), "up", [0], tmp_path, SETTINGS)
    with pytest.raises(PerennialError, match="Did you mean up"):
        load(tmp_path, ["upp"])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PerennialError, match=r"0000\.safetensors cannot be read"):
        load(tmp_path)
    with pytest.raises(PerennialError, match="record it anew"):
        read(tmp_path / "none.safetensors")


@pytest.mark.parametrize(("task", "of"), [("", ""), ("left", " of left")])
def test_where_no_folder_is_named_none_is_proposed(task, of):
    with pytest.raises(PerennialError) as error:
        require_recorded("", "strategies.replay.demonstrations", task)
    asked = "as no folder is named; set --strategies.replay.demonstrations"
    assert str(error.value) == f"There is no demonstration{of}, {asked}."
