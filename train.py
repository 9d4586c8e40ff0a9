"""Train PUMA: prune an MLLM, distil (stage 1), MAC-Loss (stage 2), evaluate.

    python train.py                                                  # tiny-qwen2-vl, GlyphBEIR, CPU
    python train.py --model Qwen/Qwen2-VL-2B-Instruct --data /data/M-BEIR --keep-layers 12 \\
        --batch-size 600 --chunk-size 50                             # one GPU
    torchrun --nproc_per_node=4 train.py --preset paper-7b --data /data/M-BEIR     # four of them

    stage 1:  L = (1 - w) * InfoNCE(tau = 0.05) + w * L_distill      w = 0.1 in the paper
    stage 2:  L = MAC-Loss(tau, tau_hard(t))       t = step / steps, tau = 0.03 in the paper

The teacher of stage 1 is the unpruned model itself, frozen. Everything goes to the run folder
`runs/puma-N`: config.json, metrics.jsonl (one object a step), curves.png, checkpoints/, model/ (an
ordinary transformers folder), results.json, trec/, gallery.png. `--resume runs/puma-N` continues a
stopped run. Every setting stands in settings.py, with its reason.

Read `stage_losses` (the formulas), `plain_step` (one step), `train_stage` (the loop); then
`large_batch_step`. Shapes: B pairs, hence 2B items a step; D width.
"""

import contextlib
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import support  # noqa: F401  before torch: it says how threads wait
import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModel, get_cosine_schedule_with_warmup

import evaluate
from data import Benchmark, TrainSet, duplicate_mask
from mac_loss import hard_temperature, mac_loss
from prune_distill import distill_loss, find_decoder, prune_layers
from puma import PUMA, load_config, loading, to_device
from settings import Config, parse
from support import distributed
from support.files import check_option, clear_errors, read_json
from support.lora import add_lora, set_dropout
from support.pictures import draw_curves
from support.run import Run, autocast, compile_layers, count_flops, measure_peak, prepared


def stage_losses(states, teacher_states, batch, stage, progress, config):
    """States (2B, D) of queries, then targets -> loss, contrastive, distill, hard_temperature.

    `teacher_states` (2B, D), or None without a teacher; `progress` in [0, 1] of this stage.
    """
    query, target = states.chunk(2)  # row i of `target` is the positive of row i of `query`
    about = {"modality": batch["modality"], "duplicate": batch.get("duplicate"),
             "positive_temperature": config.positive_temperature}
    distill = None  # no L_distill in stage 2
    if stage == 1:
        # The same temperature for intra- and inter-modality negatives: plain InfoNCE.
        tau = tau_hard = config.stage1_temperature
        loss = contrastive = mac_loss(query, target, temperature=tau, tau_hard=tau, **about)
        if teacher_states is not None:
            rows = batch["distilled"]  # (2B,) bool: all items, or those without an image
            # Twice the mean over all items: the official code adds queries' mean and targets'.
            distill = 2 * config.distill_scale * distill_loss(states[rows], teacher_states[rows])
            weight = config.distill_weight
            loss = (1 - weight) * contrastive + weight * distill  # 0.9 and 0.1 in the paper
    else:
        progress = progress if config.schedule else 1.0
        tau = tau_hard = config.temperature  # equal: InfoNCE, the control
        if config.loss == "mac":  # intra-modality negatives become harder as training goes on
            tau_hard = hard_temperature(tau, progress, config.decay)
        offset = config.intra_offset * min(1, 2 * progress)  # rises while tau_hard falls
        loss = contrastive = mac_loss(query, target, temperature=tau, tau_hard=tau_hard,
                                      intra_offset=offset, **about)
    return {"loss": loss, "contrastive": contrastive, "distill": distill,
            "hard_temperature": tau_hard}


# Both steps below leave the gradient of the loss L behind. L depends on the weights only through
# the [RET] states h of the batch's items, so
#
#     dL/dweights = sum over chunks, ranks   dL/dh_chunk . dh_chunk/dweights
#
# `plain_step` lets autograd do both factors at once: every chunk's graph must fit into memory.
# `large_batch_step` takes them one after the other (GradCache, Gao et al., 2021). The first factor
# needs the states of the whole batch, from every rank, but no graph behind them; the second needs
# one chunk's graph at a time. Memory is then that of a chunk, however large the batch.


def plain_step(student, teacher, batch, stage, progress, config):
    """Embed queries and targets, compute the losses, leave gradients behind; -> the losses.

    `batch["chunks"]` are the 2B items in padded batches, those of similar length together;
    `batch["order"]` brings their states back to queries, then targets.
    """
    visuals = [student.visual_tokens(chunk) for chunk in batch["chunks"]]  # once for both models
    teacher_states = None
    if teacher is not None:  # frozen: no graph is kept, and it is done before the student's grows
        teacher_states = embed(teacher, batch["chunks"], visuals)[batch["order"]]
    states = embed(student, batch["chunks"], visuals)[batch["order"]]  # (2B, D)
    losses = stage_losses(states, teacher_states, batch, stage, progress, config)
    losses["loss"].backward()  # fills .grad of the weights
    return losses


def embed(model, chunks, visuals):
    return torch.cat([model(chunk, visual) for chunk, visual in zip(chunks, visuals)])


def large_batch_step(student, teacher, batch, stage, progress, config):
    """The same losses and gradients for a batch too large for one graph, or shared by several
    processes: `batch["chunks"]` are then this process's share of the items."""
    chunks, order = batch["chunks"], batch["order"]
    visuals = [student.visual_tokens(chunk) for chunk in chunks]  # a chunk's: (V, D)
    teacher_states = None
    if teacher is not None:
        teacher_states = distributed.gather(embed(teacher, chunks, visuals))[order]

    embed_chunk = student  # without --chunk-size there is room for all graphs
    if config.chunk_size:
        # `checkpoint` keeps no graph: when the gradient comes, it embeds the chunk once more, with
        # the random numbers (dropout) of the first time. The price is one more forward pass.
        embed_chunk = partial(checkpoint, student, use_reentrant=False)
    own = embed(embed_chunk, chunks, visuals)  # states of this process's items
    states = distributed.gather(own).requires_grad_()  # (2B, D), a leaf: no graph behind it
    losses = stage_losses(states[order], teacher_states, batch, stage, progress, config)
    losses["loss"].backward()  # first factor: fills states.grad with dL/dh
    own.backward(distributed.own_part(states.grad))  # second factor, one chunk after the other
    distributed.sum_gradients(student.parameters())  # over the ranks
    return losses


def train_stage(stage, student, teacher, dataset, config, run, first=0):
    """Do the steps first..len(dataset) of one stage; `first` > 0 continues from the checkpoint."""
    steps, batcher, device = len(dataset), Batcher(student, config, dataset), student.device
    weights = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(  # as in the paper; on a GPU in one kernel
        weights, lr=config.of_stage(stage, "lr"), betas=(0.9, 0.98), eps=1e-7,
        weight_decay=config.weight_decay, fused=device.type == "cuda")
    schedule = get_cosine_schedule_with_warmup(optimizer, int(config.warmup * steps), steps)
    student.train()  # dropout is on; there is none but LoRA's
    set_dropout(find_decoder(student), config.of_stage(stage, "lora_dropout"))
    alone = distributed.world_size() == 1
    step_of = plain_step if alone and not config.chunk_size else large_batch_step
    with autocast(device):  # operations an item, of a step whose gradients are thrown away
        own_flops = count_flops(step_of, student, teacher, move(batcher.step(0), device), stage,
                                0.0, config)
    # Dropout follows from seed, stage and rank alone, whatever was drawn before.
    torch.manual_seed(config.seed + 1000 * stage + distributed.rank())
    if first:
        run.load_state(optimizer, schedule)  # with the random numbers of that step
    bar = prepared(batcher.step, range(first, steps), config.workers)
    if run.writes:  # one bar for all processes
        bar = tqdm(bar, f"stage {stage}", steps, initial=first, unit="step")
    started, step = time.perf_counter(), first - 1
    try:
        for step, batch in enumerate(bar, first):
            batch = move(batch, device)
            optimizer.zero_grad()
            with autocast(device):
                losses = step_of(student, teacher, batch, stage, step / steps, config)
            norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)  # norm: before it is cut to 1
            if not (losses["loss"] + norm).isfinite():  # before it spoils weights and checkpoints
                raise ValueError(f"stage {stage}, step {step + 1}: loss {losses['loss']:.3g}, "
                                 f"gradient {norm:.3g}; stopped before the update, the last good "
                                 f"weights: {run.checkpoints}; the batch: {batch['about']}")
            optimizer.step()
            schedule.step()  # of the learning rate: up for 3 % of the steps, then down a cosine

            row = {"stage": stage, "step": step + 1, **losses, "grad_norm": norm,
                   "masked_duplicates": batch["masked_duplicates"]}
            run.log(row, 2 * len(batch["modality"]), own_flops, started, bar)  # of all processes
            started = time.perf_counter()
            stopping = any(distributed.gather_objects(run.stopping))  # a signal may reach one only
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == steps or stopping:
                run.save(student, optimizer, schedule, stage, step + 1)
            if stopping:
                raise KeyboardInterrupt(f"; {run.how_to_continue}")
    except ChildProcessError as error:
        if step >= first and alone:
            run.save(student, optimizer, schedule, stage, step + 1)
        raise ChildProcessError(f"{error}; {run.how_to_continue}") from error


class Batcher:
    """TrainSet's pairs -> what a step takes. Runs in the loader's worker processes.

    Every rank reads the pairs of the whole batch, which are small, and its own share's images.
    """

    def __init__(self, model, config, dataset=None):
        self.model, self.config, self.dataset = model, config, dataset
        self.rank, self.world_size = distributed.rank(), distributed.world_size()

    def step(self, number):
        """The batch of a step of `dataset`. ValueError naming file and line of a bad item."""
        return self(self.dataset[number])

    def __call__(self, pairs):
        items = pairs["queries"] + pairs["targets"]
        # By length, so that little of a chunk is padding; every W-th, so that ranks work alike.
        by_length = sorted(range(len(items)), key=lambda i: self.model.length(items[i]))  # 2B
        shares = [by_length[rank :: self.world_size] for rank in range(self.world_size)]
        own, size = shares[self.rank], self.config.chunk_size or 64
        chunks = [own[start : start + size] for start in range(0, len(own), size)]
        text_only = self.config.distill_modalities == "text"
        batch = {
            "chunks": [self.model.collate([items[i] for i in chunk]) for chunk in chunks],  # padded
            "order": torch.tensor(sum(shares, [])).argsort(),  # item -> its place in the shares
            "modality": pairs["modality"],  # (B,) of the targets
            "distilled": torch.tensor([not (text_only and item["image"]) for item in items]),  # 2B
            "about": pairs.get("about"), "masked_duplicates": 0,
        }
        if self.config.mask_duplicates:  # (B, B) bool: other right targets are no negatives
            mask = duplicate_mask(pairs["positive_keys"], pairs["target_keys"])
            batch |= {"duplicate": mask, "masked_duplicates": int(mask.sum()) - len(mask)}
        return batch


def move(batch, device):
    tensors = {key: x.to(device) for key, x in batch.items() if isinstance(x, torch.Tensor)}
    return {**batch, **tensors, "chunks": [to_device(chunk, device) for chunk in batch["chunks"]]}


def train_set(benchmark, config, stage):
    """The batches of a stage. Pure distillation needs no label, so it uses all queries."""
    labels = 0 if stage == 1 and config.distill_weight == 1 else config.labels
    return TrainSet(benchmark, config.of_stage(stage, "batch_size"),
                    getattr(config, f"stage{stage}_steps"), config.tasks_per_batch,
                    2 * config.seed + stage - 1, labels)


def load(config, name, device, **options):
    model = PUMA.from_pretrained(name, device=device, max_visual_tokens=config.max_visual_tokens,
                                 max_text_tokens=config.max_text_tokens, **options)
    return compile_layers(model) if config.compile else model


def load_student(config, device):
    """The pruned model; float32 if all its weights are trained, else the device's usual dtype."""
    keep = None if config.keep_last else config.keep_layers  # None: all, to have the last one
    dtype = None if config.lora_rank else torch.float32
    student = load(config, config.model, device, keep_layers=keep, dtype=dtype)
    if config.keep_last:
        prune_layers(student, config.keep_layers, keep_last=True)
    return student


def load_teacher(config, student, device):
    """The frozen teacher of stage 1, or None without; shares the student's frozen parts."""
    if not config.stage1_steps or not config.distill_weight:
        return None
    teacher = load(config, config.teacher or config.model, device)
    # Both read the same visual tokens, so they need the same tower; one of the two is freed.
    own, other = student.backbone.visual.state_dict(), teacher.backbone.visual.state_dict()
    if not all(k in own and torch.equal(own[k].to(v), v) for k, v in other.items()):
        raise ValueError(f"--teacher {config.teacher} has another vision tower than {config.model}")
    teacher.backbone.visual = student.backbone.visual
    return teacher.requires_grad_(False).eval()


def remember_images(model, datasets, config):
    """Let each image of these batches go through the frozen tower once, if all fit into memory."""
    items = (item for dataset in datasets for pairs in dataset
             for item in pairs["queries"] + pairs["targets"])
    # What is wrong with an image is said at its step.
    with contextlib.suppress(ValueError), autocast(model.device):
        model.remember(items, config.visual_memory << 20, config.workers)


def prepare_training(config, model):
    """LoRA adapters, where asked for, instead of the decoder's weights; -> peft's tuner or None."""
    if config.lora_rank:
        return add_lora(find_decoder(model), config.lora_rank, config.lora_alpha,
                        config.lora_dropout)


def print_plan(config, device):
    """What the run will take, before a weight is read; ValueError if a GPU has less memory."""
    with loading(config.model), torch.device("meta"):  # shapes without memory
        model = AutoModel.from_config(load_config(config.model))
    with torch.device("meta"):
        decoder, whole = find_decoder(model), model.num_parameters()
        depth, layers = len(decoder.layers), sum(p.numel() for p in decoder.layers.parameters())
        check_option("--keep-layers", config.keep_layers, int, 1, depth)
        kept = prune_layers(model, config.keep_layers).num_parameters()
        prepare_training(config, model)  # LoRA's adapters are trained instead of the layers
    table = model.get_input_embeddings().requires_grad_(False)  # of it the row of [RET] is trained
    trained = table.embedding_dim + sum(p.numel() for p in decoder.parameters() if p.requires_grad)
    half = 2 if device.type == "cuda" else 4  # bytes of a weight that is not trained
    weights = half * kept + 4 * trained if config.lora_rank else 4 * kept
    if config.stage1_steps and config.distill_weight:  # the teacher shares just the vision tower
        weights += half * (layers + table.weight.numel())
    gib = (weights + 12 * trained) / 2**30  # a gradient takes 4 bytes, AdamW's two moments 8
    print(f"parameters: {kept:,} kept, {whole - kept:,} dropped, {trained:,} trainable; memory: "
          f"{gib:.2f} GiB, and what a chunk of items takes", flush=True)
    gpu = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory / 2**30
    if gpu and gib > gpu:
        ways = "--lora-rank 128, fewer --keep-layers, or --stage1-steps 0 (no teacher)"
        raise ValueError(f"{gib:.1f} GiB are more than the {gpu:.1f} GiB of {device}: try {ways}")


def run_stages(config):
    """Open the run's folder, new or with `--resume`, and do in it what is left to do."""
    device, name = distributed.start(config.device), config.resume or config.out
    if config.resume:
        try:
            config = Config(**read_json(Path(name, "config.json")))
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"--resume {name}: cannot read its config.json: {error}") from error
    config.check()
    for stage in (1, 2):
        size, ranks = config.of_stage(stage, "batch_size"), distributed.world_size()
        if 2 * size % ranks:
            raise ValueError(f"--batch-size must be a multiple of {ranks} processes, got {size}")
    with Run(name, asdict(config), config.decisive(), config.keep_checkpoints) as run:
        if not (run.folder / ("results.json" if config.eval else "model")).exists():
            train_and_evaluate(config, device, run)
        elif run.writes:
            print(f"{run.folder} is finished: its model is {run.folder / 'model'}")


def train_and_evaluate(config, device, run):
    """Both stages and the evaluation, from the start or from the last checkpoint."""
    folder, first = run.folder, run.writes  # of several processes the first writes
    evaluate.ensure_data(config.data)
    if first:
        print_plan(config, device)
    torch.manual_seed(config.seed)
    benchmark = Benchmark(config.data, config.seed)
    last_stage, done = run.position()  # (1, 0) in a new run
    student = load_student(config, device)  # first k layers
    teacher = load_teacher(config, student, device)  # all layers
    adapters = prepare_training(config, student)
    sets = {stage: train_set(benchmark, config, stage) for stage in (1, 2)}
    if done:
        run.load_weights(student)
    remember_images(student, sets.values(), config)
    run.peak = measure_peak(device)
    if first:
        peak = f"{run.peak / 1e9:.0f} GFLOP/s each in a large matrix product"
        print(f"{folder}: {distributed.world_size()} x {device}, {peak}", flush=True)
    run.training = True  # a stop now waits for the end of the step
    for stage in range(last_stage, 3):  # a resumed run may start in stage 2
        if (begin := done if stage == last_stage else 0) < len(sets[stage]):
            train_stage(stage, student, teacher, sets[stage], config, run, begin)
        teacher = None  # stage 2 has none: free its memory
    run.training, student.remembered = False, {}
    if not first:
        return
    distributed.stop()
    if adapters is not None:
        adapters.merge_and_unload()  # W + alpha / r * B A: an ordinary model again
    if not (folder / "model").exists():  # else the run was stopped in its evaluation
        if run.rows():
            draw_curves(folder / "curves.png", run.rows())
        student.save_pretrained(folder / "model")
        print(f"wrote {folder / 'model'} and {folder / 'curves.png'}")
    student.workers = config.workers if device.type == "cuda" else 0  # a CPU gains nothing by it
    if config.eval:  # (a) the MLLM and (b) its first layers, both untrained, beside (c) PUMA
        models = {"MLLM": load(config, config.model, device),
                  "pruned": load_student(config, device), "PUMA": student}
        evaluate.evaluate_models(models, folder / "model", config.data, out=folder,
                                 settings=asdict(config))
        print(f"wrote {folder}: results.json, results.md, gallery.png")


def main():
    config = parse(description=__doc__.split("\n")[0])
    with clear_errors():
        run_stages(config)


if __name__ == "__main__":
    main()
