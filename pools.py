"""What can be searched: a folder of images and texts, or the pools of an M-BEIR directory.

Both are sequences of items with `modality[i]` (its class), `name(i)`, and `facts()`, what a
fingerprint of their content is made of.
"""

import json
from pathlib import Path

import numpy as np

from data import MODALITIES, did_text, make_item, modality_class

IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class Folder:
    """The images and .txt files below a folder, each a candidate; hidden ones are left out.

    Raises ValueError if there are none. An empty text raises when it is read.
    """

    def __init__(self, root):
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(f"--pool {root}: no such folder")
        found = (path for path in self.root.rglob("*") if path.suffix.lower() in IMAGES | {".txt"})
        self.files = sorted(path for path in found if path.is_file()
                            and not any(part[0] == "." for part in path.relative_to(root).parts))
        if not self.files:
            raise ValueError(f"--pool {root} is empty: expected an M-BEIR directory, or images "
                             f"({' '.join(sorted(IMAGES))}) or .txt files")
        kinds = ["text" if path.suffix.lower() == ".txt" else "image" for path in self.files]
        self.modality = np.array([modality_class(kind) for kind in kinds])

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        path = self.files[i]
        if MODALITIES[self.modality[i]] == "image":
            return {"text": None, "image": str(path)}
        try:
            text = path.read_text(encoding="utf-8", errors="replace").strip()
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        if not text:
            raise ValueError(f"the text file {path} is empty")
        return {"text": text, "image": None}

    def name(self, i):
        return str(self.files[i].relative_to(self.root))

    def facts(self):
        return self.files


class Union:
    """Pools of an M-BEIR directory one after another, each candidate once, by its did.

    `keys[i]` is candidate i's did key, `rows(keys)` the way back.
    """

    def __init__(self, pools):
        self.pools = list(pools)
        keys = np.concatenate([np.asarray(pool.keys) for pool in self.pools])
        modality = np.concatenate([np.asarray(pool.modality) for pool in self.pools])
        self.starts = np.cumsum([0, *map(len, self.pools)])
        self._sorted, first = np.unique(keys, return_index=True)
        self.places = np.sort(first)  # row -> place among all pools' lines
        self.keys, self.modality = keys[self.places], modality[self.places]
        self._rows = np.searchsorted(self.places, first)  # place in the sorted keys -> row

    def __len__(self):
        return len(self.places)

    def rows(self, keys):
        """Did keys (n,), all of them in the union -> rows (n,)."""
        return self._rows[np.searchsorted(self._sorted, keys)]

    def __getitem__(self, row):
        place = self.places[row]  # raises IndexError beyond the end
        pool = np.searchsorted(self.starts, place, side="right") - 1
        return self.pools[pool][int(place - self.starts[pool])]

    def __iter__(self):
        """All items in order, from one pass through each file: item by item would open it anew."""
        wanted, place = iter(self.places.tolist()), 0
        row = next(wanted, None)
        for pool in self.pools:
            with open(pool.path, encoding="utf-8") as file:
                for line in filter(str.strip, file):
                    if place == row:
                        fields = json.loads(line)
                        yield make_item(pool.root, fields.get("txt"), fields.get("img_path"))
                        row = next(wanted, None)
                    place += 1

    def name(self, row):
        return did_text(int(self.keys[row]))

    def facts(self):
        return self
