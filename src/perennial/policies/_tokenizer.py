"""A word tokenizer for small policies, in the `tokenizers` format that large ones use too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from perennial.errors import PerennialError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BEFORE, AFTER = "In: What action should the robot take to ", "?\nOut: "
BOS, UNKNOWN = "<s>", "<unk>"


def prompt(instruction: str) -> str:
    """The prompt of OpenVLA for `instruction`."""
    return f"{BEFORE}{instruction.lower()}{AFTER}"


def train_tokenizer(instructions: Iterable[str]) -> Tokenizer:
    """A tokenizer that knows every word of `instructions`; each fixed half of the prompt is one token."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    special = [UNKNOWN, BOS, BEFORE, AFTER]
    splitter = Whitespace()
    words = {word for text in instructions for word, _ in splitter.pre_tokenize_str(text.lower())}
    vocabulary = {word: index for index, word in enumerate([*special, *sorted(words)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = splitter
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return tokenizer


def read_tokenizer(folder: Path, advice: str) -> Tokenizer:
    """The tokenizer of a checkpoint, from its tokenizer.json.

    Raises:
        PerennialError: the file is missing, where `advice` says what to do, or damaged.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise PerennialError(f"The checkpoint {folder} has no tokenizer.json; {advice}.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise PerennialError(f"{path} cannot be read ({error}); copy the file again.") from error


def tokenize(
    tokenizer: Tokenizer,
    instructions: Sequence[str],
    bos_token_id: int,
    longest: int,
    end: tuple[int, ...] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts for the model: BOS first, then padding up to the longest of them, then the prompt.

    Args:
        tokenizer: of the policy.
        instructions: N sentences.
        bos_token_id: of the beginning of a sequence.
        longest: a prompt may have so many tokens.
        end: the prompt stops at its last colon and ends in these tokens; None keeps the blank after the colon.

    Returns:
        ids: int64 [N, 1 + P]; padding has BOS's id.
        mask: bool [N, 1 + P], False at padding.

    Raises:
        PerennialError: a prompt has more than `longest` tokens.
    """
    known = {text: _ids(tokenizer, prompt(text), end) for text in dict.fromkeys(instructions)}
    text, ids = max(known.items(), key=lambda item: len(item[1]))
    if len(ids) > longest:
        raise PerennialError(
            f"The instruction {text!r} takes {len(ids)} tokens, but the policy reads {longest}; shorten it."
        )
    prompts = np.full((len(instructions), 1 + len(ids)), bos_token_id, dtype=np.int64)
    mask = np.zeros(prompts.shape, dtype=bool)
    mask[:, 0] = True
    for row, instruction in enumerate(instructions):
        ids = known[instruction]
        prompts[row, -len(ids) :] = ids
        mask[row, -len(ids) :] = True
    return prompts, mask


def _ids(tokenizer: Tokenizer, text: str, end: tuple[int, ...] | None) -> list[int]:
    if end is None:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    return [*tokenizer.encode(text.rstrip(), add_special_tokens=False).ids, *end]
