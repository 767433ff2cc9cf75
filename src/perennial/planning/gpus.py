"""GPU types by what bounds a run: memory, matrix rate and bandwidth.

Figures are the manufacturer's for dense matrices (half of what is advertised with sparsity), bfloat16 with sums in
float32. Sources: NVIDIA's data sheets of the H100, H200, A100 and L40S; the HGX B200 data sheet, divided by its eight
GPUs; the architecture white papers of Ada (RTX 4090) and Ampere GA102 (RTX 3090).
"""

from __future__ import annotations

from dataclasses import dataclass

RESERVED = 1.5e9
"""Bytes of a GPU that are not for tensors: CUDA's context, libraries' work spaces, fragments between tensors."""


@dataclass(frozen=True)
class GPU:
    """One type of GPU.

    Attributes:
        memory: bytes; those for tensors are fewer, see `room`.
        rate: dense bfloat16 operations a second.
        float32_rate: operations a second of float32 matrices, without TF32, which torch leaves off by default.
        bandwidth: bytes a second between memory and processor.
    """

    name: str
    memory: float
    rate: float
    float32_rate: float
    bandwidth: float

    @property
    def room(self) -> float:
        """Bytes for tensors."""
        return self.memory - RESERVED

    def matrix_rate(self, dtype: str) -> float:
        """Operations a second of matrices of `dtype`."""
        return self.float32_rate if dtype == "float32" else self.rate


GPUS = (
    GPU("RTX 3090 24 GB", 24e9, 71e12, 35.6e12, 936e9),
    GPU("RTX 4090 24 GB", 24e9, 165.2e12, 82.6e12, 1008e9),
    GPU("L40S 48 GB", 48e9, 362e12, 91.6e12, 864e9),
    GPU("A100 40 GB", 40e9, 312e12, 19.5e12, 1555e9),
    GPU("A100 80 GB", 80e9, 312e12, 19.5e12, 2039e9),
    GPU("H100 80 GB", 80e9, 989e12, 67e12, 3350e9),
    GPU("H200 141 GB", 141e9, 989e12, 67e12, 4800e9),
    GPU("B200 180 GB", 180e9, 2250e12, 75e12, 7700e9),
)
