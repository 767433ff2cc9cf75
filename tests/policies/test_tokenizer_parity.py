"""Prompts as the published code tokenizes them: transformers' AutoTokenizer on the same files, and a plain BPE.

The tokenizers are small ones of the published kinds: Llama's and Gemma's sentence pieces with bytes for unknown
characters, and SmolLM's bytes.
"""

import itertools
import json

import pytest
from tiny_pi0 import tiny_policy as tiny_pi0
from tiny_smolvla import tiny_policy as tiny_smolvla
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from perennial.policies._tokenizer import read_tokenizer, tokenize

CORPUS = [
    "In: What action should the robot take to pick up the black bowl?\nOut:",
    "put the wine bottle on top of the cabinet and close the drawer, the action out",
    "what should the robot take? pick, place, push, open; the top drawer of the cabinet",
]
SAID = [
    "pick up the black bowl",
    "Pick up the BLACK bowl, and put it on top",
    "öffne the drawer — 2 times",
    "close  the_drawer",
    "抽屉 open?",
]
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def sentence_pieces(folder, kind):
    """Llama's: a blank before the text, newlines as bytes; Gemma's: no blank, newlines as pieces of their own."""
    llama = kind == "LlamaTokenizer"
    special = ["<unk>", "<s>", "</s>"] if llama else ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    alphabet = sorted({letter for text in CORPUS for letter in text} - {" ", "\n"})
    pieces = [*special, *BYTES, *([] if llama else ["\n"]), "▁"]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=pieces, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([line.replace("\n", " ") for line in CORPUS], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    blank = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blank]) if llama else blank
    tokenizer.pre_tokenizer = None if llama else pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bos = "<s>" if llama else "<bos>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    settings = {"tokenizer_class": kind, "bos_token": bos, "unk_token": "<unk>"}
    return written(tokenizer, folder, settings | {"add_bos_token": True, "add_eos_token": False})


def bytes_of_smollm(folder):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True)])
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "unk_token": "<|im_start|>"}
    return written(tokenizer, folder, settings)


def written(tokenizer, folder, settings):
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def byte_pairs(folder, text):
    """Byte-pair encoding of sentence pieces in plain Python: the best-ranked pair first, bytes for what is unknown."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    rank = {tuple(pair if isinstance(pair, list) else pair.split(" ")): i for i, pair in enumerate(model["merges"])}
    parts = []
    for letter in text:
        known = letter in model["vocab"]
        parts += [letter] if known else [f"<0x{value:02X}>" for value in letter.encode()]
    while True:
        pairs = [(rank[pair], at) for at, pair in enumerate(itertools.pairwise(parts)) if pair in rank]
        if not pairs:
            return [model["vocab"][part] for part in parts]
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.fixture
def llama(tmp_path):
    return sentence_pieces(tmp_path, "LlamaTokenizer")


@pytest.mark.parametrize("said", SAID)
def test_openvlas_prompt_is_that_of_its_processor(llama, said):
    """The prompt of `get_vla_action`, and the empty token that `predict_action` adds."""
    tokenizer = read_tokenizer(llama, "")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    bos, empty = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("▁")
    ids, mask = tokenize(tokenizer, (said,), bos, 512, (empty,))
    text = f"In: What action should the robot take to {said.lower()}?\nOut:"
    assert mask.all()
    assert ids[0].tolist() == [*AutoTokenizer.from_pretrained(llama)(text).input_ids, empty]
    assert ids[0].tolist() == [bos, *byte_pairs(llama, "▁" + text.replace(" ", "▁")), empty]
    assert tokenizer.token_to_id("<0x0A>") in ids[0]


@pytest.mark.parametrize("said", SAID)
def test_the_prompt_of_pi0_is_that_of_openpi_and_lerobot(tmp_path, said):
    """openpi encodes the newline by itself and puts blanks for underscores; LeRobot appends it and leaves them."""
    folder = sentence_pieces(tmp_path, "GemmaTokenizer")
    policy = tiny_pi0()
    policy.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference = AutoTokenizer.from_pretrained(folder)
    policy.config = policy.config.__class__(**vars(policy.config) | {"bos_token_id": reference.bos_token_id})
    found = policy._ids(said)
    words = said.replace("_", " ")
    newline = policy.tokenizer.token_to_id("\n")
    assert found == [reference.bos_token_id, *byte_pairs(folder, words.replace(" ", "▁")), newline]
    assert found == reference(f"{words}\n").input_ids


@pytest.mark.parametrize("said", SAID)
def test_the_prompt_of_smolvla_is_that_of_lerobot(tmp_path, said):
    folder = bytes_of_smollm(tmp_path)
    policy = tiny_smolvla()
    policy.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert policy._ids(said) == AutoTokenizer.from_pretrained(folder)(f"{said}\n").input_ids
