"""pi-0: chunks of continuous actions by flow matching (Black et al., arXiv 2410.24164), on transformers' own network.

The 3B checkpoint and the small default are this class with another config. How it acts and learns is in `_flow.policy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor, nn

from perennial.errors import not_installed
from perennial.policies import _images, _tokenizer
from perennial.policies._anatomy import Anatomy
from perennial.policies._flow.lerobot_layout import Names
from perennial.policies._flow.policy import FlowPolicy
from perennial.policies._pi0 import anatomy as pi0_anatomy
from perennial.policies._pi0 import checkpoint as pi0_checkpoint
from perennial.policies._pi0.config import Exploration, Moments, PI0Config, small_config
from perennial.policies._placement import module_lists
from perennial.policies.base import Observation

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["PI0", "Exploration", "Moments", "PI0Config", "small_config"]


class PI0(FlowPolicy):
    """PaliGemma and an action expert that predicts H actions, of which the first C are carried out open loop."""

    name: ClassVar[str] = "pi0"
    tokenizer_of: ClassVar[str] = "google/paligemma-3b-pt-224"
    names: ClassVar[Names] = pi0_checkpoint.NAMES

    @classmethod
    def anatomy(cls, folder: Path | None, instruction: str) -> Anatomy:
        """See `Policy.anatomy`."""
        return pi0_anatomy.read(folder, instruction)

    def blocks(self) -> Sequence[nn.Module]:
        """The vision tower's blocks and the decoders' perceptrons; attention adds to a cache and must run once."""
        model = self._network.pi0.model
        decoders = (*model.vlm.language_model.layers, *model.dit.layers)
        return (*module_lists(model.vlm.vision_tower), *(layer.mlp for layer in decoders))

    @classmethod
    def _small(cls, tokenizer: Tokenizer, state: Moments, action: Moments) -> PI0Config:
        bos = int(tokenizer.token_to_id(_tokenizer.BOS) or 0)
        return small_config(tokenizer.get_vocab_size(), bos, state, action)

    @classmethod
    def _build(cls, config: Any, random: bool) -> Any:
        try:
            from perennial.policies._pi0.model import PI0Network
        except ModuleNotFoundError as error:
            raise not_installed("pi0", "vla", error) from error
        return PI0Network.create(config, random)

    @classmethod
    def _read_config(cls, folder: Path) -> PI0Config:
        return pi0_checkpoint.read_config(folder)

    def _prefix(self, observation: Observation) -> Any:
        return self._network.prefix(*self._seen(observation))

    def _prepared(self, images: np.ndarray) -> Tensor:
        return _images.padded(images, self.config.image_size, self.device)

    def _ids(self, instruction: str) -> list[int]:
        """BOS, the instruction and a newline."""
        words = instruction.strip().replace("_", " ").replace("\n", " ")
        return [self.config.bos_token_id, *self.tokenizer.encode(f"{words}\n", add_special_tokens=False).ids]
