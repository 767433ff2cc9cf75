"""What a merge costs against a plain copy of the merged checkpoint on the same disk.

    python benchmarks/merge.py --gigabytes 2

Generates two bfloat16 checkpoints, then alternates copies (shutil, fsync) and linear merges, each in a process of its
own, and prints JSON. A copy reads the model once and writes it once; a merge reads and hashes two models and writes
one. With `--mergekit` the linear merge of mergekit (arXiv 2403.13257) takes its turn as well. `speed` is median copy
time over median merge time: 1 means that merging costs what copying the result costs; `input_speed` is the same for
copying both inputs, the bytes that a merge has to read. Times mean something on an idle machine only; the CPU seconds
say what bounds the merge where the disk is fast and cores are few: SHA-256. With `--cold` the inputs are dropped from
the page cache before every run.
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
import json, os, resource, shutil, subprocess, sys, time
from pathlib import Path
kind, base, tuned, out = sys.argv[1], *map(Path, sys.argv[2:5])
if kind == "merge":
    from perennial.merging.checkpoints import merge_checkpoints
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
def used():
    return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
before, start, cpu = peak(), time.perf_counter(), used()
if kind == "merge":
    merge_checkpoints(base, tuned, out, alpha=0.8)
elif kind == "mergekit":
    options = ["--lazy-unpickle", "--no-copy-tokenizer", "--out-shard-size", "4B", "--quiet"]
    subprocess.run([sys.argv[5], sys.argv[6], str(out), *options], check=True, stdout=subprocess.DEVNULL)
else:
    out.mkdir()
    for file in base.iterdir():
        shutil.copyfile(file, out / file.name)
        with (out / file.name).open("rb") as stream:
            os.fsync(stream.fileno())
seconds = time.perf_counter() - start
cpu = used() - cpu
child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
peaks = {"peak_mb": max(peak(), child), "grown_mb": peak() - before}
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, **peaks}))
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
    mergekit: Path | None = None
    """The program `mergekit-yaml`, installed in an environment of its own."""
    folder: Path | None = None
    """On the disk to measure; the system's temporary folder by default."""


def main(arguments: Arguments) -> None:
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="perennial-merge-") as name:
        root = Path(name)
        models = [root / "base", root / "tuned"]
        for seed, model in enumerate(models):
            generate(model, arguments.gigabytes, seed)
        (root / "mergekit.yml").write_text(json.dumps(linear(models)))  # JSON is YAML
        kinds = ["copy", "merge", *(["mergekit"] if arguments.mergekit else [])]
        runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for _ in range(arguments.repetitions):
            for kind, results in runs.items():
                if arguments.cold:
                    drop_from_cache(models)
                command = [sys.executable, "-c", CHILD, kind, *map(str, models), str(root / "out")]
                command += [str(arguments.mergekit), str(root / "mergekit.yml")]
                finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                results.append(json.loads(finished.stdout))
                shutil.rmtree(root / "out")
    print(json.dumps(summary(arguments, runs), indent=2))


def generate(folder: Path, gigabytes: float, seed: int) -> None:
    """A Llama in bfloat16 of 0.4 GB a layer, in shards of 10 layers, of noise that no file system compresses."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    noise = torch.randn(4096, 11008, generator=torch.Generator().manual_seed(seed)).bfloat16()
    square, gain, words = noise[:, :4096].contiguous(), noise[:1, :4096].flatten().clone(), noise[:1000, :4096].clone()
    layers = max(1, round(gigabytes * 1e9 / (2 * (3 * noise.numel() + 4 * square.numel()))))
    weight_map: dict[str, str] = {}
    starts = range(0, layers, 10)
    for number, start in enumerate(starts, 1):
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(start, min(start + 10, layers)):
            inside = f"model.layers.{layer}"
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                tensors[f"{inside}.self_attn.{name}.weight"] = square.roll(len(tensors))
            for name in ("gate_proj", "up_proj"):
                tensors[f"{inside}.mlp.{name}.weight"] = noise.T.contiguous().roll(len(tensors))
            tensors[f"{inside}.mlp.down_proj.weight"] = noise.roll(len(tensors))
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{inside}.{name}.weight"] = gain.clone()
        if start == 0:
            tensors |= {
                "model.embed_tokens.weight": words,
                "lm_head.weight": words + 1,
                "model.norm.weight": gain.clone(),
            }
        file = f"model-{number:05}-of-{len(starts):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        with (folder / file).open("rb") as stream:
            os.fsync(stream.fileno())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": layers, "vocab_size": 1000}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32, "torch_dtype": "bfloat16"}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes, **heads}
    (folder / "config.json").write_text(json.dumps(config))


def linear(models: list[Path]) -> dict[str, object]:
    """What mergekit is told: the same 0.2 and 0.8."""
    parts = [{"model": str(model), "parameters": {"weight": w}} for model, w in zip(models, (0.2, 0.8), strict=True)]
    return {"merge_method": "linear", "models": parts, "dtype": "bfloat16"}


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
        **{f"{kind}_seconds": [round(r["seconds"], 2) for r in results] for kind, results in runs.items()},
        **{f"{kind}_cpu_seconds": [round(r["cpu_seconds"], 2) for r in results] for kind, results in runs.items()},
        **{f"{kind}_peak_mb": round(max(r["peak_mb"] for r in results)) for kind, results in runs.items()},
        "speed": round(seconds["copy"] / seconds["merge"], 3),
        "input_speed": round(2 * seconds["copy"] / seconds["merge"], 3),
        "merge_peak_grown_mb": round(max(r["grown_mb"] for r in runs["merge"])),
    }


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
