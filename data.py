"""Read M-BEIR, or any directory in its format, as toy/glyph_beir.py writes it; compose batches.

    query/{train,val,test}/mbeir_{dataset}_task{T}_{split}.jsonl       query/union_train/*.jsonl
    cand_pool/local/mbeir_{dataset}_task{T}_cand_pool.jsonl            cand_pool/global/*.jsonl
    qrels/{split}/mbeir_{dataset}_task{T}_{split}_qrels.txt            instructions/*.tsv

A query line names its positives by did; a candidate line with that did is the target:

    {"qid": "9:12", "query_txt": "A dog.", "query_modality": "text", "pos_cand_list": ["9:77"], ...}
    {"did": "9:77", "txt": null, "img_path": "mbeir_images/77.jpg", "modality": "image", ...}

The files have gigabytes. In memory stay the byte offset of each line and a few integers a line;
the line itself is parsed when its item is needed. Everything random follows from a seed.
"""

import itertools
import json
import random
import re
from array import array
from collections import defaultdict, namedtuple
from pathlib import Path

import torch

MODALITIES = ("text", "image", "image,text", "video", "video,text")  # index = modality class
CLASSES = {name: i for i, name in enumerate(MODALITIES)} | {"text,image": 2, "text,video": 4}
TASKS = {  # task id -> (query modality, candidate modality)
    0: ("text", "image"), 1: ("text", "text"), 2: ("text", "image,text"), 3: ("image", "text"),
    4: ("image", "image"), 6: ("image,text", "text"), 7: ("image,text", "image"),
    8: ("image,text", "image,text")}


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
    if not (text or image) or not all(isinstance(value, str | None) for value in (text, image)):
        raise ValueError(f"expected a text or an image path or both, got {text!r} and {image!r}")
    if image and (Path(image).is_absolute() or ".." in Path(image).parts):
        raise ValueError(f"expected an image path inside the data directory, got {image!r}")
    return {"text": text or None, "image": str(root / image) if image else None}


def format_instruction(text):
    """M-BEIR's prompts vary: strip, capitalise the first letter, end with "." unless in . ? !"""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?", "!")) else ".")


def parse_lines(path, parse, expected, header=0):
    """Yield (byte offset, parse(line)) of the lines that are not blank, after `header` lines.

    What fails in `parse` becomes a ValueError "file:line: expected ...".
    """
    number = offset = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number > header and line.strip():
                    yield offset, parse(line)
                offset += len(line)
    except OSError as error:
        raise ValueError(f"{path}: cannot read: {error.strerror}") from error
    except KeyError as error:
        raise ValueError(f"{path}:{number}: expected a field {error}") from error
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{path}:{number}: expected {expected} ({error})") from error


class Table:
    """A JSON-lines file as a sequence of dictionaries, each parsed when it is asked for.

    `columns(row)` checks a row and returns integers; `self.columns` keeps an array of each.
    """

    def __init__(self, path, columns, expected):
        self.path, self.starts, self.columns = Path(path), array("q"), None
        for offset, values in parse_lines(path, lambda line: columns(json.loads(line)), expected):
            self.columns = self.columns or [array("q") for _ in values]
            for column, value in zip([self.starts, *self.columns], [offset, *values]):
                column.append(value)
        if not self.starts:
            raise ValueError(f"{path}: expected {expected} on each line, found no line")

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            return json.loads(file.readline())


class Pool(Table):
    """A pool file as items; item i has the did key `keys[i]` and the class `modality[i]`."""

    def __init__(self, path, root):
        def columns(row):
            make_item(root, row.get("txt"), row.get("img_path"))  # only to check
            return did_key(row["did"]), modality_class(row["modality"])

        super().__init__(path, columns, "a candidate, a JSON object")
        self.root, (self.keys, self.modality) = root, self.columns
        self.index = {key: i for i, key in enumerate(self.keys)}

    def __getitem__(self, i):
        row = super().__getitem__(i)
        return make_item(self.root, row.get("txt"), row.get("img_path"))


# One evaluation cell: its name, "<dataset>_task<T>" ("zero_" in front for the zero-shot split); of
# each query the id, the item with instruction, the set of relevant did keys; its local pool's file.
Cell = namedtuple("Cell", "name qids items relevant pool_path")


class Benchmark:
    """An M-BEIR directory. Raises ValueError naming the file, the line and what was expected."""

    def __init__(self, root, seed=0):
        self.root, self.seed = Path(root), seed
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
        """Columns: qid key, modality class, key of the first positive."""
        def columns(row):
            make_item(self.root, row.get("query_txt"), row.get("query_img_path"))  # only to check
            first = did_keys(row["pos_cand_list"])[0]
            return did_key(row["qid"]), modality_class(row["query_modality"]), first

        return Table(path, columns, "a query, a JSON object")

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

    def _cell(self, path, split, limit):
        match = re.fullmatch(rf"mbeir_(.+_task(\d+))_{split}\.jsonl", path.name)
        if not match or int(match[2]) not in TASKS:
            raise ValueError(f"{path}: expected a task out of {list(TASKS)} in the file's name")
        name, target_class = match[1], modality_class(TASKS[int(match[2])][1])
        pools = [self.root / f"cand_pool/local/mbeir_{name}{part}_cand_pool.jsonl"
                 for part in ("", f"_{split}", "_test")]  # MSCOCO's has "_test" in it
        pool = next(filter(Path.exists, pools), None)
        if pool is None:
            raise ValueError(f"{pools[0]}: expected the candidate pool of {path.name}")
        table = self.query_table(path)
        rows = [table[i] for i in range(len(table))[:limit]]
        items = [self.query_item(row, target_class) for row in rows]
        relevant = self._relevant(rows, f"qrels/{split}/mbeir_{name}_{split}_qrels.txt")
        name = f"zero_{name}" if split == "zero" else name
        return Cell(name, [row["qid"] for row in rows], items, relevant, pool)

    def _relevant(self, rows, qrels):
        """For each query its relevant did keys: of `qid 0 did 1 task` lines, else pos_cand_list."""
        def parse(line):
            qid, _, did, grade, *_ = line.decode().split()
            return qid, did_key(did), int(grade)

        path = self.root / qrels
        if not path.exists():
            return [set(did_keys(row["pos_cand_list"])) for row in rows]
        relevant = {row["qid"]: set() for row in rows}
        for _, (qid, key, grade) in parse_lines(path, parse, "`qid 0 did 1 task`"):
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
        return Pool(path, self.root)


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
        qids, classes, positives = self.queries.columns
        rng = random.Random(seed)
        rows = rng.sample(range(len(qids)), len(qids))
        if labels:  # an up-sampled file repeats queries: count ids, not lines
            kept = set(list(dict.fromkeys(qids[i] for i in rows))[:labels])
            rows = [i for i in rows if qids[i] in kept]
        groups = {}  # (dataset, query class, target class) -> rows
        for i in rows:
            if positives[i] not in self.pool.index:
                raise ValueError(f"{self.pool.path}: expected {did_text(positives[i])}, the first "
                                 f"positive of query {did_text(qids[i])} in {files[0]}")
            target_class = self.pool.modality[self.pool.index[positives[i]]]
            groups.setdefault((qids[i] >> 40, classes[i], target_class), []).append(i)
        sizes, left = [len(rows) for rows in groups.values()], defaultdict(list)
        self.schedule = []  # for each step the rows of its queries
        for _ in range(steps):
            chosen = {}  # groups without repetition
            while len(chosen) < min(tasks_per_batch, len(groups)):
                chosen |= dict.fromkeys(rng.choices(list(groups), sizes))
            batch = array("q")
            for name in itertools.islice(itertools.cycle(chosen), batch_size):
                left[name] = left[name] or rng.sample(groups[name], len(groups[name]))
                batch.append(left[name].pop())
            self.schedule.append(batch)

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


def duplicate_mask(positive_keys, target_keys):
    """(B, N) bool: target j is a listed positive of query i, its own included: no negative of it.

    The official code counts them as negatives. M-BEIR's up-sampled training set repeats queries.
    """
    return torch.stack([torch.isin(target_keys, torch.tensor(keys)) for keys in positive_keys])
