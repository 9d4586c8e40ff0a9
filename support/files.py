"""JSON lines as sequences that stay on disk, what M-BEIR writes in them, safe writing.

    table = Table("pool.jsonl", lambda row: (len(row["txt"]),), "q", "a candidate")
    len(table), table[5_000_000], table.columns[0]

In memory stay the byte offset of each line and the integers that `columns` makes of it: M-BEIR's
pool of 5.6 million candidates takes 120 MB so, and some 10 GB as dictionaries.
"""

import json
import os
import random
import re
from array import array
from pathlib import Path

import numpy as np

from support.items import MODALITIES, check_text

# What parsing a line may raise; RecursionError: JSON nested a thousand deep.
BAD_LINE = (AttributeError, KeyError, TypeError, ValueError, RecursionError)
CLASSES = {name: i for i, name in enumerate(MODALITIES)} | {"text,image": 2, "text,video": 4}
DID = re.compile(r"([0-9]{1,6}):([0-9]{1,12})")


def refuse(path, number, text):
    """What is wrong with a line (0: the file as a whole) becomes a ValueError "file:line: text"."""
    raise ValueError(f"{path}:{number}: {text}" if number else f"{path}: {text}")


def parse_lines(path, parse, expected, on_error=refuse, header=0):
    """Yield (line number, byte offset, parse(line)) of lines that are not blank, after `header`.

    Where `parse` fails, on_error(path, line number, "expected ...") is called; if that does not
    raise, the line is left out."""
    end = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            start, end = end, end + len(line)
            if number <= header or line.isspace():
                continue
            try:
                value = parse(line)
            except BAD_LINE as error:
                text = f"expected a field {error}" if isinstance(error, KeyError) else str(error)
                own = text.startswith("expected ")  # it says by itself what was expected
                on_error(path, number, text if own else f"expected {expected} ({error})")
            else:
                yield number, start, value


class Table:
    """A JSON-lines file as a sequence of dictionaries, each parsed when it is asked for.

    `columns(row)` checks a row and returns integers; `self.columns` keeps an array of each, with
    the type codes of `codes` ("q": 8 bytes, "b": 1 byte). `self.numbers`: of the lines in the file.
    Bad lines, or no line at all, go to `on_error` as in `parse_lines`.
    """

    def __init__(self, path, columns, codes, expected, on_error=refuse):
        self.path, self.starts, self.numbers = Path(path), array("q"), array("i")
        self.columns = [array(code) for code in codes]
        rows = parse_lines(path, lambda line: columns(json.loads(line)), expected, on_error)
        for number, start, values in rows:
            self.starts.append(start)
            self.numbers.append(number)
            for column, value in zip(self.columns, values):
                column.append(value)
        if not self.starts:
            on_error(path, 0, f"expected {expected} on each line, found no line")

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            return json.loads(file.readline())


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


def check_content(text, image, video=None):
    """Raise ValueError unless there is a text, an image or a video whose path stays in the root."""
    path = (image, video) if image and video else image or video
    if not (text or path) or not all(isinstance(v, str | None) for v in (text, image, video, path)):
        raise ValueError(f"expected a text or an image path or both, got {text!r} and {path!r}")
    check_text(text, "text")
    check_text(path, "image path")
    if path and (path.startswith("/") or ".." in path.split("/")):
        raise ValueError(f"expected an image path inside the data directory, got {path!r}")


def make_item(root, text, image, video=None):
    """{"text", "image", if any "video"}, whole paths; ValueError if a link leads out of `root`."""
    path = image or video
    if path and not Path(os.path.realpath(root / path)).is_relative_to(os.path.realpath(root)):
        raise ValueError(f"expected an image inside the data directory, {root / path} leads out")
    item = {"text": text or None, "image": str(root / image) if image else None}
    return {**item, "video": str(root / video)} if video else item


class Pool:
    """The candidates of one or several tables, one after another, each did once, as items.

    A table's columns are did keys and modality classes; item i has `keys[i]` and `modality[i]`.
    `places`: only those of all the tables' lines.
    """

    def __init__(self, tables, root, places=None):
        self.tables, self.root = tables, root
        keys, modality = map(np.concatenate, zip(*(table.columns for table in tables)))
        self.starts = np.cumsum([0, *map(len, tables)])  # place of each table's first line
        if places is None:  # the first line of each did
            places = np.sort(np.unique(keys, return_index=True)[1])
        self.places, self.keys, self.modality = places, keys[places], modality[places]
        # A dictionary of 5.6 million keys would take 700 MB; their order takes 45.
        self.order = np.argsort(self.keys)

    def find(self, keys):
        """did keys -> (N,) array of their indices, -1 where the pool has no such candidate."""
        places = np.searchsorted(self.keys, keys, sorter=self.order).clip(max=len(self) - 1)
        found = self.order[places]
        return np.where(self.keys[found] == keys, found, -1)

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        place = int(self.places[i])  # raises IndexError beyond the end
        table = int(np.searchsorted(self.starts, place, side="right")) - 1
        row = self.tables[table][place - int(self.starts[table])]
        return make_item(self.root, row.get("txt"), row.get("img_path"), row.get("video_path"))

    def name(self, i):
        return did_text(int(self.keys[i]))

    def sample(self, keys, others, seed=0):
        """A smaller pool: the candidates with these keys, and up to so many others, drawn."""
        rows = set(self.find(sorted(keys)).tolist()) - {-1}
        rest = sorted(set(range(len(self))) - rows)
        rows |= set(random.Random(seed).sample(rest, min(len(rest), others)))
        return Pool(self.tables, self.root, self.places[sorted(rows)])


def write_text(path, text):
    """Write beside, then rename: a reader never sees half a file, nor does a kill leave one."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """As `write_text`; NaN and infinity are no JSON: a ValueError."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")
