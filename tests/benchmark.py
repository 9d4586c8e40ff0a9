"""Speed and memory, measured in one run on this machine: a script, not a test.

    python tests/benchmark.py loss search       # or all but scale and loader: 12 minutes, two cores
    python tests/benchmark.py scale --out DIR   # data.py at M-BEIR's size: 3 GB, written once
    python tests/benchmark.py sentence_transformers       # against that library, if it is installed

Prints one line a comparison: what is compared, the ratio, the aim. A time is the median of several
calls, the two sides in turn, so that a slow minute of the machine hits both. Memory is the GPU's
where there is one, else the process's (on Linux). The model has random weights and Qwen2-VL-2B's
proportions (28 layers, a vision tower with half of the decoder's weights) at a third of its width,
so that arithmetic dominates.
"""

import argparse
import contextlib
import copy
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from gpu_check import build, free_for_real, peak_memory, ready_batch, seconds_of
from PIL import Image

import puma
from data import Benchmark, TrainSet
from evaluate import ensure_data
from mac_loss import mac_loss
from prune_distill import prune_layers
from settings import Config
from support.index import search
from support.run import count_flops
from train import Batcher, large_batch_step, plain_step, stage_losses

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
THIRD = (512, 2944, 4, 1, 2048, (32, 448, 7), 28)  # as in gpu_check.SHAPES
SMALL = (256, 1472, 2, 1, 2048, (1, 256, 4), 4)  # for GradCache: the batch should take the memory
WORDS = "latin small capital letter with acute grave arrow black white chess sign of and".split()


def line(what, figure, aim=""):
    print(f"| {what} | {figure} | {aim} |", flush=True)


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


def bench_loss(rows=4096, width=1536):
    """MAC-Loss against InfoNCE by cross_entropy, forward and backward."""
    modality = torch.randint(0, 3, (rows,), device=DEVICE)

    def infonce(query, target):
        logits = F.normalize(query, dim=-1) @ F.normalize(target, dim=-1).T / 0.03
        F.cross_entropy(logits, torch.arange(rows, device=DEVICE)).backward()

    def mac(query, target, kinds=3):
        mac_loss(query, target, modality % kinds, 0.03, 0.02).backward()

    losses = {"InfoNCE": infonce, "MAC-Loss": mac, "MAC-Loss, one modality": partial(mac, kinds=1)}
    wide, narrow = ([torch.randn(rows, size, device=DEVICE, requires_grad=True) for _ in "qt"]
                    for size in (width, 8))
    plain, three, one = seconds_of(*(partial(loss, *wide) for loss in losses.values()), runs=7)
    line(f"MAC-Loss / InfoNCE, time, B = N = {rows}, D = {width}",
         f"{three / plain:.2f}, one modality {one / plain:.2f}", "<= 1.5")
    for name, loss in losses.items():
        loss(*narrow)  # so that only the (B, N) matrices count
        peak = peak_memory(partial(loss, *narrow), DEVICE) / (4 * rows * rows)
        line(f"{name}, peak memory in B x N float32 matrices", f"{peak:.2f}")


@torch.no_grad()
def bench_prune(model, keep=12):
    """Encoding with the first 12 of 28 layers against all, beside the ratio of operations."""
    models = model, prune_layers(copy.deepcopy(model), keep)
    for name, images in (("texts", 0.0), ("half with image", 0.5)):
        items = random_items(32, images)
        batch = puma.to_device(model.collate(items), DEVICE)
        full, cut = (count_flops(partial(m, batch)) for m in models)
        slow, fast = seconds_of(*(partial(m.encode, items, show_progress=False) for m in models))
        line(f"encode, {keep} layers against 28, {name}: speed-up / FLOP ratio",
             f"{slow / fast:.2f} / {full / cut:.2f} = {slow / fast * cut / full:.2f}", ">= 0.9")


@torch.no_grad()
def bench_sort(model):
    """Encoding mixed items sorted by length against input order: captions, images, passages."""
    items = random_items(56, images=0.3, longest=15) + random_items(8, images=0.0, longest=200)
    random.Random(0).shuffle(items)
    encode = partial(model.encode, batch_size=16, show_progress=False)
    slow, fast = seconds_of(lambda: [encode(items[i : i + 16]) for i in range(0, len(items), 16)],
                            lambda: encode(items))
    line("encode mixed items, input order / sorted by length, time", f"{slow / fast:.2f}", ">= 1.5")


@torch.no_grad()
def bench_last_layer(model, keep=12):
    """The last layer for [RET] alone against all positions."""
    cut = prune_layers(copy.deepcopy(model), keep)
    batch = puma.to_device(cut.collate(random_items(32, images=0.0)), DEVICE)
    run = partial(cut, batch)
    plain = mock.patch.object(puma, "_last_token_only", contextlib.nullcontext)(lambda: run())
    slow, fast = seconds_of(plain, run, runs=7)
    line(f"forward pass of {keep} layers, last one plain / for [RET] only, time",
         f"{slow / fast:.3f}", f"{keep / (keep - 1):.3f} = a whole layer")


def bench_stage1(model, keep=12):
    """A step of stage 1 here against the official code's way of computing the same losses."""
    student, config = prune_layers(copy.deepcopy(model), keep), Config(chunk_size=4)
    student.backbone.visual = model.requires_grad_(False).backbone.visual
    items = random_items(16, longest=12)  # captions, half of them with an image of 4 to 36 tokens
    batch = ready_batch(student, config, items[:8], items[8:])
    after = student.tokenize([".<|im_end|>\n"], special=True)[0]  # row 12: computed and ignored
    sides = []  # queries, targets: each padded as it comes
    for part in (items[:8], items[8:]):
        tails = [[*model.summary_tail(item), *after] for item in part]
        side = puma.to_device(model.collate(part, tails), DEVICE)
        sides.append({"image_grid_thw": side.pop("grid_thw"), "use_cache": False, **side})

    def official():
        with torch.no_grad():  # row 9: all its hidden states stay alive, and its own tower runs
            taught = [model.backbone(**side, output_hidden_states=True) for side in sides]
        learnt = [student.backbone(**side) for side in sides]
        states = [torch.cat([out.last_hidden_state[:, -1 - len(after)] for out in outs])
                  for outs in (learnt, taught)]
        stage_losses(*states, batch, 1, 0.0, config)["loss"].backward()

    ours = partial(plain_step, student, model, batch, 1, 0.0, config)
    slow, fast = seconds_of(official, ours)
    line("stage-1 step, official way / here, time", f"{slow / fast:.2f}", ">= 1.4")
    more, less = peak_memory(official, DEVICE), peak_memory(ours, DEVICE)
    line("stage-1 step, official way / here, peak memory", f"{more / less:.2f}")


def bench_gradcache(sizes=(64, 128, 256, 512, 1024)):
    """GradCache in chunks of 64 items against one big batch, B pairs of short texts."""
    student, config = build(SMALL, SMALL[-1], DEVICE, torch.float32), Config(chunk_size=64)
    free_for_real(1 << 16)  # from the start: what the timings leave in malloc's hands would count

    def step(step_of, batch):
        student.zero_grad(set_to_none=True)
        step_of(student, None, batch, 2, 0.5, config)

    steps, first = {}, None
    for rows in sizes:
        items = random_items(2 * rows, images=0.0, longest=12, seed=rows)
        batch = ready_batch(student, config, items[:rows], items[rows:])
        cached, plain = (partial(step, s, batch) for s in (large_batch_step, plain_step))
        steps[rows] = cached, plain
        cached()
        peak = peak_memory(cached, DEVICE)
        first = first or peak
        figure = f"peak {peak >> 20} MiB, {peak / first:.2f} times that of B = {sizes[0]}"
        if rows <= 256:
            figure += f"; one big batch {peak_memory(plain, DEVICE) >> 20} MiB"
        line(f"GradCache, B = {rows}", figure, "<= 1.3 at B = 1024" if rows == 1024 else "")
    for rows in sizes[:3]:
        slow, fast = seconds_of(*steps[rows], runs=2)
        line(f"GradCache / one big batch, B = {rows}, time", f"{slow / fast:.2f}")


def bench_search(rows=1_000_000, width=1536, queries=1000, k=10):
    """Exact search in a memory map of float16 vectors; FAISS has them in memory, as float32."""
    probes, found = F.normalize(torch.randn(queries, width), dim=-1), {}
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        pool = np.lib.format.open_memmap(file.name, "w+", np.float16, (rows, width))
        parts = [pool[start : start + 50_000] for start in range(0, rows, 50_000)]
        for part in parts:
            part[:] = F.normalize(torch.randn(part.shape), dim=-1).half().numpy()
        ways = {"here": partial(search, probes, torch.from_numpy(pool), k)}
        if importlib.util.find_spec("faiss"):
            index = importlib.import_module("faiss").IndexFlatIP(width)
            for part in parts:
                index.add(part.astype(np.float32))
            ways["FAISS"] = partial(index.search, probes.numpy(), k)
        for name, took in zip(ways, seconds_of(*ways.values(), runs=2)):
            found[name] = np.asarray(ways[name]()[1])
            line(f"search {rows:,} x {width}, {queries:,} queries, top {k}: {name}",
                 f"{took:.2f} s, {2e-9 * rows * width * queries / took:.0f} GFLOP/s, results as "
                 f"here: {(found[name] == found['here']).mean():.2%}")


STEPS = """
import statistics, sys, time
from data import Benchmark, TrainSet
from puma import PUMA
from settings import Config
from support.run import autocast
from train import Batcher, plain_step
config = Config()
batches = TrainSet(Benchmark(config.data), config.batch_size, steps=4)
student = PUMA.from_pretrained(config.model, keep_layers=config.keep_layers).train()
ready = [Batcher(student, config)(batches[step]) for step in range(4)]
took, end = [], time.perf_counter() + float(sys.argv[1])
while time.perf_counter() < end:
    started = time.perf_counter()
    with autocast(student.device):
        plain_step(student, None, ready[len(took) % 4], 2, 0.5, config)
    took.append(time.perf_counter() - started)
print(2 * config.batch_size / statistics.median(took))
"""
JOB = "import torch\na = torch.randn(2048, 2048)\nwhile True: a @ a"


def bench_busy(seconds=15):
    """The default run's steps, alone and beside a job with a thread a core, by how long OpenMP's
    threads spin: 300,000 rounds is libgomp's own default, 1,250 is ours."""
    ensure_data(Config().data)
    for spin in ("300000", "1250", "0"):
        rates = []
        for beside in (False, True):
            job = beside and subprocess.Popen([sys.executable, "-c", JOB],
                                              env=os.environ | {"GOMP_SPINCOUNT": "300000"})
            try:
                done = subprocess.run([sys.executable, "-c", STEPS, str(seconds)], text=True,
                                      env=os.environ | {"GOMP_SPINCOUNT": spin, "PYTHONPATH": "."},
                                      stdout=subprocess.PIPE, check=True)
            finally:
                if job:
                    job.kill()
            rates.append(float(done.stdout))
        alone, busy = rates
        line(f"training, items a second alone and beside a job, spin {spin}",
             f"{alone:.0f} and {busy:.0f}: 1 / {alone / busy:.2f}", ">= 1 / 2.5")


def page_module(model):
    """docs/serving.md's sentence-transformers model, its very code: it embeds item by item."""
    page = (Path(__file__).parent.parent / "docs/serving.md").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        model.save_pretrained(f"{folder}/model")
        Image.new("RGB", (56, 56)).save(f"{folder}/my_glyph.png")
        names = {}
        for block in re.findall(r"```python\n(.*?)```", page, re.S):
            block = block.replace("runs/puma-1/model", f"{folder}/model")
            exec(block.replace("my_glyph.png", f"{folder}/my_glyph.png"), names)
    return names["model_st"]


def batched_module(model):
    """What one would write for training with sentence-transformers: batches, and gradients."""
    base = importlib.import_module("sentence_transformers.base.modules")

    class Batched(base.InputModule):
        modalities = ["text", "image", ("image", "text"), "message"]

        def __init__(self):
            super().__init__()
            self.puma = model

        def preprocess(self, inputs, prompt=None, **_):
            batch = self.puma.collate(inputs)
            # A mini-batch leaves out padding that it does not need, but only on the right.
            ids, mask = batch["input_ids"], batch["attention_mask"]
            order = (torch.arange(ids.shape[1]) - mask.sum(1, keepdim=True)) % ids.shape[1]
            places = batch["position_ids"].transpose(0, 1)  # (B, 3, L): it slices the first axis
            out = {"input_ids": ids.gather(1, order), "attention_mask": mask.gather(1, order),
                   "position_ids": places.gather(2, order[:, None].expand(-1, 3, -1))}
            if "grid_thw" in batch:
                counts = [int(bool(item.get("image"))) for item in inputs]
                out |= {"pixel_values": batch["pixel_values"], "image_grid_thw": batch["grid_thw"],
                        "num_images_per_sample": torch.tensor(counts)}
            return out

        def forward(self, features):
            inputs, last = dict(features), features["attention_mask"].sum(1) - 1
            inputs.pop("num_images_per_sample", None)
            places = features["position_ids"][..., : features["input_ids"].shape[1]]
            inputs["position_ids"] = places.transpose(0, 1)
            states = self.puma.backbone(**inputs, use_cache=False).last_hidden_state  # (B, L, D)
            return {"sentence_embedding": states[torch.arange(len(last)), last]}

        def save(self, *_, **__):
            raise NotImplementedError

    return importlib.import_module("sentence_transformers").SentenceTransformer(
        modules=[Batched()], device="cpu")


def trainer(model, batches, gradient):
    """-> a function that does an optimizer step on each batch; it returns the first's loss."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.0)  # 0: losses stay comparable

    def train():
        found = []
        for batch in batches:
            optimizer.zero_grad()
            found.append(gradient(batch))
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
        return found[0]

    return train


def bench_sentence_transformers(steps=4, encoded=1024, sizes=(32, 64, 128)):
    """Whole training steps, the reading of images included, and encoding of images in memory
    against that library, on a CPU: the default run's model and batches, float32; with gradient
    caching, the best mini-batch of each."""
    if not importlib.util.find_spec("sentence_transformers"):
        return line("sentence-transformers", "not installed")
    losses = importlib.import_module("sentence_transformers.sentence_transformer.losses")
    config = Config(loss="infonce", mask_duplicates=False)
    ensure_data(config.data)
    batches = TrainSet(Benchmark(config.data), config.batch_size, steps, config.tasks_per_batch)
    batches = [batches[step] for step in range(steps)]
    model = puma.PUMA.from_pretrained(config.model, keep_layers=config.keep_layers)
    theirs = batched_module(copy.deepcopy(model))

    def here(chunk_size=0):
        config = Config(loss="infonce", mask_duplicates=False, chunk_size=chunk_size)
        batcher, step_of = Batcher(model, config), large_batch_step if chunk_size else plain_step
        return trainer(model, batches, lambda batch: step_of(
            model, None, batcher(batch), 2, 0.5, config)["loss"].item())

    def there(loss):
        def gradient(batch):
            columns = [theirs[0].preprocess(batch[side]) for side in ("queries", "targets")]
            value = loss(columns, None)
            value.backward()
            return value.item()

        return trainer(theirs, batches, gradient)

    what, scale = "sentence-transformers / here, time", 1 / config.temperature
    plain = there(losses.MultipleNegativesRankingLoss(theirs, scale=scale)), here()
    one, other = (train() for train in plain)
    assert abs(one - other) < 1e-3 * other, (one, other)  # the same loss of the same batch
    slow, fast = seconds_of(*plain)
    rate = config.batch_size * steps / fast
    line(f"{what}: steps of {config.batch_size} pairs, MultipleNegativesRankingLoss",
         f"{slow / fast:.2f}, here {rate:.0f} pairs/s", ">= 1.2")
    cached = [there(losses.CachedMultipleNegativesRankingLoss(
        theirs, scale=scale, mini_batch_size=size)) for size in sizes]
    took = seconds_of(*cached, *map(here, sizes))
    slow, fast = (dict(zip(sizes, part)) for part in (took[: len(sizes)], took[len(sizes) :]))
    one, other = min(slow, key=slow.get), min(fast, key=fast.get)
    line(f"{what}: CachedMultipleNegativesRankingLoss, best mini-batch / best --chunk-size",
         f"{slow[one] / fast[other]:.2f} ({one} / {other})", ">= 1.2")

    items = [item for batch in batches for item in batch["queries"] + batch["targets"]][:encoded]
    parts = [{"text": "\n".join(filter(None, (item.get("instruction"), item["text"]))),
              "image": item["image"] and Image.open(item["image"]).copy()} for item in items]
    items = [{kind: part for kind, part in item.items() if part} for item in parts]
    ways = [partial(found.encode, items, batch_size=64, normalize_embeddings=True)
            for found in (page_module(model), theirs)]
    ways.append(partial(model.encode, items, show_progress=False))
    for found in ways[:2]:
        assert np.allclose(found(), ways[2](), atol=1e-4)
    *slow, fast = seconds_of(*ways)
    for name, took in zip(("the module of docs/serving.md", "a module that embeds batches"), slow):
        line(f"{what}: encode {len(items):,} items, {name}",
             f"{took / fast:.2f}, here {len(items) / fast:.0f} items/s", ">= 1.2")


def bench_scale(folder, queries, candidates, steps=4000):
    """Open a training set of M-BEIR's size as train.py does, get its first batch of 600 pairs."""
    if not folder.exists():
        write_m_beir(folder, queries, candidates)

    def first_batch():
        started = time.perf_counter()
        batches = TrainSet(Benchmark(folder), 600, steps)
        opened = time.perf_counter() - started
        pairs = len(batches[0]["queries"])
        line(f"{len(batches.queries):,} queries, {len(batches.pool):,} candidates: start-up, "
             f"batch of {pairs}", f"{opened:.1f} s, {time.perf_counter() - started - opened:.1f} s")

    peak = peak_memory(first_batch, torch.device("cpu"))
    line("the same, peak memory, without Python and torch", f"{peak / 2**30:.2f} GiB")


def write_m_beir(root, queries, candidates):
    """The files that training needs, lines as long as the real ones; each query comes twice."""
    rng = random.Random(0)
    for name, prefix, count, words in (
            ("query/union_train/mbeir_union_up_train.jsonl", "query_", queries, 7),
            ("cand_pool/global/mbeir_union_train_cand_pool.jsonl", "", candidates, 25)):
        (root / name).parent.mkdir(parents=True)
        with (root / name).open("w") as file:
            for n in range(count):
                text = "an old red house by the sea " * rng.randrange(1, words)
                row = {f"{prefix}txt": text, f"{prefix}img_path": f"mbeir_images/oven/{n}.jpg",
                       f"{prefix}modality": "image,text", f"{prefix}src_content": None}
                dids = [f"5:{rng.randrange(candidates)}" for _ in range(8 if prefix else 0)]
                lists = {"qid": f"5:{n // 2}", "pos_cand_list": dids[:2], "neg_cand_list": dids[2:]}
                file.write(json.dumps(row | (lists if prefix else {"did": f"5:{n}"})) + "\n")
    (root / "instructions").mkdir()
    (root / "instructions/query_instructions.tsv").write_text(
        "header\nimage,text\timage,text\tOVEN\t5\tFind it.\n")


def bench_loader(batch_size=128):
    """Batches a second by worker processes, the toy model's steps a second on them; photos."""
    config = Config(batch_size=batch_size)
    ensure_data(config.data)
    batches = TrainSet(Benchmark(config.data), batch_size, steps=20)
    student = puma.PUMA.from_pretrained(config.model, keep_layers=config.keep_layers).train()
    for workers in (0, 1, 2):
        ready = iter(torch.utils.data.DataLoader(batches, batch_size=None, num_workers=workers,
                                                 collate_fn=Batcher(student, config)))
        batch, started = next(ready), time.perf_counter()  # the workers have started
        rate = sum(1 for _ in ready) / (time.perf_counter() - started)
        line(f"loader, {workers} workers, batches of {batch_size} pairs", f"{rate:.1f} a second")
    (took,) = seconds_of(partial(plain_step, student, None, batch, 2, 0.5, config))
    line("model, stage 2, without optimizer", f"{1 / took:.1f} steps a second")
    student.image_processor.size = {"shortest_edge": 4 * 28**2, "longest_edge": 300 * 28**2}
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        Image.effect_noise((500, 375), 60).convert("RGB").save(file.name)
        (took,) = seconds_of(partial(student.collate, [{"image": file.name}] * 32))
    line("JPEG files of 500 x 375 pixels, one process", f"{32 / took:.0f} a second")


def main():
    parts = {name[6:]: part for name, part in globals().items() if name.startswith("bench_")}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[[], *parts], help="default: all but two")
    parser.add_argument("--out", type=Path, default=Path("data/scale"), help="scale's directory")
    parser.add_argument("--queries", type=int, default=1_300_000, help="lines that scale writes")
    parser.add_argument("--candidates", type=int, default=5_600_000, help="the same of its pool")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads\n")
    print("| measured | figure | aim |\n|---|---|---|")
    torch.manual_seed(0)
    for name in args.parts or list(parts)[:-2]:
        given = (args.out, args.queries, args.candidates) if name == "scale" else ()
        if name in ("prune", "sort", "last_layer", "stage1"):
            given = (build(THIRD, THIRD[-1], DEVICE, torch.float32).eval(),)
        parts[name](*given)


if __name__ == "__main__":
    main()
