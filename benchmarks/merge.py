"""What a merge costs against a plain copy of the merged checkpoint on the same disk.

    python benchmarks/merge.py --gigabytes 2

Generates two bfloat16 checkpoints, then alternates copies (shutil, fsync) and linear merges, each in a process of its
own, and prints JSON. A copy reads the model once and writes it once; a merge reads and hashes two models and writes
one. `speed` is median copy time over median merge time: 1 means that merging costs what copying the result costs;
`input_speed` is the same for copying both inputs, the bytes that a merge has to read. Times mean something on an idle
machine only; the CPU seconds say what bounds the merge where the disk is fast and cores are few: SHA-256. With `--cold`
the inputs are dropped from the page cache before every run.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

CHILD = """
import json, os, shutil, sys, time
from pathlib import Path
kind, base, tuned, out = sys.argv[1], *map(Path, sys.argv[2:])
if kind == "merge":
    from perennial.merging.checkpoints import merge_checkpoints
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
before, start, cpu = peak(), time.perf_counter(), time.process_time()
if kind == "merge":
    merge_checkpoints(base, tuned, out, alpha=0.8)
else:
    out.mkdir()
    for file in base.iterdir():
        shutil.copyfile(file, out / file.name)
        with (out / file.name).open("rb") as stream:
            os.fsync(stream.fileno())
seconds = time.perf_counter() - start
cpu = time.process_time() - cpu
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak(), "grown_mb": peak() - before}))
"""


@dataclass(frozen=True)
class Arguments:
    """Size and repetitions."""

    gigabytes: float = 2.0
    """Size of each checkpoint, in files of at most 4 GB."""
    repetitions: int = 3
    """Of copy and merge, alternating."""
    cold: bool = False
    """Drop the inputs from the page cache before each run."""
    folder: Path | None = None
    """On the disk to measure; the system's temporary folder by default."""


def main(arguments: Arguments) -> None:
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="perennial-merge-") as name:
        root = Path(name)
        models = [root / "base", root / "tuned"]
        for seed, model in enumerate(models):
            generate(model, arguments.gigabytes, seed)
        runs: dict[str, list[dict[str, float]]] = {"copy": [], "merge": []}
        for _ in range(arguments.repetitions):
            for kind, results in runs.items():
                if arguments.cold:
                    drop_from_cache(models)
                command = [sys.executable, "-c", CHILD, kind, *map(str, models), str(root / "out")]
                finished = subprocess.run(command, check=True, capture_output=True, text=True)
                results.append(json.loads(finished.stdout))
                shutil.rmtree(root / "out")
    print(json.dumps(summary(arguments, runs), indent=2))


def generate(folder: Path, gigabytes: float, seed: int) -> None:
    """Layers of 64 MB in shards of 4 GB, written in float noise so that no file system compresses them."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(4096, 8192, generator=generator).bfloat16()
    layers = max(1, round(gigabytes * 1e9 / (noise.numel() * 2)))
    shards = [range(start, min(start + 60, layers)) for start in range(0, layers, 60)]
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {f"language_model.model.layers.{i:03}.weight": noise.roll(i) for i in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        with (folder / file).open("rb") as stream:
            os.fsync(stream.fileno())
    index = {"metadata": {"total_size": layers * noise.numel() * 2}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def drop_from_cache(models: list[Path]) -> None:
    for file in (file for model in models for file in model.iterdir()):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def summary(arguments: Arguments, runs: dict[str, list[dict[str, float]]]) -> dict[str, object]:
    seconds = {kind: statistics.median(r["seconds"] for r in results) for kind, results in runs.items()}
    return {
        "gigabytes": arguments.gigabytes,
        "cold": arguments.cold,
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "copy_seconds": [round(r["seconds"], 2) for r in runs["copy"]],
        "merge_seconds": [round(r["seconds"], 2) for r in runs["merge"]],
        "copy_cpu_seconds": [round(r["cpu_seconds"], 2) for r in runs["copy"]],
        "merge_cpu_seconds": [round(r["cpu_seconds"], 2) for r in runs["merge"]],
        "speed": round(seconds["copy"] / seconds["merge"], 3),
        "input_speed": round(2 * seconds["copy"] / seconds["merge"], 3),
        "merge_peak_mb": round(max(r["peak_mb"] for r in runs["merge"])),
        "merge_peak_grown_mb": round(max(r["grown_mb"] for r in runs["merge"])),
    }


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
