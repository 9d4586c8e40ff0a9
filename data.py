"""Read M-BEIR, or any directory in its format, as toy/glyph_beir.py writes it; compose batches.

    query/{train,val,test}/mbeir_{dataset}_task{T}_{split}.jsonl       query/union_train/*.jsonl
    cand_pool/local/mbeir_{dataset}_task{T}_cand_pool.jsonl            cand_pool/global/*.jsonl
    qrels/{split}/mbeir_{dataset}_task{T}_{split}_qrels.txt            instructions/*.tsv

A query line names its positives by did; a candidate line with that did is the target:

    {"qid": "9:12", "query_txt": "A dog.", "query_modality": "text", "pos_cand_list": ["9:77"], ...}
    {"did": "9:77", "txt": null, "img_path": "mbeir_images/77.jpg", "modality": "image", ...}

The files have gigabytes. In memory stay the byte offset of each line and a few integers a line;
the line itself is parsed when its item is needed. Everything random follows from a seed.

    python data.py DIR        # check a whole directory, images included, and count what is in it
"""

import itertools
import random
import re
from array import array
from collections import defaultdict, namedtuple
from pathlib import Path

import numpy as np
import torch

from lines import Table, parse_lines

MODALITIES = ("text", "image", "image,text", "video", "video,text")  # index = modality class
CLASSES = {name: i for i, name in enumerate(MODALITIES)} | {"text,image": 2, "text,video": 4}
TASKS = {  # task id -> (query modality, candidate modality)
    0: ("text", "image"), 1: ("text", "text"), 2: ("text", "image,text"), 3: ("image", "text"),
    4: ("image", "image"), 6: ("image,text", "text"), 7: ("image,text", "image"),
    8: ("image,text", "image,text")}
DID = re.compile(r"([0-9]{1,6}):([0-9]{1,12})")


def did_key(did):
    """`9:77` (dataset 9, number 77) -> one integer, so that a million dids fit into an array."""
    match = DID.fullmatch(did) if isinstance(did, str) else None
    if not match:
        raise ValueError(f'expected an id like "9:77", got {did!r}')
    return int(match[1]) << 40 | int(match[2])


def did_text(key):
    """The inverse of `did_key`."""
    return f"{key >> 40}:{key & (1 << 40) - 1}"


def did_keys(values):
    """pos_cand_list -> keys. It lists dids or, as the dataset card says, objects with one."""
    if not isinstance(values, list) or not values:
        raise ValueError(f"expected a list of ids, at least one, got {values!r}")
    return [did_key(value.get("did") if isinstance(value, dict) else value) for value in values]


def modality_class(name):
    """`image,text` or `text,image` (the dataset card has both) -> index into MODALITIES."""
    if not isinstance(name, str) or name not in CLASSES:
        raise ValueError(f"expected a modality out of {', '.join(MODALITIES)}; got {name!r}")
    return CLASSES[name]


def check_content(text, image):
    """Raise ValueError unless there is a text or an image, whose path may not leave the root."""
    if not (text or image) or not all(isinstance(value, str | None) for value in (text, image)):
        raise ValueError(f"expected a text or an image path or both, got {text!r} and {image!r}")
    if image and (image.startswith("/") or ".." in image and ".." in image.split("/")):
        raise ValueError(f"expected an image path inside the data directory, got {image!r}")


def make_item(root, text, image):
    """{"text", "image"} with the image's whole path; ValueError as in `check_content`."""
    check_content(text, image)
    return {"text": text or None, "image": str(root / image) if image else None}


def query_columns(row):
    """A query's row, checked -> qid key, modality class, key of the first positive."""
    check_content(row.get("query_txt"), row.get("query_img_path"))
    first = did_keys(row["pos_cand_list"])[0]
    return did_key(row["qid"]), modality_class(row["query_modality"]), first


def candidate_columns(row):
    """A candidate's row, checked -> did key, modality class."""
    check_content(row.get("txt"), row.get("img_path"))
    return did_key(row["did"]), modality_class(row["modality"])


def format_instruction(text):
    """M-BEIR's prompts vary: strip, capitalise the first letter, end with "." unless in . ? !"""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?", "!")) else ".")


class Pool(Table):
    """A pool file as items; item i has the did key `keys[i]` and the class `modality[i]`."""

    def __init__(self, path, root):
        super().__init__(path, candidate_columns, "qb", "a candidate, a JSON object")
        self.root, (self.keys, self.modality) = root, self.columns
        # A dictionary of 5.6 million keys would take 700 MB; their order takes 45.
        self.order = np.argsort(np.asarray(self.keys), kind="stable")

    def find(self, keys):
        """did keys -> (N,) array of their indices, -1 where the pool has no such candidate."""
        own, wanted = np.asarray(self.keys), np.asarray(keys, dtype=np.int64)
        places = np.searchsorted(own, wanted, sorter=self.order).clip(max=len(own) - 1)
        found = self.order[places]
        return np.where(own[found] == wanted, found, -1)

    def __getitem__(self, i):
        row = super().__getitem__(i)
        return make_item(self.root, row.get("txt"), row.get("img_path"))


def parse_qrel(line):
    """`qid 0 did 1 task_id`, or TREC's four columns -> qid, did key, grade."""
    qid, _, did, grade, *_ = line.decode().split()
    return qid, did_key(did), int(grade)


# One evaluation cell: its name, "<dataset>_task<T>" ("zero_" in front for the zero-shot split); of
# each query the id, the item with instruction, the set of relevant did keys; its local pool's file.
Cell = namedtuple("Cell", "name qids items relevant pool_path")


class Benchmark:
    """An M-BEIR directory. Raises ValueError naming the file, the line and what was expected."""

    def __init__(self, root, seed=0):
        self.root, self.seed, self.tables = Path(root), seed, {}
        for folder in ("query", "cand_pool", "instructions"):
            if not (self.root / folder).is_dir():
                raise ValueError(f"{root} is no M-BEIR directory: expected the folder {folder}")
        self.prompts = self._read_prompts(self.root / "instructions/query_instructions.tsv")

    def _read_prompts(self, path):
        """{(query class, candidate class, dataset id): prompts} of the tab-separated file."""
        def parse(line):
            query, candidate, _, dataset, *texts = map(str.strip, line.decode().split("\t"))
            first, *more = [format_instruction(text) for text in texts if text]
            return (modality_class(query), modality_class(candidate), int(dataset)), [first, *more]

        expected = "query modality, candidate modality, name, dataset id, prompts, tabs in between"
        return dict(entry for _, entry in parse_lines(path, parse, expected, header=1))

    def query_table(self, path):
        """A file's queries. A file that both stages train on is read once, and so are pools."""
        if path not in self.tables:
            self.tables[path] = Table(path, query_columns, "qbq", "a query, a JSON object")
        return self.tables[path]

    def query_item(self, row, target_class, salt=""):
        """A query's item; its instruction is drawn by query id and `salt` (official: unseeded)."""
        key = (modality_class(row["query_modality"]), target_class, did_key(row["qid"]) >> 40)
        if key not in self.prompts:
            raise ValueError(f"query_instructions.tsv: expected prompts for dataset {key[2]}, "
                             f"{MODALITIES[key[0]]} -> {MODALITIES[key[1]]}")
        prompt = random.Random(f"{self.seed}-{row['qid']}-{salt}").choice(self.prompts[key])
        item = make_item(self.root, row.get("query_txt"), row.get("query_img_path"))
        return {**item, "instruction": prompt}

    def cells(self, split, limit=None):
        """All cells of a split, by dataset and task. `limit`: only that many queries of each."""
        folder = self.root / "query" / split
        paths = sorted(folder.glob(f"mbeir_*_task*_{split}.jsonl"))
        if not paths:
            raise ValueError(f"{folder}: expected files mbeir_<dataset>_task<T>_{split}.jsonl")
        return [self._cell(path, split, limit) for path in paths]

    def cell_files(self, path):
        """A cell's query file -> its name, target class, local pool's file, qrels file."""
        split = path.parent.name
        match = re.fullmatch(rf"mbeir_(.+_task(\d+))_{split}\.jsonl", path.name)
        if not match or int(match[2]) not in TASKS:
            raise ValueError(f"{path}: expected a task out of {list(TASKS)} in the file's name")
        name, target_class = match[1], modality_class(TASKS[int(match[2])][1])
        pools = [self.root / f"cand_pool/local/mbeir_{name}{part}_cand_pool.jsonl"
                 for part in (f"_{split}", "", "_test")]  # MSCOCO has several, "" of all splits
        pool = next(filter(Path.exists, pools), None)
        if pool is None:
            raise ValueError(f"{pools[1]}: expected the candidate pool of {path.name}")
        return name, target_class, pool, self.root / f"qrels/{split}/mbeir_{name}_{split}_qrels.txt"

    def _cell(self, path, split, limit):
        name, target_class, pool, qrels = self.cell_files(path)
        rows = list(itertools.islice(self.query_table(path), limit))
        items = [self.query_item(row, target_class) for row in rows]
        name = f"zero_{name}" if split == "zero" else name
        return Cell(name, [row["qid"] for row in rows], items, self._relevant(rows, qrels), pool)

    def _relevant(self, rows, path):
        """For each query its relevant did keys: of `qid 0 did 1 task` lines, else pos_cand_list."""
        if not path.exists():
            return [set(did_keys(row["pos_cand_list"])) for row in rows]
        relevant = {row["qid"]: set() for row in rows}
        for _, (qid, key, grade) in parse_lines(path, parse_qrel, "`qid 0 did 1 task`"):
            if grade > 0 and qid in relevant:
                relevant[qid].add(key)
        for qid, keys in relevant.items():
            if not keys:
                raise ValueError(f"{path}: expected a relevant candidate for {qid}, found none")
        return [relevant[row["qid"]] for row in rows]

    def global_pool_path(self, split):
        """The union pool; the zero-shot split shares the test pool. None if there is none."""
        folder = self.root / "cand_pool/global"
        paths = [folder / f"mbeir_union_{part}_cand_pool.jsonl" for part in (split, "test")]
        return next(filter(Path.exists, paths), None)

    def pool(self, path):
        if path not in self.tables:
            self.tables[path] = Pool(path, self.root)
        return self.tables[path]


class TrainSet(torch.utils.data.Dataset):
    """Batches of (query, positive target) pairs; batch `s` is the same whenever it is asked for.

    Each batch mixes `tasks_per_batch` of the (dataset, task) groups, drawn by size: negatives of
    the same task are mostly intra-modality, others inter-modality, and MAC-Loss needs both. In a
    group every query comes once before any comes again. `labels`: use only that many (0: all).
    """

    def __init__(self, benchmark, batch_size, steps, tasks_per_batch=3, seed=0, labels=0):
        self.benchmark, self.seed, root = benchmark, seed, benchmark.root
        files = list(root.glob("query/union_train/*.jsonl"))
        if len(files) != 1:
            raise ValueError(f"{root}/query/union_train: expected 1 .jsonl file, got {len(files)}")
        self.queries = benchmark.query_table(files[0])
        self.pool = benchmark.pool(root / "cand_pool/global/mbeir_union_train_cand_pool.jsonl")
        rng = random.Random(seed)
        groups = self._groups(rng, labels)
        sizes, left = [len(rows) for rows in groups.values()], defaultdict(list)
        self.schedule = []  # for each step the rows of its queries
        for _ in range(steps):
            chosen = {}  # groups without repetition
            while len(chosen) < min(tasks_per_batch, len(groups)):
                chosen |= dict.fromkeys(rng.choices(list(groups), sizes))
            batch = array("q")
            for name in itertools.islice(itertools.cycle(chosen), batch_size):
                if not left[name]:
                    order = rng.sample(range(len(groups[name])), len(groups[name]))
                    left[name] = array("q", groups[name][order].tobytes())
                batch.append(left[name].pop())
            self.schedule.append(batch)

    def _groups(self, rng, labels):
        """{(dataset, query class, target class) as one integer: its rows, shuffled}."""
        qids, classes, positives = map(np.asarray, self.queries.columns)
        found = self.pool.find(positives)
        for row in np.flatnonzero(found < 0)[:1]:
            raise ValueError(
                f"{self.pool.path}: expected {did_text(int(positives[row]))}, the first positive "
                f"of query {did_text(int(qids[row]))} in {self.queries.path}")
        rows = np.array(rng.sample(range(len(qids)), len(qids)))
        if labels:  # an up-sampled file repeats queries: count ids, not lines
            known, first = np.unique(qids[rows], return_index=True)
            rows = rows[np.isin(qids[rows], known[first.argsort()[:labels]])]
        targets = np.asarray(self.pool.modality)[found]
        group = ((qids >> 40) * 64 + classes * np.int64(8) + targets)[rows]
        names, first = np.unique(group, return_index=True)
        return {name: rows[group == name] for name in names[first.argsort()].tolist()}

    def __len__(self):
        return len(self.schedule)

    def __getitem__(self, step):
        """One batch of B pairs: `queries`, `targets` (items), `modality` and `target_keys` (B,) of
        the targets, `positive_keys`: for each query all its listed positives."""
        rng = random.Random(f"{self.seed}-{step}")
        rows = [self.queries[i] for i in self.schedule[step]]
        positives = [did_keys(row["pos_cand_list"]) for row in rows]
        found = [self.pool.find(keys) for keys in positives]
        picked = [rng.choice(indices[indices >= 0].tolist()) for indices in found]
        classes = [self.pool.modality[i] for i in picked]
        return {
            "queries": [self.benchmark.query_item(*row, step) for row in zip(rows, classes)],
            "targets": [self.pool[i] for i in picked],
            "modality": torch.tensor(classes),
            "target_keys": torch.tensor([self.pool.keys[i] for i in picked]),
            "positive_keys": positives,
        }


def duplicate_mask(positive_keys, target_keys):
    """(B, N) bool: target j is a listed positive of query i, its own included: no negative of it.
    The official code counts them as negatives. M-BEIR's up-sampled training set repeats queries.
    """
    return torch.stack([torch.isin(target_keys, torch.tensor(keys)) for keys in positive_keys])


if __name__ == "__main__":
    from check_data import main

    main()
