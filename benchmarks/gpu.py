"""`make bench-gpu`: OpenVLA-OFT with random weights in the published layout, on this machine's GPU.

python benchmarks/gpu.py            measures the 7B model; writes benchmarks/gpu.json and docs/gpu-benchmarks.md
python benchmarks/gpu.py --tiny     the same with a tiny model, on the CPU where there is no GPU, into --out
python benchmarks/gpu.py --count    measures nothing; writes what is counted

Operations and bytes are counted from the sizes (`perennial plan` counts in the same way), so that every time is printed
beside what bounds it: the card's own matrix rate and bandwidth, measured here first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from gpu_page import counted_page, measured_page
from gpu_peer import Peer
from perennial.learning.base import gradient_step
from perennial.learning.grpo import GRPO
from perennial.learning.optimizer import AdamWConfig, build_optimizer
from perennial.planning import estimate
from perennial.planning.estimate import Stage, Use
from perennial.planning.gpus import GPU, RESERVED
from perennial.policies import _activations, _anatomy
from perennial.policies._openvla import anatomy as openvla_anatomy
from perennial.policies._openvla.settings import TOWERS
from perennial.policies._placement import recompute_blocks
from perennial.policies.base import Batch
from perennial.policies.lora import LoRA, add_adapter
from perennial.policies.openvla_oft import OpenVLAOFT
from perennial.randomness import stream
from perennial.strategies.composition import Strategies
from perennial.testing.memory import peak_bytes
from perennial.testing.openvla_checkpoint import write_openvla_checkpoint
from perennial.testing.policy_conformance import example_observation

ROOT = Path(__file__).parent.parent
ONE_ROW = Stage(rows=1)
BATCHES, RANK, TEMPERATURE, UPDATE_ROWS, PEER_MICRO_BATCH = (1, 8, 64), 32, 1.6, 128, 8
PUBLISHED_TEXT = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
STATISTICS = {"random": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}}}
SAID = "pick up the black bowl next to the plate and put it on the plate"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure or count, write, print."""
    parser = argparse.ArgumentParser(description="Benchmarks of the 7B model on a GPU.")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--count", action="store_true", help="only count operations and bytes of the 7B model")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, help="folder of gpu.json and gpu-benchmarks.md")
    options = parser.parse_args(arguments)
    page = (options.out or ROOT / "docs") / "gpu-benchmarks.md"
    if options.count:
        page.write_text(counted_page(count()))
        return
    if not torch.cuda.is_available() and not options.tiny:
        parser.exit(1, "torch finds no GPU here; --count prints what is counted, --tiny tries the script.\n")
    if options.tiny and options.out is None:
        parser.exit(1, "--tiny measures nothing worth keeping; name a folder by --out.\n")
    results = measure(options.tiny, options.repeats)
    target = (options.out or ROOT / "benchmarks") / "gpu.json"
    target.write_text(json.dumps(results, indent=2) + "\n")
    page.write_text(measured_page(results))
    print(page.read_text())


def count() -> dict[str, Any]:
    """Operations, bytes and memory of the 7B model in bfloat16."""
    anatomy = openvla_anatomy.read(None, 8, SAID, one_by_one=False)
    use = Use(anatomy, RANK, dtype="bfloat16", stages=(ONE_ROW,))
    updates = {name: replace(use, recompute=name == "checkpointing") for name in ("plain", "checkpointing")}
    return {
        "parameters": _anatomy.parameters(anatomy),
        "acting": [{"batch": rows, **_work(use, rows)} for rows in BATCHES],
        "updates": {
            name: {
                "model_flops": _anatomy.update_operations(anatomy, one.learning(ONE_ROW), hardware=False),
                "hardware_flops": _anatomy.update_operations(anatomy, one.learning(ONE_ROW)),
                "kept_bytes": _activations.kept(anatomy, one.learning(ONE_ROW)),
                "always_bytes": estimate.memory(one).always,
            }
            for name, one in updates.items()
        },
    }


def _work(use: Use, rows: int) -> dict[str, float]:
    """FLOPs and bytes of one decision of `rows` rows: weights once for every pass, caches once for every row."""
    size = estimate.BYTES[use.dtype]
    read = sum(
        visit.times * (_anatomy.weights(part) + rows * _anatomy.cache_read(part, visit))
        for part in use.anatomy.parts
        for visit in _anatomy.visits(part, acting=True)
    )
    return {"flops": rows * _anatomy.acting_operations(use.anatomy), "bytes": size * read}


def measure(tiny: bool, repeats: int) -> dict[str, Any]:
    """Everything, in one run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock = Clock(device, repeats)
    batches, rows = ((1, 2), 2) if tiny else (BATCHES, UPDATE_ROWS)
    card = _card(device, clock, tiny)
    with tempfile.TemporaryDirectory() as folder:
        path = _checkpoint(Path(folder) / "openvla", tiny)
        policy = OpenVLAOFT.load(path, torch.bfloat16, device)
        anatomy = OpenVLAOFT.anatomy(path, SAID)
        use = Use(anatomy, RANK, dtype="bfloat16", stages=(Stage(rows=rows),), actors=0)
        acting = [_acting(policy, use, card, clock, count) for count in batches]
        updates = {}
        for name in ("plain", "checkpointing"):
            one = replace(use, recompute=name == "checkpointing")
            policy = OpenVLAOFT.load(path, torch.bfloat16, device)
            updates[name] = _update(policy, one, card, clock, rows)
        config = policy.config
        del policy
        peer = _peer(Peer(config, RANK, device, torch.bfloat16), clock, batches, rows)
    return {
        "card": asdict(card),
        "torch": torch.__version__,
        "repeats": repeats,
        "parameters": _anatomy.parameters(anatomy),
        "acting": acting,
        "updates": updates,
        "peer": peer,
    }


class Clock:
    """Times work on a device."""

    def __init__(self, device: str, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def seconds(self, work: Callable[[], object], repeats: int | None = None) -> float:
        """The median time of `work` after one call to warm up."""
        found = []
        for number in range(1 + (repeats or self.repeats)):
            begun = time.perf_counter()
            work()
            if self.device == "cuda":
                torch.cuda.synchronize()
            if number:
                found.append(time.perf_counter() - begun)
        return statistics.median(found)

    def peak(self, work: Callable[[], object]) -> int:
        """The most bytes that `work` holds at once, beyond what was there before it."""
        if self.device == "cpu":
            return peak_bytes(work)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def _card(device: str, clock: Clock, tiny: bool) -> GPU:
    """The device with its measured rates: a square product of matrices, and a copy, which reads and writes."""
    side, size = (256, 2**20) if tiny else (8192, 2**30)
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    single = matrix.float()
    block = torch.zeros(size, device=device, dtype=torch.uint8)
    copy = torch.empty_like(block)
    if device == "cuda":
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    else:
        name, memory = "CPU", psutil.virtual_memory().total
    return GPU(
        name,
        float(memory),
        2 * side**3 / clock.seconds(lambda: matrix @ matrix),
        2 * side**3 / clock.seconds(lambda: single @ single),
        2 * size / clock.seconds(lambda: copy.copy_(block)),
    )


def _checkpoint(folder: Path, tiny: bool) -> Path:
    if tiny:
        return write_openvla_checkpoint(folder, settings={"chunk": 2})
    return write_openvla_checkpoint(
        folder,
        towers=next(iter(TOWERS.values())),
        image_size=224,
        text=PUBLISHED_TEXT,
        statistics=STATISTICS,
        action_bins=256,
        settings={"chunk": 8},
        files=3,
        deviation=0.02,
    )


def _acting(policy: OpenVLAOFT, use: Use, card: GPU, clock: Clock, rows: int) -> dict[str, float]:
    """A chunk's latency for `rows` observations at once, from uint8 frames to actions on the host."""
    observation = example_observation(policy.image_size, 3, rows=rows)
    rng = [stream(0, "bench", row) for row in range(rows)]
    seconds = clock.seconds(lambda: policy.act(observation, TEMPERATURE, rng))
    found = _work(use, rows)
    roofline = estimate.decision_seconds(use, card, rows, share=1.0)
    rate = found["flops"] / seconds / card.rate
    return {"batch": rows, "seconds": seconds, "roofline_seconds": roofline, "share_of_rate": rate, **found}


def largest_micro_batch(use: Use, room: float, rows: int) -> int:
    """The most rows, halved from `rows`, whose update fits into `room` bytes beside what lies there."""
    while rows > 1 and estimate.memory(use.capped(rows)).update > room:
        rows //= 2
    return rows


def _update(policy: OpenVLAOFT, use: Use, card: GPU, clock: Clock, rows: int) -> dict[str, float]:
    """One GRPO step on `rows` decisions, in the largest micro-batches that fit."""
    add_adapter(policy, LoRA(RANK, RANK), 0)
    if use.recompute:
        recompute_blocks(policy)
    observation = example_observation(policy.image_size, 3, rows=rows)
    chunk = policy.act(observation, TEMPERATURE, [stream(0, "bench", row) for row in range(rows)])
    ones = np.ones(chunk.log_prob.shape, np.float32)
    batch = Batch(
        observation, chunk.sample, ones > 0, TEMPERATURE, chunk.log_prob, advantage=ones[:, 0], weight=ones / rows
    )
    free = torch.cuda.mem_get_info()[0] - RESERVED if clock.device == "cuda" else psutil.virtual_memory().available
    use = use.capped(largest_micro_batch(use, free, rows))
    config = AdamWConfig(learning_rate=2e-5, micro_batch=use.rows)
    optimizer = build_optimizer(policy, Strategies(), config)

    def step() -> None:
        gradient_step(policy, batch, GRPO().loss, Strategies(), optimizer, config, np.random.default_rng(0))

    seconds = clock.seconds(step, max(1, clock.repeats // 3))
    optimizer.zero_grad()
    model = rows * _anatomy.update_operations(use.anatomy, use.learning(ONE_ROW), hardware=False)
    return {
        "rows": rows,
        "micro_batch": use.rows,
        "seconds": seconds,
        "samples_per_second": rows / seconds,
        "model_flops": model,
        "model_flop_utilisation": model / seconds / card.rate,
        "peak_bytes": clock.peak(step),
        "planned_bytes": estimate.memory(use).update,
    }


def _peer(peer: Peer, clock: Clock, batches: Sequence[int], rows: int) -> dict[str, Any]:
    """The same acting and update, written plainly."""
    config = peer.config

    def inputs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = torch.zeros(count, 3, config.image_size, config.image_size, device=peer.device, dtype=peer.dtype)
        return pixels, torch.ones(count, 32, device=peer.device, dtype=torch.int64)

    acting = [{"batch": n, "seconds": clock.seconds(lambda n=n: peer.act(*inputs(n)))} for n in batches]  # type: ignore[misc]
    chosen = peer.act(*inputs(rows))

    def step() -> None:
        peer.update(*inputs(rows), chosen, PEER_MICRO_BATCH)

    seconds = clock.seconds(step, max(1, clock.repeats // 3))
    peer.optimizer.zero_grad()
    update = {"rows": rows, "seconds": seconds, "samples_per_second": rows / seconds, "peak_bytes": clock.peak(step)}
    return {"acting": acting, "update": update}


if __name__ == "__main__":
    main()
