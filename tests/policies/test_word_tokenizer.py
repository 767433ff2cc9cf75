import numpy as np
import pytest

from perennial.errors import PerennialError
from perennial.policies._tokenizer import prompt, tokenize, train_tokenizer

TOKENIZER = train_tokenizer(["Open the drawer", "push the puck"])


def test_the_prompt_is_the_published_one():
    assert prompt("Open the Drawer") == "In: What action should the robot take to open the drawer?\nOut: "


def test_each_fixed_half_of_the_prompt_is_one_token():
    tokens = TOKENIZER.encode(prompt("Open the drawer"), add_special_tokens=False).tokens
    assert tokens == ["In: What action should the robot take to ", "open", "the", "drawer", "?\nOut: "]


def test_unknown_words_become_the_unknown_token():
    tokens = TOKENIZER.encode(prompt("shut the drawer"), add_special_tokens=False).tokens
    assert tokens[1:4] == ["<unk>", "the", "drawer"]


def test_padding_stands_between_bos_and_prompt():
    ids, mask = tokenize(TOKENIZER, ("push the puck", "drawer"), bos_token_id=1, longest=9)
    short = TOKENIZER.encode(prompt("drawer"), add_special_tokens=False).ids
    np.testing.assert_array_equal(ids[1], [1, 1, 1, *short])
    np.testing.assert_array_equal(mask, [[True] * 6, [True, False, False, True, True, True]])


def test_a_prompt_that_is_too_long_is_refused():
    with pytest.raises(PerennialError, match="'push the puck' takes 5 tokens, but the policy reads 4"):
        tokenize(TOKENIZER, ("drawer", "push the puck"), bos_token_id=1, longest=4)


def test_training_does_not_depend_on_the_order_of_instructions():
    again = train_tokenizer(["push the puck", "open the drawer", "push the puck"])
    assert again.to_str() == TOKENIZER.to_str()
