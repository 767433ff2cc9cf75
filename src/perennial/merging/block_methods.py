"""The merge methods on blocks of tensors, for models that are larger than memory.

A method looks at the models once more where it has to (SLERP at each tensor, TIES at all of them) and gives, for each
tensor, a function from the number of a block and that block of every model (base first) to the merged block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from perennial.errors import PerennialError, unknown
from perennial.merging.dare import drop_and_rescale, keep_mask, require_dare
from perennial.merging.linear import interpolate
from perennial.merging.slerp import angle_between, slerp_tensor
from perennial.merging.state_dicts import accumulator
from perennial.merging.task_arithmetic import add_task_vectors
from perennial.merging.ties import elect_and_average, require_ties, trim_threshold

Blocks = Callable[[str], Iterator[list[Tensor]]]
"""Tensor name -> its blocks in order, each as [base, *fine-tuned]."""

BlockMerge = Callable[[int, list[Tensor]], Tensor]


@dataclass(frozen=True)
class Settings:
    """What a method may need.

    Attributes:
        alpha: tensor name -> coefficient, for the tensors that can be merged.
        models: number of fine-tuned models.
        density: of TIES.
        drop: rate of DARE.
        seed: of the masks of DARE.
    """

    alpha: Mapping[str, float]
    models: int
    density: float
    drop: float
    seed: int


def prepare(method: str, settings: Settings, blocks: Blocks) -> Callable[[str], BlockMerge]:
    """How `method` merges each tensor.

    Raises:
        PerennialError: there is no such method, or the settings do not fit it.
    """
    if method not in METHODS:
        raise unknown("merge method", method, METHODS)
    return METHODS[method](settings, blocks)


def _linear(settings: Settings, blocks: Blocks) -> Callable[[str], BlockMerge]:
    _require_one(settings, "linear")
    return lambda name: lambda _, tensors: interpolate(tensors[0], tensors[1], settings.alpha[name])


def _slerp(settings: Settings, blocks: Blocks) -> Callable[[str], BlockMerge]:
    _require_one(settings, "slerp")

    def of_tensor(name: str) -> BlockMerge:
        angle = angle_between(blocks(name))
        return lambda _, tensors: slerp_tensor(tensors[0], tensors[1], settings.alpha[name], angle)

    return of_tensor


def _task_arithmetic(settings: Settings, blocks: Blocks) -> Callable[[str], BlockMerge]:
    return lambda name: (
        lambda _, tensors: add_task_vectors(tensors[0], tensors[1:], [settings.alpha[name]] * settings.models)
    )


def _ties(settings: Settings, blocks: Blocks) -> Callable[[str], BlockMerge]:
    require_ties(settings.models, settings.density)

    def task_vector(model: int) -> Iterator[Tensor]:
        for name in settings.alpha:
            for base, *finetuned in blocks(name):
                common = accumulator(base)
                yield finetuned[model].to(common) - base.to(common)

    thresholds = [
        trim_threshold(lambda model=model: task_vector(model), settings.density)  # type: ignore[misc]
        for model in range(settings.models)
    ]
    return lambda name: lambda _, tensors: elect_and_average(tensors[0], tensors[1:], thresholds, settings.alpha[name])


def _dare(settings: Settings, blocks: Blocks) -> Callable[[str], BlockMerge]:
    require_dare(settings.models, settings.drop)

    def of_tensor(name: str) -> BlockMerge:
        def merge(number: int, tensors: list[Tensor]) -> Tensor:
            size = tensors[0].numel()
            masks = [
                keep_mask(settings.seed, name, model, number, size, settings.drop) for model in range(settings.models)
            ]
            return drop_and_rescale(tensors[0], tensors[1:], masks, settings.drop, settings.alpha[name])

        return merge

    return of_tensor


def _require_one(settings: Settings, method: str) -> None:
    if settings.models != 1:
        raise PerennialError(
            f"The method {method!r} merges one fine-tuned model, not {settings.models}; "
            "use 'task_arithmetic', 'ties' or 'dare' for several."
        )


METHODS: Mapping[str, Callable[[Settings, Blocks], Callable[[str], BlockMerge]]] = {
    "linear": _linear,
    "slerp": _slerp,
    "task_arithmetic": _task_arithmetic,
    "ties": _ties,
    "dare": _dare,
}
