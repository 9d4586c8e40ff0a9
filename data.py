"""Read M-BEIR, or any directory in its format, as toy/glyph_beir.py writes it; compose batches.

    query/{train,val,test}/mbeir_{dataset}_task{T}_{split}.jsonl       query/union_train/*.jsonl
    cand_pool/local/mbeir_{dataset}_task{T}_cand_pool.jsonl            cand_pool/global/*.jsonl
    qrels/{split}/mbeir_{dataset}_task{T}_{split}_qrels.txt            instructions/*.tsv

A query line names its positives by did; a candidate line with that did is the target:

    {"qid": "9:12", "query_txt": "A dog.", "query_modality": "text", "pos_cand_list": ["9:77"], ...}
    {"did": "9:77", "txt": null, "img_path": "mbeir_images/77.jpg", "modality": "image", ...}

The files have gigabytes: in memory stay a few integers a line. All that is random has a seed.

    python data.py DIR        # check a whole directory, images included, and count what is in it
    python data.py --from pairs.csv --out my_data --valid 10%      # write one from your own pairs
"""

import argparse
import itertools
import random
import re
import sys
from collections import Counter, defaultdict, namedtuple
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import support  # noqa: F401  before torch: it says how threads wait
import torch
from tqdm import tqdm

from support.files import (CANDIDATE, TASKS, Pool, Table, check_content, check_option, clear_errors,
                           did_key, did_keys, did_text, make_item, modality_class, parse_lines,
                           printable, refuse, warn)
from support.items import MODALITIES, UNREADABLE, check_text, load_image, load_video, open_image
from support.pairs import COLUMNS, write_pairs

QUERY = tuple(f"query_{name}" for name in CANDIDATE)


def query_columns(row):
    """A query's row, checked -> qid key, modality class, first positive's key, content's class."""
    content = check_content(*map(row.get, QUERY))
    check_text(row.get("instruction"), "instruction")  # of `write_pairs`
    first = did_keys(row["pos_cand_list"])[0]
    return did_key(row["qid"]), modality_class(row["query_modality"]), first, content


def candidate_columns(row):
    """A candidate's row, checked -> did key, modality class, content's class."""
    content = check_content(*map(row.get, CANDIDATE))
    return did_key(row["did"]), modality_class(row["modality"]), content


def format_instruction(text):
    """M-BEIR's prompts vary: strip, capitalise the first letter, end with "." unless in . ? !"""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?", "!")) else ".")


def parse_prompts(line):
    """An instruction line -> (query class, candidate class, dataset id), its prompts."""
    query, candidate, _, dataset, *texts = map(str.strip, line.decode().split("\t"))
    first, *more = [format_instruction(text) for text in texts if text]  # one at least
    return (modality_class(query), modality_class(candidate), int(dataset)), [first, *more]


def parse_qrel(line):
    """`qid 0 did 1 task_id`, or TREC's four columns -> qid key, did key, grade."""
    qid, _, did, grade, *_ = line.decode().split()
    return did_key(qid), did_key(did), int(grade)


# One evaluation cell: "<dataset>_task<T>" ("zero_" in front for the zero-shot split); each query's
# id, item with instruction, set of relevant did keys; its files; its modalities.
Cell = namedtuple("Cell", "name qids items relevant path pool_path query_modality target_modality")


class Benchmark:
    """An M-BEIR directory. Raises ValueError naming the file, the line and what was expected.

    With `on_error` (see `parse_lines`) it reads on after a bad line, as the checker does.
    """

    def __init__(self, root, seed=0, on_error=refuse):
        self.root, self.seed, self.on_error = Path(root), seed, on_error
        self.warn = warn if on_error is refuse else on_error
        self.tables = {}  # a file that both stages train on is read once, and so are pools
        for folder in ("query", "cand_pool", "instructions"):
            if not (self.root / folder).is_dir():
                raise ValueError(f"{root} is no M-BEIR directory: expected the folder {folder}")
        expected = "query modality, candidate modality, name, dataset id, prompts, tabs in between"
        self.prompts_path = self.root / "instructions/query_instructions.tsv"
        lines = parse_lines(self.prompts_path, parse_prompts, expected, on_error, 1)
        self.prompts = dict(entry for *_, entry in lines)

    def table(self, path, columns=query_columns, codes="qbqb", what="a query"):
        """The lines of a file, by default of queries."""
        if path not in self.tables:
            table = Table(path, columns, codes, f"{what}, a JSON object", self.on_error)
            odd = np.flatnonzero(np.not_equal(table.columns[1], table.columns[-1]))
            for row in odd[:1]:
                self.warn(path, table.numbers[row], f"{what} is {MODALITIES[table.columns[1][row]]}"
                          f" but has {MODALITIES[table.columns[-1][row]]}; {len(odd):,} such lines")
            self.tables[path] = table
        return self.tables[path]

    def pool(self, *paths):
        """The candidates of these files."""
        return Pool([self.table(path, candidate_columns, "qbb", "a candidate")
                     for path in paths], self.root)

    def query_item(self, row, target_class, salt="", place="a query"):
        """A query's item; its instruction is drawn by query id and `salt` (official: unseeded).
        `place`: its file and line, for the ValueError if there is no instruction."""
        key = (modality_class(row["query_modality"]), target_class, did_key(row["qid"]) >> 40)
        if key not in self.prompts:
            raise ValueError(f"{place}: expected prompts for dataset {key[2]}, "
                             f"{MODALITIES[key[0]]} -> {MODALITIES[key[1]]} in {self.prompts_path}")
        prompt = random.Random(f"{self.seed}-{row['qid']}-{salt}").choice(self.prompts[key])
        prompt = format_instruction(row.get("instruction") or prompt)  # its own: not in M-BEIR
        item = make_item(self.root, *map(row.get, QUERY), place)
        item["instruction"] = prompt
        return item

    def cells(self, split, limit=None):
        """All cells of a split, by dataset and task. `limit`: only that many queries of each."""
        folder = self.root / "query" / split
        paths = sorted(folder.glob(f"mbeir_*_task*_{split}.jsonl"),  # task 9 before 10
                       key=lambda path: re.sub(r"\d+", lambda n: n[0].zfill(4), path.name))
        if not paths:
            raise ValueError(f"{folder}: expected files mbeir_<dataset>_task<T>_{split}.jsonl")
        return [self._cell(path, split, limit) for path in paths]

    def _cell(self, path, split, limit):
        name, task, pool, qrels = self.cell_files(path)
        table = self.table(path)
        lines = np.sort(np.unique(table.columns[0], return_index=True)[1])[:limit]  # an id once
        rows, keys = [table[i] for i in lines], [table.columns[0][i] for i in lines]
        target = modality_class(TASKS[task][1])
        items = [self.query_item(row, target, "", table.place(i)) for row, i in zip(rows, lines)]
        listed = {key: did_keys(row["pos_cand_list"]) for key, row in zip(keys, rows)}
        relevant = self.relevance(qrels, listed)
        for key in (key for key in keys if not relevant[key]):
            raise ValueError(f"{qrels}: expected a relevant candidate for {did_text(key)}")
        return Cell(f"zero_{name}" if split == "zero" else name, [row["qid"] for row in rows],
                    items, [set(relevant[key]) for key in keys], path, pool, *TASKS[task])

    def cell_files(self, path):
        """A cell's query file -> its name, task id, local pool's file, qrels file."""
        split = path.parent.name
        match = re.fullmatch(rf"mbeir_(.+_task(\d+))_{split}\.jsonl", path.name)
        if not match or int(match[2]) not in TASKS:
            raise ValueError(f"{path}: expected a task out of {list(TASKS)} in the file's name")
        name = match[1]
        pools = [self.root / f"cand_pool/local/mbeir_{name}{part}_cand_pool.jsonl"
                 for part in (f"_{split}", "", "_test")]  # MSCOCO has several, "" of all splits
        pool = next(filter(Path.exists, pools), None)
        if pool is None:
            raise ValueError(f"{pools[1]}: expected the candidate pool of {path.name}")
        qrels = self.root / f"qrels/{split}/mbeir_{name}_{split}_qrels.txt"
        return name, int(match[2]), pool, qrels

    def relevance(self, path, listed, parse=parse_qrel):
        """{qid key: its relevant did keys}: a qrels file's with a grade above 0, else `listed`."""
        if path is None or not path.exists():
            return listed
        relevant = defaultdict(set)
        lines = parse_lines(path, parse, "`qid 0 did 1 task`", self.on_error)
        for *_, (qid, did, grade) in lines:
            if grade > 0:
                relevant[qid].add(did)
        return relevant

    def global_pool_path(self, split):
        """The union pool; the zero-shot split shares the test pool. None if there is none."""
        folder = self.root / "cand_pool/global"
        paths = [folder / f"mbeir_union_{part}_cand_pool.jsonl" for part in (split, "test")]
        return next(filter(Path.exists, paths), None)


class TrainSet(torch.utils.data.Dataset):
    """Batches of (query, positive target) pairs; batch `s` is the same whenever it is asked for.

    Each batch mixes all (dataset, task) groups in equal parts, or `tasks_per_batch` of them, drawn
    by size: negatives of the same task are mostly intra-modality, others inter-modality. In a
    group every query comes once before any comes again. `labels`: use only that many (0: all).
    """

    def __init__(self, benchmark, batch_size, steps, tasks_per_batch=0, seed=0, labels=0):
        self.benchmark, self.seed, root = benchmark, seed, benchmark.root
        files = list(root.glob("query/union_train/*.jsonl"))
        if len(files) != 1:
            raise ValueError(f"{root}/query/union_train: expected 1 .jsonl file, got {len(files)}")
        self.queries = benchmark.table(files[0])
        self.pool = benchmark.pool(root / "cand_pool/global/mbeir_union_train_cand_pool.jsonl")
        rng = random.Random(seed)
        self.groups = self._groups(rng, labels)
        self.left = defaultdict(list)  # group -> rows that are still to come in this round
        self.schedule = [self._draw(rng, batch_size, tasks_per_batch) for _ in range(steps)]

    def _groups(self, rng, labels):
        """{(dataset, query class, target class): its rows, shuffled}."""
        qids, classes, positives, _ = self.queries.columns
        found = self.pool.find(positives)
        for row in np.flatnonzero(found < 0):
            refuse(self.queries.path, self.queries.numbers[row],
                   f"expected {did_text(positives[row])} in {self.pool.tables[0].path}")
        targets, groups = self.pool.modality[found].tolist(), defaultdict(list)
        rows = rng.sample(range(len(qids)), len(qids))
        # `labels` counts ids, as an up-sampled file repeats lines; both stages get the same ones.
        ids = list(dict.fromkeys(qids.tolist()))
        used = set(random.Random(self.benchmark.seed).sample(ids, len(ids))[: labels or None])
        for row in rows:
            if qids[row] in used:
                groups[qids[row] >> 40, classes[row], targets[row]].append(row)
        return groups

    def _draw(self, rng, batch_size, tasks_per_batch):
        """The rows of one batch: the groups take turns until it is full."""
        names, sizes = list(self.groups), [len(rows) for rows in self.groups.values()]
        chosen = {} if 0 < tasks_per_batch < len(names) else dict.fromkeys(names)  # ordered sets
        while len(chosen) < min(tasks_per_batch, len(names)):
            chosen |= dict.fromkeys(rng.choices(names, sizes))
        batch = []
        for name in itertools.islice(itertools.cycle(chosen), batch_size):
            if not self.left[name]:  # a new round, in a new order
                self.left[name] = rng.sample(self.groups[name], len(self.groups[name]))
            batch.append(self.left[name].pop())
        return batch

    def __len__(self):
        return len(self.schedule)

    def __getitem__(self, step):
        """One batch of B pairs: `queries`, `targets` (items), `modality` and `target_keys` (B,) of
        the targets, `positive_keys`: for each query all its listed positives; `about`: tasks and
        query ids, as text."""
        rng = random.Random(f"{self.seed}-{step}")
        chosen = self.schedule[step]
        rows = [self.queries[i] for i in chosen]
        positives = [did_keys(row["pos_cand_list"]) for row in rows]
        found = [self.pool.find(keys) for keys in positives]
        picked = [rng.choice(indices[indices >= 0].tolist()) for indices in found]
        classes = [int(self.pool.modality[i]) for i in picked]
        tasks = {f"dataset {row['qid'].split(':')[0]}, {row['query_modality']} -> "
                 f"{MODALITIES[target]}" for row, target in zip(rows, classes)}
        return {
            "queries": [self.benchmark.query_item(row, target, step, self.queries.place(i))
                        for row, target, i in zip(rows, classes, chosen)],
            "targets": [self.pool[i] for i in picked],
            "modality": torch.tensor(classes),
            "target_keys": torch.tensor([int(self.pool.keys[i]) for i in picked]),
            "positive_keys": positives,
            "about": f"{'; '.join(sorted(tasks))}; {' '.join(row['qid'] for row in rows)}",
        }


def duplicate_mask(positive_keys, target_keys):
    """(B, N) bool: target j is a listed positive of query i, its own included: no negative of it.
    The official code counts them as negatives. M-BEIR's up-sampled training set repeats queries.
    """
    return torch.stack([torch.isin(target_keys, torch.tensor(keys)) for keys in positive_keys])


class Checker(Benchmark):
    """Reads a directory as training and evaluation do, past what is wrong, and counts that."""

    def __init__(self, root, limit=20):
        self.counts = Counter()  # problems by file
        self.texts, self.limit = {}, limit  # the first problems, each text once
        super().__init__(root, on_error=self.problem)

    def problem(self, path, number, text):
        """Count a problem of a line; number 0: of the file as a whole."""
        self.counts[path] += 1
        if len(self.texts) < self.limit and text not in self.texts:
            self.texts[text] = f"{path}:{number}: {text}" if number else f"{path}: {text}"

    def check(self):
        """Read all pools and queries. Raises ValueError if there is no query."""
        files = sorted(self.root.glob("query/*/*.jsonl"))
        if not files:
            raise ValueError(f"{self.root}: expected files query/<split>/*.jsonl, found none")
        union = self.root / "query/union_train"
        if union.is_dir() and len(found := list(union.glob("*.jsonl"))) != 1:  # as TrainSet has it
            self.problem(union, 0, f"expected 1 .jsonl file, got {len(found)}")
        paths = sorted(self.root.glob("cand_pool/*/*.jsonl"))
        pools = {path: self.pool(path) for path in tqdm(paths, "pools", disable=None)}
        for path, pool in pools.items():
            table = pool.tables[0]
            for row in np.setdiff1d(np.arange(len(table)), pool.places):
                did = did_text(table.columns[0][row])
                self.problem(path, table.numbers[row], f"expected each id once, {did} came before")
        for path in tqdm(files, "queries", disable=None):
            self.check_queries(path, pools)

    def check_queries(self, path, pools):
        """A file of queries: its ids, instructions, relevance. `pools`: {path: pool}."""
        split = path.parent.name.removeprefix("union_")
        searched = union = self.global_pool_path(split)
        target = qrels = None  # training: no task in the file's name, no qrels
        if split != "train":
            try:
                _, task, searched, qrels = self.cell_files(path)
                target = modality_class(TASKS[task][1])
            except ValueError as error:
                self.problem(path, 0, str(error).removeprefix(f"{path}: "))
        known = pools.get(union) or pools.get(searched)  # an empty pool counts as none
        if not known:
            return self.problem(path, 0, "expected a global or local pool of its candidates")
        listed = {}  # qid key -> keys of its positives

        def classes_of(keys):
            found = known.find(keys)
            for i in np.flatnonzero(found < 0):
                raise ValueError(f"expected {did_text(keys[i])} in {known.tables[0].path}")
            return known.modality[found].tolist()

        def check_query(row):
            columns = query_columns(row)
            if split != "train" and columns[0] in listed:
                raise ValueError(f"expected each id once, {row['qid']} came before")
            listed[columns[0]] = did_keys(row["pos_cand_list"])
            classes = classes_of(listed[columns[0]])
            if row.get("neg_cand_list"):
                classes_of(did_keys(row["neg_cand_list"]))
            for target_class in set(classes) if target is None else [target]:
                self.query_item(row, target_class)
            return columns

        def check_qrel(line):
            qid, did, grade = parse_qrel(line)
            classes_of([did])
            if qid not in listed:
                raise ValueError(f"expected a query of {path}, got {did_text(qid)}")
            return qid, did, grade

        table = self.table(path, check_query)
        relevant = self.relevance(qrels, listed, check_qrel)
        local = pools.get(searched) or known
        for number, qid in zip(table.numbers, table.columns[0]):
            if (local.find(list(relevant[qid])) < 0).all():
                self.problem(path, number, f"expected a positive of {did_text(qid)} in {searched}")

    def check_images(self, read):
        """Open each image by `read`, in threads; -> their number."""
        images = {}  # (name, is it a video) -> file and line that have it first
        for table in self.tables.values():
            for number, row in zip(table.numbers, table):
                for field in (*QUERY[1:], *CANDIDATE[1:]):
                    if name := row.get(field):
                        images.setdefault((name, "video" in field), (table.path, number))

        def what_is_wrong(image):
            name, is_video = image
            try:
                whole = load_video if is_video and read is load_image else read
                whole(make_item(self.root, None, name)["image"])
            except UNREADABLE as error:
                return f"expected an image that can be read, {name} is not: {error}"

        with ThreadPool(16) as threads:
            for place, text in zip(images.values(), threads.imap(what_is_wrong, images, 100)):
                if text:
                    self.problem(*place, text)
        return len(images)


def main():
    parser = argparse.ArgumentParser(description="Check a whole M-BEIR directory, or write one.")
    parser.add_argument("directory", nargs="?", help="M-BEIR directory to check")
    parser.add_argument("--from", dest="pairs", type=Path, metavar="FILE",
                        help=f".csv (first line: names) or .jsonl file of {' '.join(COLUMNS)}")
    parser.add_argument("--out", type=Path, help="directory to write from it, must not exist")
    parser.add_argument("--valid", default="10%", help="of the queries are held out as val, test")
    parser.add_argument("--show", type=int, default=20, help="problems to print")
    parser.add_argument("--images", choices=["header", "full", "none"], default="full",
                        help="decode each image, only open it (faster), or skip them")
    args = parser.parse_args()
    with clear_errors():
        if bool(args.directory) == bool(args.pairs and args.out):
            raise ValueError("expected an M-BEIR directory, or --from FILE --out DIRECTORY")
        if args.directory:
            sys.exit(check_directory(args))
        print(write_pairs(args.pairs, args.out, args.valid))


def check_directory(args):
    """Print what is wrong in args.directory, and a line a file; -> 1 if anything is, else 0."""
    read = {"header": open_image, "full": load_image, "none": None}[args.images]
    check_option("--show", args.show, int)
    checker = Checker(args.directory, args.show)
    checker.check()
    images = checker.check_images(read) if read else 0
    for path, table in checker.tables.items():
        name = printable(str(path.relative_to(args.directory)))
        problems = checker.counts[path]
        print(f"{name:<60}{len(table):>11,} lines{problems:>10,} problems")
    count, lines = sum(checker.counts.values()), sum(map(len, checker.tables.values()))
    for text in checker.texts.values():
        print(printable(text))
    if count > len(checker.texts):
        print(f"... and {count - len(checker.texts):,} more; --show shows as many as you like")
    print(f"{args.directory}: {lines:,} lines, {images:,} images, {count:,} problems")
    return 1 if count else 0


if __name__ == "__main__":
    main()
