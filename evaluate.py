"""Evaluate a PUMA model on M-BEIR: embed, search, score, time, show.

    python evaluate.py runs/puma-1/model                               # GlyphBEIR's test split
    python evaluate.py runs/puma-1/model --query "leftwards arrow with hook"
    python evaluate.py runs/puma-1/model --image a.png --query "make it capital" --modality image
    python evaluate.py runs/puma-1/model --query "a dog" --pool ~/Pictures
    python evaluate.py toy/tiny-qwen2-vl --depths all --keep-last      # which k to cut at
    torchrun --nproc_per_node=4 evaluate.py runs/puma-1/model --data /data/M-BEIR

The first scores each cell (dataset and task) on its local pool (its own candidates) and on the
global pool (all cells' candidates together, so that the modality must be right as well). A search
looks through the global pool, or a folder of images, videos and .txt files. `--depths` weighs what
an untrained model knows after k layers against their cost. `support/index.py` keeps embeddings.
"""

import argparse
import contextlib
import re
from pathlib import Path
from statistics import median
from timeit import timeit

import support  # noqa: F401  before torch: it says how threads wait
import torch

from data import Benchmark
from prune_distill import find_decoder, layer_embeddings, prune_layers
from puma import PUMA, to_device
from settings import DEFAULT_DATA
from support import distributed, report
from support.files import (check_option, clear_errors, did_text, modality_class, new_folder,
                           printable, warn, write_json, write_text)
from support.index import embed_to_file, search, stored_path
from support.items import MODALITIES, Folder, load_image, load_video
from support.pictures import draw_depths, draw_gallery
from support.run import autocast, compile_layers, count_flops


class Embedded:
    """All queries and candidates of some cells, each embedded once.

    `queries[cell name]` (Q, ..., D); `candidates` (N, ..., D), the items of `union`. The axis in
    between is what `encode(items)` returns there: several models or depths, say. `sample`: of each
    local pool only the positives and so many others; the global pool is then all these together.
    """

    def __init__(self, benchmark, cells, split, encode, sample=None):
        self.global_path = benchmark.global_pool_path(split)
        paths = list(filter(None, [self.global_path, *sorted({c.pool_path for c in cells})]))
        self.pools = {path: benchmark.pool(path) for path in paths}
        self.union = benchmark.pool(*paths)
        for cell, path in [(c, p) for c in cells for p in (c.pool_path, self.global_path) if p]:
            if lost := sum((self.pools[path].find(list(x)) < 0).all() for x in cell.relevant):
                warn(path, 0, f"it has no right candidate for {lost:,} of {len(cell.items):,} "
                     f"queries of {cell.name}, which count as misses")
        if len(self.union) == len(self.pools[paths[0]]):  # the global pool holds the local ones
            self.union = self.pools[paths[0]]  # a search through it uses the same embeddings
        if sample is not None:
            for cell in cells:
                pool, positives = self.pools[cell.pool_path], set.union(*cell.relevant)
                self.pools[cell.pool_path] = pool.sample(positives, sample)
            keys = {key for cell in cells for key in self.pools[cell.pool_path].keys.tolist()}
            self.union = self.pools[self.global_path] = self.union.sample(keys, 0)
        counts = [len(cell.items) for cell in cells]
        queries = encode([item for cell in cells for item in cell.items])
        self.queries = {cell.name: part for cell, part in zip(cells, queries.split(counts))}
        self.candidates = encode(self.union)

    def row(self, key):
        """The index in `union` of a did key."""
        return int(self.union.find([key])[0])

    def rank(self, cells, place=(), popularity_penalty=0.0, device=None):
        """{(cell name, "local" or "global"): (scores, did keys)}, the best ten for each query.

        `place`: which of the axis in between. `popularity_penalty` p subtracts p times a
        candidate's mean similarity to all test queries of the cell (later official code: 0.2).
        """
        place = (slice(None), place) if isinstance(place, int) else ...
        jobs = [(cell.name, "local", cell.pool_path) for cell in cells]
        jobs += [(cell.name, "global", self.global_path) for cell in cells if self.global_path]
        rankings = {}
        for path in dict.fromkeys(path for *_, path in jobs):  # a large pool is read only once
            names = [(name, which) for name, which, searched in jobs if searched == path]
            queries = [self.queries[name][place].float() for name, _ in names]
            # (q - p mean q) . c = q . c - p mean(q . c)
            queries = [part - popularity_penalty * part.mean(0) for part in queries]
            keys = self.pools[path].keys
            found = search(torch.cat(queries), self.candidates[place], report.DEPTH,
                           rows=torch.from_numpy(self.union.find(keys)), device=device)
            scores, indices = (part.split([len(q) for q in queries]) for part in found)
            for name, values, best in zip(names, scores, indices):
                rankings[name] = values.tolist(), keys[best.numpy()].tolist()
        return rankings


def split_cells(benchmark, split, limit=None):
    """The cells of a split; `test` brings the zero-shot split along where the data has one."""
    cells = benchmark.cells(split, limit)
    if split == "test" and (benchmark.root / "query/zero").is_dir():
        cells += benchmark.cells("zero", limit)
    return cells


def efficiency(model, items, batch_size=64, runs=3):
    """Parameters, operations an item (of the first `batch_size` of `items`), items a second and
    milliseconds an item at batch size 1 (medians of `encode` calls, image reading included)."""
    batch = to_device(model.collate(items[:batch_size]), model.device)
    with torch.no_grad():
        flops = count_flops(lambda: model(batch)) / len(batch["input_ids"])

    def seconds(items):
        return timeit(lambda: model.encode(items, batch_size, show_progress=False), number=1)

    return {"parameters": sum(p.numel() for p in model.parameters()),
            "gflops_per_item": flops / 1e9,
            "items_per_s": len(items) / median(seconds(items) for _ in range(runs)),
            "latency_ms": 1e3 * median(seconds([item]) for item in items[:20])}


def storing_encoder(models, name, batch_size=64, skip_bad=False):
    """-> encode(items) -> (N, M, D) embeddings of M models, kept in the folder of the last one,
    whose path or hub id is `name`. The models share the last one's vision tower."""
    last, width = models[-1], models[-1].ret_embedding.numel()
    with autocast(last.device):  # a cache may be shared with a machine without bfloat16
        fast = torch.is_autocast_enabled(last.device.type)
    settings = (last.max_text_tokens, last.max_frames, dict(last.image_processor.size), fast,
                [str(model.backbone.dtype) for model in models])

    def states(batch):
        with autocast(last.device):
            visual = last.visual_tokens(batch)  # each image is read, and seen by the tower, once
            return torch.stack([model(batch, visual) for model in models], dim=1)

    def encode(items):
        path = stored_path(name, items, *settings, skip_bad)
        vectors = embed_to_file(path, items, lambda part: last.encode(
            part, batch_size, show_progress=False, forward=states).flatten(1),
            len(models) * width, skip_bad)
        return vectors.unflatten(1, (len(models), width))

    return encode


def evaluate_models(models, name, data, split="test", out=None, batch_size=64, limit=None,
                    popularity_penalty=0.0, settings=None):
    """Evaluate models on all cells of a split, print the tables, write all to `out`; -> results.

    `models` {heading: PUMA}: results are the last one's, whose folder or hub id is `name`; those of
    the others are its `baselines`. Under torchrun each process embeds a part, the first scores.
    """
    benchmark = Benchmark(data)
    cells = split_cells(benchmark, split, limit)
    encode = storing_encoder([model.eval() for model in models.values()], name, batch_size)
    embedded = Embedded(benchmark, cells, split, encode)
    if distributed.rank():
        return None  # the embeddings are there; one process scores them
    sample, columns = [item for cell in cells for item in cell.items[:24]], {}
    for i, (heading, model) in enumerate(models.items()):
        rankings = embedded.rank(cells, i, popularity_penalty, model.device)
        columns[heading] = {**report.score(cells, rankings),
                            "efficiency": efficiency(model, sample, batch_size)}
    *baselines, results = columns.values()
    confusion = report.modality_confusion(
        cells, rankings, lambda key: embedded.union.modality[embedded.row(key)])
    results |= {"baselines": dict(zip(columns, baselines)), "confusion": confusion,
                "settings": settings}
    tables = [report.comparison_table(columns)]
    if not baselines:
        tables += [report.metrics_table(results, which) for which in ("local", "global")]
        tables.append(report.confusion_table(confusion))
    # Names of cells are names of files, which may hold anything.
    text = "\n".join(printable(line) for table in tables for line in [*table.splitlines(), ""])
    print(text)
    if out is not None:
        write_results(Path(out), results, text, embedded, cells, rankings)
    return results


def write_results(out, results, text, embedded, cells, rankings):
    """results.json, results.md, TREC files, gallery.png: numbers first, then the picture."""
    write_json(out / "results.json", results)
    write_text(out / "results.md", f"# Evaluation\n\n```\n{text}\n```\n")
    report.write_trec(out / "trec" if results["baselines"] else out, cells, rankings, did_text)
    rows = []  # each cell's first query with the best of its local pool
    for cell in [c for c in cells if not c.name.startswith("zero_")] or cells:
        scores, ranked = rankings[cell.name, "local"]
        found = [(f"{value:.3f}", embedded.union[embedded.row(key)], key in cell.relevant[0])
                 for value, key in zip(scores[0], ranked[0])]
        rows.append((f"{cell.name}: query", cell.items[0], found))
    draw_gallery(out / "gallery.png", rows)


def show(model, args, out):
    """Search for args.query, args.image or args.video; print the args.k best, draw them into out.

    args.pool: a folder of files, instead of args.data. args.modality: only its candidates; a query
    without instruction then gets the benchmark's for that task. args.skip_bad: leave files out that
    cannot be read. -> the picture's name. Raises ValueError on bad input.
    """
    query = {"text": args.query, "image": args.image, "video": args.video,
             "instruction": args.instruction}
    if args.pool:
        items = Folder(args.pool)
    else:
        benchmark = Benchmark(args.data)
        path = benchmark.global_pool_path("test")
        if path is None:
            raise ValueError(f"{args.data}/cand_pool/global: expected mbeir_union_test_cand_pool")
        items = benchmark.pool(path)
        if args.modality and not args.instruction:
            kinds = ",".join(kind for kind in ("image", "video", "text") if query[kind])
            task = modality_class(kinds), modality_class(args.modality)
            prompts = [texts[0] for key, texts in benchmark.prompts.items() if key[:2] == task]
            query["instruction"] = next(iter(prompts), None)
    with autocast(model.device):  # as the candidates
        vector = model.encode(query)[None]  # first, as a bad query should fail at once
    encode = storing_encoder([model], args.model, args.batch_size, args.skip_bad)
    vectors = encode(items)[:, 0]
    if distributed.rank():
        return
    good = ~vectors[:, 0].isnan()
    for first in (~good).nonzero()[:1]:
        print(f"skipped {int((~good).sum())} of {len(items)} files that cannot be read, first "
              f"{printable(items.name(int(first)))}")
    if args.modality:
        good &= torch.from_numpy(items.modality == modality_class(args.modality))
    rows = good.nonzero().flatten()
    if not len(rows):
        raise ValueError(f"none of {len(items)} candidates is readable and has the modality")
    scores, best = search(vector, vectors, args.k, rows=rows, device=model.device)
    found = []
    for rank, (value, i) in enumerate(zip(scores[0].tolist(), rows[best[0]].tolist()), 1):
        item, kind = items[i], MODALITIES[items.modality[i]]
        content = printable(item["text"] or item["image"] or item["video"])[:70]
        print(f"{rank:>3}  {value:.3f}  {kind:<10}  {printable(items.name(i)):<24}  {content}")
        found.append((f"{rank}.  {value:.3f}  {kind}", item, None))
    out.mkdir(parents=True, exist_ok=True)
    draw_gallery(out / "search.png", [("query", query, found[start : start + 5])
                                      for start in range(0, len(found), 5)])
    return "search.png"


def read_out(model, keep_last=False):
    """-> function of a batch: (B, L + 1, D), the states after every depth; with `keep_last` then
    another (L + 1), those of layers 1..k-1 and the last one."""
    decoder = find_decoder(model)
    layers = decoder.layers

    def states_of(batch):
        visual = model.visual_tokens(batch)
        states = list(layer_embeddings(model, batch, visual))
        if keep_last:
            states.append(states[0])
            for depth in range(1, len(layers) + 1):
                decoder.layers = torch.nn.ModuleList([*layers[: depth - 1], layers[-1]])
                states.append(model(batch, visual).float())
            decoder.layers = layers
        return torch.stack(states, dim=1)

    return states_of


def compare_depths(model, benchmark, split="test", depths=None, keep_last=False, queries=200,
                   candidates=1000, batch_size=64):
    """What the untrained model knows after k layers and what they cost (not in the paper).

    depths: k in 1..L, default all. queries, candidates: of each cell, so many (and the positives):
    hit rates are higher than on whole pools, and what counts is how they change with depth.
    -> one dict a depth: `depth`; `local` and `global` (hit rate @5, mean over cells), `cells`;
    `cosine` and `cka` (to the last layer, of all candidates); with `keep_last` the same as
    `last_...`; the fields of `efficiency`. `model` ends cut at the smallest depth."""
    full = len(find_decoder(model).layers)
    depths = sorted(set(depths or range(1, full + 1)))
    if not 1 <= depths[0] <= depths[-1] <= full:
        raise ValueError(f"--depths must be in 1..{full}, got {depths}")
    cells, states_of = benchmark.cells(split, queries), read_out(model, keep_last)
    embedded = Embedded(benchmark, cells, split, lambda items: model.encode(
        items, batch_size, forward=states_of), candidates)
    last, sample = embedded.candidates[:, full], [i for cell in cells for i in cell.items[:16]]
    rows = []
    for depth in reversed(depths):  # from the deepest: each cut is one of the model before
        row = {"depth": depth}
        for kind, place in [("", depth), ("last_", full + 1 + depth)][: 1 + keep_last]:
            results = report.score(cells, embedded.rank(cells, place))
            row |= {kind + pool: entry["hit_rate@5"] for pool, entry in results["average"].items()}
            row[f"{kind}cells"] = {name: cell["local"]["hit_rate@5"]
                                   for name, cell in results["cells"].items()}
            states = embedded.candidates[:, place]
            row[f"{kind}cosine"] = (states * last).sum(-1).mean().item()
            row[f"{kind}cka"] = report.linear_cka(states, last)
        rows.insert(0, row | efficiency(prune_layers(model, depth), sample, batch_size))
    return rows


def arguments():
    """The command line. Raises ValueError on values that contradict each other or do not exist."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("model", help="model folder or hub id")
    option("--data", default=DEFAULT_DATA, help="M-BEIR directory; GlyphBEIR is written if absent")
    option("--split", default="test", help="test brings the zero-shot split along")
    option("--out", help="folder for the results, must not exist; default: results/<model>")
    option("--query", help="search for this text instead of evaluating")
    option("--image", help="search for this image; with --query for both together")
    option("--video", help="the same with a video, an animated GIF, WebP or PNG file")
    option("--instruction", help="what to look for, in front of the query's text")
    option("--pool", help="search this folder of images, videos, .txt files instead of --data")
    option("--modality", choices=MODALITIES, help="search only candidates of this modality")
    option("--k", type=int, default=10, help="how many results a search shows")
    option("--skip-bad", action="store_true", help="search without the files that cannot be read")
    option("--depths", help="instead: quality and cost after k layers; 2,4 or all")
    option("--keep-last", action="store_true", help="with --depths: 1..k-1 and the last, too")
    option("--batch-size", type=int, default=64, help="items embedded at a time")
    option("--limit", type=int, help="only the first queries of each cell")
    option("--popularity-penalty", type=float, default=0.0, help="0.2: as in the official code")
    option("--workers", type=int, default=0, help="processes that read images; on a GPU one a core")
    option("--device", default="", help="torch device; default: cuda if there is one")
    option("--compile", action="store_true", help="as in train.py; not for --depths")
    args = parser.parse_args()
    if (args.pool or args.instruction) and not (args.query or args.image or args.video):
        raise ValueError("--pool and --instruction need a search: give --query, --image or --video")
    if args.image and args.video:
        raise ValueError("a search is for --image or for --video, not for both")
    for name, value in vars(args).items():
        if value is not None and name != "device":
            least = name not in ("popularity_penalty", "workers") and value is not False  # letters
            check_option(f"--{name.replace('_', '-')}", value, type(value), int(least))
    if not re.fullmatch("all|[0-9]+(,[0-9]+)*", args.depths or "all"):
        raise ValueError(f"--depths must be all or numbers like 2,4, got {args.depths}")
    if args.image or args.video:  # can it be read? before anything slow
        load_image(args.image) if args.image else load_video(args.video)
    return args


def main():
    with clear_errors():
        run(arguments())


def run(args):
    """Evaluate, search or compare depths, as the command line says."""
    device, first = distributed.start(args.device), distributed.rank() == 0
    out = Path(args.out or "results/" + "-".join(Path(args.model).resolve().parts[-2:]))
    # A folder of --out gets its name when all is written; one of ours is written over.
    with new_folder(out) if args.out and first else contextlib.nullcontext(out) as folder:
        if not args.pool:
            ensure_data(args.data)
        model = PUMA.from_pretrained(args.model, device=device).eval()
        model = compile_layers(model) if args.compile and not args.depths else model
        model.workers = args.workers
        if args.query or args.image or args.video:
            written = show(model, args, folder)
        elif args.depths:
            asked = None if args.depths == "all" else map(int, args.depths.split(","))
            rows = compare_depths(model, Benchmark(args.data), args.split, asked, args.keep_last,
                                  args.limit or 200, batch_size=args.batch_size)
            print(report.depth_table(rows))
            write_json(folder / "depths.json", {"rows": rows, "settings": vars(args)})
            draw_depths(folder / "depths.png", rows)
            written = "depths.json, depths.png"
        else:
            evaluate_models({"PUMA": model}, args.model, args.data, args.split, folder,
                            args.batch_size, args.limit, args.popularity_penalty, vars(args))
            written = "results.json, results.md, gallery.png"
    if first:
        print(f"wrote {out}: {written}")


def ensure_data(folder):
    """Write the default benchmark if it is absent. ValueError if an older version wrote it."""
    if str(folder) == DEFAULT_DATA and not Path(folder).exists() and distributed.rank() == 0:
        from toy.glyph_beir import build

        print(f"writing GlyphBEIR to {folder} ...", flush=True)
        with contextlib.suppress(FileExistsError):  # another process was faster
            print(build(folder))
    distributed.gather_objects(None)
    if str(folder) == DEFAULT_DATA and not [*Path(folder).glob("query/train/mbeir_motion*")]:
        raise ValueError(f"{folder} is of an older version: delete it, and it is written anew")


if __name__ == "__main__":
    main()
