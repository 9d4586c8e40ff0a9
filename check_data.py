"""Check a whole M-BEIR directory before training on it for days.

    python data.py data/glyph_beir              # exit status 0: clean, 1: problems, 2: no directory

Every line of every query file and pool is parsed; every did and qid that a query or a qrels line
names must exist; every query needs instructions, and a relevant candidate in the pool that is
searched for it; every image must exist and its header be readable (`--images full` decodes it,
`--images none` skips). It prints a line a file of queries, then the first problems, as
`file:line: expected ...`.

A did may be in the cell's local pool or in the split's global one: positives of OVEN and InfoSeek
have dids of both datasets, and only some of them are in the local pool.

Worker processes parse parts of files into arrays and open images; the main process compares arrays.
"""

import argparse
import contextlib
import multiprocessing
import os
import sys
from array import array
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import (
    MODALITIES,
    Benchmark,
    candidate_columns,
    did_key,
    did_keys,
    did_text,
    parse_qrel,
    query_columns,
)
from items import UNREADABLE
from lines import BAD_LINE, explain, json_row

PART = 1 << 23  # bytes of a file, or so, that a worker reads at a time

# What a worker finds in its part of a file. Arrays with an entry a valid row: `lines` (from 0),
# `keys`, modality `classes`, `counts` (positives, negatives); all their dids in a row in `dids`.
# `images`: (line, path) pairs; `problems`: (line, text) pairs; `newlines`: how many in this part.
Part = namedtuple("Part", "newlines lines keys classes counts dids images problems")

# A pool's did keys, sorted, with the modality class of each.
Keys = namedtuple("Keys", "keys classes")


def split_file(path):
    """Byte ranges [start, end) of whole lines that together are the file."""
    starts = [0]
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        while starts[-1] + PART < size:
            file.seek(starts[-1] + PART)
            file.readline()
            starts.append(file.tell())
    return [(start, end) for start, end in zip(starts, [*starts[1:], size]) if start < end]


def read_part(job):
    """A job of the worker pool: (path, whether it holds queries, start, end) -> Part."""
    path, is_query, start, end = job
    with open(path, "rb") as file:
        file.seek(start)
        lines = file.read(end - start).split(b"\n")
    rows, counts, dids, images, problems = [], [], [], [], []
    expected = "a query, a JSON object" if is_query else "a candidate, a JSON object"
    for number, line in enumerate(lines):
        if not line or line.isspace():
            continue
        try:
            row = json_row(line)
            key, modality = (query_columns if is_query else candidate_columns)(row)[:2]
            if is_query:
                positives, negatives = did_keys(row["pos_cand_list"]), row.get("neg_cand_list")
                negatives = did_keys(negatives) if negatives else []
                counts.append((len(positives), len(negatives)))
                dids += positives + negatives
        except BAD_LINE as error:
            problems.append((number, explain(error, expected)))
            continue
        rows.append((number, key, modality))
        image = row.get("query_img_path" if is_query else "img_path")
        if image:
            images.append((number, image))
    numbers, keys, classes = np.array(rows, dtype=np.int64).reshape(-1, 3).T.copy()
    counts = np.array(counts, dtype=np.int64).reshape(-1, 2)
    newlines = len(lines) - 1
    return Part(newlines, numbers, keys, classes, counts, np.array(dids, dtype=np.int64), images,
                problems)


def check_images(job):
    """A job of the worker pool: (root, mode, lines, paths) -> [(line, what is wrong)]."""
    root, mode, lines, paths = job
    problems = []
    for line, path in zip(lines, paths.split("\0")):
        try:
            with Image.open(f"{root}/{path}") as image:
                if mode == "full":
                    image.load()
        except FileNotFoundError:
            problems.append((line, f"expected the image {path}, which does not exist"))
        except UNREADABLE as error:
            problems.append((line, f"expected an image that can be read, {path} is not: {error}"))
    return problems


def look_up(pools, keys):
    """did keys -> the modality class of each in the first pool that has it, -1 where none has."""
    found = np.full(len(keys), -1)
    for pool in pools:
        places = np.searchsorted(pool.keys, keys).clip(max=len(pool.keys) - 1)
        found = np.where((found < 0) & (pool.keys[places] == keys), pool.classes[places], found)
    return found


@contextlib.contextmanager
def parallel(processes, worth_it):
    """A function like map(function, jobs) that runs in worker processes, results in order."""
    if processes == 1 or not worth_it:
        yield map
        return
    with multiprocessing.Pool(processes) as workers:
        yield workers.imap


class Checker:
    """Collects what is wrong with a directory: `counts[path]` problems, `shown` the first ones."""

    def __init__(self, root, images="header", limit=20, processes=None):
        self.root, self.mode, self.limit = Path(root), images, limit
        self.processes = processes or os.cpu_count()
        self.shown, self.counts, self.lines = [], Counter(), 0
        self.seen, self.image_jobs = set(), []  # hashes of image paths; (file, job)
        self.benchmark = Benchmark(root)

    def problem(self, path, line, text):
        """Count a problem; line 0: of the file as a whole."""
        self.counts[path] += 1
        if len(self.shown) < self.limit:
            self.shown.append(f"{path}:{line}: {text}" if line else f"{path}: {text}")

    def read(self, paths, kind):
        """Yield (path, Part) of all files in order; by then lines count from 1, in the file."""
        jobs = [(path, kind == "queries", *ends) for path in paths for ends in split_file(path)]
        total = sum(end - start for *_, start, end in jobs)
        line, last = 1, None
        with (parallel(self.processes, total > 4 * PART) as map_jobs,
              tqdm(total=total, unit="B", unit_scale=True, desc=kind, disable=None) as bar):
            for (path, _, start, end), part in zip(jobs, map_jobs(read_part, jobs)):
                line, last = line if path == last else 1, path
                for number, text in part.problems:
                    self.problem(path, line + number, text)
                self.collect_images(path, line, part.images)
                self.lines += len(part.lines)
                yield path, part._replace(lines=part.lines + line)
                line += part.newlines
                bar.update(end - start)

    def collect_images(self, path, line, images):
        """Remember the images that no line named before, to be opened later."""
        new = {}
        for number, image in images if self.mode != "none" else ():
            if hash(image) not in self.seen:
                self.seen.add(hash(image))
                new[image] = line + number
        names, lines = list(new), list(new.values())
        for start in range(0, len(names), 500):
            some = slice(start, start + 500)  # joined, as millions of small strings take memory
            job = (str(self.root), self.mode, array("q", lines[some]), "\0".join(names[some]))
            self.image_jobs.append((path, job))

    def open_images(self):
        jobs = [job for _, job in self.image_jobs]
        with (parallel(self.processes, len(jobs) > 8) as map_jobs,
              tqdm(total=len(self.seen), unit=" images", desc="images", disable=None) as bar):
            for (path, job), found in zip(self.image_jobs, map_jobs(check_images, jobs)):
                for line, text in found:
                    self.problem(path, line, text)
                bar.update(len(job[2]))

    def read_pools(self):
        """{path: Keys}, local pools first."""
        folder = self.root / "cand_pool"
        paths = sorted(folder.glob("local/*.jsonl")) + sorted(folder.glob("global/*.jsonl"))
        parts = {path: [([-1], [-1])] for path in paths}  # so that none is empty; no did is -1
        for path, part in self.read(paths, "candidates"):
            parts[path].append((part.keys, part.classes.astype(np.int8)))
        pools = {}
        for path in paths:
            keys, classes = map(np.concatenate, zip(*parts.pop(path)))
            order = keys.argsort(kind="stable")
            pools[path] = Keys(keys[order], classes[order].astype(np.int8))
            if len(keys) == 1 and not self.counts[path]:
                self.problem(path, 0, "expected a candidate on each line, found no line")
        return pools

    def check(self):
        """Check everything; -> rows of the summary."""
        self.pools = self.read_pools()
        paths = sorted(self.root.glob("query/*/*.jsonl"))
        if not paths:
            raise ValueError(f"{self.root}: expected files query/<split>/*.jsonl, found none")
        files = {path: QueryFile(self, path, self.pools) for path in paths}
        for path, part in self.read(paths, "queries"):
            files[path].check(part)
        for file in files.values():
            file.finish()
        self.open_images()
        rows = [file.summary() for file in files.values()]
        for path in self.pools.keys() - {file.pool_path for file in files.values()}:
            name = str(path.relative_to(self.root)).removesuffix(".jsonl")
            rows.append((name, 0, 0, len(self.pools[path].keys) - 1, self.counts[path]))
        return sorted(rows)


class QueryFile:
    """One file of queries with the pools that its dids must be in: `pools[0]` is searched."""

    def __init__(self, checker, path, pools):
        self.checker, self.path = checker, path
        self.qids, self.positives, self.missing_prompts = [], 0, set()
        self.target_class = self.pool_path = self.qrels_path = None
        split = path.parent.name.removeprefix("union_")
        union = checker.benchmark.global_pool_path(split)
        try:
            if split == "train":  # the names of its files have no task
                self.pool_path = union
            else:
                _, self.target_class, self.pool_path, qrels = checker.benchmark.cell_files(path)
                self.qrels_path = qrels if qrels.exists() else None
        except ValueError as error:
            self.problem(0, str(error).removeprefix(f"{path}: "))
        self.pools = [pools[p] for p in dict.fromkeys((self.pool_path, union)) if p in pools]

    def problem(self, line, text):
        self.checker.problem(self.path, int(line), text)

    def check(self, part):
        """The dids and instructions of one part of the file."""
        self.qids.append(part.keys)
        self.positives += int(part.counts[:, 0].sum())
        entries = np.arange(part.counts.size)  # positives, negatives of row 0, of row 1, ...
        rows = np.repeat(entries // 2, part.counts.ravel())
        positive = np.repeat(entries % 2 == 0, part.counts.ravel())
        found = look_up(self.pools, part.dids)
        for i in np.flatnonzero(found < 0):
            kind, did = "positive" if positive[i] else "negative", did_text(int(part.dids[i]))
            self.problem(part.lines[rows[i]], f"expected the {kind} {did} in a candidate pool")
        if self.pool_path is not None and self.qrels_path is None:
            missing_or_here = (found < 0) | (look_up(self.pools[:1], part.dids) >= 0)
            fine = np.bincount(rows[positive & missing_or_here], minlength=len(part.lines))
            for row in np.flatnonzero(fine == 0):
                self.problem(part.lines[row], f"expected a positive in {self.pool_path}")
        self.check_instructions(part, rows[positive], found[positive])

    def check_instructions(self, part, rows, targets):
        """Prompts for each (query class, target class, dataset); a missing one is named once."""
        if self.target_class is not None:
            targets = np.full(len(rows), self.target_class)
        needed = np.stack([part.classes[rows], targets, part.keys[rows] >> 40], axis=1)
        needed, first = np.unique(needed[targets >= 0], axis=0, return_index=True)
        lines = part.lines[rows[targets >= 0]][first]
        for key, line in zip(map(tuple, needed.tolist()), lines):
            if key not in self.checker.benchmark.prompts and key not in self.missing_prompts:
                self.missing_prompts.add(key)
                query, target = MODALITIES[key[0]], MODALITIES[key[1]]
                self.problem(line, "expected instructions in query_instructions.tsv for dataset "
                                   f"{key[2]}, {query} -> {target}")

    def finish(self):
        """What only the whole file shows; its qrels."""
        self.qids = np.concatenate([np.empty(0, np.int64), *self.qids])
        if not len(self.qids) and not self.checker.counts[self.path]:
            self.problem(0, "expected a query on each line, found no line")
        if self.qrels_path is not None:
            self.check_qrels()

    def check_qrels(self):
        """Known qids, known dids, and for each query a relevant one in the pool searched."""
        def problem(line, text):
            self.checker.problem(self.qrels_path, int(line), text)

        entries = []
        for number, line in enumerate(self.qrels_path.read_bytes().split(b"\n"), 1):
            try:
                if line.strip():
                    qid, did, grade = parse_qrel(line)
                    entries.append((number, did_key(qid), did, grade))
            except BAD_LINE as error:
                problem(number, explain(error, "`qid 0 did 1 task`"))
        numbers, qids, dids, grades = np.array(entries, dtype=np.int64).reshape(-1, 4).T
        for i in np.flatnonzero(~np.isin(qids, self.qids)):
            problem(numbers[i], f"expected a query of {self.path}, got {did_text(int(qids[i]))}")
        for i in np.flatnonzero(look_up(self.pools, dids) < 0):
            problem(numbers[i], f"expected {did_text(int(dids[i]))} in a candidate pool")
        right = (grades > 0) & (look_up(self.pools[:1], dids) >= 0)
        for qid in np.setdiff1d(self.qids, qids[right]):
            problem(0, f"expected a relevant candidate of query {did_text(int(qid))} "
                       f"in {self.pool_path}")
        self.positives = int((grades > 0).sum())

    def summary(self):
        """(name, queries, positives, pool size, problems in its files)"""
        paths = {self.path, self.pool_path, self.qrels_path} - {None}
        size = len(self.pools[0].keys) - 1 if self.pool_path in self.checker.pools else 0
        split, name = self.path.parent.name, self.path.stem.removeprefix("mbeir_")
        return (f"{split}/{name.removesuffix(f'_{split}')}", len(self.qids), self.positives, size,
                sum(self.checker.counts[path] for path in paths))


def main():
    parser = argparse.ArgumentParser(prog="data.py", description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("directory", help="M-BEIR directory")
    option("--images", choices=["header", "full", "none"], default="header",
           help="open each image, decode each, or skip them")
    option("--show", type=int, default=20, help="problems to print")
    option("--processes", type=int, help="default: one a core")
    args = parser.parse_args()
    try:
        checker = Checker(args.directory, args.images, args.show, args.processes)
        rows = checker.check()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    width = max(len(row[0]) for row in rows)
    print(f"{'':<{width}}{'queries':>11}{'positives':>11}{'pool':>11}{'problems':>10}")
    for name, queries, positives, pool, problems in rows:
        print(f"{name:<{width}}{queries:>11,}{positives:>11,}{pool:>11,}{problems:>10,}")
    count = sum(checker.counts.values())
    for text in checker.shown:
        print(text)
    if count > len(checker.shown):
        print(f"... and {count - len(checker.shown):,} more; --show shows as many as you like")
    print(f"{args.directory}: {checker.lines:,} lines, {len(checker.seen):,} images, "
          f"{count:,} problems")
    sys.exit(1 if count else 0)


if __name__ == "__main__":
    main()
