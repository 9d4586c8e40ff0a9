"""Speed and memory, measured in one run on this machine: a script, not a test.

    python tests/benchmark.py                # all parts, about 12 minutes on two CPU cores
    python tests/benchmark.py loss search    # some of them

Prints one line a comparison: what is compared, the ratio, the aim. A time is the median of several
calls, the two sides in turn, so that a slow minute of the machine hits both. Needs no GPU, uses one
when there is one (memory is then the GPU's; else the process's, on Linux). The model has random
weights and the proportions of Qwen2-VL-2B (28 layers, MLP 5.8 times as wide, a vision tower of 32
blocks with half of the decoder's weights) at a third of its width, so that arithmetic dominates.
"""

import argparse
import contextlib
import copy
import ctypes
import random
import re
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoTokenizer,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen2VLModel,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import benchmark_search  # noqa: E402

import puma  # noqa: E402
from mac_loss import mac_loss  # noqa: E402
from prune_distill import depth_costs, distill_loss, prune_layers  # noqa: E402
from puma import PUMA, to_device  # noqa: E402
from settings import Config  # noqa: E402
from train import Batcher, move, training_step  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORDS = "latin small capital letter with acute grave arrow black white chess sign of and".split()


def random_model(width=512, layers=28, blocks=32):
    """A PUMA of random weights. Tokenizer: tiny-qwen2-vl's."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy/tiny-qwen2-vl")
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=23 * width // 4,
            num_hidden_layers=layers, num_attention_heads=width // 128, num_key_value_heads=1,
            rope_parameters={"rope_type": "default", "mrope_section": [16, 24, 24],
                             "rope_theta": 1_000_000.0},
            bos_token_id=None, eos_token_id=None,
        ),
        vision_config=dict(depth=blocks, embed_dim=7 * width // 8, hidden_size=width,
                           num_heads=7 * width // 512, mlp_ratio=4),
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 36 * 28 * 28}
    return PUMA(Qwen2VLModel(config), tokenizer, Qwen2VLImageProcessorPil(size=size)).to(DEVICE)


def random_items(count, images=0.5, longest=60, seed=0):
    """Texts of 3 to `longest` words; some have an image of 56 to 168 pixels a side."""
    rng = random.Random(seed)
    items = []
    for _ in range(count):
        item = {"text": " ".join(rng.choices(WORDS, k=rng.randint(3, longest))), "image": None}
        if rng.random() < images:
            item["image"] = Image.effect_noise((rng.randint(56, 168), rng.randint(56, 168)), 50)
        items.append(item)
    return items


def seconds(*functions, runs=3):
    """The median time of each function, called in turn; one first call of each is not timed."""
    free_for_real(1 << 25)  # the most that malloc itself would choose
    times = [[] for _ in functions]
    for run in range(runs + 1):
        for function, own in zip(functions, times):
            started = time.perf_counter()
            function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            own += [time.perf_counter() - started] if run else []
    return [statistics.median(own) for own in times]


def peak_memory(function):
    """Bytes that `function()` takes at most, above what was there before: GPU, or resident."""
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    free_for_real(1 << 16)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before goes back, so it is not reused
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def free_for_real(size):
    """Blocks above `size` bytes go back to the system when freed; malloc keeps smaller ones."""
    ctypes.CDLL(None).mallopt(-3, size)  # M_MMAP_THRESHOLD


def resident(key):
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) * 1024


def line(what, figure, aim=""):
    print(f"| {what} | {figure} | {aim} |", flush=True)


# ---- the comparisons -----------------------------------------------------------------------------

def bench_loss(rows=4096, width=1536):
    """MAC-Loss against InfoNCE by cross_entropy, forward and backward."""
    modality = torch.randint(0, 3, (rows,), device=DEVICE)
    labels = torch.arange(rows, device=DEVICE)

    def infonce(query, target):
        logits = F.normalize(query, dim=-1) @ F.normalize(target, dim=-1).T / 0.03
        F.cross_entropy(logits, labels).backward()

    def mac(query, target, modality=modality):
        mac_loss(query, target, modality, 0.03, 0.02).backward()

    def mac_one(query, target):
        mac(query, target, torch.zeros_like(modality))

    def embeddings(width):
        return [torch.randn(rows, width, device=DEVICE, requires_grad=True) for _ in "qt"]

    pair = embeddings(width)
    times = seconds(lambda: infonce(*pair), lambda: mac(*pair), lambda: mac_one(*pair), runs=7)
    line(f"MAC-Loss / InfoNCE, time, B = N = {rows}, D = {width}",
         f"{times[1] / times[0]:.2f}, one modality {times[2] / times[0]:.2f}", "<= 1.5")
    narrow = embeddings(8)  # so that only the (B, N) matrices count
    for name, function in (("InfoNCE", infonce), ("MAC-Loss", mac),
                           ("MAC-Loss, one modality", mac_one)):
        function(*narrow)
        peak = peak_memory(lambda function=function: function(*narrow))
        line(f"{name}, peak memory in B x N float32 matrices", f"{peak / (4 * rows * rows):.2f}",
             "" if function is infonce else "<= 3")


def bench_prune(model, keep=12):
    """Encoding with the first 12 of 28 layers against all, beside the ratio of operations."""
    cut = prune_layers(copy.deepcopy(model), keep).eval()
    for name, images in (("texts", 0.0), ("half with image", 0.5)):
        items = random_items(32, images)
        batch = to_device(model.collate(items), DEVICE)
        flops = [depth_costs(m, batch)[-1][1] for m in (model, cut)]
        times = seconds(*(lambda m=m, items=items: m.encode(items, show_progress=False)
                          for m in (model, cut)))
        speed, work = times[0] / times[1], flops[0] / flops[1]
        line(f"encode, {keep} layers against 28, {name}: speed-up / FLOP ratio",
             f"{speed:.2f} / {work:.2f} = {speed / work:.2f}", ">= 0.9")


def bench_sort(model):
    """Encoding mixed items sorted by length against input order: captions, images, passages."""
    items = random_items(56, images=0.3, longest=15) + random_items(8, images=0.0, longest=200)
    random.Random(0).shuffle(items)

    def in_order():
        with torch.inference_mode():
            for start in range(0, len(items), 16):
                model(to_device(model.collate(items[start : start + 16]), DEVICE))

    times = seconds(lambda: model.encode(items, batch_size=16, show_progress=False), in_order)
    line("encode mixed items, input order / sorted by length, time", f"{times[1] / times[0]:.2f}",
         ">= 1.5")


def bench_last_layer(model, keep=12):
    """The last layer for [RET] alone against all positions."""
    cut = prune_layers(copy.deepcopy(model), keep).eval()
    batch = to_device(cut.collate(random_items(32, images=0.0)), DEVICE)

    @torch.inference_mode()
    def plain():
        only, puma._last_token_only = puma._last_token_only, contextlib.nullcontext
        try:
            cut(batch)
        finally:
            puma._last_token_only = only

    @torch.inference_mode()
    def ret_only():
        cut(batch)

    times = seconds(plain, ret_only, runs=7)
    line(f"forward pass of {keep} layers, last one plain / for [RET] only, time",
         f"{times[0] / times[1]:.3f}", f"{keep / (keep - 1):.3f} = a whole layer")


def bench_stage1(model, keep=12):
    """A step of stage 1 here against the official code's way of computing the same losses."""
    student, teacher = prune_layers(copy.deepcopy(model), keep), model
    teacher.requires_grad_(False)
    student.backbone.visual = teacher.backbone.visual
    items = random_items(16, longest=12)  # captions, half of them with an image of 4 to 36 tokens
    pairs = {"queries": items[:8], "targets": items[8:], "modality": torch.zeros(8).long(),
             "positive_keys": [[i] for i in range(8)], "target_keys": torch.arange(8)}

    def losses_of(states, teacher_states):
        modality = torch.zeros(8, dtype=torch.long, device=DEVICE)
        contrastive = mac_loss(*states.chunk(2), modality, 0.05, 0.05)
        return {"loss": 0.9 * contrastive + 0.1 * distill_loss(states, teacher_states)}

    batch = move(Batcher(student, Config(chunk_size=4))(pairs), DEVICE)
    after = student.tokenize([".<|im_end|>\n"], special=True)[0]  # row 12: computed and ignored

    def prepare(items):
        tails = [[*model.summary_tail(item), *after] for item in items]
        return to_device(model.collate(items, tails), DEVICE)

    halves = [prepare(items[:8]), prepare(items[8:])]  # queries, targets: each padded as it comes

    def embed(side, network, keep_all):
        network = network.backbone
        embeds = network.get_input_embeddings()(side["input_ids"])
        if "pixel_values" in side:  # row 9: each model computes the tower for itself
            visual = network.visual(side["pixel_values"], grid_thw=side["grid_thw"]).pooler_output
            slots = side["input_ids"] == network.config.image_token_id
            embeds = embeds.masked_scatter(slots[..., None], visual)
        out = network.language_model(inputs_embeds=embeds, attention_mask=side["attention_mask"],
                                     position_ids=side["position_ids"], use_cache=False,
                                     output_hidden_states=keep_all)
        return out.last_hidden_state[:, -1 - len(after)], out.hidden_states

    def official():
        with torch.no_grad():
            taught = [embed(side, teacher, True) for side in halves]  # all states stay alive
        states = torch.cat([embed(side, student, False)[0] for side in halves])
        losses_of(states, torch.cat([state for state, _ in taught]))["loss"].backward()

    def ours():
        training_step(student, teacher, batch, losses_of)

    times = seconds(official, ours)
    line("stage-1 step, official way / here, time", f"{times[0] / times[1]:.2f}", ">= 1.4")
    peaks = [peak_memory(step) for step in (official, ours)]
    line("stage-1 step, official way / here, peak memory", f"{peaks[0] / peaks[1]:.2f}")


def bench_gradcache():
    """GradCache in chunks of 64 items against one big batch, B pairs of short texts."""
    student = random_model(width=256, layers=4, blocks=1)
    free_for_real(1 << 16)  # from the start: what the timings leave in malloc's hands would count
    steps, first = {}, None
    for rows in (64, 128, 256, 512, 1024):
        items = random_items(2 * rows, images=0.0, longest=12, seed=rows)
        pairs = {"queries": items[:rows], "targets": items[rows:],
                 "modality": torch.zeros(rows).long(), "target_keys": torch.arange(rows),
                 "positive_keys": [[i] for i in range(rows)]}

        def losses_of(states, _teacher_states, rows=rows):
            modality = torch.zeros(rows, dtype=torch.long, device=DEVICE)
            return {"loss": mac_loss(*states.chunk(2), modality, 0.03, 0.02)}

        batch = move(Batcher(student, Config(chunk_size=64))(pairs), DEVICE)

        def step(grad_cache, batch=batch, losses_of=losses_of):
            student.zero_grad(set_to_none=True)
            training_step(student, None, batch, losses_of, grad_cache)

        steps[rows] = step
        step(True)
        cached = peak_memory(partial(step, True))
        first = first or cached
        figure = f"peak {cached >> 20} MiB, {cached / first:.2f} times that of B = 64"
        if rows <= 256:
            figure += f"; one big batch {peak_memory(partial(step, False)) >> 20} MiB"
        line(f"GradCache, B = {rows}", figure, "<= 1.3 at B = 1024" if rows == 1024 else "")
    for rows in (64, 128, 256):
        times = seconds(partial(steps[rows], True), partial(steps[rows], False), runs=2)
        line(f"GradCache / one big batch, B = {rows}, time", f"{times[0] / times[1]:.2f}")


def bench_search():
    """Exact search in 1 M vectors against FAISS IndexFlatIP, if that is installed."""
    print()
    benchmark_search.compare(**benchmark_search.DEFAULTS, threads=torch.get_num_threads())


def main():
    parts = {"loss": bench_loss, "prune": bench_prune, "sort": bench_sort,
             "last_layer": bench_last_layer, "stage1": bench_stage1, "gradcache": bench_gradcache,
             "search": bench_search}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[[], *parts], help="default: all")
    chosen = parser.parse_args().parts or list(parts)
    print(f"torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads\n")
    print("| measured | figure | aim |\n|---|---|---|")
    model = None
    for name in chosen:
        if name in ("loss", "gradcache", "search"):
            parts[name]()
        else:
            model = model or random_model().eval()
            parts[name](model)


if __name__ == "__main__":
    main()
