"""What `perennial alpha` can be told; nothing heavy is imported before it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from tyro.conf import Positional


@dataclass(frozen=True)
class Alpha:
    """Find the alpha to merge with: play the policies between a base and its fine-tuned weights, without training."""

    base: Positional[Path]
    """Pretrained checkpoint."""
    finetuned: Positional[Path]
    """Fine-tuned checkpoint, PEFT adapter folder, or tasks/NN-NAME of a run."""
    tasks: tuple[str, ...] = ()
    """Tasks that were fine-tuned for."""
    variant: str = "ood_val"
    """Shifted version in which they are played; evaluate the merged policy in another one."""
    generalist: tuple[str, ...] = ()
    """Tasks of the base that should still be done; they are played in the first variant."""
    retention: float = 0.5
    """Weight of the generalist tasks in the choice, from 0 to 1, where there are some."""
    alpha: str = "0,0.2,0.4,0.6,0.8,1"
    """Candidates, with commas between."""
    vision: Annotated[str, tyro.conf.arg(name="alpha.vision")] = ""
    """Candidates for the vision parameters, where they differ; several make a grid."""
    language: Annotated[str, tyro.conf.arg(name="alpha.language")] = ""
    """Candidates for the language parameters, where they differ."""
    action: Annotated[str, tyro.conf.arg(name="alpha.action")] = ""
    """Candidates for the action parameters, where they differ."""
    episodes: int = 40
    """Most training states of each task that a candidate plays; 0 plays none and goes by the demonstrations alone. No
    state is played twice, as it would be no new evidence."""
    temperature: float = 1.0
    """Of action sampling; 0 is greedy."""
    demonstrations: Path | None = None
    """Demonstrations of the tasks that were left out of the fine-tuning; with --pretraining, for a rule of thumb."""
    pretraining: Path | None = None
    """Demonstrations that the base was made of."""
    suite: str = "metaworld"
    """Suite of the tasks."""
    policy: str = "openvla_oft"
    """Policy class."""
    device: str = "cpu"
    """Where the policies act: cpu, cuda or cuda:<number>."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights; by default what the checkpoint asks for."""
    seed: int = 0
    """Names the random streams of action sampling."""
    workers: int = 0
    """Worker processes; 0 takes one per processor core."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("alpha.html")
    """Where to write the page; the JSON goes beside it, and neither may exist."""
    json: bool = False
    """Print JSON."""

    def __call__(self) -> None:
        """Sweep."""
        from perennial.alpha import command

        command.command(self, Console())
