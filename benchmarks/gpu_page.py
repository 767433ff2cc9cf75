"""The tables of `make bench-gpu` in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perennial.planning.gpus import GPUS

SHOWN = ("A100 80 GB", "H100 80 GB", "H200 141 GB")
HEAD = """# GPU benchmarks

OpenVLA-OFT with random weights of the published sizes in the published layout, bfloat16, a LoRA of rank 32, 224-pixel
images, chunks of 8 actions (56 tokens in one forward pass), sequences of about 345 positions. Operations are those of
matrix products, two for each product and sum; bytes are the weights, read once for each forward pass."""


def counted_page(found: Mapping[str, Any]) -> str:
    """What is known without measuring."""
    lines = [
        HEAD,
        "",
        "**Nothing on this page was measured on a GPU yet.** These are counts, and the shortest times that",
        "the data sheets' rates and bandwidths allow. `make bench-gpu` replaces this page by measurements.",
        "",
        f"## Acting ({found['parameters'] / 1e9:.2f} billion parameters)",
        "",
        "| batch | TFLOP | GB read | FLOP per byte | " + " | ".join(f"{name}, ms at least" for name in SHOWN) + " |",
        "|---|---|---|---|" + "---|" * len(SHOWN),
    ]
    cards = [gpu for gpu in GPUS if gpu.name in SHOWN]
    for one in found["acting"]:
        times = [1000 * max(one["flops"] / gpu.rate, one["bytes"] / gpu.bandwidth) for gpu in cards]
        cells = [f"{one['flops'] / 1e12:.2f}", f"{one['bytes'] / 1e9:.1f}", f"{one['flops'] / one['bytes']:.0f}"]
        lines.append(f"| {one['batch']} | " + " | ".join([*cells, *(f"{t:.1f}" for t in times)]) + " |")
    balances = ", ".join(f"{gpu.rate / gpu.bandwidth:.0f} for the {gpu.name}" for gpu in cards)
    lines += [
        "",
        "A batch is bound by arithmetic, and not by reading the weights, where it has more operations for each byte",
        f"than the card: {balances}.",
        "",
        "## One row of a GRPO update",
        "",
        "| | TFLOP that the model needs | TFLOP that are computed | GB kept for the backward pass | GB always there |",
        "|---|---|---|---|---|",
    ]
    for name, one in found["updates"].items():
        flops = f"{one['model_flops'] / 1e12:.2f} | {one['hardware_flops'] / 1e12:.2f}"
        lines.append(f"| {name} | {flops} | {one['kept_bytes'] / 1e9:.2f} | {one['always_bytes'] / 1e9:.1f} |")
    lines += [
        "",
        "Always there are the learner's weights, one copy to act with, the adapter and the moments of AdamW.",
    ]
    return "\n".join(lines) + "\n"


def measured_page(found: Mapping[str, Any]) -> str:
    """What was measured, beside what bounds it and beside the plain way."""
    card = found["card"]
    rates = f"{card['rate'] / 1e12:,.3g} TFLOP/s in bfloat16, {card['bandwidth'] / 1e9:,.4g} GB/s"
    lines = [
        HEAD,
        "",
        f"Measured on {card['name']} with torch {found['torch']} by `make bench-gpu`, medians of {found['repeats']}",
        f"(updates: of a third of that); the card's measured rates are {rates}.",
        "",
        "## Acting, from frames on the host to actions on the host",
        "",
        "| batch | ms | roofline, ms | times the roofline | share of the matrix rate | bound by | plain way, ms | "
        "times faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for ours, theirs in zip(found["acting"], found["peer"]["acting"], strict=True):
        cells = [
            f"{1000 * ours['seconds']:.3g}",
            f"{1000 * ours['roofline_seconds']:.3g}",
            f"{ours['seconds'] / ours['roofline_seconds']:.2f}",
            f"{ours['share_of_rate']:.1%}",
            "arithmetic" if ours["flops"] / card["rate"] > ours["bytes"] / card["bandwidth"] else "reading weights",
            f"{1000 * theirs['seconds']:.3g}",
            f"{theirs['seconds'] / ours['seconds']:.2f}",
        ]
        lines.append(f"| {ours['batch']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## GRPO update",
        "",
        "| | rows at once | rows/s | model FLOP utilisation | peak GB | planned GB |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in found["updates"].items():
        memory = f"{one['peak_bytes'] / 1e9:.3g} | {one['planned_bytes'] / 1e9:.3g}"
        speed = f"{one['samples_per_second']:.3g} | {one['model_flop_utilisation']:.1%}"
        lines.append(f"| {name} | {one['micro_batch']} | {speed} | {memory} |")
    plain = found["peer"]["update"]
    lines.append(f"| the plain way | | {plain['samples_per_second']:.3g} | | {plain['peak_bytes'] / 1e9:.3g} | |")
    lines += ["", "Memory is that of an update beyond weights and moments."]
    return "\n".join(lines) + "\n"
