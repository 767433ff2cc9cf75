"""Images as the code of each family prepares them, against Pillow and against the published formulas in NumPy."""

import math
from dataclasses import replace

import imageio.v3 as iio
import numpy as np
import pytest
import tiny_openvla_oft
import tiny_pi0
import tiny_smolvla
import torch
from PIL import Image

from perennial.policies._images import cropped, padded, padded_before, stretched
from perennial.randomness import stream
from perennial.testing.policy_conformance import example_observation

CPU = torch.device("cpu")
BICUBIC, BILINEAR, LANCZOS = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS


def picture(height, width):
    """Noise over a ramp, with a black and a white square that filters overshoot at."""
    noise = stream(0, "picture").integers(0, 80, (height, width, 3))
    image = noise + np.linspace(60, 120, height)[:, None, None]
    image[: height // 4, : width // 4] = 0
    image[-height // 4 :, -width // 4 :] = 255
    return image.astype(np.uint8)


def levels(prepare, image, size):
    """What `prepare` makes of one image, as grey levels float64 [size, size, 3]."""
    return prepare(image[None, None], size, CPU)[0, 0].permute(1, 2, 0).double().numpy() * 255


def assert_whole(found):
    np.testing.assert_allclose(found, found.round(), atol=1e-4)


@pytest.mark.parametrize(("height", "width", "size"), [(256, 256, 224), (64, 64, 56), (40, 40, 64), (48, 64, 24)])
def test_openvlas_images_are_stretched_as_pillow_does(height, width, size):
    image = picture(height, width)
    expected = np.asarray(Image.fromarray(image).resize((size, size), BICUBIC)).astype(float)
    found = levels(stretched, image, size)
    assert_whole(found)
    np.testing.assert_array_equal(found.round(), expected)


def test_each_tower_sees_the_image_normalised_its_own_way():
    """The six channels of `PrismaticImageProcessor`, in float32, three for DINOv2 and three for SigLIP."""
    policy = tiny_openvla_oft.tiny_policy()
    towers, given = policy.model.vision_backbone, []
    for tower in (towers.featurizer, towers.fused_featurizer):
        tower.embeddings.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    image = picture(48, 48)
    observation = example_observation(48, tiny_openvla_oft.STATE_DIM, rows=1)
    policy.act(replace(observation, images=image[None, None]), 0.0, [None])
    pixels = np.asarray(Image.fromarray(image).resize((32, 32), BICUBIC), np.float32).transpose(2, 0, 1) / 255
    for seen, tower in zip(given, (policy.config.dino, policy.config.siglip), strict=True):
        mean, std = (np.array(numbers, np.float32)[:, None, None] for numbers in (tower.mean, tower.std))
        np.testing.assert_allclose(seen[0].numpy(), (pixels - mean) / std, atol=1e-6)


@pytest.mark.parametrize("prepare", [stretched, padded, padded_before])
def test_an_image_of_the_right_size_is_only_scaled(prepare):
    image = picture(32, 32)
    np.testing.assert_array_equal(levels(prepare, image[::-1], 32).round(), image[::-1])


def tensorflow_crop(image):
    """`tf.image.crop_and_resize` of the centre of uint8 [S, S, 3] to S pixels, then `convert_image_dtype` to uint8.

    Output pixel i lies at start (S - 1) + i (end - start) (S - 1) / (S - 1) of the input; its value is
    interpolated between the four pixels around it, and 255.5 times it is cut off.
    """
    side, kept = len(image), math.sqrt(0.9)
    values = image / 255.0
    out = np.empty_like(values)
    start = (1 - kept) / 2
    for i in range(side):
        y = start * (side - 1) + i * kept
        top, low, dy = math.floor(y), math.ceil(y), y - math.floor(y)
        for j in range(side):
            x = start * (side - 1) + j * kept
            left, right, dx = math.floor(x), math.ceil(x), x - math.floor(x)
            above = values[top, left] + (values[top, right] - values[top, left]) * dx
            below = values[low, left] + (values[low, right] - values[low, left]) * dx
            out[i, j] = above + (below - above) * dy
    return np.floor(np.clip(out, 0, 1) * 255.5)


def through_jpeg(image):
    return iio.imread(iio.imwrite("<bytes>", image, extension=".jpg", quality=95))


def test_the_centre_crop_is_tensorflows():
    image = picture(56, 56)
    found, expected = levels(cropped, image, 56), tensorflow_crop(through_jpeg(image))
    assert_whole(found)
    np.testing.assert_array_equal(found.round(), expected)


def test_before_the_crop_comes_a_lanczos_resize():
    image = picture(64, 64)
    resized = np.asarray(Image.fromarray(through_jpeg(image)).resize((56, 56), LANCZOS))
    difference = np.abs(levels(cropped, image, 56) - tensorflow_crop(resized))
    assert difference.max() <= 1.01  # Pillow also rounds between columns and rows, TensorFlow does not
    assert (difference < 0.5).mean() > 0.8


TENSORFLOW = """
0e1e2d405162738494a4b7c8 0b1d2c3f5060718292a3b7ca 0d1d2e415062738595a3b8ca 0f213443557a939faaadb9c9
142336476bbad1d3cabcc1cf 121f344771d5e8e8d9bec3d1 182636466dc4d4d8d2bfc3d0 182738495e8094a2abb4c1d0
1a2a3b4b5c6e8093a2b5c7d5 1a2a3d4e5f708295a4b5c8d6 1b2c3f5162738495a5b5c8d7 192c405162718192a2b3c6d7
"""
"""Red of `box()` after the published functions in TensorFlow 2.21, a row a word, two hexadecimal digits a pixel."""


def box():
    """A red box before smooth colours, uint8 [24, 24, 3]."""
    y, x = np.mgrid[:24, :24]
    image = np.stack([9 * x + y, 250 - 10 * y, 128 + 100 * np.sin(x / 3 + y / 5)], -1).astype(np.uint8)
    image[8:14, 10:18] = (230, 40, 60)
    return image


def test_before_both_comes_tensorflows_jpeg():
    """Its decoder is the fast one, hence the tolerance; without the JPEG it is up to 31 grey levels, 3 on average."""
    expected = np.array([list(bytes.fromhex(row)) for row in TENSORFLOW.split()])
    difference = np.abs(levels(cropped, box(), 12)[..., 0] - expected)
    assert difference.max() <= 4.01
    assert difference.mean() < 2


@pytest.mark.parametrize(("height", "width", "size"), [(256, 256, 224), (64, 64, 56), (40, 40, 64), (45, 64, 56)])
def test_the_images_of_pi0_are_openpis(height, width, size):
    """`resize_with_pad` of its client: the longer side fits, in the middle of black, by Pillow's bilinear."""
    image = picture(height, width)
    ratio = max(height, width) / size
    inside = Image.fromarray(image).resize((int(width / ratio), int(height / ratio)), BILINEAR)
    expected = Image.new("RGB", (size, size))
    expected.paste(inside, ((size - inside.width) // 2, (size - inside.height) // 2))
    found = levels(padded, image, size)
    assert_whole(found)
    np.testing.assert_array_equal(found.round(), np.asarray(expected))


def lerobot_resize(image, size):
    """`resize_with_pad` of LeRobot's SmolVLA in NumPy: two pixels beside each place, black above and to the left."""
    height, width = image.shape[:2]
    ratio = max(height, width) / size
    out = image.astype(float)
    for axis, after in ((0, int(height / ratio)), (1, int(width / ratio))):
        before = out.shape[axis]
        place = np.clip((np.arange(after) + 0.5) * before / after - 0.5, 0, None)
        low = place.astype(int)
        high = np.minimum(low + 1, before - 1)
        share = (place - low).reshape([-1, 1, 1] if axis == 0 else [1, -1, 1])
        out = out.take(low, axis) * (1 - share) + out.take(high, axis) * share
    return np.pad(out, ((size - out.shape[0], 0), (size - out.shape[1], 0), (0, 0)))


@pytest.mark.parametrize(("height", "width", "size"), [(64, 64, 128), (64, 64, 40), (48, 64, 128)])
def test_the_images_of_smolvla_are_lerobots(height, width, size):
    image = picture(height, width)
    np.testing.assert_allclose(levels(padded_before, image, size), lerobot_resize(image, size), atol=1e-3)


@pytest.mark.parametrize(
    ("tiny", "changes", "expected"),
    [
        (tiny_openvla_oft, {}, stretched),
        (tiny_openvla_oft, {"center_crop": True}, cropped),
        (tiny_pi0, {}, padded),
        (tiny_smolvla, {}, padded_before),
    ],
)
def test_every_family_looks_at_its_own_kind_of_image(tiny, changes, expected):
    policy = tiny.tiny_policy(camera_size=40, **changes)
    size = policy.config.image_size
    assert policy.image_size == 40
    images = picture(40, 40)[None, None].repeat(policy.config.views, 1)
    observation = replace(example_observation(size, tiny.STATE_DIM, rows=1), images=images)
    seen = policy._inputs(observation)[0] if tiny is tiny_openvla_oft else (policy._seen(observation)[0] + 1) / 2
    torch.testing.assert_close(seen, expected(images, size, CPU))
