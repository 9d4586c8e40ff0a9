"""JSON lines as sequences that stay on disk, what M-BEIR has in them; safe writing; errors.

    table = Table("pool.jsonl", lambda row: (len(row["txt"]),), "q", "a candidate")
    len(table), table[5_000_000], table.columns[0]

In memory stay the byte offset of each line and the integers that `columns` makes of it: M-BEIR's
pool of 5.6 million candidates takes 120 MB so, and some 10 GB as dictionaries.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import traceback
from array import array
from pathlib import Path
from typing import get_args

import numpy as np

from support.items import MODALITIES, Item, check_text, regular

TASKS = {  # M-BEIR's task id -> (query modality, candidate modality); it has no data for 5
    0: ("text", "image"), 1: ("text", "text"), 2: ("text", "image,text"), 3: ("image", "text"),
    4: ("image", "image"), 5: ("image", "image,text"), 6: ("image,text", "text"),
    7: ("image,text", "image"), 8: ("image,text", "image,text"),
    9: ("text", "video"), 10: ("video", "text")}  # ours
CANDIDATE = ("txt", "img_path", "video_path")  # of these a row has content; M-BEIR has no video
# What parsing a line may raise; RecursionError: JSON nested a thousand deep.
BAD_LINE = (AttributeError, KeyError, TypeError, ValueError, RecursionError)
CLASSES = {name: i for i, name in enumerate(MODALITIES)} | {"text,image": 2, "text,video": 4}
MANY = 1_000_000  # no number on a command line may be larger, unless it says so
DID = re.compile(r"([0-9]{1,6}):([0-9]{1,12})")


def refuse(path, number, text):
    """What is wrong with a line (0: the file as a whole) becomes a ValueError "file:line: text"."""
    raise ValueError(f"{path}:{number}: {text}" if number else f"{path}: {text}")


def parse_lines(path, parse, expected, on_error=refuse, header=0):
    """Yield (line number, byte offset, parse(line)) of lines that are not blank, after `header`.

    Where `parse` fails, on_error(path, line number, "expected ...") is called; if that does not
    raise, the line is left out."""
    end = 0
    with open(regular(path), "rb") as file:
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

    def place(self, index):
        return f"{self.path}:{self.numbers[index]}"


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
    """-> modality class. ValueError unless there is a text, an image or a video (or a text with one
    of these) whose path stays inside the root."""
    path = (image, video) if image and video else image or video
    if not (text or path) or not all(isinstance(v, str | None) for v in (text, image, video, path)):
        raise ValueError(f"expected a text or an image path or both, got {text!r} and {path!r}")
    check_text(text, "text")
    check_text(path, "image path")
    if path and (path.startswith("/") or ".." in path.split("/")):
        raise ValueError(f"expected an image path inside the data directory, got {path!r}")
    return 0 if not path else (4 if text else 3) if video else 2 if text else 1


def make_item(root, text, image, video=None, place=None):
    """{"text", "image", if any "video"}, whole paths, which knows its place, a file and line.
    ValueError if a link leads out of `root`."""
    path = image or video
    if path and not Path(os.path.realpath(root / path)).is_relative_to(os.path.realpath(root)):
        raise ValueError(f"expected an image inside the data directory, {root / path} leads out")
    item = Item(text=text or None, image=str(root / image) if image else None)
    item |= {"video": str(root / video)} if video else {}
    item.place = place
    return item


class Pool:
    """The candidates of one or several tables, one after another, each did once, as items.

    A table's columns are did keys and modality classes; item i has `keys[i]` and `modality[i]`.
    `places`: only those of all the tables' lines.
    """

    def __init__(self, tables, root, places=None):
        self.tables, self.root, self.files = tables, root, [table.path for table in tables]
        keys, modality = map(np.concatenate, zip(*(table.columns[:2] for table in tables)))
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
        number = int(np.searchsorted(self.starts, place, side="right")) - 1
        table, line = self.tables[number], place - int(self.starts[number])
        return make_item(self.root, *map(table[line].get, CANDIDATE), table.place(line))

    def name(self, i):
        return did_text(int(self.keys[i]))

    def sample(self, keys, others, seed=0):
        """A smaller pool: the candidates with these keys, and up to so many others, drawn."""
        rows = set(self.find(sorted(keys)).tolist()) - {-1}
        rest = sorted(set(range(len(self))) - rows)
        rows |= set(random.Random(seed).sample(rest, min(len(rest), others)))
        return Pool(self.tables, self.root, self.places[sorted(rows)])


def read_json(path):
    """The JSON object in a file. ValueError, naming the file, if there is something else in it."""
    try:
        value = json.loads(regular(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        refuse(path, 0, f"expected a JSON object ({error})")
    if not isinstance(value, dict):
        refuse(path, 0, f"expected a JSON object, got {str(value)[:40]}")
    return value


def write_text(path, text):
    """Write beside, then rename: a reader never sees half a file, nor does a kill leave one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """As `write_text`; NaN and infinity are no JSON: a ValueError."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def new_folder(folder):
    """Yield a folder to write in, which gets the name `folder` when all is written: after an error
    or a kill there is none of that name. FileExistsError if there is one, before or at the end."""
    folder = Path(folder)
    for left in folder.parent.glob(f"{folder.name}.tmp-*"):  # of a kill, if that process is gone
        if Path("/proc/self").exists() and not Path("/proc", left.suffix[5:]).exists():
            shutil.rmtree(left, ignore_errors=True)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another folder")
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            temporary.rename(folder)
        except OSError:
            if folder.exists():
                raise FileExistsError(f"another process has made {folder} meanwhile") from None
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_option(option, value, kind, least=0, most=MANY):
    """ValueError, naming option and value, unless it is of this type and in `least`..`most`; a
    text's length counts. `kind` may be `int | None`; a float may be written as an integer."""
    kinds = get_args(kind) or (kind,)
    fits = type(value) in kinds or type(value) is int and float in kinds
    if value is None and fits:
        return
    size = len(value) if isinstance(value, str) else value
    if not fits or not least <= size <= most:
        what = "a text, not empty" if str in kinds else f"in {least:,}..{most:,}"
        raise ValueError(f"{option} must be {what}, got {value!r:.80}")


def printable(text):
    """Text for a terminal or a picture: control characters and the like as their escapes."""
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)


def warn(path, number, text):
    """Say what is odd in a file, but no reason to stop; the arguments as in `refuse`."""
    place = f"{path}:{number}" if number else path
    print(printable(f"warning: {place}: {text}"), file=sys.stderr, flush=True)


@contextlib.contextmanager
def clear_errors():
    """Around a script's main: what goes wrong is one line on stderr, and the exit status 2, for
    Ctrl-C and SIGTERM 130. Other errors are ours: they keep their traceback."""
    for stream in (sys.stdout, sys.stderr):  # a console that is not UTF-8 shows escapes
        with contextlib.suppress(AttributeError):  # a notebook's has no encoding
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up as Ctrl-C does
    try:
        yield
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, RuntimeError) and "memory" not in text:
            raise
        print(printable(f"error: {text}"), file=sys.stderr)
        _end(error, 2)
    except KeyboardInterrupt as stop:
        print(f"stopped{stop}", file=sys.stderr)
        _end(stop, 130)


def _end(error, status):
    # Its traceback holds local variables, a loader of batches, say, whose processes would live on.
    traceback.clear_frames(error.__traceback__)
    sys.exit(status)
