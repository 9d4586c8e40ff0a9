"""GlyphBEIR: a multimodal retrieval benchmark that ships with Python.

Every Unicode character has an official English name (`unicodedata`, standard library), and the
DejaVu fonts in matplotlib's wheel have twelve faces that draw 3,189 letters, marks and symbols. A
rendering is an image, its name is a caption, and names compose as captions do: LATIN SMALL LETTER E
WITH ACUTE minus ACUTE, in CAPITAL, and so on. That is enough for all eight M-BEIR task types, with
no download:

    python toy/glyph_beir.py --out data/glyph_beir      # about 6 s on two cores

writes a directory in M-BEIR's exact format (TIGER-Lab/M-BEIR), which data.py reads like the real
one. One training example, as a student would say it:

    query      image of `e` + "make it capital"              (task 7: image+text -> image)
    positive   any of the nine training renderings of `E`
    hard negatives  renderings of `é`, `ë`: right letter, wrong mark

What is held out of training (and of toy/pretrain.py, which reads the training files only):

* faces       test queries are drawn in Serif-Italic, test targets in Sans-BoldOblique;
* relations   15 % of the (source, target) pairs of the edit tasks 1, 6, 7, 8, both directions;
* characters  a tenth of them (split `zero`), whose names are made of words that other names use.

Not in the paper: it trains and tests on M-BEIR.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import textwrap
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.files import check_option, clear_errors, new_folder  # noqa: E402
from support.pairs import write_m_beir  # noqa: E402

DATASET, DATASET_ID = "glyph", 10  # M-BEIR's own datasets have the ids 0 to 9
IMAGE_SIZE, FONT_SIZE, BASELINE = 56, 34, 41  # pixels; 56 = 2 x 28, so Qwen2-VL sees 2 x 2 tokens

TRAIN_FACES = [
    "Sans", "Sans-Bold", "Sans-Oblique", "Serif", "Serif-Bold", "Serif-BoldItalic",
    "SansMono", "SansMono-Bold", "SansMono-BoldOblique",
]
TARGET_FACE = "Sans-BoldOblique"  # every character has it
TEST_QUERY_FACES = ["Serif-Italic", "SansMono-Oblique"]  # the first that draws the character
VAL_QUERY_FACES = ["SansMono-Oblique", "Serif-Italic"]

# task id -> (query modality, candidate modality), as in M-BEIR
TASKS = {
    0: ("text", "image"),
    1: ("text", "text"),
    2: ("text", "image,text"),
    3: ("image", "text"),
    4: ("image", "image"),
    6: ("image,text", "text"),
    7: ("image,text", "image"),
    8: ("image,text", "image,text"),
}
EDIT_TASKS = (1, 6, 7, 8)  # the query names a relation, the target is the other character
INSTRUCTIONS = {
    0: ["Find a picture of this character", "Show an image of the named character",
        "Which image draws this character"],
    1: ["Find the name of the character described", "Name the character meant",
        "Which character name fits the description"],
    2: ["Find the card of this character", "Find the picture with facts about this character",
        "Which card belongs to the named character"],
    3: ["Find the name of this character", "Name the character in the picture",
        "Which name belongs to the image"],
    4: ["Find the same character in another typeface", "Show another image of this character",
        "Which image draws the same character"],
    6: ["Answer with the name of a character", "Find the name that answers the question",
        "Which character name is the answer"],
    7: ["Find a picture of the changed character", "Show an image after the edit",
        "Which image draws the edited character"],
    8: ["Find the card of the changed character", "Find the picture with facts after the edit",
        "Which card belongs to the edited character"],
}

# Words that swap: names that differ in exactly this word are related, in both directions.
SWAPS = """small/capital black/white leftwards/rightwards upwards/downwards leftwards/upwards
left/right up/down left/up light/heavy single/double psili/dasia horizontal/vertical greater/less
above/below superscript/subscript""".split()
# Words that one name has and its partner lacks: "latin small letter turned a" and "... letter a".
EXTRAS = "turned reversed inverted sideways double".split()
CATEGORIES = {
    "Lu": "uppercase letter", "Ll": "lowercase letter", "Lt": "titlecase letter",
    "Lm": "modifier letter", "Lo": "letter", "Nd": "digit", "Nl": "letter number",
    "No": "number", "Sm": "math symbol", "Sc": "currency sign", "Sk": "modifier symbol",
    "So": "symbol", "Pd": "dash", "Ps": "opening mark", "Pe": "closing mark",
    "Pi": "opening quote", "Pf": "closing quote", "Pc": "connector", "Po": "punctuation",
}
SCRIPTS = (
    "latin greek coptic cyrillic armenian georgian hebrew arabic braille nko lao ogham tifinagh"
)


@dataclass(frozen=True)
class Relation:
    """`source` becomes `target` by "`verb` `word`": ("é", "É", "make", "capital")."""

    source: str
    target: str
    verb: str  # make | add | remove
    word: str

    @property
    def pair(self):
        """The unordered pair: holding out e -> E must hold out E -> e, or the answer leaks."""
        return frozenset((self.source, self.target))

    def query_text(self, task, names):
        """The text of an edit query: a description (1), a question (6), an order (7, 8)."""
        word = self.word
        if task == 1:
            name = names[self.source]
            return {
                "make": f"the {word} form of {name}",
                "add": f"{name} plus {word}",
                "remove": f"{name} minus {word}",
            }[self.verb]
        if task == 6:
            return {
                "make": f"what is its {word} form?",
                "add": f"what is it with {word} added?",
                "remove": f"what is it with {word} removed?",
            }[self.verb]
        return f"make it {word}" if self.verb == "make" else f"{self.verb} {word}"


def font_path(face):
    return Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVu{face}.ttf")


def words(name):
    """The words of a name; each digit counts as one ("dots-138" -> dots, 1, 3, 8)."""
    return re.findall(r"[a-z]+|\d", name)


def load_characters(faces):
    """{character: name} of all letters, numbers, punctuation and symbols that >= 8 faces draw.

    `faces` maps a face to the set of code points that it covers. Returned in code point order.
    """
    coverage = Counter(code for codes in faces.values() for code in codes)
    names = {}
    for code in sorted(code for code, count in coverage.items() if count >= 8):
        char = chr(code)
        if unicodedata.category(char)[0] in "LNPS" and unicodedata.name(char, ""):
            names[char] = unicodedata.name(char).lower()
    return names


def find_relations(names):
    """All relations that the names imply, both directions, sorted, one per (source, target)."""
    chars = {name: char for char, name in names.items()}
    found = {}

    def relate(name, partner, there, back):
        if partner in chars and partner != name:
            a, b = chars[name], chars[partner]
            found.setdefault((a, b), Relation(a, b, *there))
            found.setdefault((b, a), Relation(b, a, *back))

    for name in names.values():
        parts = name.split()
        for first, second in (swap.split("/") for swap in SWAPS):
            if first in parts:
                swap = {first: second, second: first}
                partner = " ".join(swap.get(part, part) for part in parts)
                relate(name, partner, ("make", second), ("make", first))
        for extra in EXTRAS:
            if extra in parts:
                partner = " ".join(part for part in parts if part != extra)
                relate(name, partner, ("remove", extra), ("add", extra))
        base, _, marks = name.partition(" with ")
        marks = marks.split(" and ") if marks else []
        for mark in marks:
            rest = [other for other in marks if other != mark]
            partner = base + (" with " + " and ".join(rest) if rest else "")
            relate(name, partner, ("remove", mark), ("add", mark))
        if name.startswith("braille pattern dots-"):
            for digit in name.rpartition("-")[2]:
                partner = name.replace(digit, "")
                relate(name, partner, ("remove", f"dot {digit}"), ("add", f"dot {digit}"))
        if name.startswith("modifier letter "):
            partner = name.replace("modifier letter small", "latin small letter")
            partner = partner.replace("modifier letter capital", "latin capital letter")
            relate(name, partner, ("make", "plain letter"), ("make", "modifier letter"))
    # "add macron" to u with diaeresis has two answers; such orders, a handful, test nothing.
    answers = Counter((r.source, r.verb, r.word) for r in found.values())
    unclear = {r.pair for r in found.values() if answers[r.source, r.verb, r.word] > 1}
    return [found[key] for key in sorted(found) if found[key].pair not in unclear]


class World:
    """Characters, relations and their splits: everything that the files are written from.

    `zero` is the set of held-out characters; `relation_split` maps each Relation to `train`, `val`,
    `test` or, when it touches a held-out character, `zero`. The same seed gives the same world.
    """

    def __init__(self, seed=0):
        rng = random.Random(seed)
        all_faces = [*TRAIN_FACES, TARGET_FACE, *TEST_QUERY_FACES]
        self.faces = {face: set(FT2Font(str(font_path(face))).get_charmap()) for face in all_faces}
        self.names = load_characters(self.faces)

        # A character may be held out only while each of its words stays in two training names.
        left = Counter(word for name in self.names.values() for word in set(words(name)))
        self.zero = set()
        for char in rng.sample(list(self.names), len(self.names)):
            own = set(words(self.names[char]))
            if len(self.zero) < len(self.names) // 10 and all(left[word] >= 3 for word in own):
                left.subtract(own)
                self.zero.add(char)
        self.seen = [char for char in self.names if char not in self.zero]

        self.relations = find_relations(self.names)
        pairs = sorted({tuple(sorted(r.pair)) for r in self.relations if not r.pair & self.zero})
        rng.shuffle(pairs)
        test, val = int(0.15 * len(pairs)), int(0.20 * len(pairs))
        split = {frozenset(p): "test" if i < test else "val" if i < val else "train"
                 for i, p in enumerate(pairs)}
        self.relation_split = {r: split.get(r.pair, "zero") for r in self.relations}
        self.edits = defaultdict(list)  # source -> its relations
        for relation in self.relations:
            self.edits[relation.source].append(relation)

    def drawable(self, char, faces):
        """Those of `faces` that draw `char`, in order."""
        return [face for face in faces if ord(char) in self.faces[face]]

    def card_text(self, char):
        """Facts, without the name. The case partner is left out where it would tell an answer."""
        name = self.names[char]
        script = name.split()[0] if name.split()[0] in SCRIPTS.split() else "common"
        facts = [script, CATEGORIES[unicodedata.category(char)], f"code point {ord(char):04x}"]
        for edit in self.edits[char]:
            if edit.word in ("capital", "small") and self.relation_split[edit] == "train":
                facts.append(f"{edit.word} form {self.names[edit.target]}")
        return ", ".join(facts)


def render(char, face, fonts={}):  # noqa: B006  the default is a cache of opened fonts, per process
    """One character, black on white, an `L` image of 56 x 56 pixels.

    Size and baseline are the same for all, so that `o`, `O` and superscript `ᵒ` stay different;
    only a glyph that would leave the canvas is drawn smaller.
    """
    size = FONT_SIZE
    while True:
        font = fonts.setdefault((face, size), None) or ImageFont.truetype(font_path(face), size)
        fonts[face, size] = font
        left, top, right, bottom = font.getbbox(char, anchor="ls")
        if right - left <= IMAGE_SIZE and BASELINE + top >= 0 and BASELINE + bottom <= IMAGE_SIZE:
            break
        size -= 2
    image = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), 255)
    x = (IMAGE_SIZE - (right - left)) // 2 - left
    ImageDraw.Draw(image).text((x, BASELINE), char, fill=0, font=font, anchor="ls")
    return image


def image_path(char, face):
    return f"mbeir_images/{DATASET}/{face}/{ord(char):05x}.png"


def ignore_interrupts():
    """Ctrl-C reaches the workers, too: only the first process speaks, and it ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def write_images(job):
    """Render the characters of one face; a job of the worker pool.

    A folder belongs to one worker: two that create files in it would wait for each other.
    """
    root, face, chars = job
    parent = multiprocessing.parent_process()
    for char in chars:
        if parent and not parent.is_alive():
            return  # killed: what it has written is removed by the next call
        render(char, face).save(Path(root, image_path(char, face)), compress_level=1)


class Pool:
    """The candidates of training or of evaluation, and who depicts what.

    `dids[modality][char]` lists the dids of a character in that modality: its positives.
    """

    def __init__(self, world, chars, faces, first_did):
        self.rows = []
        self.dids = {m: defaultdict(list) for m in ("text", "image", "image,text")}
        next_did = first_did
        for char in chars:
            card = world.card_text(char)
            drawn = world.drawable(char, faces)
            entries = [("text", world.names[char], None)]
            entries += [("image", None, face) for face in drawn]
            entries += [("image,text", card, face) for face in drawn[:3]]
            for modality, text, face in entries:
                did = f"{DATASET_ID}:{next_did}"
                next_did += 1
                self.dids[modality][char].append(did)
                path = image_path(char, face) if face else None
                self.rows.append({"txt": text, "img_path": path, "modality": modality,
                                  "did": did, "src_content": None})


def make_queries(world, pool, split, task, count, query_faces, rng):
    """Up to `count` query rows of one task and split.

    `count` None: one for each character or relation.
    """
    if task in EDIT_TASKS:
        sources = [r for r in world.relations if world.relation_split[r] == split]
    else:
        sources = sorted(world.zero) if split == "zero" else world.seen
    sources = rng.sample(sources, len(sources))[:count]
    query_modality, target_modality = TASKS[task]
    rows = []
    for source in sources:
        relation = source if task in EDIT_TASKS else None
        shown, wanted = (relation.source, relation.target) if relation else (source, source)
        text = relation.query_text(task, world.names) if relation else world.names[shown]
        image = None
        if "image" in query_modality:
            faces = world.drawable(shown, query_faces)
            image = image_path(shown, rng.choice(faces) if split == "train" else faces[0])
        dids = pool.dids[target_modality]
        near = [shown, *(edit.target for edit in world.edits[wanted])]
        near = [char for char in dict.fromkeys(near) if char != wanted]
        rows.append({
            "qid": None,  # numbered when all queries of the file are known
            "query_txt": text if "text" in query_modality else None,
            "query_img_path": image,
            "query_modality": query_modality,
            "query_src_content": None,
            "pos_cand_list": dids[wanted],
            "neg_cand_list": [dids[c][0] for c in near if dids[c]][:4],
            "task_id": task,
        })
    return rows


def make_splits(world, train_pool, pool, seed):
    """Rows of all queries: training, {split: rows}. Query ids run on over all of them."""
    numbers = iter(range(1, 1_000_000))

    def numbered(rows):
        return [{**row, "qid": f"{DATASET_ID}:{next(numbers)}"} for row in rows]

    # Repeats draw another face; their instruction and positive are drawn anew by the reader.
    repeats = {0: 2, 1: 1, 2: 2, 3: 2, 4: 2, 6: 1, 7: 2, 8: 1}
    rng = random.Random(seed)
    train = [
        row
        for task, times in repeats.items()
        for _ in range(times)
        for row in make_queries(world, train_pool, "train", task, None, TRAIN_FACES, rng)
    ]
    rng.shuffle(train)
    train = numbered(train)
    splits = {"val": (200, VAL_QUERY_FACES), "test": (500, TEST_QUERY_FACES),
              "zero": (500, TEST_QUERY_FACES)}
    return train, {
        split: [row for task in TASKS
                for row in numbered(make_queries(world, pool, split, task, count, faces, rng))]
        for split, (count, faces) in splits.items()
    }


def draw_samples(root, world, path):
    """samples.png: for each task one test query beside its target, read back from the files."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    pool_file = root / "cand_pool/global/mbeir_union_test_cand_pool.jsonl"
    pool = {row["did"]: row for row in map(json.loads, pool_file.open(encoding="utf-8"))}
    figure, axes = plt.subplots(4, 4, figsize=(13, 8), width_ratios=[1, 1, 1, 1])
    for index, task in enumerate(TASKS):
        queries = root / f"query/test/mbeir_{DATASET}_task{task}_test.jsonl"
        row = json.loads(queries.open(encoding="utf-8").readline())
        target = pool[row["pos_cand_list"][0]]
        sides = [("query", row["query_img_path"], row["query_txt"]),
                 ("target", target["img_path"], target["txt"])]
        for side, (role, image, text) in enumerate(sides):
            axis = axes[index // 2][index % 2 * 2 + side]
            axis.axis("off")
            if image:
                axis.imshow(Image.open(root / image), cmap="gray", vmin=0, vmax=255)
            lines = textwrap.wrap(text or "", 30)
            if image:
                axis.set_title("\n".join(lines), fontsize=9, y=-0.28)
            else:
                axis.text(0.5, 0.5, "\n".join(lines), ha="center", va="center", fontsize=11,
                          transform=axis.transAxes)
            kind = TASKS[task][side].replace(",", " + ")
            axis.text(0.5, 1.04, f"task {task}, {role}: {kind}", ha="center", fontsize=9,
                      color="tab:blue" if role == "query" else "tab:green",
                      transform=axis.transAxes)
    figure.suptitle("GlyphBEIR: one test query of each task, and its target")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def build(out, seed=0, processes=None):
    """Write the benchmark to folder `out`, which must not exist; a killed run leaves no `out`.

    Returns a one-line summary. Raises FileExistsError.
    """
    out = Path(out)
    with new_folder(out) as root:
        world = World(seed)
        train_pool = Pool(world, world.seen, TRAIN_FACES, first_did=1)
        pool = Pool(world, world.names, [TARGET_FACE], first_did=len(train_pool.rows) + 1)
        wanted = {face: world.seen for face in TRAIN_FACES}
        wanted |= {face: list(world.names) for face in [TARGET_FACE, *TEST_QUERY_FACES]}
        jobs = [
            (str(root), face, [char for char in chars if world.drawable(char, [face])])
            for face, chars in wanted.items()
        ]
        for face in wanted:  # not by the workers: after a kill, one would make the folder anew
            Path(root, f"mbeir_images/{DATASET}/{face}").mkdir(parents=True)
        context = multiprocessing.get_context("spawn")
        with context.Pool(processes or os.cpu_count(), ignore_interrupts) as workers:
            images = workers.map_async(write_images, jobs, chunksize=1)
            train, splits = make_splits(world, train_pool, pool, seed)
            prompts = {TASKS[task]: texts for task, texts in INSTRUCTIONS.items()}
            pools = {"train": train_pool.rows, "val": pool.rows, "test": pool.rows}
            write_m_beir(root, DATASET, DATASET_ID, prompts, train, splits, pools)
            (root / "query/train").mkdir()  # M-BEIR has each dataset's own file besides the union
            union = (root / "query/union_train/mbeir_union_up_train.jsonl").read_bytes()
            (root / f"query/train/mbeir_{DATASET}_train.jsonl").write_bytes(union)
            images.get()
        draw_samples(root, world, root / "samples.png")
    return (
        f"{out}: {len(world.names):,} characters ({len(world.zero)} zero-shot), "
        f"{len(world.relations):,} relations, {len(train):,} training queries, "
        f"{len(train_pool.rows):,} training and {len(pool.rows):,} test candidates"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="data/glyph_beir", help="folder to write; must not exist")
    parser.add_argument("--seed", type=int, default=0, help="splits and query order follow from it")
    args = parser.parse_args()
    with clear_errors():
        check_option("--seed", args.seed, int, 0, 2**31)
        check_option("--out", args.out, str, 1)
        print(build(args.out, args.seed))


if __name__ == "__main__":
    main()
