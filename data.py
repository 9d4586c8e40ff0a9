"""Read M-BEIR: queries, candidate pools, relevance, instructions; compose training batches.

Any directory in M-BEIR's format works, the real one (TIGER-Lab/M-BEIR) or toy/glyph_beir.py's:

    query/{train,val,test}/mbeir_{dataset}_task{T}_{split}.jsonl      query/union_train/*.jsonl
    cand_pool/local/mbeir_{dataset}_task{T}_cand_pool.jsonl           cand_pool/global/mbeir_union_*.jsonl
    qrels/{split}/mbeir_{dataset}_task{T}_{split}_qrels.txt           instructions/query_instructions.tsv

A query line names its positives by did; a candidate line with that did is the target:

    {"qid": "9:12", "query_txt": "A dog on a sofa.", "query_modality": "text", "pos_cand_list": ["9:77"]}
    {"did": "9:77", "txt": null, "img_path": "mbeir_images/coco/77.jpg", "modality": "image"}

The files have gigabytes: in memory stay the byte offset of each line and a few integers a line; the
line itself is parsed when its item is needed. Everything random follows from a seed.

    python -c "from data import Benchmark; print(Benchmark('data/glyph_beir').cells('test')[0])"
"""

import json
import os
import random
import re
from array import array
from dataclasses import dataclass
from pathlib import Path

import torch

MODALITIES = (
    "text",
    "image",
    "image,text",
    "video",
    "video,text",
)  # a modality's index is its class
TASKS = {  # task id -> (query modality, candidate modality)
    0: ("text", "image"), 1: ("text", "text"), 2: ("text", "image,text"), 3: ("image", "text"),
    4: ("image", "image"), 6: ("image,text", "text"), 7: ("image,text", "image"),
    8: ("image,text", "image,text"),
}  # fmt: skip


def did_key(did):
    """ "ds:n" -> one integer, so that a million dids fit into an array. ValueError if malformed."""
    match = re.fullmatch(r"(\d+):(\d+)", did) if isinstance(did, str) else None
    if not match:
        raise ValueError(f'expected an id like "9:77", got {did!r}')
    return int(match[1]) << 40 | int(match[2])


def dataset_id(key):
    """The dataset id of a `did_key`."""
    return key >> 40


def modality_class(name):
    """ "text,image" or "image,text" -> index into MODALITIES. (The dataset card has both spellings.)"""
    normal = {"text,image": "image,text", "text,video": "video,text"}.get(name, name)
    if normal not in MODALITIES:
        raise ValueError(f"expected a modality out of {', '.join(MODALITIES)}; got {name!r}")
    return MODALITIES.index(normal)


def candidate_list(values):
    """pos_cand_list as did keys; entries are strings, or objects with a `did` as the card says."""
    if not isinstance(values, list):
        raise ValueError(f"expected a list of ids, got {values!r}")
    return [did_key(value.get("did") if isinstance(value, dict) else value) for value in values]


class Table:
    """A JSON-lines file as a sequence of dictionaries, parsed one line at a time.

    `columns(row)` checks a row and returns the integers to keep of it; `self.columns` holds one array
    for each. Raises ValueError "file:line: what was expected" on the first bad line.
    """

    def __init__(self, path, columns):
        self.path = Path(path)
        self.starts, self.columns = array("q"), None
        position = 0
        try:
            with self.path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        self._add(position, columns, line, number)
                    position += len(line)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot read: {error.strerror}") from error
        if not self.starts:
            raise ValueError(f"{self.path}: expected at least one JSON line, found none")
        self.end = position

    def _add(self, position, columns, line, number):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"expected a JSON object, got {str(row)[:60]}")
            values = columns(row)
        except KeyError as error:
            raise ValueError(f"{self.path}:{number}: expected a field {error}") from error
        except ValueError as error:  # includes malformed JSON and malformed UTF-8
            raise ValueError(f"{self.path}:{number}: {error}") from error
        self.starts.append(position)
        self.columns = self.columns or [array("q") for _ in values]
        for column, value in zip(self.columns, values):
            column.append(value)

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        start = self.starts[index]
        end = self.starts[index + 1] if index + 1 < len(self) else self.end
        with self.path.open("rb") as file:
            file.seek(start)
            return json.loads(file.read(end - start))


def make_item(root, text, image):
    """{"text", "image"} with an absolute image path. ValueError if the path leaves the data root."""
    if image and (os.path.isabs(image) or ".." in Path(image).parts):
        raise ValueError(f"image path {image!r} leaves the data directory {root}")
    if not text and not image:
        raise ValueError("expected a text or an image path, got neither")
    return {"text": text or None, "image": str(root / image) if image else None}


class Pool:
    """Candidates of one pool file. `keys[i]` is candidate i's did key, `modality[i]` its class."""

    def __init__(self, path, root):
        def columns(row):
            make_item(root, row.get("txt"), row.get("img_path"))  # only to check it
            return did_key(row["did"]), modality_class(row["modality"])

        self.root = root
        self.table = Table(path, columns)
        self.keys, self.modality = self.table.columns
        self.index = {key: i for i, key in enumerate(self.keys)}

    def __len__(self):
        return len(self.table)

    def __getitem__(self, i):
        row = self.table[i]
        return make_item(self.root, row.get("txt"), row.get("img_path"))


@dataclass
class Cell:
    """One evaluation cell: the queries of a dataset and task, their relevance, their pool's path."""

    name: str  # "<dataset>_task<T>", with "zero_" in front for the zero-shot split
    task: int
    qids: list
    items: list  # with instruction
    relevant: list  # for each query the set of relevant did keys
    pool_path: Path


class Benchmark:
    """An M-BEIR directory. Raises ValueError that names the file, the line and what was expected."""

    def __init__(self, root, seed=0):
        self.root = Path(root)
        self.seed = seed
        for folder in ("query", "cand_pool", "instructions"):
            if not (self.root / folder).is_dir():
                raise ValueError(
                    f"{self.root} is no M-BEIR directory: expected the folder {self.root / folder}"
                )
        self.instructions = self._read_instructions(
            self.root / "instructions/query_instructions.tsv"
        )

    def _read_instructions(self, path):
        """{(query modality, candidate modality, dataset id): prompts}."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot read: {error}") from error
        prompts = {}
        for number, line in enumerate(lines[1:], 2):
            fields = line.split("\t")
            found = [format_instruction(field) for field in fields[4:] if field.strip()]
            if not line.strip():
                continue
            if not found or not fields[3].strip().isdigit():
                raise ValueError(
                    f"{path}:{number}: expected modality, modality, name, id, prompts; tab-separated"
                )
            key = (
                modality_class(fields[0].strip()),
                modality_class(fields[1].strip()),
                int(fields[3]),
            )
            prompts[key] = found
        return prompts

    def instruction(self, query_class, target_class, dataset, salt):
        """One of the task's prompts, drawn by `salt` (a query id, so that evaluation is repeatable)."""
        prompts = self.instructions.get((query_class, target_class, dataset))
        if prompts is None:
            kinds = f"{MODALITIES[query_class]} -> {MODALITIES[target_class]}"
            raise ValueError(f"query_instructions.tsv has no prompt for dataset {dataset}, {kinds}")
        return random.Random(f"{self.seed}-{salt}").choice(prompts)

    def query_table(self, path):
        def columns(row):
            make_item(self.root, row.get("query_txt"), row.get("query_img_path"))
            positives = candidate_list(row["pos_cand_list"])
            if not positives:
                raise ValueError("expected at least one positive in pos_cand_list, got none")
            return did_key(row["qid"]), modality_class(row["query_modality"]), positives[0]

        return Table(path, columns)

    def query_item(self, row, target_class, salt=""):
        item = make_item(self.root, row.get("query_txt"), row.get("query_img_path"))
        dataset = dataset_id(did_key(row["qid"]))
        query_class = modality_class(row["query_modality"])
        salt = f"{row['qid']}{salt}"
        return {**item, "instruction": self.instruction(query_class, target_class, dataset, salt)}

    def cells(self, split, limit=None):
        """All cells of a split, by dataset and task. `limit`: only that many queries each."""
        cells = []
        for path in sorted((self.root / "query" / split).glob(f"mbeir_*_task*_{split}.jsonl")):
            dataset, task = re.fullmatch(
                rf"mbeir_(.+)_task(\d+)_{split}\.jsonl", path.name
            ).groups()
            if int(task) not in TASKS:
                raise ValueError(f"{path}: expected a task out of {list(TASKS)}, got {task}")
            table = self.query_table(path)
            rows = [table[i] for i in range(len(table))[:limit]]
            target_class = modality_class(TASKS[int(task)][1])
            pools = [
                f"mbeir_{dataset}_task{task}{part}_cand_pool.jsonl"
                for part in ("", f"_{split}", "_test")
            ]
            found = [
                p for p in (self.root / "cand_pool/local" / name for name in pools) if p.exists()
            ]
            if not found:
                raise ValueError(
                    f"{self.root / 'cand_pool/local' / pools[0]}: expected the pool of {path.name}"
                )
            cells.append(
                Cell(
                    name=("zero_" if split == "zero" else "") + f"{dataset}_task{task}",
                    task=int(task),
                    qids=[row["qid"] for row in rows],
                    items=[self.query_item(row, target_class) for row in rows],
                    relevant=self._relevant(rows, dataset, task, split),
                    pool_path=found[0],
                )
            )
        if not cells:
            raise ValueError(
                f"{self.root / 'query' / split}: expected files mbeir_*_task*_{split}.jsonl"
            )
        return cells

    def _relevant(self, rows, dataset, task, split):
        """Sets of relevant did keys: the qrels file (`qid 0 did 1 task`), or else pos_cand_list."""
        path = self.root / f"qrels/{split}/mbeir_{dataset}_task{task}_{split}_qrels.txt"
        if not path.exists():
            return [set(candidate_list(row["pos_cand_list"])) for row in rows]
        relevant = {row["qid"]: set() for row in rows}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            fields = line.split()
            if len(fields) not in (0, 4, 5):
                raise ValueError(
                    f"{path}:{number}: expected `qid 0 did relevance task`, got {line!r}"
                )
            if fields and fields[0] in relevant and int(fields[3]) > 0:
                relevant[fields[0]].add(did_key(fields[2]))
        missing = [qid for qid, keys in relevant.items() if not keys]
        if missing:
            raise ValueError(
                f"{path}: expected a relevant candidate for query {missing[0]}, found none"
            )
        return list(relevant.values())

    def global_pool_path(self, split):
        """The union pool of a split; the zero-shot split shares the test pool. None if there is none."""
        for name in (split, "test"):
            path = self.root / f"cand_pool/global/mbeir_union_{name}_cand_pool.jsonl"
            if path.exists():
                return path
        return None

    def pool(self, path):
        return Pool(path, self.root)


def format_instruction(text):
    """M-BEIR's prompts vary: strip, capitalise the first letter, end with `.` unless it ends in . ? !"""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?", "!")) else ".")


class TrainSet(torch.utils.data.Dataset):
    """Batches of (query, positive target) pairs; batch `s` is the same whenever it is asked for.

    Each batch mixes `tasks_per_batch` of the (dataset, task) groups: negatives of the same task are
    mostly intra-modality, those of the others inter-modality, and MAC-Loss needs both. Groups are drawn
    by size, and within a group every query comes once before any comes again. `labels` keeps only
    that many queries (for experiments with few labels).
    """

    def __init__(self, benchmark, batch_size, steps, tasks_per_batch=3, seed=0, labels=None):
        self.benchmark, self.seed = benchmark, seed
        folder = benchmark.root / "query/union_train"
        files = sorted(folder.glob("*.jsonl"))
        if len(files) != 1:
            raise ValueError(f"{folder}: expected one .jsonl file, found {len(files)}")
        self.queries = benchmark.query_table(files[0])
        self.pool = benchmark.pool(
            benchmark.root / "cand_pool/global/mbeir_union_train_cand_pool.jsonl"
        )
        groups = {}
        qids, classes, positives = self.queries.columns
        rng = random.Random(seed)
        rows = (
            range(len(qids))
            if labels is None
            else rng.sample(range(len(qids)), min(labels, len(qids)))
        )
        for i in rows:
            if positives[i] not in self.pool.index:
                raise ValueError(
                    f"{files[0]}: a positive of query {self.queries[i]['qid']} is in no training pool"
                )
            target_class = self.pool.modality[self.pool.index[positives[i]]]
            groups.setdefault((dataset_id(qids[i]), classes[i], target_class), array("q")).append(i)
        self.schedule = list(self._schedule(groups, batch_size, steps, tasks_per_batch, rng))

    @staticmethod
    def _schedule(groups, batch_size, steps, tasks_per_batch, rng):
        """For each step the rows of its queries."""
        names, sizes = list(groups), [len(rows) for rows in groups.values()]
        left = {name: [] for name in names}
        count = min(tasks_per_batch, len(names))
        for _ in range(steps):
            chosen = []
            while len(chosen) < count:  # without replacement, by size
                (name,) = rng.choices(names, sizes)
                chosen += [name] * (name not in chosen)
            batch = array("q")
            for k, name in enumerate(chosen):
                for _ in range(batch_size * (k + 1) // count - batch_size * k // count):
                    if not left[name]:
                        left[name] = rng.sample(list(groups[name]), len(groups[name]))
                    batch.append(left[name].pop())
            yield batch

    def __len__(self):
        return len(self.schedule)

    def __getitem__(self, step):
        """One batch of B pairs: `queries`, `targets` (items), `modality` (B,) of the targets,
        `target_keys` (B,), `positive_keys`: for each query all its listed positives."""
        rng = random.Random(f"{self.seed}-{step}")
        batch = {"queries": [], "targets": [], "positive_keys": []}
        picked = []
        for i in self.schedule[step]:
            row = self.queries[i]
            positives = candidate_list(row["pos_cand_list"])
            known = [self.pool.index[key] for key in positives if key in self.pool.index]
            target = rng.choice(known)
            picked.append(target)
            target_class = self.pool.modality[target]
            batch["queries"].append(self.benchmark.query_item(row, target_class, salt=f"-{step}"))
            batch["targets"].append(self.pool[target])
            batch["positive_keys"].append(positives)
        batch["modality"] = torch.tensor([self.pool.modality[t] for t in picked])
        batch["target_keys"] = torch.tensor([self.pool.keys[t] for t in picked])
        return batch


def duplicate_mask(positive_keys, target_keys):
    """(B, N) bool: is target j a listed positive of query i? Such a column is no negative of query i.

    The official code leaves them in; M-BEIR's up-sampled training set repeats queries, so they occur.
    The query's own target is marked as well: `mac_loss` never leaves that one out.
    """
    columns = {}
    for j, key in enumerate(target_keys.tolist()):
        columns.setdefault(key, []).append(j)
    mask = torch.zeros(len(positive_keys), len(target_keys), dtype=torch.bool)
    for i, keys in enumerate(positive_keys):
        mask[i, [j for key in keys for j in columns.get(key, ())]] = True
    return mask
