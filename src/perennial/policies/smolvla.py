"""SmolVLA: pi-0's flow on a small vision-language model (Shukor et al., arXiv 2506.01844), by transformers' SmolVLM.

How it acts and learns is in `_flow.policy`. Its network (see `_smolvla.model`) reads the state as a token of the
prefix, and its prompt has no first token of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor, nn

from perennial.errors import not_installed
from perennial.policies import _images
from perennial.policies._anatomy import Anatomy
from perennial.policies._flow.lerobot_layout import Names
from perennial.policies._flow.policy import FlowPolicy
from perennial.policies._pi0.config import Moments
from perennial.policies._smolvla import anatomy as smolvla_anatomy
from perennial.policies._smolvla import config as smolvla_config
from perennial.policies._smolvla.config import UNUSED, SmolVLAConfig, small_config
from perennial.policies.base import Observation

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["SmolVLA", "SmolVLAConfig", "small_config"]


class SmolVLA(FlowPolicy):
    """SmolVLM and an action expert that predicts H actions, of which the first C are carried out open loop."""

    name: ClassVar[str] = "smolvla"
    tokenizer_of: ClassVar[str] = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
    names: ClassVar[Names] = Names(lambda name: name.removeprefix("model."), re.compile(UNUSED))

    @classmethod
    def anatomy(cls, folder: Path | None, instruction: str) -> Anatomy:
        """See `Policy.anatomy`."""
        return smolvla_anatomy.read(folder, instruction)

    def blocks(self) -> Sequence[nn.Module]:
        """The vision tower's blocks and the decoders' perceptrons."""
        return tuple(self._network.blocks())

    def _prefix(self, observation: Observation) -> Any:
        return self._network.prefix(*self._seen(observation), self._state(observation))

    def _prepared(self, images: np.ndarray) -> Tensor:
        return _images.padded_before(images, self.config.image_size, self.device)

    def _ids(self, instruction: str) -> list[int]:
        """The instruction and a newline."""
        ids: list[int] = self.tokenizer.encode(f"{instruction}\n", add_special_tokens=False).ids
        return ids

    @classmethod
    def _small(cls, tokenizer: Tokenizer, state: Moments, action: Moments) -> SmolVLAConfig:
        return small_config(tokenizer.get_vocab_size(), state, action)

    @classmethod
    def _build(cls, config: Any, random: bool) -> Any:
        try:
            from perennial.policies._smolvla.model import SmolVLANetwork
        except ModuleNotFoundError as error:
            raise not_installed("smolvla", "vla", error) from error
        return SmolVLANetwork.create(config, random)

    @classmethod
    def _read_config(cls, folder: Path) -> SmolVLAConfig:
        return smolvla_config.read_config(folder)
