"""Camera images to the square pixels that a policy looks at, as the code that its family was trained with makes them.

Resampling is two small matrices, one for rows and one for columns, so every filter is the same few lines and runs on
any device. Grey levels are rounded where the reference rounds them, so sums are float64: halves must not tip over.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

CROP_AREA = 0.9
"""Share of the image's area that a centre crop keeps (OpenVLA's random-crop augmentation keeps as much)."""

FRACTION = 2.0**22
"""Pillow's weights are whole multiples of one over this."""

Filter = Callable[[Tensor], Tensor]


def stretched(images: np.ndarray, size: int, device: torch.device) -> Tensor:
    """As OpenVLA's processor ("resize-naive"): Pillow's bicubic, whatever the image's shape.

    Args:
        images: uint8 [N, V, H, W, 3].
        size: side of the square.
        device: where the result lies.

    Returns:
        float32 [N, V, 3, size, size] in [0, 1].
    """
    return _as_pillow(_planes(images, device), size, size, _cubic).float() / 255


def cropped(images: np.ndarray, size: int, device: torch.device) -> Tensor:
    """As the evaluation scripts of OpenVLA and OpenVLA-OFT: JPEG, TensorFlow's Lanczos-3, the central 90 % of the area.

    The JPEG is that of their training data. Differs from their code in the decoder's cosine transform, exact here and
    fast there, which moves single pixels by up to 17 grey levels and the average by less than one. TensorFlow's
    `crop_and_resize` puts the first and the last sample on the borders of the crop and reads between pixels; its
    conversion to uint8 takes the level below, of 255.5 in all. Arguments and result as of `stretched`.
    """
    planes = _planes(_through_jpeg(images), device)
    for axis in (-1, -2):
        if planes.shape[-2:] != (size, size):
            planes = _resample(planes, axis, _areas(planes.shape[axis], size, _lanczos))
    planes = planes.double().round().clamp(0, 255)
    planes = _resample(_resample(planes, -1, _crop(size)), -2, _crop(size))
    return (planes * (255.5 / 255)).floor().clamp(0, 255).float() / 255


def padded(images: np.ndarray, size: int, device: torch.device) -> Tensor:
    """As openpi's client: Pillow's bilinear at the image's own proportions, in the middle of black.

    Arguments and result as of `stretched`.
    """
    planes = _planes(images, device)
    height, width = _fitted(planes, size)
    planes = _as_pillow(planes, height, width, _linear)
    top, left = (size - height) // 2, (size - width) // 2
    return functional.pad(planes, (left, size - width - left, top, size - height - top)).float() / 255


def padded_before(images: np.ndarray, size: int, device: torch.device) -> Tensor:
    """As LeRobot's SmolVLA: torch's bilinear, which skips pixels where it shrinks, with black above and to the left.

    Nothing is rounded. Arguments and result as of `stretched`.
    """
    planes = _planes(images, device).float() / 255
    height, width = _fitted(planes, size)
    flat = functional.interpolate(planes.flatten(0, 1), (height, width), mode="bilinear", align_corners=False)
    return functional.pad(flat, (size - width, 0, size - height, 0)).view(*planes.shape[:3], size, size)


def _through_jpeg(images: np.ndarray) -> np.ndarray:
    """uint8 [N, V, H, W, 3] as it comes back from TensorFlow's standard JPEG: quality 95, colour at half resolution."""
    decoded = np.empty_like(images)
    for index in np.ndindex(images.shape[:2]):
        file = io.BytesIO()
        Image.fromarray(images[index]).save(file, "JPEG", quality=95, subsampling="4:2:0")
        decoded[index] = Image.open(file)
    return decoded


def _planes(images: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [N, V, 3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 1, 4, 2, 3).contiguous()


def _fitted(planes: Tensor, size: int) -> tuple[int, int]:
    """Height and width of the largest image with the same proportions in a square of `size`."""
    height, width = planes.shape[-2:]
    ratio = max(height, width) / size
    return int(height / ratio), int(width / ratio)


def _as_pillow(planes: Tensor, height: int, width: int, kernel: Filter) -> Tensor:
    """Columns first, then rows, with whole grey levels after each; halves are rounded up."""
    for axis, side in ((-1, width), (-2, height)):
        if planes.shape[axis] != side:
            weights = (_areas(planes.shape[axis], side, kernel) * FRACTION).round() / FRACTION
            planes = (_resample(planes, axis, weights) + 0.5).floor().clamp(0, 255)
    return planes


def _resample(planes: Tensor, axis: int, weights: Tensor) -> Tensor:
    """Sums of `planes` along `axis` [before] by `weights` [after, before], float64."""
    return (planes.double().transpose(axis, -1) @ weights.to(planes.device).T).transpose(axis, -1)


@functools.cache
def _areas(before: int, after: int, kernel: Filter) -> Tensor:
    """Weights float64 [after, before] where pixels are areas; the filter widens where the image shrinks."""
    scale = before / after
    places = (torch.arange(after, dtype=torch.float64) + 0.5) * scale - 0.5
    return _weights(places, before, max(scale, 1.0), kernel)


@functools.cache
def _crop(size: int) -> Tensor:
    """Weights float64 [size, size] of the centre crop, where pixels are points."""
    kept = math.sqrt(CROP_AREA)
    places = torch.linspace((1 - kept) / 2, (1 + kept) / 2, size, dtype=torch.float64) * (size - 1)
    return _weights(places, size, 1.0, _linear)


def _weights(places: Tensor, before: int, width: float, kernel: Filter) -> Tensor:
    weights = kernel((torch.arange(before, dtype=torch.float64) - places[:, None]) / width)
    return weights / weights.sum(1, keepdim=True)


def _linear(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic with a = -1/2 (IEEE ASSP 29, 1981)."""
    x = x.abs()
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def _lanczos(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0)
