"""Train PUMA: prune an MLLM, distil (stage 1), MAC-Loss (stage 2), evaluate.

    python train.py                                                  # tiny-qwen2-vl, GlyphBEIR, CPU
    python train.py --model Qwen/Qwen2-VL-2B-Instruct --data /data/M-BEIR --keep-layers 12 \\
        --batch-size 600 --chunk-size 50                             # one GPU
    torchrun --nproc_per_node=4 train.py --preset paper-7b --data /data/M-BEIR     # four of them

    stage 1:  L = (1 - w) * InfoNCE(tau = 0.05) + w * L_distill      w = 0.1 in the paper
    stage 2:  L = MAC-Loss(tau, tau_hard(t))       t = step / steps, tau = 0.03 in the paper

The teacher of stage 1 is the unpruned model itself, frozen. Both losses act on the un-normalised
`[RET]` states of a batch of (query, target) pairs. Everything goes to the run folder `runs/puma-N`:
config.json, metrics.jsonl (one object a step), curves.png, checkpoints/, model/ (an ordinary
transformers folder), results.json, trec/ (rankings), gallery.png, confusion.png (which modality
comes first on a global pool). `--resume runs/puma-N` continues a stopped run.
Every setting stands in settings.py, with its reason.

Read `train_stage` (the loop), `training_step` (one step), `stage_losses` (the formulas).
Shapes: B pairs, hence 2B items a step, shared by W processes (1 without torchrun); D width.
"""

import json
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

import distributed
import evaluate
import memory
from data import Benchmark, TrainSet, duplicate_mask
from mac_loss import hard_temperature, mac_loss
from metrics import modality_confusion
from pictures import draw_confusion, draw_curves, draw_gallery
from prune_distill import distill_loss, find_decoder, layer_embeddings, prune_layers
from puma import PUMA, to_device
from run import Run, random_state, replayed
from settings import Config, parse

# ---- the method ----------------------------------------------------------------------------------


def stage_losses(states, teacher_states, batch, stage, progress, config):
    """States (2B, D) of queries, then targets -> loss, contrastive, distill, hard_temperature.

    `teacher_states` (2B, D) or None; `progress` in [0, 1] of this stage.
    """
    query, target = states.chunk(2)
    tau = config.stage1_temperature if stage == 1 else config.temperature
    progress = progress if config.schedule else 1.0
    mac = stage == 2 and config.loss == "mac"
    tau_hard = hard_temperature(tau, progress, config.decay) if mac else tau  # equal: InfoNCE
    contrastive = mac_loss(query, target, batch["modality"], tau, tau_hard,
                           duplicate=batch.get("duplicate"),
                           positive_temperature=config.positive_temperature,
                           intra_offset=(stage == 2) * config.intra_offset * min(1, 2 * progress))
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

    `batch["chunks"]` hold this process's items, those of similar length together, so that little
    is padding; `batch["order"]` brings the states of all processes to queries, then targets. The
    loss L depends on the weights only through the states h, so the gradient is taken in two parts,
        dL/dweights = sum over chunks  dL/dh_chunk . dh_chunk/dweights.
    The first factor needs the states of all chunks and processes, but no graph behind them.
    With `grad_cache` (Gao et al., 2021) no graph is kept for the second, either: each chunk is
    embedded once more, with its graph and the same dropout. Memory is then that of one chunk,
    however large the batch; the price is one more forward pass.
    """
    chunks, order = batch["chunks"], batch["order"]
    visuals = [student.visual_tokens(chunk) for chunk in chunks]  # frozen tower: once for both
    teacher_states = None
    if teacher is not None:
        with torch.no_grad():
            parts = [teacher(chunk, visual) for chunk, visual in zip(chunks, visuals)]
        teacher_states = distributed.gather(torch.cat(parts))[order]

    draws, parts = [], []
    with torch.set_grad_enabled(not grad_cache):
        for chunk, visual in zip(chunks, visuals):
            draws += [random_state()] if grad_cache else []
            parts.append(student(chunk, visual))
        own = torch.cat(parts)
    states = distributed.gather(own).requires_grad_()
    losses = losses_of(states[order], teacher_states)
    losses["loss"].backward()  # fills states.grad with dL/dh
    gradient = distributed.own_part(states.grad)
    if grad_cache:
        gradients = gradient.split([len(part) for part in parts])
        for chunk, visual, draw, part in zip(chunks, visuals, draws, gradients):
            with replayed(draw):
                student(chunk, visual).backward(part)
    else:
        own.backward(gradient)
    distributed.sum_gradients(student.parameters())
    return losses


def train_stage(stage, student, teacher, dataset, config, run, first=0):
    """Do the steps first..len(dataset) of one stage; `first` > 0 continues from the checkpoint."""
    steps = len(dataset)
    weights = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.of_stage(stage, "lr"), betas=(0.9, 0.98),
                                  eps=1e-7, weight_decay=config.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(config.warmup * steps), steps)
    if first:
        run.load_state(optimizer, schedule)
    student.train()
    if config.lora_rank:
        memory.set_dropout(student, config.of_stage(stage, "lora_dropout"))
    loader = DataLoader(Subset(dataset, range(first, steps)), batch_size=None,
                        collate_fn=Batcher(student, config), num_workers=config.workers)
    quiet = {"disable": True} if distributed.rank() else {}  # one bar for all processes
    bar = tqdm(loader, initial=first, total=steps, desc=f"stage {stage}", unit="step", **quiet)
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
        stopping = any(distributed.gather_objects(run.stopping))  # a signal may reach one rank only
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == steps or stopping:
            run.save(student, optimizer, schedule, stage, step + 1)
        if stopping:
            raise KeyboardInterrupt(f"; continue with: python train.py --resume {run.folder}")


# ---- batches -------------------------------------------------------------------------------------


class Batcher:
    """TrainSet's pairs -> what `training_step` takes. Runs in the loader's worker processes.

    Every process reads the pairs of the whole batch, which are small, and opens the images of its
    own share: every W-th of the items by length, so that all have the same work.
    """

    def __init__(self, model, config):
        self.model, self.config = model, config
        self.rank, self.world_size = distributed.rank(), distributed.world_size()

    def __call__(self, pairs):
        items = pairs["queries"] + pairs["targets"]
        by_length = sorted(range(len(items)), key=lambda i: self.model.length(items[i]))
        shares = [by_length[rank :: self.world_size] for rank in range(self.world_size)]
        own, order = shares[self.rank], sum(shares, [])
        size = self.config.chunk_size or 64
        chunks = [own[start : start + size] for start in range(0, len(own), size)]
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


def autocast(device):
    """bfloat16 matrix products on GPUs. (On a CPU a prototype gained 6 % from them at toy size.)"""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


# ---- models, evaluation, main --------------------------------------------------------------------


def load_student(config, device):
    """The pruned model; float32 if all its weights are trained, else the device's usual dtype."""
    keep = None if config.keep_last else config.keep_layers
    dtype = None if config.lora_rank else torch.float32
    student = load(config, config.model, device, keep_layers=keep, dtype=dtype)
    if config.keep_last:
        prune_layers(student, config.keep_layers, keep_last=True)
    return student


def prepare_training(config, student):
    """Adapters and gradient checkpointing, where asked for; -> peft's tuner or None."""
    adapters = None
    if config.lora_rank:
        adapters = memory.add_lora(student, config.lora_rank, config.lora_alpha,
                                   config.lora_dropout)
    if config.gradient_checkpointing:
        decoder = find_decoder(student)
        decoder.activation_checkpointing_enable()
        # The last layer computes one position, by hooks that are gone when it would be recomputed.
        decoder.layers[-1].gradient_checkpointing = False
    return adapters


def load(config, name, device, **options):
    return PUMA.from_pretrained(name, device=device, max_visual_tokens=config.max_visual_tokens,
                                max_text_tokens=config.max_text_tokens, **options)


def load_teacher(config, student, device):
    """The frozen teacher of stage 1, or None without; shares the student's frozen parts."""
    if not config.stage1_steps or not config.distill_weight:
        return None
    teacher = load(config, config.teacher or config.model, device)
    own, other = student.backbone.visual.state_dict(), teacher.backbone.visual.state_dict()
    if not all(k in own and torch.equal(own[k].to(v), v) for k, v in other.items()):
        raise ValueError(f"--teacher {config.teacher} has another vision tower than {config.model}")
    teacher.backbone.visual = student.backbone.visual
    table, other = (model.backbone.get_input_embeddings() for model in (student, teacher))
    if torch.equal(table.weight.to(other.weight.dtype), other.weight):
        teacher.backbone.set_input_embeddings(table)
    return teacher.requires_grad_(False).eval()


def compare(config, student, folder, device):
    """Evaluate (a) the untrained MLLM, (b) the pruned one, untrained, (c) PUMA; print, write."""
    benchmark = Benchmark(config.data)
    cells = evaluate.split_cells(benchmark, "test")
    full = load(config, config.model, device)
    pruned = load_student(config, device) if config.keep_last else None
    student.eval()  # `encode` sees to it for `full` only

    def all_three(batch):  # one pass, for which each image is read, and seen by the tower, once
        visual = student.visual_tokens(batch)
        if config.keep_last:
            untrained = [full(batch, visual), pruned(batch, visual)]
        else:  # cut after layer k = read out at depth k
            untrained = layer_embeddings(full, batch, visual)[[-1, config.keep_layers]]
        return torch.stack([*untrained, student(batch, visual)])

    print("evaluating the untrained MLLM at both depths, and PUMA", flush=True)
    embedded = evaluate.Embedded(benchmark, cells, "test",
                                 lambda items: full.encode(items, forward=all_three))
    *untrained, rankings = (embedded.rank(cells, column) for column in range(3))
    columns = {name: evaluate.score(cells, ranks) for name, ranks in
               zip(("MLLM", "pruned", "PUMA"), (*untrained, rankings))}
    sample = [item for cell in cells for item in cell.items[:24]]
    columns["MLLM"]["efficiency"] = evaluate.efficiency(full, sample)
    cost = evaluate.efficiency(student, sample)  # of the pruned model, trained or not
    columns["pruned"]["efficiency"] = columns["PUMA"]["efficiency"] = cost
    print(evaluate.table(columns))
    baselines = {"full": columns["MLLM"], "pruned": columns["pruned"]}
    results = {**columns["PUMA"], "baselines": baselines, "settings": asdict(config)}
    results["confusion"] = modality_confusion(cells, rankings, embedded.modality)
    evaluate.write_trec(folder / "trec", cells, rankings)
    draw_gallery(folder / "gallery.png", evaluate.gallery_rows(embedded, cells, rankings))
    if results["confusion"]:  # there is a global pool
        draw_confusion(folder / "confusion.png", results["confusion"])
    evaluate.write_json(folder / "results.json", results)
    print(f"wrote {folder / 'results.json'} and the pictures beside it")


def labels_of(config, stage):
    """How many labelled queries a stage uses, 0: all. Pure distillation needs no label at all."""
    return 0 if stage == 1 and config.distill_weight == 1 else config.labels


def prepare(config):
    """Check what can be checked without loading anything; -> (config, run folder)."""
    if config.resume:
        path = Path(config.resume) / "config.json"
        if not path.is_file():
            raise ValueError(f"--resume {config.resume}: expected the file {path}")
        return Config(**json.loads(path.read_text(encoding="utf-8"))), path.parent
    config.check()
    for stage in (1, 2):
        items, world_size = 2 * config.of_stage(stage, "batch_size"), distributed.world_size()
        if items % world_size:
            raise ValueError(f"the {items} items of a batch cannot be shared by {world_size}: "
                             f"--batch-size must be a multiple of {world_size}")
    if config.out and Path(config.out).exists():
        raise ValueError(f"--out {config.out} exists: choose another, or continue with --resume")
    number = 1
    while Path(f"runs/puma-{number}").exists():
        number += 1
    return config, Path(config.out or f"runs/puma-{number}")


def train(config):
    device = distributed.start(config.device)
    main_process = distributed.rank() == 0
    # One process looks for a free folder and writes the default data; the others wait for it.
    prepared = prepare(config) if main_process else None
    config, folder = distributed.gather_objects(prepared)[0]
    if main_process:
        evaluate.ensure_data(config.data)
        memory.report(config, device)
    distributed.barrier()
    torch.manual_seed(config.seed)
    benchmark = Benchmark(config.data, config.seed)
    student = load_student(config, device)
    teacher = load_teacher(config, student, device)
    adapters = prepare_training(config, student)
    sets = [TrainSet(benchmark, config.of_stage(stage, "batch_size"), steps,
                     config.tasks_per_batch, 2 * config.seed + stage - 1, labels_of(config, stage))
            for stage, steps in enumerate((config.stage1_steps, config.stage2_steps), 1)]
    torch.manual_seed(config.seed + distributed.rank())  # each process draws its own dropout

    run = Run(folder, device, config.keep_checkpoints)  # bad input was refused, leaving no folder
    if main_process:
        evaluate.write_json(folder / "config.json", asdict(config))
        print(f"{folder}: {distributed.world_size()} x {device}, {run.peak / 1e9:.0f} GFLOP/s in a "
              "large matrix product", flush=True)
    start = run.position()
    if start != (1, 0):
        run.load_weights(student)
    for stage, dataset in enumerate(sets, 1):
        first = start[1] if stage == start[0] else 0
        if stage >= start[0] and first < len(dataset):
            train_stage(stage, student, teacher, dataset, config, run, first)
        teacher = None  # stage 2 has none: free its memory
    if not main_process:
        return
    distributed.stop()
    if adapters is not None:
        adapters.merge_and_unload()
    if run.rows():
        draw_curves(folder / "curves.png", run.rows())
    student.save_pretrained(folder / "model")
    print(f"wrote {folder / 'model'} and {folder / 'curves.png'}")
    if config.eval:
        compare(config, student, folder, device)


def main():
    config = parse(description=__doc__.split("\n")[0])
    try:
        train(config)
    except (ValueError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(f"stopped{stop}", file=sys.stderr)
        sys.exit(130)
    finally:
        distributed.stop()


if __name__ == "__main__":
    main()
