"""Train PUMA: prune an MLLM, distil (stage 1), then MAC-Loss (stage 2); evaluate.

    python train.py                                                  # tiny-qwen2-vl, GlyphBEIR, CPU
    python train.py --model Qwen/Qwen2-VL-2B-Instruct --data /data/M-BEIR --keep-layers 12 \\
        --batch-size 600 --chunk-size 50 --lr 3e-4                   # one GPU

    stage 1:  L = (1 - w) * InfoNCE(tau = 0.05) + w * L_distill      w = 0.1 in the paper
    stage 2:  L = MAC-Loss(tau = 0.03, tau_hard(t))                  t = step / steps

The teacher of stage 1 is the unpruned model itself, frozen. Both losses act on the un-normalised
`[RET]` states of a batch of (query, target) pairs. Everything goes to `runs/puma-N`: config.json,
metrics.jsonl (one object a step), curves.png, checkpoints/, model/, results.json, gallery.png.
`--resume runs/puma-N` continues an interrupted run.

The loop is `train_stage`, one step is `training_step`, the losses are `stage_losses`.
Shapes: B pairs, so 2B items a step; D width.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import HfArgumentParser, get_cosine_schedule_with_warmup
from transformers.hf_argparser import HfArg

import evaluate
from data import Benchmark, TrainSet, duplicate_mask
from mac_loss import hard_temperature, mac_loss
from prune_distill import distill_loss, prune_layers
from puma import PUMA, to_device


@dataclass
class Config:
    """Every setting of a run, with its reason. The command line has one option for each."""

    model: str = HfArg(
        default="toy/tiny-qwen2-vl", help="MLLM to prune: folder or hub id (paper: Qwen2-VL-7B)"
    )
    data: str = HfArg(
        default=evaluate.DEFAULT_DATA, help="M-BEIR directory; GlyphBEIR is written there if absent"
    )
    out: str = HfArg(
        default="", help="run folder, must not exist; default: the next free runs/puma-N"
    )
    keep_layers: int = HfArg(
        default=4, help="first decoder layers to keep (paper: 12 of 28; here 4 of 8)"
    )
    keep_last: bool = HfArg(
        default=False, help="the last kept layer is the model's last (official comment)"
    )
    stage1_steps: int = HfArg(
        default=100, help="distillation steps; 0 skips stage 1 (paper: 2 epochs)"
    )
    stage2_steps: int = HfArg(default=400, help="MAC-Loss steps (paper: 2 epochs of M-BEIR)")
    batch_size: int = HfArg(default=128, help="pairs a step (paper: 288 and 600 over 4 GPUs)")
    chunk_size: int = HfArg(
        default=0,
        help="items a forward pass with GradCache, for any batch in the memory of a chunk; 0: off",
    )
    tasks_per_batch: int = HfArg(
        default=3, help="tasks in a batch, so that both kinds of negatives occur"
    )
    lr: float = HfArg(
        default=1e-3, help="peak learning rate (paper, LoRA: 2e-4 and 3e-4; here all weights)"
    )
    stage1_temperature: float = HfArg(
        default=0.05, help="InfoNCE temperature of stage 1 (paper: 0.05)"
    )
    temperature: float = HfArg(default=0.03, help="tau of stage 2 (paper: 0.03)")
    decay: float = HfArg(
        default=0.5, help="lambda: tau_hard falls to tau * exp(-lambda) (paper: 0.5)"
    )
    loss: Literal["mac", "infonce"] = HfArg(
        default="mac", help="loss of stage 2; infonce keeps tau_hard = tau"
    )
    positive_temperature: Literal["hard", "base"] = HfArg(
        default="hard", help="the positive's temperature (official: hard)"
    )
    mask_duplicates: bool = HfArg(
        default=True, help="other right targets are no negatives (official code: they are)"
    )
    teacher: str = HfArg(
        default="", help="teacher of stage 1; default: the unpruned model, as in the paper"
    )
    distill_weight: float = HfArg(default=0.1, help="w, share of L_distill in stage 1 (paper: 0.1)")
    distill_scale: float = HfArg(
        default=1.0, help="factor in L_distill (official code: 0.05; it hardly acts then)"
    )
    distill_modalities: Literal["all", "text"] = HfArg(
        default="all", help="text: only items without image, as official"
    )
    labels: int = HfArg(default=0, help="use only so many labelled queries; 0: all")
    warmup: float = HfArg(
        default=0.03, help="share of a stage's steps with rising learning rate (paper: 0.03)"
    )
    weight_decay: float = HfArg(default=0.0, help="AdamW weight decay (paper: 0)")
    max_visual_tokens: int = HfArg(
        default=300, help="image budget, tokens of 28 x 28 pixels (paper: 4 to 300)"
    )
    max_text_tokens: int = HfArg(default=450, help="instruction + text are cut there (paper: 450)")
    workers: int = HfArg(default=0, help="processes that prepare batches; on a GPU use 4 or more")
    checkpoint_every: int = HfArg(
        default=200, help="steps between checkpoints; the last two are kept"
    )
    seed: int = HfArg(default=0, help="batches, instructions and positives follow from it")
    resume: str = HfArg(
        default="", help="run folder to continue; the other options come from its config.json"
    )
    device: str = HfArg(default="", help="torch device; default: cuda if there is one")
    eval: bool = HfArg(default=True, help="evaluate at the end: MLLM, pruned MLLM and PUMA")


# ---- the method ----------------------------------------------------------------------------------


def stage_losses(states, teacher_states, batch, stage, progress, config):
    """(2B, D) states of queries then targets -> {"loss", "contrastive", "distill", "hard_temperature"}.

    `teacher_states` (2B, D) or None; `progress` in [0, 1] of this stage.
    """
    query, target = states.chunk(2)
    tau = config.stage1_temperature if stage == 1 else config.temperature
    tau_hard = tau
    if stage == 2 and config.loss == "mac":
        tau_hard = hard_temperature(tau, progress, config.decay)
    contrastive = mac_loss(
        query, target, batch["modality"], tau, tau_hard, duplicate=batch["duplicate"],
        positive_temperature=config.positive_temperature,
    )  # fmt: skip
    if teacher_states is None:
        return {
            "loss": contrastive,
            "contrastive": contrastive,
            "distill": None,
            "hard_temperature": tau_hard,
        }
    rows = batch["distilled"]  # all items, or those without an image
    # Query and target terms are added in the official code: twice the mean over all items.
    distill = 2 * config.distill_scale * distill_loss(states[rows], teacher_states[rows])
    w = config.distill_weight
    loss = (1 - w) * contrastive + w * distill
    return {
        "loss": loss,
        "contrastive": contrastive,
        "distill": distill,
        "hard_temperature": tau_hard,
    }


def training_step(student, teacher, batch, losses_of, grad_cache):
    """Embed 2B items chunk by chunk, compute the losses, leave gradients; -> losses.

    Chunks hold items of similar length, so that little is padding. With `grad_cache`, memory is that of
    one chunk (Gao et al. 2021): the loss L depends on the weights only through the states h, so
        dL/dweights = sum over chunks  (dL/dh_chunk) . (dh_chunk/dweights).
    The first factor needs all states but no graph; then each chunk is embedded again, with its graph,
    and pulls its part back. Costs a second forward pass. Dropout repeats its draws.
    """
    chunks, order = batch["chunks"], batch["order"]
    visuals = [
        student.visual_tokens(chunk) for chunk in chunks
    ]  # frozen tower: once for both models
    teacher_states = None
    if teacher is not None:
        with torch.no_grad():
            teacher_states = torch.cat([teacher(c, v) for c, v in zip(chunks, visuals)])[order]
    if not grad_cache:
        states = torch.cat([student(c, v) for c, v in zip(chunks, visuals)])
        losses = losses_of(states[order], teacher_states)
        losses["loss"].backward()
        return losses
    draws, parts = [], []
    with torch.no_grad():
        for chunk, visual in zip(chunks, visuals):
            draws.append(random_state())
            parts.append(student(chunk, visual))
    states = torch.cat(parts).requires_grad_()
    losses = losses_of(states[order], teacher_states)
    losses["loss"].backward()  # fills states.grad, dL/dh
    for chunk, visual, draw, grad in zip(
        chunks, visuals, draws, states.grad.split([len(p) for p in parts])
    ):
        with replayed(draw):
            student(chunk, visual).backward(grad)
    return losses


def train_stage(stage, student, teacher, loader, config, run, first=0):
    """Run the steps first..len of one stage."""
    steps = config.stage1_steps if stage == 1 else config.stage2_steps
    weights = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=config.lr, betas=(0.9, 0.98), eps=1e-7, weight_decay=config.weight_decay
    )  # fmt: skip
    schedule = get_cosine_schedule_with_warmup(optimizer, int(config.warmup * steps), steps)
    if first:
        run.load(student, optimizer, schedule)
    student.train()
    bar = tqdm(loader, initial=first, total=steps, desc=f"stage {stage}", unit="step")
    for step, batch in enumerate(bar, first):
        started = time.perf_counter()
        batch = move(batch, student.device)

        def losses_of(states, teacher_states, batch=batch, step=step):
            return stage_losses(states, teacher_states, batch, stage, step / steps, config)

        with run.counting_flops(), autocast(student.device):
            losses = training_step(student, teacher, batch, losses_of, bool(config.chunk_size))
        grad_norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

        run.log(bar, stage, step, losses, grad_norm, batch, started)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == steps or run.stopping:
            run.save(student, optimizer, schedule, stage, step + 1)
        if run.stopping:
            raise SystemExit(
                f"stopped after step {step + 1} of stage {stage}: python train.py --resume {run.folder}"
            )


# ---- batches -------------------------------------------------------------------------------------


class Batcher:
    """TrainSet's pairs -> what `training_step` takes; runs in the loader's worker processes."""

    def __init__(self, model, config):
        self.model, self.config = model, config

    def __call__(self, pairs):
        items = pairs["queries"] + pairs["targets"]
        order = sorted(range(len(items)), key=lambda i: self.model.length(items[i]))
        size = self.config.chunk_size or 64
        chunks = [
            self.model.collate([items[i] for i in order[s : s + size]])
            for s in range(0, len(items), size)
        ]
        duplicate = duplicate_mask(pairs["positive_keys"], pairs["target_keys"])
        text_only = self.config.distill_modalities == "text"
        return {
            "chunks": chunks,
            "order": torch.tensor(order).argsort(),  # back to queries, then targets
            "modality": pairs["modality"],
            "duplicate": duplicate if self.config.mask_duplicates else None,
            "masked_duplicates": int(duplicate.sum()) - len(duplicate)
            if self.config.mask_duplicates
            else 0,
            "distilled": torch.tensor([not (text_only and item["image"]) for item in items]),
        }


def move(batch, device):
    tensors = {k: v.to(device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
    return {**batch, **tensors, "chunks": [to_device(chunk, device) for chunk in batch["chunks"]]}


def make_loader(dataset, batcher, config, first):
    """Batches first.. of a TrainSet; the same ones whatever came before."""
    rest = Subset(dataset, range(first, len(dataset)))
    return DataLoader(rest, batch_size=None, collate_fn=batcher, num_workers=config.workers)


def random_state():
    return (
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    )


@contextlib.contextmanager
def replayed(state):
    """Inside, random draws repeat those made after `random_state()` was taken."""
    with torch.random.fork_rng():
        torch.set_rng_state(state[0])
        torch.cuda.set_rng_state_all(state[1]) if state[1] else None
        yield


def autocast(device):
    """bfloat16 matrix products on GPUs. (On the CPU at toy size, a prototype gained only 6 %.)"""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


# ---- the run folder ------------------------------------------------------------------------------


class Run:
    """A run's folder: metrics, checkpoints, curves; and its stop signals."""

    def __init__(self, folder, device):
        self.folder = Path(folder)
        self.checkpoints = self.folder / "checkpoints"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.metrics_path = self.folder / "metrics.jsonl"
        self.peak, self.flops_per_item, self.stopping = measure_peak(device), None, False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def _stop(self, *_):
        self.stopping = True  # the current step is finished and saved

    @contextlib.contextmanager
    def counting_flops(self):
        """Counts the operations of the first step (torch counts them, forward and backward)."""
        if self.flops_per_item is not None:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self.flops_per_item = counter.get_total_flops()  # of the step; `log` divides by its items

    def log(self, bar, stage, step, losses, grad_norm, batch, started):
        """One line in metrics.jsonl, and the progress bar."""
        count = len(batch["order"])
        if step == 0 or self.flops_per_item > 1e15 or not hasattr(self, "items"):
            self.items = count
        row = {"stage": stage, "step": step + 1}
        row |= {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in losses.items()}
        row |= {"grad_norm": grad_norm.item(), "masked_duplicates": batch["masked_duplicates"]}
        row["samples_per_s"] = count / (time.perf_counter() - started)
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        mfu = self.flops_per_item / self.items * row["samples_per_s"] / self.peak
        bar.set_postfix(
            loss=f"{row['loss']:.3f}", samples_s=f"{row['samples_per_s']:.0f}", mfu=f"{mfu:.0%}"
        )

    def save(self, student, optimizer, schedule, stage, step):
        """checkpoints/<stage>-<step>: trainable weights (safetensors), optimizer; renamed when whole."""
        name = f"stage{stage}-step{step:06d}"
        temporary = self.checkpoints / f"{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_file(
            {n: p.detach() for n, p in student.named_parameters() if p.requires_grad},
            temporary / "model.safetensors",
        )
        torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                    "random": torch.get_rng_state()}, temporary / "optimizer.pt")  # fmt: skip
        shutil.rmtree(self.checkpoints / name, ignore_errors=True)
        temporary.rename(self.checkpoints / name)
        for old in self.saved()[:-2]:
            shutil.rmtree(old)

    def saved(self):
        """Checkpoint folders, oldest first."""
        return sorted(self.checkpoints.glob("stage?-step??????"))

    def position(self):
        """(stage, steps done) of the last checkpoint; (1, 0) if there is none."""
        if not self.saved():
            return 1, 0
        name = self.saved()[-1].name
        return int(name[5]), int(name[-6:])

    def load(self, student, optimizer=None, schedule=None):
        """Continue from the last checkpoint; later lines of metrics.jsonl are dropped."""
        folder = self.saved()[-1]
        student.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        if optimizer is not None:
            state = torch.load(folder / "optimizer.pt", weights_only=True)
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            torch.set_rng_state(state["random"])

    def forget_after(self, stage, step):
        """Drop the lines of metrics.jsonl that come after the checkpoint: those steps are repeated."""
        if self.metrics_path.exists():
            lines = self.metrics_path.read_text(encoding="utf-8").splitlines(keepends=True)
            done = [line for line in lines if line.endswith("\n")]
            kept = [
                r for r in done if (json.loads(r)["stage"], json.loads(r)["step"]) <= (stage, step)
            ]
            self.metrics_path.write_text("".join(kept), encoding="utf-8")

    def draw_curves(self):
        """curves.png: losses and tau_hard over the steps of both stages."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        rows = [json.loads(line) for line in self.metrics_path.open(encoding="utf-8")]
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
        for key, colour in (("contrastive", "tab:blue"), ("distill", "tab:orange")):
            points = [(i, r[key]) for i, r in enumerate(rows, 1) if r[key] is not None]
            if points:
                left.plot(*zip(*points), color=colour, label=f"{key} loss", linewidth=1)
        right.plot([r["hard_temperature"] for r in rows], color="tab:red", label="hard temperature")
        change = sum(r["stage"] == 1 for r in rows)
        for axis in (left, right):
            if change:
                axis.axvline(change, color="0.6", linestyle=":", label="stage 2 begins")
            axis.set_xlabel("step")
            axis.set_ylim(bottom=0)
            axis.legend()
        left.set_ylabel("loss (nats; squared distance)")
        right.set_ylabel("temperature")
        figure.tight_layout()
        figure.savefig(self.folder / "curves.png", dpi=90)
        plt.close(figure)


def measure_peak(device, size=2048):
    """Floating-point operations a second of a large matrix product: the machine's practical peak."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


# ---- main ----------------------------------------------------------------------------------------


def load_models(config, device):
    """(student, teacher or None). Frozen parts of the same checkpoint are shared, not held twice."""
    limits = {
        "max_visual_tokens": config.max_visual_tokens,
        "max_text_tokens": config.max_text_tokens,
    }
    student = load_student(config, device)
    if not config.stage1_steps or not config.distill_weight:
        return student, None
    teacher = PUMA.from_pretrained(config.teacher or config.model, device=device, **limits)
    own, other = student.backbone.visual.state_dict(), teacher.backbone.visual.state_dict()
    if own.keys() != other.keys() or not all(
        torch.equal(own[k], other[k].to(own[k].dtype)) for k in own
    ):
        raise ValueError(
            f"--teacher {config.teacher} has another vision tower than --model {config.model}"
        )
    teacher.backbone.visual = student.backbone.visual
    return student, teacher.requires_grad_(False).eval()


def load_student(config, device):
    """The pruned model, float32: it is trained."""
    limits = {
        "max_visual_tokens": config.max_visual_tokens,
        "max_text_tokens": config.max_text_tokens,
    }
    keep = None if config.keep_last else config.keep_layers
    student = PUMA.from_pretrained(config.model, keep, device=device, dtype=torch.float32, **limits)
    return (
        prune_layers(student, config.keep_layers, keep_last=True) if config.keep_last else student
    )


def compare(config, student, run, device):
    """Evaluate (a) the untrained MLLM, (b) the pruned one, untrained, (c) PUMA; print and write it all."""
    benchmark = Benchmark(config.data)
    cells = evaluate.split_cells(benchmark, "test")
    full = PUMA.from_pretrained(
        config.model, device=device, max_visual_tokens=config.max_visual_tokens
    )
    pruned = load_student(config, device)

    def both(batch):  # they share the visual tokens
        visual = full.visual_tokens(batch)
        return torch.stack([full(batch, visual), pruned(batch, visual)])

    print("evaluating the untrained MLLM, whole and pruned ...", flush=True)
    untrained = evaluate.Embedded(
        benchmark, cells, "test", lambda items: full.encode(items, forward=both)
    )
    print("evaluating PUMA ...", flush=True)
    trained = evaluate.Embedded(benchmark, cells, "test", student.encode)
    columns = {
        "MLLM": evaluate.score(untrained, cells, depth=0),
        "pruned MLLM": evaluate.score(untrained, cells, depth=1),
        "PUMA": evaluate.score(trained, cells),
    }
    for name, model in (("MLLM", full), ("pruned MLLM", pruned), ("PUMA", student)):
        columns[name]["efficiency"] = evaluate.efficiency(
            model, [i for cell in cells for i in cell.items[:64]]
        )
    print(evaluate.table(columns))
    results = columns["PUMA"]
    results["baselines"] = {"full": columns["MLLM"], "pruned": columns["pruned MLLM"]}
    results["settings"] = asdict(config)
    evaluate.write_trec(run.folder / "trec", trained, cells)
    evaluate.draw_gallery(run.folder / "gallery.png", evaluate.gallery_rows(trained, cells))
    evaluate.write_json(run.folder / "results.json", results)


def prepare(config):
    """Check the config, make or reopen the run folder; -> (config, folder)."""
    if config.resume:
        path = Path(config.resume) / "config.json"
        if not path.is_file():
            raise ValueError(f"--resume {config.resume}: expected the file {path}")
        return Config(**json.loads(path.read_text(encoding="utf-8"))), Path(config.resume)
    for name in (
        "keep_layers",
        "stage2_steps",
        "batch_size",
        "tasks_per_batch",
        "checkpoint_every",
    ):
        if getattr(config, name) < (0 if name == "stage2_steps" else 1):
            raise ValueError(
                f"--{name.replace('_', '-')} must be positive, got {getattr(config, name)}"
            )
    if config.out and Path(config.out).exists():
        raise ValueError(
            f"--out {config.out} exists: choose another folder, or continue it with --resume"
        )
    number = 1
    while not config.out and Path(f"runs/puma-{number}").exists():
        number += 1
    return config, Path(config.out or f"runs/puma-{number}")


def main(arguments=None):
    (config,) = HfArgumentParser(
        Config, description=__doc__.split("\n")[0]
    ).parse_args_into_dataclasses(arguments)
    config, folder = prepare(config)
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(config.seed)
    evaluate.ensure_data(config.data)
    benchmark = Benchmark(config.data, config.seed)
    student, teacher = load_models(config, device)
    batcher = Batcher(student, config)
    sets = {}
    for stage, steps in ((1, config.stage1_steps), (2, config.stage2_steps)):
        sets[stage] = TrainSet(benchmark, config.batch_size, steps, config.tasks_per_batch,
                               seed=2 * config.seed + stage, labels=config.labels or None)  # fmt: skip

    run = Run(folder, device)  # from here on there is a folder; bad arguments have left none
    evaluate.write_json(folder / "config.json", asdict(config))
    print(
        f"run folder {folder}; {device}, {run.peak / 1e9:.0f} GFLOP/s in a large matrix product",
        flush=True,
    )
    stage, first = run.position()
    run.forget_after(stage, first)
    if stage == 2 and first == 0 or first:
        run.load(student)
    for current in (1, 2):
        if current >= stage:
            skip = first if current == stage else 0
            if skip < len(sets[current]):
                loader = make_loader(sets[current], batcher, config, skip)
                train_stage(
                    current, student, teacher if current == 1 else None, loader, config, run, skip
                )
        teacher = None  # stage 2 works without it: free the memory
    run.draw_curves()
    student.save_pretrained(folder / "model")
    print(f"wrote {folder / 'model'} and {folder / 'curves.png'}")
    if config.eval:
        compare(config, student, run, device)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
