"""`make bench`: measures everything in one run and writes benchmarks/*.json and docs/benchmarks.md.

python benchmarks/run.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import house
import learning
import naive
import page
import rollout
import strategies
from perennial.config import preset
from perennial.doctor import describe_machine

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description="Benchmarks of the default configuration.")
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    config = preset("demo")
    plain = {"naive_steps_per_second": naive.measure(config.tasks.trained[0], 64, repeats)}
    results = {
        "machine": describe_machine(),
        "repeats": repeats,
        "rollout": rollout.measure(config, repeats) | plain,
        "learning": learning.measure(config, repeats),
        "house": house.measure(config, repeats),
    }
    (ROOT / "benchmarks" / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    strategies.write(config, repeats)
    print(page.write())


if __name__ == "__main__":
    main()
