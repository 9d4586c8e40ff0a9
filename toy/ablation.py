"""The evidence: which part of PUMA helps on GlyphBEIR, with five seeds and paired differences.

    python toy/ablation.py                     # every group; hours on two cores, resumes by itself
    python toy/ablation.py losses --seeds 5    # one group

Each run trains a model (stage 2 with the same number of samples everywhere), evaluates it on 200
test queries a cell, and leaves one JSON file in `runs/ablation`; a run whose file is there is not
done again. Afterwards docs/ablation.json (all results), docs/ablation.md (tables: mean, spread,
difference to the table's first line, paired by seed, with its 95 % interval) and two pictures
beside them are written. Runs go side by side with one thread each: two such do more than one with
two threads. All of it takes about four hours on two cores.
"""

import argparse
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

import evaluate  # noqa: E402
import train  # noqa: E402
from data import Benchmark  # noqa: E402
from settings import Config  # noqa: E402
from support.files import check_option, clear_errors, write_json, write_text  # noqa: E402
from support.pictures import plt  # noqa: E402
from support.report import modality_confusion, score  # noqa: E402
from support.run import Run  # noqa: E402

# What the tables compare is written out, so that new defaults of train.py do not change them.
BASE = Config(stage1_steps=0, stage2_steps=80, lr=3e-3, temperature=0.03, decay=0.5, workers=0,
              eval=False)
LOWEST = 0.03 * math.exp(-0.5)  # tau_hard at the end of the schedule
DISTIL = {"stage1_steps": 40}
FULL = "full depth, InfoNCE"  # its model is the trained teacher of the group "teacher"
TRAINED = "trained"

# group -> {line of the table: settings}; differences are to the first line of the group
GROUPS = {
    "parts": {
        "pruned, InfoNCE": {"loss": "infonce"},
        FULL: {"loss": "infonce", "keep_layers": 8},
        "pruned, MAC": {},
        "pruned, stage 1 without teacher, InfoNCE":
            {"loss": "infonce", **DISTIL, "distill_weight": 0.0},
        "pruned, distilled, InfoNCE": {"loss": "infonce", **DISTIL},
        "pruned, stage 1 without teacher, MAC": {**DISTIL, "distill_weight": 0.0},
        "pruned, distilled, MAC": DISTIL,
    },
    "losses": {
        "InfoNCE": {"loss": "infonce"},
        "MAC": {},
        "InfoNCE at tau_hard": {"loss": "infonce", "temperature": LOWEST},
        "InfoNCE + intra-modality offset 1": {"loss": "infonce", "intra_offset": 1.0},
    },
    "mac": {
        "MAC": {},
        "InfoNCE at tau_hard": {"loss": "infonce", "temperature": LOWEST},
        "MAC without schedule": {"schedule": False},
        "MAC, positive at tau": {"positive_temperature": "base"},
        "MAC, lambda 0.2": {"decay": 0.2},
        "MAC, lambda 1": {"decay": 1.0},
        "MAC, duplicates not masked": {"mask_duplicates": False},
    },
    "other modalities pushed less": {  # all else is equal: no schedule, the low temperature
        "InfoNCE at tau_hard": {"loss": "infonce", "temperature": LOWEST},
        "MAC without schedule": {"schedule": False},
    },
    "distil": {
        "stage 1 without teacher, InfoNCE": {"loss": "infonce", **DISTIL, "distill_weight": 0.0},
        "distilled, InfoNCE": {"loss": "infonce", **DISTIL},
        "distilled, text only, InfoNCE":
            {**DISTIL, "distill_modalities": "text", "loss": "infonce"},
    },
    "distil before MAC": {
        "stage 1 without teacher, MAC": {**DISTIL, "distill_weight": 0.0},
        "distilled, MAC": DISTIL,
    },
    **{f"{labels or 'all'} labels": {  # of 45,598
        name: {"labels": labels, "loss": "infonce", **stage1}
        for name, stage1 in {
            "stage 1 without teacher": {**DISTIL, "distill_weight": 0.0},
            "no stage 1": {},
            "distilled 0.1": DISTIL,
            "pure distillation of unlabelled items": {**DISTIL, "distill_weight": 1.0},
            "the same, 3 x as long": {"stage1_steps": 120, "distill_weight": 1.0},
            "stage 1 without teacher, 3 x as long": {"stage1_steps": 120, "distill_weight": 0.0},
        }.items()
    } for labels in (450, 4500, 0)},
    "teacher": {
        "cut from a trained model, stage 1 without teacher":
            {"loss": "infonce", **DISTIL, "distill_weight": 0.0, "model": TRAINED},
        "cut from a trained model, distilled 0.5":
            {"loss": "infonce", **DISTIL, "distill_weight": 0.5, "model": TRAINED},
    },
    "layers": {
        f"{keep} layer{'s' * (keep > 1)}{', the last one kept' * last}":
            {"keep_layers": keep, "keep_last": last, "loss": "infonce"}
        for keep in (4, 1, 2, 3, 5, 6, 7, 8) for last in (False, True) if keep < 8 or not last
    },
}


T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # t, 1 to 9 degrees


def run_id(settings):
    """The settings that differ from BASE, as text: the same run may stand in several groups."""
    base, config = asdict(BASE), asdict(replace(BASE, **settings))
    changed = [f"{key}={value}" for key, value in config.items() if value != base[key]]
    return " ".join(changed) or "base"


def result_path(folder, settings, seed):
    return folder / f"{run_id(settings)} seed={seed}.json"


def run_one(settings, seed, folder):
    """Train and evaluate one model; -> its results, also written to `folder`."""
    torch.set_num_threads(1)
    started = time.time()
    config = replace(BASE, seed=seed, **settings)
    if config.model == TRAINED:
        config.model = str(folder / f"trained-{seed}")
    device = torch.device("cpu")
    torch.manual_seed(seed)
    benchmark = Benchmark(config.data, seed)
    student = train.load_student(config, device)
    teacher = train.load_teacher(config, student, device)
    work = folder / f"work-{os.getpid()}"
    run = Run(work)
    sets = {stage: train.train_set(benchmark, config, stage) for stage in (1, 2)}
    train.remember_images(student, sets.values(), config)
    for stage, dataset in sets.items():
        if len(dataset):
            train.train_stage(stage, student, teacher, dataset, config, run)
        teacher = None
    student.remembered = {}
    benchmark = Benchmark(config.data)  # the same instructions for every seed
    cells = evaluate.split_cells(benchmark, "test", limit=200)
    embedded = evaluate.Embedded(benchmark, cells, "test", student.encode)
    rankings = embedded.rank(cells)
    quality = score(cells, rankings)
    confusion = modality_confusion(cells, rankings, lambda key: embedded.union.modality[
        embedded.row(key)])
    result = {
        "id": run_id(settings), "seed": seed, "seconds": round(time.time() - started),
        "masked_duplicates": sum(row["masked_duplicates"] for row in run.rows()),
        "confusion": confusion,
        "tasks": {name: {pool: entry[pool]["hit_rate@5"] for pool in ("local", "global")}
                  for name, entry in quality["cells"].items()},
    }
    for key, split in (("average", "seen"), ("average_zero", "zero-shot")):
        for pool in ("local", "global"):
            result[f"{split} {pool}"] = quality[key][pool]["hit_rate@5"]
    if settings == GROUPS["parts"][FULL]:
        student.save_pretrained(folder / f"trained-{seed}")
    shutil.rmtree(work)
    write_json(result_path(folder, settings, seed), result)
    return result


def run_group(group, seeds, folder, workers):
    """Do every run of a group that has no result yet, `workers` at a time, seed by seed."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = {}
    for seed in range(seeds):
        for settings in GROUPS[group].values():
            if not result_path(folder, settings, seed).exists():
                tasks[run_id(settings), seed] = settings
    print(f"{group}: {len(tasks)} runs to do", flush=True)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        pending = [pool.submit(run_one, settings, seed, folder)
                   for (_, seed), settings in tasks.items()]
        for done, future in enumerate(as_completed(pending), 1):
            result = future.result()
            print(f"{done}/{len(tasks)}, {result['seconds']} s: local {result['seen local']:.1%}, "
                  f"global {result['seen global']:.1%}, seed {result['seed']}: {result['id']}",
                  flush=True)


# ---- tables and pictures -------------------------------------------------------------------------

POOLS = {"seen local": "tab:blue", "seen global": "tab:orange"}
COLUMNS = ("seen local", "seen global", "zero-shot local", "zero-shot global", "wrong modality")


def values_of(results, settings, column):
    """{seed: percent} of one line of a table; `column` is one of COLUMNS or (task, pool)."""
    found = [result for result in results if result["id"] == run_id(settings)]
    if isinstance(column, tuple):
        task, pool = column
        return {result["seed"]: 100 * result["tasks"][task][pool] for result in found}
    if column == "wrong modality":  # share of first places of the global pool, mean over tasks
        shares = {r["seed"]: [task["wrong modality"] for name, task in r["confusion"].items()
                              if not name.startswith("zero_")] for r in found}
        return {seed: 100 * statistics.mean(share) for seed, share in shares.items()}
    return {result["seed"]: 100 * result[column] for result in found}


def paired(values, reference):
    """Seeds that both have, mean difference over them, half the width of its 95 % interval."""
    differences = [values[seed] - reference[seed] for seed in values.keys() & reference.keys()]
    if len(differences) < 2:
        return len(differences), sum(differences), math.nan
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    return len(differences), statistics.mean(differences), T95[len(differences) - 2] * spread


def table(group, results):
    """Markdown: mean ± standard deviation over seeds; difference to the first line, paired."""
    lines = [f"## {group}", "", "| | seeds | " + " | ".join(
        f"{column} | difference" for column in COLUMNS) + " |",
        "|---|---|" + "---|---|" * len(COLUMNS)]
    first = next(iter(GROUPS[group].values()))
    for name, settings in GROUPS[group].items():
        cells, seeds = [], 0
        for column in COLUMNS:
            values = values_of(results, settings, column)
            seeds = len(values)
            if not values:
                break
            spread = f" ± {statistics.stdev(values.values()):.1f}" if seeds > 1 else ""
            cells.append(f"{statistics.mean(values.values()):.1f}{spread}")
            common, difference, half = paired(values, values_of(results, first, column))
            cells.append("" if settings == first or not common else
                         f"{difference:+.1f}" + (f" ± {half:.1f}" if common > 1 else ""))
        if seeds:
            lines.append(f"| {name} | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def task_table(results):
    """Markdown: hit rate @5 of InfoNCE and of MAC-Loss by task and pool, difference paired."""
    infonce, mac = (GROUPS["losses"][name] for name in ("InfoNCE", "MAC"))
    tasks = next(result["tasks"] for result in results if result["id"] == run_id(mac))
    lines = ["### losses, by task", "", "| | local: InfoNCE | MAC | difference | global: InfoNCE | "
             "MAC | difference |", "|---|---|---|---|---|---|---|"]
    for task in tasks:
        cells = []
        for pool in ("local", "global"):
            pair = [values_of(results, settings, (task, pool)) for settings in (infonce, mac)]
            cells += [f"{statistics.mean(values.values()):.1f}" for values in pair]
            _, difference, half = paired(pair[1], pair[0])
            cells.append(f"{difference:+.1f} ± {half:.1f}")
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(path, groups, results):
    """One panel a group: a dot a seed, local pools blue and global orange, a bar at the mean."""
    heights = [1.3 + 0.3 * len(GROUPS[group]) for group in groups]
    figure, axes = plt.subplots(len(groups), 1, figsize=(9, sum(heights)), squeeze=False,
                                gridspec_kw={"height_ratios": heights})
    for axis, group in zip(axes[:, 0], groups):
        for row, settings in enumerate(GROUPS[group].values()):
            for column, colour in POOLS.items():
                values = list(values_of(results, settings, column).values())
                if values:
                    axis.plot(values, [row] * len(values), "o", color=colour, alpha=0.5)
                    axis.plot(statistics.mean(values), row, "|", color=colour, markersize=16)
        axis.set_yticks(range(len(GROUPS[group])), GROUPS[group], fontsize=8)
        axis.set_ylim(len(GROUPS[group]) - 0.4, -0.6)
        axis.set_title(group)
        axis.set_xlabel("average hit rate @5 on seen characters, %")
        axis.grid(axis="x", alpha=0.3)
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=colour) for colour in
               POOLS.values()]
    axes[0, 0].legend(handles, ["local pools", "global pool"], loc="center", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


TEACHING = {  # what stage 1 does: its line, the line of the same steps without a teacher
    "0.9 InfoNCE + 0.1 distillation, 40 steps": ("distilled 0.1", "stage 1 without teacher"),
    "distillation alone, 40 steps":
        ("pure distillation of unlabelled items", "stage 1 without teacher"),
    "distillation alone, 120 steps":
        ("the same, 3 x as long", "stage 1 without teacher, 3 x as long"),
}
LABELS = {"450 labels": "450 (1 %)", "4500 labels": "4,500 (10 %)", "all labels": "all 45,598"}


def gains(results, pair, column):
    """What a teacher is worth: `paired` for each number of labels."""
    return [paired(*(values_of(results, GROUPS[group][line], column) for line in pair))
            for group in LABELS]


def gain_table(results):
    """Markdown: gain over the same steps without a teacher, by number of labelled queries."""
    lines = ["### the teacher's worth, by labelled queries", "", "| | pool | "
             + " | ".join(LABELS.values()) + " |", "|---|---|" + "---|" * len(LABELS)]
    for name, pair in TEACHING.items():
        for column in POOLS:
            cells = [f"{mean:+.1f} ± {half:.1f} ({seeds} seeds)"
                     for seeds, mean, half in gains(results, pair, column)]
            lines.append(f"| {name} | {column} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def keep_last_table(results):
    """Markdown: hit rate of layers 1 .. k - 1 and the last, minus that of the first k."""
    by_depth = {(settings["keep_layers"], settings["keep_last"]): settings
                for settings in GROUPS["layers"].values()}
    depths = sorted(keep for keep, last in by_depth if last)
    lines = ["### layers 1 .. k - 1 and the last, against the first k", "",
             "| k | " + " | ".join(map(str, depths)) + " |", "|---|" + "---|" * len(depths)]
    for column in POOLS:
        differences = [paired(*(values_of(results, by_depth[keep, last], column)
                                for last in (True, False))) for keep in depths]
        cells = [f"{mean:+.1f} ± {half:.1f}" for _, mean, half in differences]
        lines.append(f"| {column} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_gain(axis, results):
    """The local half of `gain_table`."""
    for shift, (name, pair) in enumerate(TEACHING.items(), -1):
        _, means, halves = zip(*gains(results, pair, "seen local"))
        places = [place + 0.05 * shift for place in range(len(means))]
        axis.errorbar(places, means, halves, marker="o", capsize=3, label=name)
    axis.axhline(0, color="0.6", linewidth=1)
    axis.set_xticks(range(len(LABELS)), LABELS.values())
    axis.set(title="What the teacher is worth", xlabel="labelled queries",
             ylabel="gain in local hit rate @5, points")
    axis.legend(fontsize=8)


def draw_depths(axis, results):
    """Hit rate against the number of kept layers, the first k or k - 1 and the last."""
    for pool, colour in POOLS.items():
        for last, style in ((False, "o-"), (True, "s:")):
            points = {settings["keep_layers"]: values_of(results, settings, pool).values()
                      for settings in GROUPS["layers"].values()
                      if settings["keep_last"] == last or settings["keep_layers"] == 8}
            means = [statistics.mean(points[keep]) for keep in sorted(points)]
            axis.plot(sorted(points), means, style, color=colour,
                      label=f"{pool.removeprefix('seen ')}, {'last kept' if last else 'first k'}")
    axis.set(title="How deep to cut", xlabel="decoder layers kept, of 8",
             ylabel="hit rate @5, %, mean of the seeds")
    axis.legend(fontsize=8)


def write_report(folder, docs):
    """docs/ablation.json, .md and .png of the groups whose every line has a result in `folder`."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("* seed=*.json"))]
    groups = [group for group in GROUPS
              if all(values_of(results, s, "seen local") for s in GROUPS[group].values())]
    if not results:  # the tables that are there are worth more than empty ones
        raise FileNotFoundError(f"{folder}: expected the results of runs, found none")
    lines = ",\n".join(map(json.dumps, results))  # one run a line
    write_text(docs / "ablation.json", f"[\n{lines}\n]\n")
    text = "\n\n".join(table(group, results) for group in groups)
    if "losses" in groups:
        text += "\n\n" + task_table(results)
    if "layers" in groups:
        text += "\n\n" + keep_last_table(results)
    if set(LABELS) <= set(groups):
        text += "\n\n" + gain_table(results)
    head = ("Average hit rate @5, %, mean ± standard deviation over seeds; differences to the "
            "first line of each table are paired by seed, ± half of the 95 % interval. Wrong "
            "modality: share of first places on the global pool. Made by `python toy/ablation.py`; "
            f"{BASE.stage2_steps} stage-2 steps of {BASE.batch_size} pairs unless said otherwise.")
    picture = "![Every run: a dot a seed, a bar at the mean](ablation.png)"
    write_text(docs / "ablation.md", f"# Ablation\n\n{head}\n\n{text}\n\n{picture}\n")
    if groups:
        draw(docs / "ablation.png", groups, results)
    if {"layers", *LABELS} <= set(groups):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
        draw_gain(left, results)
        draw_depths(right, results)
        figure.tight_layout()
        figure.savefig(docs / "ablation_curves.png", dpi=90)
        plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each line")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/ablation", help="its subfolders")
    parser.add_argument("--report", action="store_true", help="only write the tables and pictures")
    args = parser.parse_args()
    unknown = set(args.groups) - set(GROUPS)
    if unknown:
        parser.error(f"unknown group {sorted(unknown)[0]}: choose from {', '.join(GROUPS)}")
    with clear_errors():
        run(args)


def run(args):
    """Train what has no result yet, group by group, and write the report after each."""
    check_option("--seeds", args.seeds, int, 1, len(T95) + 1)
    check_option("--workers", args.workers, int, 1, 1024)
    args.work = args.work.absolute()
    os.chdir(ROOT)  # the paths in Config are relative to the repository
    weights = Path(BASE.model, "model.safetensors").read_bytes()
    args.work /= hashlib.sha256(weights).hexdigest()[:8]  # another MLLM has other results
    if not args.report:
        args.work.mkdir(parents=True, exist_ok=True)  # fails now or never
        evaluate.ensure_data(BASE.data)
    for group in () if args.report else args.groups or GROUPS:
        run_group(group, args.seeds, args.work, args.workers)
        write_report(args.work, ROOT / "docs")
    write_report(args.work, ROOT / "docs")
    print((ROOT / "docs/ablation.md").read_text())


if __name__ == "__main__":
    main()
