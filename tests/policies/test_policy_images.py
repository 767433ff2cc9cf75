import numpy as np
import pytest
import torch
from PIL import Image

from perennial.policies._images import to_pixels
from perennial.randomness import stream

CPU = torch.device("cpu")


def picture(side):
    """Noise over a gradient, far enough from black and white that Pillow's two passes need no clipping between them."""
    noise = stream(0, "picture").integers(0, 80, (side, side, 3))
    ramp = np.linspace(60, 120, side)[:, None, None]
    return (noise + ramp).astype(np.uint8)


@pytest.mark.parametrize(("side", "size"), [(96, 64), (64, 56), (40, 64)])
def test_resizing_is_that_of_an_image_library(side, size):
    image = picture(side)
    expected = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    pixels = to_pixels(image[None, None], size, False, CPU)[0, 0].permute(1, 2, 0) * 255
    assert np.abs(pixels.numpy() - expected).max() <= 1.01


def test_overshoot_is_clipped():
    checks = np.kron(np.indices((8, 8)).sum(0) % 2, np.ones((5, 5))).astype(np.uint8)[..., None].repeat(3, -1) * 255
    pixels = to_pixels(checks[None, None], 64, False, CPU)
    assert pixels.min() == 0
    assert pixels.max() == 1


def test_an_image_of_the_right_size_is_only_scaled():
    image = picture(32)
    pixels = to_pixels(image[::-1][None, None], 32, False, CPU)
    np.testing.assert_array_equal((pixels[0, 0].permute(1, 2, 0) * 255).round().numpy(), image[::-1])


def test_the_centre_crop_keeps_nine_tenths_of_the_area_around_the_middle():
    side, kept = 200, 190  # 190^2 / 200^2 = 0.9025
    image = np.zeros((side, side, 3), np.uint8)
    image[5:195, 5:195] = 200
    pixels = to_pixels(image[None, None], kept, True, CPU)
    np.testing.assert_array_equal((pixels * 255).round().numpy(), 200)
    image[6:194, 6:194] = 100
    ring = (to_pixels(image[None, None], kept, True, CPU) * 255).round()[0, 0, 0]
    assert (ring[0] == 200).all()
    assert (ring[-1] == 200).all()
    assert (ring[1:-1, 1:-1] == 100).all()
