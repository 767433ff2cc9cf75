"""The tables in the documentation say what the result files say."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from perennial import discovery

ROOT = Path(__file__).parents[2]
PAGES = (*sorted((ROOT / "docs" / "evidence").glob("*.md")), ROOT / "docs" / "strategies.md")


@pytest.fixture(scope="module")
def evidence():
    spec = importlib.util.spec_from_file_location("evidence", ROOT / "scripts" / "evidence.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_table_is_that_of_the_results(page, evidence):
    text = page.read_text(encoding="utf-8")
    assert evidence.MARKED.search(text), "the page has no table"
    assert evidence.filled(text) == text, "run `make evidence`"


def test_a_mean_rate_lies_within_an_interval_that_narrows_with_more_episodes(evidence):
    few, many = ([[{"value": 50.0, "n": n}], [{"value": 100.0, "n": n}]] for n in (20, 200))
    assert evidence.mean_rate(few)["value"] == evidence.mean_rate(many)["value"] == 75.0
    assert evidence.mean_rate(many)["low"] == pytest.approx(75 - 3.497, abs=0.001)  # Agresti and Coull, by hand
    assert evidence.mean_rate(few)["low"] < evidence.mean_rate(many)["low"]


def test_a_mean_rate_over_seeds_knows_how_they_differ(evidence):
    seeds = [[{"value": value, "n": 1000} for value in (45.0, 50.0, 55.0)]]
    margin = 4.302653 * 5 / 3**0.5  # Student's t with two degrees of freedom
    assert evidence.mean_rate(seeds)["low"] == pytest.approx(50 - margin)


def test_every_strategy_is_explained():
    page = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| `(\w+)` \|", page.partition("<!--")[0], re.MULTILINE)
    assert sorted(explained) == list(discovery.names("strategies"))
