"""Read M-BEIR: queries, candidate pools, relevance, instructions; compose training batches.

Any directory in M-BEIR's format works, the real one or the one that toy/glyph_beir.py writes:

    query/{train,val,test}/mbeir_{dataset}_task{T}_{split}.jsonl       query/union_train/*.jsonl
    cand_pool/local/mbeir_{dataset}_task{T}_cand_pool.jsonl            cand_pool/global/*.jsonl
    qrels/{split}/mbeir_{dataset}_task{T}_{split}_qrels.txt            instructions/*.tsv

A query line names its positives by did; a candidate line with that did is the target:

    {"qid": "9:12", "query_txt": "A dog.", "query_modality": "text", "pos_cand_list": ["9:77"], ...}
    {"did": "9:77", "txt": null, "img_path": "mbeir_images/77.jpg", "modality": "image", ...}

The files have gigabytes. In memory stay the byte offset of each line and a few integers a line;
the line itself is parsed when its item is needed. Everything random follows from a seed.
"""

import json
import os
import random
import re
from array import array
from dataclasses import dataclass
from pathlib import Path

import torch

MODALITIES = ("text", "image", "image,text", "video", "video,text")  # index = modality class
CLASSES = {name: i for i, name in enumerate(MODALITIES)} | {"text,image": 2, "text,video": 4}
TASKS = {  # task id -> (query modality, candidate modality)
    0: ("text", "image"), 1: ("text", "text"), 2: ("text", "image,text"), 3: ("image", "text"),
    4: ("image", "image"), 6: ("image,text", "text"), 7: ("image,text", "image"),
    8: ("image,text", "image,text"),
}


def did_key(did):
    """`9:77` (dataset 9, number 77) -> one integer, so that a million dids fit into an array."""
    match = re.fullmatch(r"(\d{1,6}):(\d{1,12})", did) if isinstance(did, str) else None
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


def make_item(root, text, image):
    """{"text", "image"} with the image's whole path, which may not leave the data root."""
    if not all(isinstance(value, str | None) for value in (text, image)):
        raise ValueError(f"expected text and image path as strings or null, got {text!r}, {image!r}")
    if image and (os.path.isabs(image) or ".." in Path(image).parts):
        raise ValueError(f"expected an image path inside the data directory, got {image!r}")
    if not text and not image:
        raise ValueError("expected a text or an image path, got neither")
    return {"text": text or None, "image": str(root / image) if image else None}


def read_lines(path):
    """(number, line) of each line of a text file that is not blank. ValueError: cannot read it."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read: {error}") from error
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def format_instruction(text):
    """M-BEIR's prompts vary: strip, capitalise the first letter, end with "." unless in . ? !"""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?", "!")) else ".")


class Table:
    """A JSON-lines file as a sequence of dictionaries, parsed one at a time.

    `columns(row)` checks a row and returns the integers to keep of it; `self.columns` has an array
    for each. Raises ValueError "file:line: what was expected" at the first bad line.
    """

    def __init__(self, path, columns):
        self.path, self.starts, self.columns = Path(path), array("q"), None
        position = 0
        try:
            with self.path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        self._add(position, line, columns)
                    position += len(line)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot read: {error.strerror}") from error
        except KeyError as error:
            raise ValueError(f"{self.path}:{number}: expected a field {error}") from error
        except ValueError as error:
            raise ValueError(f"{self.path}:{number}: {error}") from error
        if not self.starts:
            raise ValueError(f"{self.path}: expected at least one JSON line, found none")

    def _add(self, position, line, columns):
        try:
            row = json.loads(line)
        except ValueError:  # malformed JSON or UTF-8
            row = line
        if not isinstance(row, dict):
            raise ValueError(f"expected a JSON object, got {str(row)[:60]}")
        values = columns(row)
        self.columns = self.columns or [array("q") for _ in values]
        for column, value in zip([self.starts, *self.columns], [position, *values]):
            column.append(value)

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            return json.loads(file.readline())


class Pool:
    """Candidates of one pool file. `keys[i]` is candidate i's did key, `modality[i]` its class."""

    def __init__(self, path, root):
        def columns(row):
            make_item(root, row.get("txt"), row.get("img_path"))  # only to check it
            return did_key(row["did"]), modality_class(row["modality"])

        self.root, self.table = root, Table(path, columns)
        self.keys, self.modality = self.table.columns
        self.index = {key: i for i, key in enumerate(self.keys)}

    def __len__(self):
        return len(self.table)

    def __getitem__(self, i):
        row = self.table[i]
        return make_item(self.root, row.get("txt"), row.get("img_path"))


@dataclass
class Cell:
    """One evaluation cell: the queries of a dataset and task, their relevance, their local pool."""

    name: str  # "<dataset>_task<T>", with "zero_" in front for the zero-shot split
    qids: list
    items: list  # the queries, with instruction
    relevant: list  # for each query the set of relevant did keys
    pool_path: Path


class Benchmark:
    """An M-BEIR directory. Raises ValueError naming the file, the line and what was expected."""

    def __init__(self, root, seed=0):
        self.root, self.seed = Path(root), seed
        for folder in ("query", "cand_pool", "instructions"):
            path = self.root / folder
            if not path.is_dir():
                raise ValueError(f"{self.root} is no M-BEIR directory: expected the folder {path}")
        self.prompts = self._read_prompts(self.root / "instructions/query_instructions.tsv")

    def _read_prompts(self, path):
        """{(query class, candidate class, dataset id): prompts} of the tab-separated file."""
        prompts = {}
        for number, line in read_lines(path)[1:]:
            fields = [field.strip() for field in line.split("\t")]
            try:
                key = (modality_class(fields[0]), modality_class(fields[1]), int(fields[3]))
                prompts[key] = [format_instruction(text) for text in fields[4:] if text]
                prompts[key][0]  # IndexError if there is none
            except (ValueError, IndexError) as error:
                raise ValueError(
                    f"{path}:{number}: expected query modality, candidate modality, name, dataset "
                    f"id and prompts, separated by tabs ({error})") from error
        return prompts

    def query_table(self, path, pool=None):
        """Columns: qid key, modality class, key of the first positive (in `pool`, if given)."""
        def columns(row):
            make_item(self.root, row.get("query_txt"), row.get("query_img_path"))  # to check it
            positives = did_keys(row["pos_cand_list"])
            known = [key for key in positives if pool is None or key in pool.index]
            if not known:
                raise ValueError(f"expected a positive in the pool, got {did_text(positives[0])}")
            return did_key(row["qid"]), modality_class(row["query_modality"]), known[0]

        return Table(path, columns)

    def query_item(self, row, target_class, salt=""):
        """A query's item; its instruction is drawn by query id and `salt` (official: unseeded)."""
        key = (modality_class(row["query_modality"]), target_class, did_key(row["qid"]) >> 40)
        if key not in self.prompts:
            raise ValueError(f"{self.root}/instructions/query_instructions.tsv: expected a prompt for "
                             f"dataset {key[2]}, {MODALITIES[key[0]]} -> {MODALITIES[key[1]]}")
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

    def _cell(self, path, split, limit):
        match = re.fullmatch(rf"mbeir_(.+_task(\d+))_{split}\.jsonl", path.name)
        if not match or int(match[2]) not in TASKS:
            raise ValueError(f"{path}: expected a task out of {list(TASKS)} in the file's name")
        name, target_class = match[1], modality_class(TASKS[int(match[2])][1])
        table = self.query_table(path)
        rows = [table[i] for i in range(len(table))[:limit]]
        pools = [self.root / f"cand_pool/local/mbeir_{name}{part}_cand_pool.jsonl"
                 for part in ("", f"_{split}", "_test")]  # MSCOCO's has "_test" in it
        pool = next((path for path in pools if path.exists()), None)
        if pool is None:
            raise ValueError(f"{pools[0]}: expected the candidate pool of {path.name}")
        items = [self.query_item(row, target_class) for row in rows]
        relevant = self._relevant(rows, f"qrels/{split}/mbeir_{name}_{split}_qrels.txt")
        name = f"zero_{name}" if split == "zero" else name
        return Cell(name, [row["qid"] for row in rows], items, relevant, pool)

    def _relevant(self, rows, qrels):
        """For each query its relevant did keys: of `qid 0 did 1 task` lines, else pos_cand_list."""
        path = self.root / qrels
        if not path.exists():
            return [set(did_keys(row["pos_cand_list"])) for row in rows]
        relevant = {row["qid"]: set() for row in rows}
        for number, line in read_lines(path):
            try:
                qid, _, did, grade, *_ = line.split()
                if int(grade) > 0 and qid in relevant:
                    relevant[qid].add(did_key(did))
            except ValueError as error:
                raise ValueError(
                    f"{path}:{number}: expected `qid 0 did 1 task`, got {line!r}") from error
        for qid, keys in relevant.items():
            if not keys:
                raise ValueError(f"{path}: expected a relevant candidate for {qid}, found none")
        return [relevant[row["qid"]] for row in rows]

    def global_pool_path(self, split):
        """The union pool; the zero-shot split shares the test pool. None if there is none."""
        name = str(self.root / "cand_pool/global/mbeir_union_{}_cand_pool.jsonl")
        paths = [Path(name.format(part)) for part in (split, "test")]
        return next((path for path in paths if path.exists()), None)

    def pool(self, path):
        return Pool(path, self.root)


class TrainSet(torch.utils.data.Dataset):
    """Batches of (query, positive target) pairs; batch `s` is the same whenever it is asked for.

    Each batch mixes `tasks_per_batch` of the (dataset, task) groups: negatives of the same task are
    mostly intra-modality, those of other tasks inter-modality, and MAC-Loss needs both. Groups are
    drawn by size; within a group every query comes once before any comes again. `labels`: use only
    that many queries (0: all).
    """

    def __init__(self, benchmark, batch_size, steps, tasks_per_batch=3, seed=0, labels=0):
        self.benchmark, self.seed = benchmark, seed
        folder = benchmark.root / "query/union_train"
        files = sorted(folder.glob("*.jsonl"))
        if len(files) != 1:
            raise ValueError(f"{folder}: expected one .jsonl file, found {len(files)}")
        self.pool = benchmark.pool(
            benchmark.root / "cand_pool/global/mbeir_union_train_cand_pool.jsonl")
        self.queries = benchmark.query_table(files[0], self.pool)
        qids, classes, positives = self.queries.columns
        rng = random.Random(seed)
        rows = rng.sample(range(len(qids)), len(qids))
        if labels:  # an up-sampled file repeats queries: count ids, not lines
            kept = set(list(dict.fromkeys(qids[i] for i in rows))[:labels])
            rows = [i for i in rows if qids[i] in kept]
        groups = {}
        for i in rows:
            target_class = self.pool.modality[self.pool.index[positives[i]]]
            groups.setdefault((qids[i] >> 40, classes[i], target_class), []).append(i)
        self.schedule = list(_schedule(groups, batch_size, steps, tasks_per_batch, rng))

    def __len__(self):
        return len(self.schedule)

    def __getitem__(self, step):
        """One batch of B pairs: `queries`, `targets` (items), `modality` and `target_keys` (B,) of
        the targets, `positive_keys`: for each query all its listed positives."""
        rng = random.Random(f"{self.seed}-{step}")
        rows = [self.queries[i] for i in self.schedule[step]]
        positives = [did_keys(row["pos_cand_list"]) for row in rows]
        index = self.pool.index
        picked = [rng.choice([index[key] for key in keys if key in index]) for keys in positives]
        classes = [self.pool.modality[i] for i in picked]
        return {
            "queries": [self.benchmark.query_item(*row, step) for row in zip(rows, classes)],
            "targets": [self.pool[i] for i in picked],
            "modality": torch.tensor(classes),
            "target_keys": torch.tensor([self.pool.keys[i] for i in picked]),
            "positive_keys": positives,
        }


def _schedule(groups, batch_size, steps, tasks_per_batch, rng):
    """For each step the rows of its queries; `groups` {name: rows}."""
    names, sizes = list(groups), [len(rows) for rows in groups.values()]
    left = {name: [] for name in names}
    count = min(tasks_per_batch, len(names))
    for _ in range(steps):
        chosen = []
        while len(chosen) < count:  # by size, without repetition
            (name,) = rng.choices(names, sizes)
            chosen += [name] * (name not in chosen)
        batch = array("q")
        for place in range(batch_size):
            name = chosen[place % count]
            if not left[name]:
                left[name] = rng.sample(groups[name], len(groups[name]))
            batch.append(left[name].pop())
        yield batch


def duplicate_mask(positive_keys, target_keys):
    """(B, N) bool: is target j a listed positive of query i, and so no negative of it?

    The official code keeps such columns as negatives; M-BEIR's up-sampled training set repeats
    queries, so they occur. The query's own target is marked, too: `mac_loss` never leaves it out.
    """
    columns = {}
    for j, key in enumerate(target_keys.tolist()):
        columns.setdefault(key, []).append(j)
    mask = torch.zeros(len(positive_keys), len(target_keys), dtype=torch.bool)
    for i, keys in enumerate(positive_keys):
        mask[i, [j for key in keys for j in columns.get(key, ())]] = True
    return mask
