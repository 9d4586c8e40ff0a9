"""Train PUMA: prune an MLLM, distil (stage 1), MAC-Loss (stage 2), evaluate.

    python train.py                                                  # tiny-qwen2-vl, GlyphBEIR, CPU
    python train.py --model Qwen/Qwen2-VL-2B-Instruct --data /data/M-BEIR --keep-layers 12 \\
        --batch-size 600 --chunk-size 50                             # one GPU

    stage 1:  L = (1 - w) * InfoNCE(tau = 0.05) + w * L_distill      w = 0.1 in the paper
    stage 2:  L = MAC-Loss(tau = 0.03, tau_hard(t))                  t = step / steps

The teacher of stage 1 is the unpruned model itself, frozen. Both losses act on the un-normalised
`[RET]` states of a batch of (query, target) pairs. Everything goes to the run folder `runs/puma-N`:
config.json, metrics.jsonl (one object a step), curves.png, checkpoints/, model/ (an ordinary
transformers folder), results.json, gallery.png. `--resume runs/puma-N` continues a stopped run.

Read `train_stage` (the loop), `training_step` (one step), `stage_losses` (the formulas).
Shapes: B pairs, hence 2B items a step; D width.
"""

import contextlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import HfArgumentParser, get_cosine_schedule_with_warmup
from transformers.hf_argparser import HfArg

import evaluate
from data import Benchmark, TrainSet, duplicate_mask
from mac_loss import hard_temperature, mac_loss
from pictures import draw_curves, draw_gallery
from prune_distill import distill_loss, layer_embeddings, prune_layers
from puma import PUMA, to_device
from run import Run, pick_device


def arg(default, why):
    return HfArg(default=default, help=why)


@dataclass
class Config:
    """Every setting of a run, with its reason; the command line has one option for each."""

    model: str = arg("toy/tiny-qwen2-vl", "MLLM to prune: folder or hub id (paper: Qwen2-VL-7B)")
    data: str = arg(evaluate.DEFAULT_DATA, "M-BEIR directory; GlyphBEIR is written there if absent")
    out: str = arg("", "run folder, must not exist; default: the next free runs/puma-N")
    keep_layers: int = arg(4, "decoder layers to keep (paper: 12 of 28; here: 4 of 8)")
    keep_last: bool = arg(False, "keep layers 1..k-1 and the last (a comment of the official code)")
    stage1_steps: int = arg(40, "distillation steps; 0 skips stage 1 (paper: 2 epochs)")
    stage2_steps: int = arg(320, "steps of stage 2 (paper: 2 epochs of M-BEIR)")
    batch_size: int = arg(128, "pairs a step (paper: 288 in stage 1, 600 in stage 2, on 4 GPUs)")
    chunk_size: int = arg(0, "GradCache: items a forward pass, whatever the batch size; 0: off")
    tasks_per_batch: int = arg(3, "tasks in a batch, several so that both kinds of negatives occur")
    lr: float = arg(2e-3, "peak learning rate (paper, LoRA: 2e-4, 3e-4; here all weights, tiny)")
    warmup: float = arg(0.03, "share of a stage's steps with rising learning rate (paper: 0.03)")
    weight_decay: float = arg(0.0, "AdamW's weight decay (paper: 0)")
    stage1_temperature: float = arg(0.05, "InfoNCE temperature of stage 1 (paper: 0.05)")
    temperature: float = arg(0.03, "tau of stage 2 (paper: 0.03)")
    decay: float = arg(0.5, "lambda: tau_hard falls to tau * exp(-lambda) (paper: 0.5)")
    loss: Literal["mac", "infonce"] = arg("mac", "stage 2; infonce keeps tau_hard = tau")
    positive_temperature: Literal["hard", "base"] = arg("hard", "positive's tau (official: hard)")
    mask_duplicates: bool = arg(True, "another right target is no negative (official: it is one)")
    teacher: str = arg("", "teacher of stage 1; default: the unpruned model, as in the paper")
    distill_weight: float = arg(0.1, "w: share of L_distill in stage 1 (paper: 0.1)")
    distill_scale: float = arg(1.0, "factor in L_distill (official: 0.05, too little to act here)")
    distill_modalities: Literal["all", "text"] = arg("all", "text: items without image (official)")
    labels: int = arg(0, "use only so many labelled queries, to study few labels; 0: all")
    max_visual_tokens: int = arg(300, "image budget, tokens of 28 x 28 pixels (paper: 300)")
    max_text_tokens: int = arg(450, "instruction + text are cut there (paper: 450)")
    workers: int = arg(1, "processes that prepare batches; on a GPU 4 or more keep ahead of it")
    checkpoint_every: int = arg(200, "steps between checkpoints; the last two are kept")
    seed: int = arg(0, "batches, instructions and choice of positives follow from it")
    resume: str = arg("", "run folder to continue; all else comes from its config.json")
    device: str = arg("", "torch device; default: cuda if there is one")
    eval: bool = arg(True, "evaluate at the end: the MLLM, the pruned MLLM and PUMA")


# ---- the method ----------------------------------------------------------------------------------


def stage_losses(states, teacher_states, batch, stage, progress, config):
    """States (2B, D) of queries, then targets -> loss, contrastive, distill, hard_temperature.

    `teacher_states` (2B, D) or None; `progress` in [0, 1] of this stage.
    """
    query, target = states.chunk(2)
    tau = config.stage1_temperature if stage == 1 else config.temperature
    mac = stage == 2 and config.loss == "mac"
    tau_hard = hard_temperature(tau, progress, config.decay) if mac else tau  # equal: InfoNCE
    contrastive = mac_loss(query, target, batch["modality"], tau, tau_hard,
                           duplicate=batch.get("duplicate"),
                           positive_temperature=config.positive_temperature)
    losses = {"contrastive": contrastive, "distill": None, "hard_temperature": tau_hard}
    if teacher_states is None:
        return {"loss": contrastive, **losses}
    rows = batch["distilled"]  # which items: all of them, or those without an image
    # Twice the mean over all items: the official code adds a mean for queries and one for targets.
    distill = 2 * config.distill_scale * distill_loss(states[rows], teacher_states[rows])
    loss = (1 - config.distill_weight) * contrastive + config.distill_weight * distill
    return {"loss": loss, **losses, "distill": distill}


def training_step(student, teacher, batch, losses_of, grad_cache=False):
    """Embed 2B items chunk by chunk, compute the losses, leave gradients behind; -> the losses.

    `batch["chunks"]` hold items of similar length, so that little is padding; `batch["order"]`
    brings their states back to queries, then targets. With `grad_cache`, memory is that of one
    chunk (Gao et al., 2021): the loss L depends on the weights only through the states h, so
        dL/dweights = sum over chunks  dL/dh_chunk . dh_chunk/dweights.
    The first factor needs all states, but no graph behind them. For the second, each chunk is
    embedded again, with its graph and the same dropout. The price is one more forward pass.
    """
    chunks, order = batch["chunks"], batch["order"]
    visuals = [student.visual_tokens(chunk) for chunk in chunks]  # frozen tower: once for both
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
    losses["loss"].backward()  # fills states.grad with dL/dh
    gradients = states.grad.split([len(part) for part in parts])
    for chunk, visual, draw, gradient in zip(chunks, visuals, draws, gradients):
        with replayed(draw):
            student(chunk, visual).backward(gradient)
    return losses


def train_stage(stage, student, teacher, dataset, config, run, first=0):
    """Do the steps first..len(dataset) of one stage; `first` > 0 continues from the checkpoint."""
    steps = len(dataset)
    weights = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.lr, betas=(0.9, 0.98), eps=1e-7,
                                  weight_decay=config.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(config.warmup * steps), steps)
    if first:
        run.load_state(optimizer, schedule)
    student.train()
    loader = DataLoader(Subset(dataset, range(first, steps)), batch_size=None,
                        collate_fn=Batcher(student, config), num_workers=config.workers)
    bar = tqdm(loader, initial=first, total=steps, desc=f"stage {stage}", unit="step")
    started = time.perf_counter()
    for step, batch in enumerate(bar, first):
        batch = move(batch, student.device)

        def losses_of(states, teacher_states, batch=batch, step=step):
            return stage_losses(states, teacher_states, batch, stage, step / steps, config)

        items, grad_cache = len(batch["order"]), config.chunk_size > 0
        do_step = partial(training_step, student, teacher, batch, losses_of, grad_cache)
        with autocast(student.device):
            run.count(stage, items, do_step)
            optimizer.zero_grad()
            losses = do_step()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()

        row = {"stage": stage, "step": step + 1, **losses, "grad_norm": norm}
        run.log(row | {"masked_duplicates": batch["masked_duplicates"]}, items, started, bar)
        started = time.perf_counter()
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == steps or run.stopping:
            run.save(student, optimizer, schedule, stage, step + 1)
        if run.stopping:
            raise KeyboardInterrupt(f"; continue with: python train.py --resume {run.folder}")


# ---- batches -------------------------------------------------------------------------------------


class Batcher:
    """TrainSet's pairs -> what `training_step` takes. Runs in the loader's worker processes."""

    def __init__(self, model, config):
        self.model, self.config = model, config

    def __call__(self, pairs):
        items = pairs["queries"] + pairs["targets"]
        order = sorted(range(len(items)), key=lambda i: self.model.length(items[i]))
        size = self.config.chunk_size or 64
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        text_only = self.config.distill_modalities == "text"
        batch = {
            "chunks": [self.model.collate([items[i] for i in chunk]) for chunk in chunks],
            "order": torch.tensor(order).argsort(),
            "modality": pairs["modality"],
            "distilled": torch.tensor([not (text_only and item["image"]) for item in items]),
            "masked_duplicates": 0,
        }
        if self.config.mask_duplicates:
            mask = duplicate_mask(pairs["positive_keys"], pairs["target_keys"])
            batch |= {"duplicate": mask, "masked_duplicates": int(mask.sum()) - len(mask)}
        return batch


def move(batch, device):
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    chunks = [to_device(chunk, device) for chunk in batch["chunks"]]
    return {**batch, **to_device(tensors, device), "chunks": chunks}


def random_state():
    return torch.get_rng_state(), torch.cuda.get_rng_state_all()


@contextlib.contextmanager
def replayed(state):
    """Inside, random draws repeat those made after `random_state()` was taken."""
    with torch.random.fork_rng():
        torch.set_rng_state(state[0])
        torch.cuda.set_rng_state_all(state[1])
        yield


def autocast(device):
    """bfloat16 matrix products on GPUs. (On a CPU a prototype gained 6 % from them at toy size.)"""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


# ---- models, evaluation, main --------------------------------------------------------------------


def load_student(config, device):
    """The pruned model, in float32 because it is trained."""
    keep = None if config.keep_last else config.keep_layers
    student = load(config, config.model, device, keep_layers=keep, dtype=torch.float32)
    if config.keep_last:
        prune_layers(student, config.keep_layers, keep_last=True)
    return student


def load(config, name, device, **options):
    return PUMA.from_pretrained(name, device=device, max_visual_tokens=config.max_visual_tokens,
                                max_text_tokens=config.max_text_tokens, **options)


def load_teacher(config, student, device):
    """The frozen teacher of stage 1, sharing the student's vision tower; None without stage 1."""
    if not config.stage1_steps or not config.distill_weight:
        return None
    teacher = load(config, config.teacher or config.model, device)
    own, other = student.backbone.visual.state_dict(), teacher.backbone.visual.state_dict()
    if not all(k in own and torch.equal(own[k].to(v), v) for k, v in other.items()):
        raise ValueError(f"--teacher {config.teacher} has another vision tower than {config.model}")
    teacher.backbone.visual = student.backbone.visual
    return teacher.requires_grad_(False).eval()


def compare(config, student, folder, device):
    """Evaluate (a) the untrained MLLM, (b) the pruned one, untrained, (c) PUMA; print, write."""
    benchmark = Benchmark(config.data)
    cells = evaluate.split_cells(benchmark, "test")
    full, pruned = load(config, config.model, device), load_student(config, device)

    def both(batch):  # cut after layer k = read out at depth k, so that one pass serves (a) and (b)
        if config.keep_last:
            return torch.stack([full(batch), pruned(batch)])
        return layer_embeddings(full, batch)[[-1, config.keep_layers]]

    print("evaluating the untrained MLLM at both depths, then PUMA", flush=True)
    encode = [lambda items: full.encode(items, forward=both), student.encode]
    untrained, trained = (evaluate.Embedded(benchmark, cells, "test", e) for e in encode)
    rankings = trained.rank(cells)
    columns = {
        "MLLM": evaluate.score(cells, untrained.rank(cells, depth=0)),
        "pruned": evaluate.score(cells, untrained.rank(cells, depth=1)),
        "PUMA": evaluate.score(cells, rankings),
    }
    sample = [item for cell in cells for item in cell.items[:24]]
    for results, model in zip(columns.values(), (full, pruned, student)):
        results["efficiency"] = evaluate.efficiency(model, sample)
    print(evaluate.table(columns))
    baselines = {"full": columns["MLLM"], "pruned": columns["pruned"]}
    results = {**columns["PUMA"], "baselines": baselines, "settings": asdict(config)}
    evaluate.write_trec(folder / "trec", cells, rankings)
    draw_gallery(folder / "gallery.png", evaluate.gallery_rows(trained, cells, rankings))
    evaluate.write_json(folder / "results.json", results)
    print(f"wrote {folder / 'results.json'} and {folder / 'gallery.png'}")


def prepare(config):
    """Check what can be checked without loading anything; -> (config, run folder)."""
    if config.resume:
        path = Path(config.resume) / "config.json"
        if not path.is_file():
            raise ValueError(f"--resume {config.resume}: expected the file {path}")
        return Config(**json.loads(path.read_text(encoding="utf-8"))), path.parent
    for name in ("batch_size", "tasks_per_batch", "checkpoint_every", "temperature", "lr"):
        if getattr(config, name) <= 0:
            value = getattr(config, name)
            raise ValueError(f"--{name.replace('_', '-')} must be greater than 0, got {value}")
    if config.out and Path(config.out).exists():
        raise ValueError(f"--out {config.out} exists: choose another, or continue with --resume")
    number = 1
    while Path(f"runs/puma-{number}").exists():
        number += 1
    return config, Path(config.out or f"runs/puma-{number}")


def train(config):
    config, folder = prepare(config)
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    evaluate.ensure_data(config.data)
    benchmark = Benchmark(config.data, config.seed)
    student = load_student(config, device)
    teacher = load_teacher(config, student, device)
    sets = [TrainSet(benchmark, config.batch_size, steps, config.tasks_per_batch,
                     seed=2 * config.seed + stage, labels=config.labels)
            for stage, steps in enumerate((config.stage1_steps, config.stage2_steps))]

    run = Run(folder, device)  # bad arguments and data have been refused by now, leaving no folder
    evaluate.write_json(folder / "config.json", asdict(config))
    print(f"{folder}: {device}, {run.peak / 1e9:.0f} GFLOP/s in a large matrix product", flush=True)
    start = run.position()
    if start != (1, 0):
        run.load_weights(student)
    for stage, dataset in enumerate(sets, 1):
        first = start[1] if stage == start[0] else 0
        if stage >= start[0] and first < len(dataset):
            train_stage(stage, student, teacher, dataset, config, run, first)
        teacher = None  # stage 2 has none: free its memory
    if run.rows():
        draw_curves(folder / "curves.png", run.rows())
    student.save_pretrained(folder / "model")
    print(f"wrote {folder / 'model'} and {folder / 'curves.png'}")
    if config.eval:
        compare(config, student, folder, device)


def main():
    parser = HfArgumentParser(Config, description=__doc__.split("\n")[0])
    config, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        train(config)
    except (ValueError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(f"stopped{stop}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
