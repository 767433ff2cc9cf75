"""Camera images to the square pixels that a policy looks at."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

CROP_AREA = 0.9
"""Share of the image's area that a centre crop keeps (OpenVLA's random-crop augmentation keeps as much)."""


def to_pixels(images: np.ndarray, size: int, center_crop: bool, device: torch.device) -> Tensor:
    """Turn uint8 [N, V, H, W, 3] into float32 [N, V, 3, size, size] in [0, 1].

    Resizing is bicubic with antialiasing and rounds to whole grey levels as an image file would.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 1, 4, 2, 3)
    if center_crop:
        height, width = (round(side * math.sqrt(CROP_AREA)) for side in pixels.shape[-2:])
        top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
        pixels = pixels[..., top : top + height, left : left + width]
    if pixels.shape[-2:] == (size, size):
        return pixels.contiguous().float().div_(255)
    flat = functional.interpolate(pixels.flatten(0, 1).float(), (size, size), mode="bicubic", antialias=True)
    return flat.round_().clamp_(0, 255).div_(255).view(*pixels.shape[:3], size, size)
