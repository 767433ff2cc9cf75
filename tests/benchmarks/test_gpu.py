"""The GPU benchmark: its counts, and that the whole script runs with a tiny model."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from perennial.planning import estimate

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu")


def test_counts_are_those_of_the_textbook(gpu):
    """2 N T operations for a forward pass over T positions; weights are read once, whatever the batch."""
    found = gpu.count()
    one, eight, many = found["acting"]
    assert (one["batch"], eight["batch"], many["batch"]) == (1, 8, 64)
    assert one["flops"] == pytest.approx(2 * 6.5e9 * 345 + 2 * 0.7e9 * 260, rel=0.06)
    assert many["flops"] == 64 * one["flops"]
    assert one["bytes"] == many["bytes"] == pytest.approx(2 * found["parameters"], rel=0.03)
    plain, again = found["updates"]["plain"], found["updates"]["checkpointing"]
    assert plain["model_flops"] == again["model_flops"] == plain["hardware_flops"]
    assert plain["model_flops"] == pytest.approx(2.05 * one["flops"], rel=0.03)
    assert again["hardware_flops"] == pytest.approx(plain["model_flops"] + one["flops"], rel=0.03)
    assert again["kept_bytes"] < 0.1 * plain["kept_bytes"]


def test_the_page_in_the_documentation_is_what_is_counted(gpu):
    text = (ROOT / "docs" / "gpu-benchmarks.md").read_text()
    if "Nothing on this page was measured" in text:
        assert text == importlib.import_module("gpu_page").counted_page(gpu.count())


def test_the_micro_batch_is_the_largest_that_fits(gpu):
    anatomy = gpu.openvla_anatomy.read(None, 8, gpu.SAID, one_by_one=False)
    use = gpu.Use(anatomy, 32, dtype="bfloat16", stages=(gpu.Stage(rows=1000),))
    for room in (5e9, 40e9):
        rows = gpu.largest_micro_batch(use, room, 128)
        assert estimate.memory(use.capped(rows)).update <= room
        assert estimate.memory(use.capped(2 * rows)).update > room
    assert gpu.largest_micro_batch(use, 1e15, 128) == 128


def test_the_plain_network_has_the_same_size(gpu):
    peer = importlib.import_module("gpu_peer")
    with torch.device("meta"):
        plain = peer.PlainVLA(gpu.openvla_anatomy.published_config(8))
    assert sum(p.numel() for p in plain.parameters()) == pytest.approx(gpu.count()["parameters"], rel=0.03)


def test_the_script_measures_a_tiny_model(gpu, tmp_path, capsys):
    gpu.main(["--tiny", "--repeats", "1", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())
    rate = found["card"]["rate"]
    for one in (*found["acting"], *found["peer"]["acting"]):
        assert one["seconds"] > 0
    first, second = found["acting"]
    assert second["flops"] == 2 * first["flops"]
    assert first["share_of_rate"] == pytest.approx(first["flops"] / first["seconds"] / rate)
    for update in found["updates"].values():
        assert update["samples_per_second"] == pytest.approx(update["rows"] / update["seconds"])
        assert update["model_flop_utilisation"] == pytest.approx(update["model_flops"] / update["seconds"] / rate)
        assert update["peak_bytes"] > 0
    page = (tmp_path / "gpu-benchmarks.md").read_text()
    assert f"Measured on {found['card']['name']} with torch {torch.__version__}" in page
    assert page.count("\n| ") == 1 + len(found["acting"]) + 1 + 3
    assert page in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_can_be_done(gpu, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main([])
    assert stopped.value.code == 1
    assert "torch finds no GPU here; --count" in capsys.readouterr().err
