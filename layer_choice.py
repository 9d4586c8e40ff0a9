"""Which k? Read an untrained model out at every depth, and weigh what it finds against its cost.

    python prune_distill.py toy/tiny-qwen2-vl --keep-last              # GlyphBEIR's test queries
    python prune_distill.py Qwen/Qwen2-VL-2B-Instruct --data /data/M-BEIR

For every depth 0 (the token embedding) to L: hit rate @5 with the final norm, cosine and linear CKA
to the last layer, parameters, operations an item. All on samples of the benchmark's cells: some
queries of each, their positives and other candidates of the local pool. So the rates are higher
than those of `evaluate.py`; what counts is how they change from depth to depth. A depth is what
pruning to it leaves before any training.
"""

import argparse
import random
import sys
from pathlib import Path

import numpy as np

from data import Benchmark
from distributed import pick_device
from evaluate import DEFAULT_DATA, ensure_data, result_folder
from prune_distill import layer_report
from puma import PUMA
from report import write_json

HIT = "hit_rate@5"


def sample_cells(benchmark, split, queries=200, candidates=1000, seed=0):
    """[(cell name, query items, candidate items, right indices of each query)] of every cell.

    The first `queries`; their positives and, up to `candidates`, others drawn from the local pool.
    Raises ValueError if a cell's pool holds none of the positives.
    """
    rng, samples = random.Random(seed), []
    for cell in benchmark.cells(split, queries):
        pool = benchmark.pool(cell.pool_path)
        found = [{row for row in pool.find(sorted(keys)).tolist() if row >= 0}
                 for keys in cell.relevant]
        right = sorted(set.union(*found))
        if not right:
            raise ValueError(f"{cell.pool_path}: expected the positives of {cell.name}, found none")
        others = np.setdiff1d(np.arange(len(pool)), right).tolist()
        others = rng.sample(others, min(len(others), max(0, candidates - len(right))))
        column = {row: i for i, row in enumerate(right)}
        positives = [{column[row] for row in rows} for rows in found]
        samples.append((cell.name, cell.items, [pool[row] for row in right + others], positives))
    return samples


def report_layers(model, samples, batch_size=64, keep_last=False):
    """`layer_report` averaged over cells: one dict a depth, in `cells` each cell's hit rate."""
    reports = [layer_report(model, queries, candidates, positives, 5, batch_size, keep_last)
               for _, queries, candidates, positives in samples]
    rows = []
    for depth in zip(*reports):
        row = {key: sum(part[key] for part in depth) / len(depth) for key in depth[0]}
        row |= {"depth": depth[0]["depth"], "parameters": depth[0]["parameters"]}
        row["cells"] = {name: part[HIT] for (name, *_), part in zip(samples, depth)}
        rows.append(row)
    return rows


def suggest(rows, share=0.9):
    """One line: the smallest depth that keeps `share` of the full depth's hit rate, and why."""
    full = rows[-1]
    kept = next(row for row in rows[1:] if row[HIT] >= share * full[HIT])
    hits, of = 100 * kept[HIT], 100 * full[HIT]
    line = (f"k = {kept['depth']} of {full['depth']}: the first depth that keeps {share:.0%} of "
            f"the whole model's hit rate @5 ({hits:.1f} of {of:.1f} %, untrained), at "
            f"{kept['flops'] / full['flops']:.0%} of its operations")
    if kept["depth"] > 1:
        below = rows[kept["depth"] - 1]
        line += (f"; k = {below['depth']} keeps {below[HIT] / full[HIT]:.0%} at "
                 f"{below['flops'] / full['flops']:.0%}")
    return line + "; training can win back part of what a smaller k loses"


def layer_table(rows, variant=None):
    """A text table, one line a depth; `variant`: the rows with the last layer kept."""
    head = f"{'depth':>5}{'hit@5, %':>10}{'cosine':>8}{'CKA':>7}{'parameters':>15}{'GFLOP':>12}"
    lines = [head + (f"{'keep-last: hit@5':>18}{'cosine':>8}{'CKA':>7}" if variant else "")]
    for row in rows:
        line = (f"{row['depth']:>5}{100 * row[HIT]:>10.1f}{row['cosine']:>8.3f}{row['cka']:>7.3f}"
                f"{row['parameters']:>15,}{row['flops'] / 1e9:>12.4f}")
        if variant and row["depth"]:
            other = variant[row["depth"]]
            line += f"{100 * other[HIT]:>18.1f}{other['cosine']:>8.3f}{other['cka']:>7.3f}"
        lines.append(line)
    return "\n".join(lines)


def choose(args):
    """What `main` does, errors as exceptions: ValueError or OSError on bad input."""
    if args.limit < 1 or args.candidates < 1:
        raise ValueError(f"--limit and --candidates must be at least 1, got {args.limit} and "
                         f"{args.candidates}")
    ensure_data(args.data)
    model = PUMA.from_pretrained(args.model, device=pick_device(args.device))
    samples = sample_cells(Benchmark(args.data), args.split, args.limit, args.candidates)
    rows = report_layers(model, samples, args.batch_size)
    variant = report_layers(model, samples, args.batch_size, True) if args.keep_last else None
    print(layer_table(rows, variant))
    print(suggest(rows))
    from pictures import draw_layers

    out = Path(args.out or result_folder(args.model))
    out.mkdir(parents=True, exist_ok=True)
    draw_layers(out / "layers.png", rows, variant)
    write_json(out / "layers.json", {"rows": rows, "keep_last": variant, "settings": vars(args)})
    print(f"wrote {out / 'layers.png'} and {out / 'layers.json'}")


def main():
    """The command line of `python prune_distill.py`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("model", help="model folder or hub id, not pruned")
    option("--data", default=DEFAULT_DATA, help="M-BEIR directory; GlyphBEIR is written if absent")
    option("--split", default="test", help="whose queries")
    option("--limit", type=int, default=200, help="queries of each cell")
    option("--candidates", type=int, default=1000, help="candidates of each cell, positives first")
    option("--keep-last", action="store_true", help="also: layers 1..k-1 and the last")
    option("--out", help="folder for layers.png and layers.json; default: results/<model>")
    option("--batch-size", type=int, default=64, help="items embedded at a time")
    option("--device", default="", help="torch device; default: cuda if there is one")
    try:
        choose(parser.parse_args())
    except (ValueError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
