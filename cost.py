"""What a model costs at full depth and cut after k layers; `evaluate.py MODEL --efficiency 2,4`.

For each depth, loaded afresh as pruned: parameters, operations an item (counted by torch on real
items, a multiply-add is 2) and latency at batch 1, each split into vision tower and decoder; items
a second at the best batch size, image reading included; the process's peak memory then. Beside it,
quality: the hit rate @5 of this very model cut there, untrained, on samples of the benchmark's
cells (`layer_choice.py`).
"""

import gc
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data import Benchmark
from distributed import pick_device
from layer_choice import HIT, report_layers, sample_cells
from prune_distill import find_decoder
from puma import PUMA, to_device
from report import write_json


def count(model, items):
    """{"parameters", "gflops_per_item"}, each with a split into vision, decoder and the rest."""
    visual, decoder = model.backbone.visual, find_decoder(model)
    sizes = {"vision": visual, "decoder": torch.nn.ModuleList([*decoder.layers, decoder.norm])}
    sizes = {key: sum(p.numel() for p in part.parameters()) for key, part in sizes.items()}
    total = sum(p.numel() for p in model.parameters())
    batch = to_device(model.collate(items), model.device)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch)
    flops = {key: sum(part.values()) / len(items) / 1e9
             for key, part in counter.get_flop_counts().items()}
    name = next(name for name, module in model.named_modules() if module is visual)
    vision = flops.get(f"{type(model).__name__}.{name}", 0.0)
    return {"parameters": total,
            "parameters_split": sizes | {"embedding table": total - sum(sizes.values())},
            "gflops_per_item": flops["Global"],
            "gflops_split": {"vision": vision, "decoder": flops["Global"] - vision}}


def latency(model, items):
    """Milliseconds at batch 1, median over items: reading (and tokenising), vision, decoder."""
    rows = []
    with torch.inference_mode():
        for item in items[:2] + items:  # the first two warm up
            times = [_now(model)]
            batch = to_device(model.collate([item]), model.device)
            times.append(_now(model))
            visual = model.visual_tokens(batch)
            times.append(_now(model))
            model(batch, visual).cpu()
            times.append(_now(model))
            rows.append([1e3 * (b - a) for a, b in zip(times, times[1:])])
    parts = [statistics.median(column) for column in zip(*rows[2:])]
    split = dict(zip(("reading", "vision", "decoder"), parts))
    return {"total": statistics.median(sum(row) for row in rows[2:]), **split}


def _now(model):
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def throughput(model, items, sizes=(1, 4, 16, 64, 256)):
    """(items a second, batch size, peak bytes) at the best batch size, growing while it pays."""
    best = (0.0, 0, 0)
    for size in sizes:
        sample = items[: max(4 * size, 64)]
        reset_peak(model.device)
        try:
            started = _now(model)
            model.encode(sample, size, show_progress=False)
            speed = len(sample) / (_now(model) - started)
        except torch.OutOfMemoryError:
            break
        if speed < 0.8 * best[0] or len(sample) < size:
            break
        best = max(best, (speed, size, peak_bytes(model.device)))
    return best


def reset_peak(device):
    """Start measuring `peak_bytes` anew, where the system can."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device):
    """Most memory since `reset_peak`: of the GPU's tensors, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(name, data, asked, split="test", limit=200, candidates=1000, device="", out=None):
    """Full depth and each depth `asked` for: print the table, draw costs.png; -> one dict a depth.

    name: model folder or hub id; limit, candidates: queries and candidates of each cell, to measure
    quality. Raises ValueError for a depth that the model does not have.
    """
    model = PUMA.from_pretrained(name, device=pick_device(device))
    full = len(find_decoder(model).layers)
    for depth in asked:
        if not 1 <= depth <= full:
            raise ValueError(f"--efficiency: a depth must be in 1..{full}, got {depth}")
    samples = sample_cells(Benchmark(data), split, limit, candidates)
    quality = report_layers(model, samples)
    items = [item for _, queries, candidates, _ in samples for item in queries + candidates]
    items = random.Random(0).sample(items, min(len(items), 1024))
    rows = []
    for depth in sorted({*asked, full}):
        model = None  # the one before makes room
        model = PUMA.from_pretrained(name, depth, device=pick_device(device)).eval()
        row = {"depth": depth, HIT: quality[depth][HIT], **count(model, items[:64]),
               "latency_ms": latency(model, items[:24])}
        speed, size, peak = throughput(model, items)
        rows.append(row | {"items_per_s": speed, "batch_size": size, "peak_bytes": peak})
    print(cost_table(rows))
    if out is not None:
        from pictures import draw_costs

        out.mkdir(parents=True, exist_ok=True)
        draw_costs(out / "costs.png", rows)
        write_json(out / "costs.json", {"rows": rows, "limit": limit, "split": split})
        print(f"wrote {out / 'costs.png'} and {out / 'costs.json'}")
    return rows


def cost_table(rows):
    """A text table, one column a depth."""
    lines = [("depth", [f"{row['depth']}" for row in rows]),
             ("hit rate @5, %", [f"{100 * row['hit_rate@5']:.1f}" for row in rows]),
             ("parameters", [f"{row['parameters']:,}" for row in rows])]
    lines += [(f"  {key}", [f"{row['parameters_split'][key]:,}" for row in rows])
              for key in rows[0]["parameters_split"]]
    lines.append(("GFLOP an item", [f"{row['gflops_per_item']:.4f}" for row in rows]))
    lines += [(f"  {key}", [f"{row['gflops_split'][key]:.4f}" for row in rows])
              for key in rows[0]["gflops_split"]]
    lines.append(("latency at batch 1, ms", [f"{row['latency_ms']['total']:.1f}" for row in rows]))
    lines += [(f"  {key}", [f"{row['latency_ms'][key]:.1f}" for row in rows])
              for key in ("reading", "vision", "decoder")]
    lines.append(("items a second", [f"{row['items_per_s']:,.0f}" for row in rows]))
    lines.append(("  at batch size", [f"{row['batch_size']}" for row in rows]))
    lines.append(("  peak memory, MB", [f"{row['peak_bytes'] / 1e6:,.0f}" for row in rows]))
    return "\n".join(f"{name:<24}" + "".join(f"{value:>14}" for value in values)
                     for name, values in lines)
