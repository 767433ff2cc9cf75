"""`perennial merge` as it is typed: what reaches the merge, what it says, and sentences about what cannot be merged."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging.models import assert_same, read, weights, write
from perennial.cli import main
from perennial.merging.adapters import delta_weights
from perennial.merging.dare import dare
from perennial.merging.linear import linear
from perennial.merging.ties import ties
from perennial.policies.lora import LoRA, add_adapter, save_adapter
from perennial.policies.openvla_oft import OpenVLAOFT
from perennial.storage.base_checkpoint import checkpoint_folder
from perennial.testing.toy import ToyPolicy
from strategies.worlds import shake


def merge(*arguments):
    main(["merge", *map(str, arguments)])


@pytest.fixture
def refused(capsys):
    """Calls `perennial merge`, which must fail, and gives its sentence."""

    def run(*arguments):
        with pytest.raises(SystemExit) as error:
            merge(*arguments)
        assert error.value.code == 2
        return capsys.readouterr().err.strip()

    return run


@pytest.fixture
def adapters(tmp_path):
    """Three adapters of one base, as runs save them."""
    folders = []
    for seed in (1, 2, 3):
        policy = ToyPolicy(0)
        add_adapter(policy, LoRA(2, 4), seed)
        shake(policy, seed)
        folders.append(tmp_path / f"{seed:02d}-task")
        save_adapter(policy, folders[-1] / "adapter", "base")
    return folders


def test_alpha_and_its_groups_reach_the_merge_and_are_told(pair, tmp_path, capsys):
    (pair[0] / "pytorch_model.bin").write_bytes(b"stale")
    merge(*pair, "-o", tmp_path / "out", "--alpha", 1, "--alpha.language", 0.25)
    name = "language_model.model.layers.0.weight"
    assert_same(read(tmp_path / "out"), weights(2) | {name: linear(weights(1), weights(2), 0.25)[name]})
    said = capsys.readouterr().out
    assert "Of 6 tensors 4 differed; alpha: action 1, language 0.25, other 1, vision 1." in said
    assert "Left out, as they hold weights in another format: pytorch_model.bin." in said


def test_without_options_it_is_the_papers_alpha_of_everything(pair, tmp_path):
    merge(*pair, "-o", tmp_path / "out")
    assert_same(read(tmp_path / "out"), linear(weights(1), weights(2), 0.8))


def test_a_merge_into_a_base_of_ours_is_a_checkpoint_that_runs_and_evaluations_take(tmp_path):
    """The base's manifest vouches for other weights, and what the base could do says nothing about the merged model."""
    base = checkpoint_folder("bundled:metaworld-small")
    tuned = {name: tensor + 1 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tuned, tmp_path / "tuned.safetensors")
    merge("bundled:metaworld-small", tmp_path / "tuned.safetensors", "-o", tmp_path / "out", "--alpha", 0.5)
    out = checkpoint_folder(str(tmp_path / "out"))
    assert {path.name for path in out.iterdir()} == {
        *(path.name for path in base.iterdir() if path.name not in ("manifest.json", "pretraining.json")),
        "merge_provenance.json",
    }
    stored = read(out)
    assert_same(stored, linear(load_file(base / "model.safetensors"), tuned, 0.5))
    for name, tensor in OpenVLAOFT.load(out).acting_weights().items():
        assert torch.equal(tensor, stored[name].float())


def test_the_settings_of_ties_and_dare_reach_the_merge(pair, tmp_path):
    asked = {
        "ties": (["--alpha", 0.8, "--density", 0.5], ties(weights(1), [weights(2)], 0.8, density=0.5)),
        "dare": (["--alpha", 0.8, "--drop", 0.3, "--seed", 4], dare(weights(1), [weights(2)], 0.8, drop=0.3, seed=4)),
    }
    for method, (options, expected) in asked.items():
        merge(*pair, "-o", tmp_path / method, "--method", method, *options)
        for name, tensor in read(tmp_path / method).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


def test_all_of_a_task_vector_is_added_where_no_alpha_is_given(pair, tmp_path):
    merge(*pair, "-o", tmp_path / "out", "--method", "task_arithmetic")
    assert_same(read(tmp_path / "out"), weights(2))


@pytest.mark.parametrize(
    ("option", "method", "owner"),
    [("--density", "linear", "ties"), ("--drop", "ties", "dare"), ("--seed", "slerp", "dare")],
)
def test_an_option_of_another_method_is_refused(pair, tmp_path, refused, option, method, owner):
    said = refused(*pair, "-o", tmp_path / "out", "--method", method, option, 1)
    assert re.search(rf"{option} is 1(\.0)?, but it says how {owner} merges and --method is {method}", said)
    assert not (tmp_path / "out").exists()


def test_beyond_the_models_goes_only_what_is_asked_to(pair, tmp_path, refused):
    for alpha in ("1.2", "-0.1"):
        said = refused(*pair, "-o", tmp_path / "out", f"--alpha={alpha}")
        assert f"alpha is {alpha}, but it must lie in [0, 1]; beyond it goes only with --extrapolate." in said
    assert "alpha of action is 3.0" in refused(*pair, "-o", tmp_path / "out", "--alpha.action", 3)
    assert not (tmp_path / "out").exists()
    merge(*pair, "-o", tmp_path / "out", "--alpha", 1.2, "--extrapolate")
    assert_same(read(tmp_path / "out"), linear(weights(1), weights(2), 1.2, extrapolate=True))


def test_a_group_without_tensors_an_existing_folder_and_a_rank_of_a_checkpoint_are_refused(tmp_path, refused):
    seeing = {"vision.weight": torch.ones(3)}
    folders = write(tmp_path / "base", seeing), write(tmp_path / "tuned", seeing)
    said = refused(*folders, "-o", tmp_path / "out", "--alpha.language", 0.5)
    assert re.search("no parameter group with tensors 'language'.*vision", said)
    assert "tuned exists already" in refused(*folders, "-o", folders[1])
    assert "is no adapter, so the result has no rank" in refused(*folders, "-o", tmp_path / "out", "--rank", 4)
    assert not (tmp_path / "out").exists()


def test_tensors_that_differ_are_listed_up_to_ten(tmp_path, refused):
    base = write(tmp_path / "base", {f"w{number:02d}": torch.ones(2) for number in range(12)})
    tuned = write(tmp_path / "tuned", {"w00": torch.ones(3)})
    said = refused(base, tuned, "-o", tmp_path / "out")
    assert "12 tensors differ: w01 is missing, w02 is missing" in said
    assert "w10 is missing, ..." in said
    assert "w11" not in said


@pytest.mark.parametrize(
    ("options", "shares"),
    [(["--alpha", 0.25], (0.75, 0.25)), (["--alpha", 0.4, "--method", "task_arithmetic"], (0.2, 0.4, 0.4))],
)
def test_adapters_become_an_adapter_whose_updates_are_the_weighted_sums(adapters, tmp_path, capsys, options, shares):
    merge(*adapters[: len(shares)], "-o", tmp_path / "out", *options)
    deltas = [delta_weights(folder / "adapter") for folder in adapters]
    for name, delta in delta_weights(tmp_path / "out").items():
        expected = sum(share * of[name] for share, of in zip(shares, deltas, strict=False))
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)
    assert f"(rank {2 * len(shares)}, exact)" in capsys.readouterr().out


def test_the_error_of_a_smaller_rank_is_told(adapters, tmp_path, capsys):
    merge(*adapters[:2], "-o", tmp_path / "out", "--rank", 2)
    residual = json.loads((tmp_path / "out" / "merge_provenance.json").read_text())["residual"]
    assert 0.01 < residual < 1
    assert f"(rank 2, relative error {residual:.2g})" in capsys.readouterr().out


def test_what_adapters_alone_cannot_do_is_refused(adapters, tmp_path, refused):
    out = ["-o", tmp_path / "out"]
    assert "merged with each other by one alpha" in refused(*adapters[:2], *out, "--alpha.language", 0.5)
    assert "merged with each other by one alpha" in refused(*adapters, *out, "--method", "ties")
    assert "one adapter into another, not 2" in refused(*adapters, *out)
    assert "alpha is 1.5" in refused(*adapters[:2], *out, "--alpha", 1.5)
    save_file(ToyPolicy(0).acting_weights(), tmp_path / "model.safetensors")
    assert "is no readable adapter folder" in refused(adapters[0], tmp_path, *out)
    other = ToyPolicy(1)
    add_adapter(other, LoRA(2, 4), 0)
    save_adapter(other, tmp_path / "strange", "their/base")
    assert "strange was trained on their/base" in refused(adapters[0], tmp_path / "strange", *out)
    assert not (tmp_path / "out").exists()
