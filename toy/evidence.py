"""What a batch is made of decides what a loss can teach: the trials behind the README's claims.

    python toy/evidence.py             # everything; hours on two cores, goes on where it stopped
    python toy/evidence.py grid        # one part: grid, finals, premise, depth, layers, distil
    python toy/evidence.py --report    # only write docs/evidence.* of the results that are there

Each loss is tried at its own best setting. `grid` (one seed, validation queries, half the usual
length) follows tau outward from 0.05 until it gets no better, for each loss, for batches of two
tasks and of all (the main two: of one and four as well), in both worlds: GlyphBEIR as train.py has
it, where a negative of another modality may show the same character, and `toy/glyph_beir.py
--domains`, where, with all tasks, most are of another dataset, as in M-BEIR. `finals` trains the
winners at full length with five seeds and scores them on the test queries, `premise` looks at what
MAC-Loss assumes before any training, `depth` asks whether half the layers catch up with training,
`layers` what a look at the untrained model would choose, `distil` whether stage 1 brings the
student nearer to its teacher, and when that pays. A run leaves one JSON file in `runs/evidence`; a
run whose file is there is not done again, and a new folder begins with the results in
docs/evidence.json. What has been run so far, with how many seeds: docs/evidence.md.
"""

import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import shutil
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # side by side, progress bars would mix

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import support  # noqa: E402, F401  before torch: it says how threads wait
import torch  # noqa: E402
from torch.nn.functional import cross_entropy, normalize  # noqa: E402

import evaluate  # noqa: E402
import train  # noqa: E402
from data import Benchmark, TrainSet, duplicate_mask  # noqa: E402
from mac_loss import mac_loss  # noqa: E402
from prune_distill import find_decoder, layer_embeddings, prune_layers  # noqa: E402
from puma import PUMA  # noqa: E402
from settings import Config  # noqa: E402
from support.distributed import pick_device  # noqa: E402
from support.files import (  # noqa: E402
    check_option,
    clear_errors,
    read_json,
    write_json,
    write_text,
)
from support.pictures import plt  # noqa: E402
from support.report import modality_confusion, score  # noqa: E402
from support.run import Run  # noqa: E402
from toy.glyph_beir import build, direction, premise  # noqa: E402

# What the tables compare is written out, so that new defaults of train.py do not change them.
BASE = Config(model="toy/tiny-qwen2-vl", keep_layers=4, stage1_steps=0, stage2_steps=240,
              batch_size=128, lr=3e-3, warmup=0.03, stage1_temperature=0.05, temperature=0.05,
              decay=0.5, distill_scale=10.0, tasks_per_batch=0, workers=0, eval=False)
WORLDS = {"one dataset": "data/glyph_beir", "four domains": "data/domains"}
README_WORLD, FINAL = "one dataset", 480  # FINAL: steps, of both stages together
TAUS = (0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2)
START = TAUS.index(0.05)
ALL = 0
MIXES = {2: "2 tasks a batch", ALL: "all tasks"}
# To see what lies between, the two main losses alone; no loss's best is chosen from these.
MAIN, BETWEEN = ("InfoNCE", "MAC-Loss"), {1: "1 task a batch", 4: "4 tasks a batch"}
EVERY_MIX = dict(sorted((MIXES | BETWEEN).items(), key=lambda mix: mix[0] or math.inf))


def risen(tau, progress, decay):
    """tau_hard from tau * exp(-decay) up to tau at half of training; InfoNCE from there on."""
    return tau * math.exp(-decay * (1 - min(1, 2 * progress)))


def crossed(tau, progress, decay):
    """From tau * exp(-decay) up to tau * exp(+decay); equal to tau halfway."""
    return tau * math.exp(decay * (2 * progress - 1))


def swapped(query, target, *, temperature, tau_hard, **about):
    return mac_loss(query, target, temperature=tau_hard, tau_hard=temperature, **about)


def pair_by_pair(query, target, *, modality, temperature, tau_hard, duplicate, **_):
    """Each negative beside the positive at the negative's own temperature: the sum in the loss is
    over exp((s_ij - s_ii) / tau_ij). So one that is as similar as the positive weighs as much,
    whatever its modality; in MAC-Loss such an inter-modality negative is left alone."""
    own = torch.arange(len(query), device=query.device)
    with torch.autocast(query.device.type, enabled=False):  # in float32, as mac_loss
        query, target = (normalize(side.float(), dim=1) for side in (query, target))
        cosines = query @ target.T
        tau = torch.where(modality[:, None] == modality, tau_hard, temperature)
        logits = (cosines - cosines.diagonal()[:, None]) / tau
        also_right = duplicate & (own[:, None] != own)
        return cross_entropy(logits.masked_fill(also_right, -math.inf), own)


class LearntTemperature:
    """InfoNCE whose log tau is learnt beside the weights, from the given tau on, as in CLIP."""

    log_tau = optimizer = None

    def __call__(self, query, target, *, temperature, tau_hard, **about):
        if self.optimizer is None:
            self.log_tau = torch.tensor(math.log(temperature), device=query.device,
                                        requires_grad=True)
            self.optimizer = torch.optim.Adam([self.log_tau], lr=BASE.lr)
        self.optimizer.step()  # with the gradient of the step before; none yet: nothing happens
        self.optimizer.zero_grad()
        tau = self.log_tau.exp()
        return pair_by_pair(query, target, temperature=tau, tau_hard=tau, **about)


# What takes the place of a function in train.py; none of them is in the paper.
VARIANTS = {"rising": ("hard_temperature", risen), "crossing": ("hard_temperature", crossed),
            "inverted": ("mac_loss", swapped), "pair": ("mac_loss", pair_by_pair),
            "learnt": ("mac_loss", LearntTemperature())}
LOSSES = {  # name -> settings
    "InfoNCE": {"loss": "infonce"},
    "MAC-Loss": {},
    "InfoNCE + offset 1": {"loss": "infonce", "intra_offset": 1.0},
    "InfoNCE + offset 2": {"loss": "infonce", "intra_offset": 2.0},
    "InfoNCE, learnt tau": {"loss": "infonce", "variant": "learnt"},  # tau: where it begins
    "MAC-Loss, positive at tau": {"positive_temperature": "base"},
    "MAC-Loss, pair by pair": {"variant": "pair"},
    "MAC-Loss, rising": {"variant": "rising"},  # hard first, then soft: the other way round
    "MAC-Loss, crossing": {"variant": "crossing"},  # and on, until intra-modality is the softer
    "MAC-Loss, inverted": {"variant": "inverted"},  # the other modalities get the lower tau
}
DEPTHS, LENGTHS = range(1, 9), (80, 240, 480, 960)
LABELS, STAGE1_STEPS = {450: "1 %", 4500: "10 %", 0: "all"}, (40, 120, 240, 480)
MLLM, TRAINED = "", "teacher"  # whose folder stands beside the results
NO_TEACHER = 0.0, MLLM
TEACHERS = {  # name -> (weight of L_distill, teacher)
    "no teacher": NO_TEACHER,
    "MLLM, 0.9 InfoNCE + 0.1 distillation": (0.1, MLLM), "MLLM, distillation alone": (1.0, MLLM),
    "trained teacher, 0.9 + 0.1": (0.1, TRAINED), "trained teacher alone": (1.0, TRAINED),
}


def plain_steps(steps):
    """So many steps without a teacher take the time of `steps` with one."""
    # In forward passes of four layers: a student's step is 3, as the backward pass is twice the
    # forward one; the teacher's eight layers are 2.
    return steps * 5 // 3


# ---- runs ----------------------------------------------------------------------------------------


def run_id(settings):
    """The settings that differ from BASE, as text: the same run may stand in several tables."""
    own = {key: value for key, value in settings.items() if key in ("variant", "split")}
    base = asdict(BASE)
    config = asdict(replace(BASE, **{k: v for k, v in settings.items() if k not in own}))
    changed = {key: value for key, value in config.items() if value != base[key]} | own
    return " ".join(f"{k}={str(v).replace('/', '_')}" for k, v in sorted(changed.items())) or "base"


def path_of(settings, seed, folder):
    return folder / f"{run_id(settings)} seed={seed}.json"


def run_one(settings, seed, folder, keep=None):
    """Train and score one model, unless its file is there; -> its results. `keep`: its place."""
    path = path_of(settings, seed, folder)
    if path.exists() and (keep is None or keep.exists()):
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    settings, started, device = dict(settings), time.time(), pick_device("")
    split, variant = settings.pop("split", "val"), settings.pop("variant", None)
    if settings.get("teacher"):
        settings["teacher"] = str(folder / settings["teacher"])
    config = replace(BASE, seed=seed, **settings)
    torch.manual_seed(seed)
    benchmark = Benchmark(config.data)  # the same instructions for every seed
    student = train.load_student(config, device)
    teacher = train.load_teacher(config, student, device)
    sets = {stage: train.train_set(Benchmark(config.data, seed), config, stage)
            for stage in (1, 2)}
    result = {"id": path.name.rpartition(" seed=")[0], "seed": seed, "device": device.type}
    train.remember_images(student, sets.values(), config)
    work = folder / f"work-{os.getpid()}"
    try:
        with replaced(variant) as function, Run(work) as run:
            for stage, dataset in sets.items():
                if not len(dataset):
                    continue
                if stage == 1:
                    result["apart before"] = apart(student, benchmark, config.teacher)
                own_teacher = teacher if stage == 1 else None
                train.train_stage(stage, student, own_teacher, dataset, config, run)
                if stage == 1:
                    result["apart after"] = apart(student, benchmark, config.teacher)
        if variant == "learnt":
            result["tau after"] = function.log_tau.exp().item()
    finally:  # after an error as well: the next run of this process takes the same folder
        shutil.rmtree(work, ignore_errors=True)
    student.remembered = {}
    if split == "test":
        result["premise after"] = premise(student, config.data, config.tasks_per_batch)
    if benchmark.root.joinpath("query/train/mbeir_motion_train.jsonl").exists():
        result["direction"] = [direction(student, config.data, shuffled=mixed)
                               for mixed in (False, True)]
    result |= scores(student, benchmark, split) | {"seconds": round(time.time() - started)}
    if keep:
        student.save_pretrained(keep)
    if not path.exists():  # a teacher that is trained again leaves the first one's results
        write_json(path, result)
    print(f"{result['seconds']} s: {result['local']:.1%} {result['global']:.1%} {path.stem}",
          flush=True)
    return result


@contextlib.contextmanager
def replaced(variant):
    """Let train.py use a variant's function meanwhile; None: its own. -> the function"""
    name, function = VARIANTS.get(variant, ("mac_loss", mac_loss))
    usual, function = getattr(train, name), copy.deepcopy(function)  # one that has learnt nothing
    setattr(train, name, function)
    try:
        yield function
    finally:
        setattr(train, name, usual)


def scores(model, benchmark, split):
    """Hit rate @5 on 200 queries of each task, and whether the modality was right."""
    cells = [cell for cell in evaluate.split_cells(benchmark, split, limit=200)
             if not cell.name.startswith("zero_")]
    embedded = evaluate.Embedded(benchmark, cells, split, lambda items: model.encode(items))
    rankings = embedded.rank(cells)
    confusion = modality_confusion(cells, rankings, lambda key: embedded.union.modality[
        embedded.row(key)])
    quality = score(cells, rankings)
    return {**{pool: quality["average"][pool]["hit_rate@5"] for pool in ("local", "global")},
            "wrong modality": statistics.mean(c["wrong modality"] for c in confusion.values()),
            "cells": {name: [entry[pool]["hit_rate@5"] for pool in ("local", "global")]
                      for name, entry in quality["cells"].items()}}


def apart(student, benchmark, teacher):
    """How far student and teacher are apart on queries that training does not see: mean squared
    distance of their states, which is what distillation lowers, and mean cosine."""
    items = [item for cell in benchmark.cells("val", 24) for item in cell.items]
    teacher = PUMA.from_pretrained(teacher or BASE.model, device=student.device).eval()
    own, other = (model.encode(items, normalize=False) for model in (student, teacher))
    return {"distance": (own - other).square().mean().item(),
            "cosine": torch.cosine_similarity(own, other, dim=1).mean().item()}


def settings_of(world, loss, mix, tau, **more):
    return {"data": WORLDS[world], "tasks_per_batch": mix, "temperature": tau,
            **LOSSES[loss], **more}


def mean_of_pools(result):
    return (result["local"] + result["global"]) / 2


def local_alone(result):
    return result["local"]


CRITERIA = {"": mean_of_pools, ", best local": local_alone}  # how a loss's best run is chosen
FOUR = ", 4 tasks a batch"  # the main two losses are also tried with


def follow_tau(world, loss, mix, folder):
    """Outward from 0.05 in both directions as long as it gets better, by each criterion."""
    runs = {}

    def run(place):
        if place not in runs:
            runs[place] = run_one(settings_of(world, loss, mix, TAUS[place]), 0, folder)
        return runs[place]

    for value in CRITERIA.values():
        for step in (1, -1):
            place = START
            while 0 <= place + step < len(TAUS) and value(run(place + step)) > value(run(place)):
                place += step


def side_by_side(jobs, workers):
    """Run (function, *arguments) jobs in processes of one thread each."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(*job) for job in jobs]):
            future.result()


def grid(folder, workers):
    side_by_side([(follow_tau, world, loss, mix, folder) for world in WORLDS for loss in LOSSES
                  for mix in (EVERY_MIX if loss in MAIN else MIXES)], workers)


def tried(folder, world, loss, mixes=MIXES):
    """{(mix, tau): result} of the grid's runs that are there."""
    found = {}
    for mix in mixes:
        for tau in TAUS:
            path = folder / f"{run_id(settings_of(world, loss, mix, tau))} seed=0.json"
            if path.exists():
                found[mix, tau] = json.loads(path.read_text())
    return found


def best(folder, world, loss, value):
    """(mix, tau) of the best run of the grid by `value(result)`; None if there is none."""
    runs = tried(folder, world, loss)
    return max(runs, key=lambda key: value(runs[key]), default=None)


def final_lines(folder, world):
    """{line of the table: settings}: each loss at its best, by both pools and by local alone; then,
    for the README, all layers, and both stages as train.py has them, with as many samples."""
    lines, test = {}, {"stage2_steps": FINAL, "split": "test"}
    for why, value in CRITERIA.items():
        for loss in LOSSES:
            choice = best(folder, world, loss, value)
            settings = choice and settings_of(world, loss, *choice, **test)
            if choice and settings != lines.get(loss):  # the same may be the best by both
                lines[loss + why] = settings
    for loss in filter(lines.get, MAIN):  # what lies between, otherwise the same
        lines[loss + FOUR] = lines[loss] | {"tasks_per_batch": 4}
    if world == README_WORLD and lines:
        lines["InfoNCE, all layers"] = {**lines["InfoNCE"], "keep_layers": 8}
        usual = Config()
        names = "stage1_steps distill_weight distill_scale tasks_per_batch temperature".split()
        lines["PUMA, both stages"] = test | {name: getattr(usual, name) for name in names} | {
            "data": WORLDS[world], "stage2_steps": FINAL - usual.stage1_steps}
        lines["both stages, rising"] = lines["PUMA, both stages"] | LOSSES["MAC-Loss, rising"]
        control = lines["PUMA, both stages"] | LOSSES["InfoNCE"]
        lines["both stages, InfoNCE"] = control | {"temperature": lines["InfoNCE"]["temperature"]}
        lines["both stages, InfoNCE at PUMA's tau"] = control
    return lines


def finals(folder, workers, seeds=5):
    side_by_side([(run_one, settings, seed, folder) for seed in range(seeds) for world in WORLDS
                  for settings in final_lines(folder, world).values()], workers)


def infonce(folder, **more):
    """The settings of InfoNCE at its best in the README's world."""
    choice = best(folder, README_WORLD, "InfoNCE", mean_of_pools)
    if choice is None:
        raise ValueError(f"{folder}: expected results; run `python toy/evidence.py grid` first")
    return settings_of(README_WORLD, "InfoNCE", *choice, **more)


def depth_settings(folder, keep, steps):
    return infonce(folder, keep_layers=keep, stage2_steps=steps, split="test")


def depth(folder, workers, seeds=3):
    side_by_side([(run_one, depth_settings(folder, keep, steps), seed, folder)
                  for seed in range(seeds) for steps in LENGTHS for keep in DEPTHS], workers)


def layers(folder, workers=1):
    """What may be seen without training: contrastive loss and hit rate after every depth, the
    latter also without the last kept layer's MLP, as FreeRet (arXiv 2509.24621) reads MLLMs out."""
    path = folder / "layers.json"
    if path.exists():
        return
    model, data = PUMA.from_pretrained(BASE.model).eval(), WORLDS[README_WORLD]
    benchmark, losses, result = Benchmark(data), [], {}
    for batch in TrainSet(benchmark, BASE.batch_size, 8, ALL):
        with torch.no_grad():
            states = [layer_embeddings(model, model.collate(batch[side]))
                      for side in ("queries", "targets")]
        mask = duplicate_mask(batch["positive_keys"], batch["target_keys"])
        losses.append([mac_loss(*pair, batch["modality"], 0.05, 0.05, duplicate=mask).item()
                       for pair in zip(*states)])
    result["loss"] = [statistics.mean(values) for values in zip(*losses)]  # of depths 0..L
    for depth in range(1, len(result["loss"])):
        cut = prune_layers(copy.deepcopy(model), depth)
        result[f"{depth}"] = scores(cut, benchmark, "test")
        layer = find_decoder(cut).layers[-1]
        layer.mlp.down_proj.weight.data.zero_()  # what it adds to the state is nothing
        result[f"{depth} without the last MLP"] = scores(cut, benchmark, "test")
    write_json(path, result)


def premises(folder, workers=1):
    """What MAC-Loss assumes, before training: in 32 batches of each kind, by the first layers."""
    path = folder / "premise.json"
    if not path.exists():
        model = PUMA.from_pretrained(BASE.model, BASE.keep_layers).eval()
        write_json(path, {world: {name: premise(model, data, mix, batches=32)
                                  for mix, name in EVERY_MIX.items()}
                          for world, data in WORLDS.items()})


def distil_settings(folder, labels, steps, weight, teacher):
    return infonce(folder, labels=labels, stage1_steps=steps, distill_weight=weight,
                   teacher=teacher)


def distil(folder, workers, seeds=3):
    kinds = [(steps, *teacher) for steps in STAGE1_STEPS for teacher in TEACHERS.values()]
    kinds += [(plain_steps(steps), *NO_TEACHER) for steps in STAGE1_STEPS]
    jobs = [(run_one, distil_settings(folder, labels, *kind), seed, folder)
            for seed in range(seeds) for labels in LABELS for kind in kinds]
    # The trained teacher first, if one is still to learn from it: its folder must be there.
    if any(job[1]["teacher"] and not path_of(*job[1:]).exists() for job in jobs):
        run_one(depth_settings(folder, 8, FINAL), 0, folder, keep=folder / TRAINED)
    side_by_side(jobs, workers)


# ---- tables and pictures -------------------------------------------------------------------------

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # t, 1 to 9 degrees


def paired(values, reference):
    """Number of seeds both have, mean difference over them, half its 95 % interval's width."""
    differences = [values[seed] - reference[seed] for seed in values.keys() & reference.keys()]
    if len(differences) < 2:
        return len(differences), sum(differences), math.nan
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    return len(differences), statistics.mean(differences), T95[len(differences) - 2] * spread


def results_of(folder, settings):
    return [json.loads(path.read_text()) for path in folder.glob("*.json")
            if path.name.rpartition(" seed=")[0] == run_id(settings)]


def values_of(folder, settings, column):
    """{seed: percent} of a line's runs that are there."""
    return {run["seed"]: 100 * run[column] for run in results_of(folder, settings)}


def difference(folder, settings, other):
    """One line's local / global less the other's, over the seeds both have; "" below three."""
    found = [paired(*(values_of(folder, each, pool) for each in (settings, other)))
             for pool in ("local", "global")]
    return " / ".join(f"{mean:+.1f} ± {half:.1f}" for count, mean, half in found if count > 2)


def grid_table(folder, world):
    """Markdown: local / global by loss, batch mix and tau; the loss's best in bold."""
    lines = ["| loss | batch | " + " | ".join(f"tau {tau}" for tau in TAUS) + " |",
             "|---|---|" + "---|" * len(TAUS)]
    for loss in LOSSES:
        runs = tried(folder, world, loss, EVERY_MIX)
        choice = best(folder, world, loss, mean_of_pools)
        for mix, name in EVERY_MIX.items():
            cells = [f"{100 * run['local']:.1f} / {100 * run['global']:.1f}" if run else ""
                     for run in (runs.get((mix, tau)) for tau in TAUS)]
            if choice and choice[0] == mix:
                place = TAUS.index(choice[1])
                cells[place] = f"**{cells[place]}**"
            if any(cells):
                lines.append(f"| {loss} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def finals_table(folder, world):
    """Markdown: each line's mean, its difference to InfoNCE's, paired by seed, and its setting."""
    columns, lines = ("local", "global", "wrong modality"), final_lines(folder, world)
    rows = ["| loss | batch, tau | seeds | " + " | ".join(f"{c} | against InfoNCE"
                                                         for c in columns) + " |",
            "|---|---|---|" + "---|---|" * len(columns)]
    for name, settings in lines.items():
        cells, seeds = [], 0
        # InfoNCE of the same kind; that with four tasks stands against the one with all.
        why = next(why for why in (FOUR, *reversed(CRITERIA)) if name.endswith(why))
        first = lines.get("InfoNCE" + ("" if name == "InfoNCE" + FOUR else why), settings)
        for column in columns:
            values = values_of(folder, settings, column)
            if not (seeds := len(values)):
                break
            common, mean, half = paired(values, values_of(folder, first, column))
            cells.append(f"{statistics.mean(values.values()):.1f}")
            cells.append("" if settings == first or common < 2 else f"{mean:+.1f} ± {half:.1f}")
        if seeds:
            batch = f"{EVERY_MIX[settings['tasks_per_batch']]}, {settings['temperature']}"
            rows.append(f"| {name} | {batch} | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(rows) if len(rows) > 2 else ""


PREMISE = ("cosine to the positive", "cosine to intra-modality negatives",
           "cosine to inter-modality negatives", "share of negatives of another modality",
           "share of hardest negatives of another modality",
           "share of hardest negatives of another dataset")


def premise_table(folder, world):
    """Markdown: the premise before training, and in batches as each final trained on; direction."""
    rows = ["| | " + " | ".join(PREMISE).replace("hardest", "nearest")
            + " | clips told from their reverse, %, with shuffled frames, % |",
            "|---|" + "---|" * (len(PREMISE) + 1)]
    path, lines = folder / "premise.json", {}  # name -> premises, directions: one a seed
    if path.exists():
        lines = {f"before training, {mix}": ([found], [])
                 for mix, found in json.loads(path.read_text())[world].items()}
    for name, settings in final_lines(folder, world).items():
        if found := results_of(folder, settings):
            lines[name] = ([r["premise after"] for r in found],
                           [r["direction"] for r in found if "direction" in r])
    for name, (found, directions) in lines.items():
        # With one task a batch there are no inter-modality negatives.
        values = [[own[line] for own in found if line in own] for line in PREMISE]
        means = [f"{statistics.mean(own):.2f}" if own else "" for own in values]
        told = [f"{100 * statistics.mean(part):.0f}" for part in zip(*directions)]
        rows.append(f"| {name} | " + " | ".join([*means, ", ".join(told)]) + " |")
    return "\n".join(rows)


def depth_table(folder):
    """Markdown: local / global by layers kept and steps."""
    if not best(folder, README_WORLD, "InfoNCE", mean_of_pools):
        return ""
    rows = ["| layers | " + " | ".join(f"{steps} steps" for steps in LENGTHS) + " |",
            "|---|" + "---|" * len(LENGTHS)]
    for keep in DEPTHS:
        pairs = [[values_of(folder, depth_settings(folder, keep, steps), pool).values()
                  for pool in ("local", "global")] for steps in LENGTHS]
        cells = [" / ".join(f"{statistics.mean(values):.1f}" for values in pair)
                 + f" ({len(pair[0])})" if pair[0] else "" for pair in pairs]
        if any(cells):
            rows.append(f"| {keep} | " + " | ".join(cells) + " |")
    if len(rows) < 4:  # one depth says nothing of depth
        return ""
    half, whole = DEPTHS[-1] // 2, DEPTHS[-1]
    gaps = [difference(folder, *(depth_settings(folder, keep, steps) for keep in (half, whole)))
            for steps in LENGTHS]
    return "\n".join([*rows, f"| {half} against {whole} | " + " | ".join(gaps) + " |"])


def layers_table(folder):
    """Markdown: by depth, what is seen without training, and what training makes of it."""
    path = folder / "layers.json"
    if not path.exists():
        return ""
    found, rows = json.loads(path.read_text()), [
        "| layers | loss | untrained | without the last MLP | trained, 480 steps |",
        "|---|---|---|---|---|"]
    depths = len(found["loss"]) - 1
    chosen = [min(half, key=found["loss"].__getitem__)
              for half in (range(1, depths // 2 + 1), range(depths // 2 + 1, depths + 1))]
    for depth in range(1, depths + 1):
        cells = [f"{100 * run['local']:.1f} / {100 * run['global']:.1f}" for run in (
            found[f"{depth}"], found[f"{depth} without the last MLP"])]
        trained = [values_of(folder, depth_settings(folder, depth, 480), pool).values()
                   for pool in ("local", "global")]
        cells.append(" / ".join(f"{statistics.mean(values):.1f}" for values in trained if values))
        loss = f"{found['loss'][depth]:.2f}"
        rows.append(f"| {depth} | {f'**{loss}**' if depth in chosen else loss} | "
                    + " | ".join(cells) + " |")
    return "\n".join(rows)


def distil_table(folder):
    """Markdown: by labels, steps of stage 1 and teacher, what is found and the way to the teacher.
    """
    rows = ["| labels | steps of stage 1 | teacher | seeds | local / global | against no teacher | "
            "at equal time | distance, before to after | clips told from their reverse |",
            "|---" * 9 + "|"]
    for labels in LABELS if best(folder, README_WORLD, "InfoNCE", mean_of_pools) else ():
        for steps in sorted({*STAGE1_STEPS, *map(plain_steps, STAGE1_STEPS)}):
            for name, teacher in TEACHERS.items():
                settings = distil_settings(folder, labels, steps, *teacher)
                found = results_of(folder, settings)
                if not found:
                    continue
                local, wide, told = (100 * statistics.mean(values) for values in zip(
                    *((run["local"], run["global"], run["direction"][0]) for run in found)))
                before, after = (statistics.mean(run[f"apart {when}"]["distance"] for run in found)
                                 for when in ("before", "after"))
                against = " | ".join(
                    "" if teacher == NO_TEACHER else difference(
                        folder, settings, distil_settings(folder, labels, many, *NO_TEACHER))
                    for many in (steps, plain_steps(steps)))
                rows.append(f"| {LABELS[labels]} | {steps} | {name} | {len(found)} | {local:.1f} / "
                            f"{wide:.1f} | {against} | {before:.2f} to {after:.2f} | {told:.0f} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def seen_worlds(folder):
    """The worlds that the grid has runs of; the default one always."""
    return [world for world in WORLDS
            if world == README_WORLD or any(tried(folder, world, loss) for loss in LOSSES)]


MARKERS = dict(zip(EVERY_MIX, "<o>s", strict=True))
COLOURS = [f"tab:{name}" for name in
           "blue red green olive cyan orange purple brown pink gray".split()]


def draw(path, folder):
    """Local against global hit rate of the finals, the mean of a line's seeds; a panel a world.

    Arrows lead from InfoNCE to MAC-Loss, the large points. A percentage point has the same length
    on both axes.
    """
    worlds, mixes_shown, losses_shown = seen_worlds(folder), {}, {}
    figure, axes = plt.subplots(1, len(worlds), figsize=(3.4 * len(worlds), 6),
                                sharex=True, sharey=True, squeeze=False)
    for axis, world in zip(axes[0], worlds):
        lines, ends = final_lines(folder, world), {}
        for loss, colour in zip(LOSSES, COLOURS, strict=True):
            for settings in (lines.get(loss + why) for why in (*CRITERIA, FOUR)):
                if not settings or not results_of(folder, settings):
                    continue
                mix = settings["tasks_per_batch"]
                point = [statistics.mean(values_of(folder, settings, pool).values())
                         for pool in ("local", "global")]
                axis.plot(*point, MARKERS[mix], color=colour, markersize=10 if loss in MAIN else 6,
                          alpha=0.8, zorder=3 if loss in MAIN else 2)
                ends[loss, mix] = point
                mixes_shown[EVERY_MIX[mix]] = MARKERS[mix], "black"
                losses_shown[loss] = "D", colour
        for mix in EVERY_MIX:
            if {(loss, mix) for loss in MAIN} <= ends.keys():
                axis.annotate("", *(ends[loss, mix] for loss in reversed(MAIN)),
                              arrowprops={"arrowstyle": "->", "color": "0.5", "shrinkA": 7,
                                          "shrinkB": 7})
        axis.set(title=world, xlabel="local pools, %", aspect="equal")
        axis.margins(x=0.2)
        axis.xaxis.set_major_locator(plt.MaxNLocator(4, prune="upper"))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("global pool: hit rate @5, %")
    for label, (marker, colour) in (mixes_shown | losses_shown).items():
        axes[0, -1].plot([], [], marker, color=colour, label=label)
    axes[0, -1].legend(fontsize=9, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout(w_pad=2)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)


def draw_depth(path, folder):
    """Hit rate by layers kept, a curve per length of training: left local, right global."""
    figure, axes = plt.subplots(1, 2, figsize=(6.8, 3), sharey=True)
    for axis, pool in zip(axes, ("local", "global")):
        for steps, colour in zip(LENGTHS, plt.cm.viridis([0.85, 0.6, 0.35, 0.0])):
            means = {keep: statistics.mean(values.values()) for keep in DEPTHS if (
                values := values_of(folder, depth_settings(folder, keep, steps), pool))}
            axis.plot(means.keys(), means.values(), "o-", color=colour, markersize=4,
                      label=f"{steps} steps")
        axis.set(title=f"{pool} pool{'s' * (pool == 'local')}", xlabel="layers kept, of 8")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("hit rate @5, %")
    axes[1].legend(fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_distil(path, folder, steps=120):
    """Hit rate by share of labels at equal time, a colour per teacher, a point per seed: left
    local, right global."""
    figure, axes = plt.subplots(1, 2, figsize=(6.8, 4), sharey=True)
    for axis, pool in zip(axes, ("local", "global")):
        for number, (name, teacher) in enumerate(TEACHERS.items()):
            many = plain_steps(steps) if teacher == NO_TEACHER else steps  # as much time
            found = [(place + (number - 2) / 8, value) for place, labels in enumerate(LABELS)
                     for value in values_of(folder, distil_settings(
                         folder, labels, many, *teacher), pool).values()]
            axis.plot(*(zip(*found) if found else ([], [])), "o", color=COLOURS[number],
                      markersize=5, alpha=0.8, label=name)
        axis.set(title=f"{pool} pool{'s' * (pool == 'local')}", xlabel="labels",
                 xticks=range(len(LABELS)), xticklabels=LABELS.values())
        axis.grid(alpha=0.3, axis="y")
    axes[0].set_ylabel("hit rate @5, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=2, fontsize=9)
    figure.tight_layout(rect=(0, 0.2, 1, 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)


NOTES = {  # what docs/evidence.md says above the tables of each section
    "Grid": f"""
Validation queries, {BASE.stage2_steps} steps, one seed; bold: the loss's best by the mean of both
pools. The rule: tau is followed outward from 0.05 until neither that mean nor the local rate gets
better. Thinned: most variants with two tasks a batch, and one or four tasks a batch (the main two
losses alone, not chosen from), were tried at one tau or two; rows without 0.05 were started at a
higher tau. Where a best stands at the edge of what was tried, the search is unfinished.

One dataset: GlyphBEIR as train.py has it, characters and some clips. Four domains: `--domains`.
Intra-modality negatives have the modality that the query wants, inter-modality ones another; tau
is the temperature of the latter, MAC-Loss's hard one ends at 0.61 of it. Offset: added to the
logits of intra-modality negatives. Learnt tau: beside the weights, beginning with the column's.
Positive at tau: the positive does not get the hard temperature. Pair by pair: each negative meets
the positive at the negative's own temperature. Rising: the hard temperature goes up to tau instead
of down from it; crossing: up beyond it, until it is the softer one. Inverted: inter-modality
negatives get the lower temperature.""",
    "Finals": """
Test queries, 480 steps, the losses that were run at their best setting of the grid: by the mean of
both pools, or (best local) by local pools alone. Rows with four tasks a batch were not chosen: they
have the tau of the loss's first row. Against InfoNCE: over the seeds both have, paired, ± half of
the 95 % interval. MAC-Loss with four tasks stands against InfoNCE with four, rows of best local
against InfoNCE's best local, all others against InfoNCE's first row. Wrong modality: share of first
places in the global pool. All intervals are of seeds of training alone: one MLLM, the same 200
queries a task. All layers have the tau of four.

Second table: the premise that MAC-Loss rests on, before training in 32 batches of each kind (the
first four layers), after it in four batches of the row's own kind, the same for every seed (with
two tasks these are four pairs of tasks: a small sample). Shares are fractions; nearest: of the
highest cosine. Clips: test and zero-shot ones, without those that blink, which has no reverse; a
clip or its description counts if it is nearer to the right target than to that of the reverse.

The picture: the first table, a point a row; what has other layers or a stage 1 is left out.""",
    "Depth": """
InfoNCE with the setting that is best for four layers, test queries, mean of the seeds (how many).
The last row is paired by seed, ± half of the 95 % interval.""",
    "Without training": """
Contrastive loss (tau 0.05, eight training batches of all tasks) and hit rate (test queries) of the
untrained MLLM cut after each layer; bold: the lowest loss of each half, which L3Prune (arXiv
2410.14578) would choose. Without the last MLP: the last kept layer adds only what its attention
says (FreeRet, arXiv 2509.24621). Trained: as in Depth.""",
    "Distillation": f"""
Validation queries, mean of the seeds: stage 1 as given (distillation times {BASE.distill_scale:g}),
then {BASE.stage2_steps} steps of InfoNCE at its best. Distillation alone needs no labels, so its
stage 1 takes all training queries; all others see the labelled ones. Against no teacher: as many
steps, paired by seed, ± half of the 95 % interval, where there are three; at equal time: against no
teacher in 5/3 as many steps, as the teacher's eight layers cost two thirds of a step of four.
Distance: mean squared difference to the states of the teacher (without one: of the MLLM), of
queries that training does not see, before and after stage 1. The trained teacher: all layers,
{FINAL} steps of InfoNCE, all labels; one training, the same for every seed, but another one,
on another processor, for stages of 40 and 480 steps (89.4 / 87.0 instead of 90.9 / 84.7).

The picture: 120 steps with a teacher, 200 without, which takes as much time.""",
}
PICTURES = {"Finals": ("evidence.png", draw), "Depth": ("evidence_depth.png", draw_depth),
            "Distillation": ("evidence_distil.png", draw_distil)}


def write_report(folder, docs):
    """docs/evidence.json, .md and the pictures, of the results in `folder`."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("* seed=*.json"))]
    if not results:  # the tables that are there are worth more than empty ones
        raise FileNotFoundError(f"{folder}: expected the results of runs, found none")
    about = {"of": folder.name} | {path.stem: read_json(path) for path in (
        folder / "layers.json", folder / "premise.json") if path.exists()}
    lines = ",\n".join(map(json.dumps, results))  # one run a line
    write_text(docs / "evidence.json", f'{json.dumps(about)[:-1]}, "runs": [\n{lines}\n]}}\n')
    finals = {world: finals_table(folder, world) for world in WORLDS}
    sections = {
        "Grid": [f"### {world}\n\n{grid_table(folder, world)}" for world in seen_worlds(folder)],
        "Finals": [f"### {world}\n\n{table}\n\n{premise_table(folder, world)}"
                   for world, table in finals.items() if table],
        "Depth": [depth_table(folder)], "Without training": [layers_table(folder)],
        "Distillation": [distil_table(folder)]}
    text = [f"# Evidence\n\nMade by `python toy/evidence.py`: hit rate @5, %, mean over the tasks, "
            f"local pools / global pool; unless a row says otherwise {BASE.keep_layers} layers, "
            f"batches of {BASE.batch_size} pairs, no stage 1."]
    for name, tables in sections.items():
        if any(tables):
            text += [f"## {name}", NOTES[name].strip(), *tables]
            if name in PICTURES:
                file, draw_it = PICTURES[name]
                draw_it(docs / file, folder)
                text.append(f"![{name}]({file})")
    write_text(docs / "evidence.md", "\n\n".join(text) + "\n")


def restore(folder, docs):
    """Begin a new folder of results with those of `docs`, if they are of its MLLM and worlds."""
    folder.mkdir(parents=True)
    path = docs / "evidence.json"
    kept = read_json(path) if path.exists() else {}
    if kept.get("of") == folder.name:
        for run in kept["runs"]:
            write_json(folder / f"{run['id']} seed={run['seed']}.json", run)
        for name in kept.keys() & {"layers", "premise"}:
            write_json(folder / f"{name}.json", kept[name])


PARTS = {"grid": grid, "finals": finals, "premise": premises, "depth": depth, "layers": layers,
         "distil": distil}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/evidence", help="its subfolders")
    parser.add_argument("--report", action="store_true", help="only write the tables and pictures")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {sorted(unknown)[0]}: choose from {', '.join(PARTS)}")
    with clear_errors():
        run(args)


def run(args):
    """Do what has no result yet, part by part, and write the report after each."""
    check_option("--workers", args.workers, int, 1, 1024)
    args.work = args.work.absolute()
    os.chdir(ROOT)  # the paths in Config are relative to the repository
    weights = Path(BASE.model, "model.safetensors").read_bytes()
    args.work.mkdir(parents=True, exist_ok=True)  # fails now or never
    evaluate.ensure_data(BASE.data)
    if not Path(WORLDS["four domains"]).exists():
        print(build(WORLDS["four domains"], domains=True), flush=True)
    for world in WORLDS.values():  # another MLLM or another world has other results
        weights += Path(world, "query/union_train/mbeir_union_up_train.jsonl").read_bytes()
    args.work /= hashlib.sha256(weights).hexdigest()[:8]
    if not args.work.exists():
        restore(args.work, ROOT / "docs")
    if not args.report:
        for part in args.parts or PARTS:
            PARTS[part](args.work, args.workers)
            write_report(args.work, ROOT / "docs")
    write_report(args.work, ROOT / "docs")
    print((ROOT / "docs/evidence.md").read_text())


if __name__ == "__main__":
    main()
