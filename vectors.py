"""Embeddings in files: written in chunks, continued after a kill, found again by their content.

    cache = Cache(model, "runs/puma-1/model")
    vectors = cache.embed(pool, "pool of the test split")             # (N, D) float16, a memory map

The first call embeds the pool into `runs/puma-1/model/cache/<key>.npy`, noting each finished chunk
in a file beside it; the next one only opens the file. The key is a hash over all that the
embeddings depend on: the model's files, the code that embeds, and every item with the time of its
image's last change. Change one, and they are computed again. Under torchrun, each of W processes
(of one machine: they write into one file) embeds every W-th chunk.
Shapes: N items, D width.
"""

import hashlib
import json
import os
import shutil
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import distributed
from items import as_item, load_image
from report import write_json


def embed_to_file(path, items, encode, width, about=None, skip_bad=False, chunk_size=1_024):
    """Embed items into a (N, D) float16 .npy memory map; continue what a killed run began.

    items: a sequence, item by item when needed; encode(list of items) -> (n, `width`) float32.
    about: a dictionary for the .json file beside it. skip_bad: an item that cannot be read gets a
    row of NaN instead of ending the run. Raises ValueError for an empty pool, an embedding that is
    not finite, a file of another shape, and a disk with too little space.
    """
    path, shape = Path(path), (len(items), width)
    if not len(items):
        raise ValueError("cannot embed: the pool is empty")
    chunks = -(-len(items) // chunk_size)
    if distributed.rank() == 0 and not all(file.exists() for file in _files(path)):
        _create(path, shape, chunks, about or {})
    distributed.barrier()
    vectors = _open(path, shape)
    done = np.memmap(_files(path)[1], dtype=np.uint8, mode="r+")
    if len(done) != chunks:
        raise ValueError(f"{path} was written in {len(done)} chunks, expected {chunks}: delete it")
    own = range(distributed.rank(), chunks, distributed.world_size())
    todo = [number for number in own if not done[number]]
    sizes = {number: min(chunk_size, len(items) - number * chunk_size) for number in own}
    bar = tqdm(total=sum(sizes.values()), initial=sum(sizes[i] for i in set(own) - set(todo)),
               desc="encode", unit="item", disable=not todo or distributed.rank(), leave=False)
    for number in todo:
        rows = range(number * chunk_size, number * chunk_size + sizes[number])
        part = _encode(items, rows, encode, skip_bad)
        vectors[rows.start : rows.stop] = part.half().numpy()
        vectors.flush()  # first the vectors, then the note that they are there
        done[number] = 1
        done.flush()
        bar.update(len(rows))
    bar.close()
    distributed.barrier()
    return torch.from_numpy(vectors)


def _files(path):
    """The vectors; one byte a chunk, 1 if it is done; what it is, for people."""
    return path, path.with_suffix(".progress"), path.with_suffix(".json")


def _create(path, shape, chunks, about):
    """An empty file of vectors, in place only when whole."""
    size, free = 2 * shape[0] * shape[1], shutil.disk_usage(path.parent).free
    if size > free:  # else the memory map would end the process with SIGBUS
        raise ValueError(f"{path} needs {size / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
    vectors, progress, description = _files(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
    progress.write_bytes(bytes(chunks))
    write_json(description, about | {"shape": shape})
    os.replace(temporary, vectors)


def _open(path, shape):
    try:
        vectors = np.lib.format.open_memmap(path, mode="r+")
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"cannot read the embeddings {path}: {error}; delete it") from error
    if vectors.shape != shape or vectors.dtype != np.float16:
        raise ValueError(f"{path} holds {vectors.dtype} vectors of shape {vectors.shape}, the model"
                         f" and the pool make {shape}: delete it")
    return vectors


def _encode(items, rows, encode, skip_bad):
    """Embeddings of some rows; with `skip_bad`, NaN for those that cannot be read."""
    good = list(rows)
    if skip_bad:
        try:
            return _encode(items, rows, encode, skip_bad=False)
        except ValueError:
            good = [i for i in rows if problem(items, i) is None]
    part = encode([items[i] for i in good]) if good else torch.empty(0, 0)
    for i, finite in zip(good, part.isfinite().all(-1).tolist()):
        if not finite:
            raise ValueError(f"the model's embedding of item {i} is NaN or infinite: {items[i]}")
    if len(good) == len(rows):
        return part
    out = torch.full((len(rows), part.shape[1] or 1), torch.nan)
    out[[i - rows.start for i in good]] = part
    return out


def problem(items, i):
    """Why item i cannot be embedded, in words; None if it can."""
    try:
        item = as_item(items[i])
        if item.get("image"):
            load_image(item["image"])
    except ValueError as error:
        return str(error)



def fingerprint(*parts):
    """A key of 16 hex digits: equal if all parts are, another if one changes.

    A part is a string, a Path (a file: its name, inode, size, times of the last changes), an item
    (its text, instruction and image file), or an iterable of these.
    """
    digest = hashlib.sha256()
    _feed(digest, parts)
    return digest.hexdigest()[:16]


def _feed(digest, part):
    if isinstance(part, str | None):
        digest.update(repr(part).encode())
    elif isinstance(part, Path):
        try:
            status = part.stat()
            facts = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        except OSError:  # it will be named when it is read
            facts = None
        digest.update(f"{part.name} {facts}\n".encode())  # the same by whatever path it is given
    elif isinstance(part, dict):
        for key in ("text", "instruction"):
            digest.update(f"{part.get(key)!r}\n".encode())
        _feed(digest, Path(part["image"]) if part.get("image") else None)
    else:
        digest.update(b"[")
        for one in part:
            _feed(digest, one)
        digest.update(b"]")


class Cache:
    """The folder of a model's embedding files: `cache` in the model's own folder.

    A hub id, or a model folder that cannot be written, has `results/<name>/cache`; where that
    cannot be written either, nothing is kept. `name` is the folder or hub id of the PUMA `model`.
    """

    def __init__(self, model, name):
        self.model, self.name = model, str(name)
        home = Path(name)
        if not home.is_dir():
            from transformers.utils import cached_file

            home = Path(cached_file(name, "config.json")).parent
        code = [Path(__file__).with_name(file) for file in ("puma.py", "items.py")]
        files = sorted(path for path in home.iterdir() if path.is_file())
        depth = model.backbone.config.get_text_config().num_hidden_layers
        settings = (f"{depth} {model.max_text_tokens} {dict(model.image_processor.size)} "
                    f"{next(model.parameters()).dtype}")
        self.identity = fingerprint(files, [path.read_text() for path in code], settings)
        fallback = Path("results") / "-".join(Path(name).parts[-2:])
        self.places = [home / "cache"] * (home == Path(name)) + [fallback / "cache"]

    @cached_property
    def folder(self):
        """The first place that can be written, made when first needed; None if there is none."""
        return next(filter(_writable, self.places), None)

    def embed(self, items, what, batch_size=64, skip_bad=False):
        """Embeddings (N, D) of a sequence of items, from the file or computed into it.

        `what` names them: a new file replaces one of the same name. `skip_bad`: as in
        `embed_to_file`. Raises ValueError on bad items.
        """
        def encode(part):
            return self.model.encode(part, batch_size, show_progress=False)

        key = fingerprint(self.identity, items.facts() if hasattr(items, "facts") else items)
        if self.folder is None:
            return _encode(items, range(len(items)), encode, skip_bad)
        path, width = self.folder / f"{key}.npy", self.model.ret_embedding.numel()
        vectors = embed_to_file(path, items, encode, width, {"what": what}, skip_bad)
        for old in self.folder.glob("*.json") if distributed.rank() == 0 else ():
            if old.stem != key and json.loads(old.read_text()).get("what") == what:
                for file in _files(old.with_suffix(".npy")):
                    file.unlink(missing_ok=True)
        if not skip_bad and (bad := vectors[:, 0].isnan()).any():  # left out by an earlier run
            raise ValueError(problem(items, int(bad.nonzero()[0])))
        return vectors


def _writable(folder):
    """Make a folder that git ignores; False if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".gitignore").write_text("*\n")
        return True
    except OSError:
        return False
