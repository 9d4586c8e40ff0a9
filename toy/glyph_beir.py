"""GlyphBEIR: a multimodal retrieval benchmark that ships with Python.

Every Unicode character has an official English name (`unicodedata`, standard library), and the
DejaVu fonts in matplotlib's wheel have twelve faces that draw 3,189 letters, marks and symbols. A
rendering is an image, its name is a caption, and names compose as captions do: LATIN SMALL LETTER E
WITH ACUTE minus ACUTE, in CAPITAL, and so on. That is enough for all eight M-BEIR task types, with
no download:

    python toy/glyph_beir.py --out data/glyph_beir      # 54 MB, 12 s of CPU time

writes a directory in M-BEIR's exact format (TIGER-Lab/M-BEIR), which data.py reads like the real
one. M-BEIR has no video: our tasks 9 (text -> video) and 10 (video -> text), a dataset of their own
("motion"), are clips of 20 of the characters, in a field `video_path` (`query_video_path`):

    query      "latin small letter a slides to the left"     (task 9: text -> video)
    positive   that clip; the same frames in reverse, which slide to the right, are in the pool too

One training example of the other tasks, as a student would say it:

    query      image of `e` + "make it capital"              (task 7: image+text -> image)
    positive   any of the nine training renderings of `E`
    hard negatives  renderings of `é`, `ë`: right letter, wrong mark

What is held out of training (and of toy/pretrain.py, which reads the training files only):

* faces       test queries are drawn in Serif-Italic, test targets in Sans-BoldOblique;
* relations   15 % of the (source, target) pairs of the edit tasks 1, 6, 7, 8, both directions;
* motions     15 % of the (character, motion and its reverse) pairs of tasks 9 and 10;
* characters  a tenth of them (split `zero`), whose names are made of words that other names use.

MAC-Loss takes negatives of another modality for the easy ones. M-BEIR, ten datasets of one or two
tasks each, makes them so: they are mostly of another dataset as well. Here one dataset has eight
tasks, and a negative of another modality may well be about the same character. Hence

    python toy/glyph_beir.py --domains --out data/domains
    python toy/glyph_beir.py --premise toy/tiny-qwen2-vl --keep-layers 4 --out data/domains

The first line writes the same characters as four datasets, each of one kind of script and of two
tasks; the second prints how easy which negatives are for a model: look there before believing a
result on MAC-Loss. Not in the paper: it trains and tests on M-BEIR.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import string
import sys
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageChops, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.files import CANDIDATE, check_option, clear_errors, make_item, new_folder  # noqa: E402
from support.files import TASKS as M_BEIR_TASKS  # noqa: E402
from support.pairs import write_m_beir  # noqa: E402

DATASET, DATASET_ID = "glyph", 10  # M-BEIR's own datasets have the ids 0 to 9
# With --domains: id -> name, tasks and what its characters are called in instructions.
DOMAINS = {12: ("latin", (6, 7), "Latin letters"),
           13: ("alphabets", (0, 3), "letters from Greek to Georgian"),
           14: ("symbols", (1, 2), "symbols, arrows and numerals"),
           15: ("scripts", (4, 8), "letters of other scripts")}
IMAGE_SIZE, FONT_SIZE, BASELINE = 56, 34, 41  # pixels; 56 = 2 x 28, so Qwen2-VL sees 2 x 2 tokens

TRAIN_FACES = [
    "Sans", "Sans-Bold", "Sans-Oblique", "Serif", "Serif-Bold", "Serif-BoldItalic",
    "SansMono", "SansMono-Bold", "SansMono-BoldOblique",
]
TARGET_FACE = "Sans-BoldOblique"  # every character has it
TEST_QUERY_FACES = ["Serif-Italic", "SansMono-Oblique"]  # the first that draws the character
VAL_QUERY_FACES = ["SansMono-Oblique", "Serif-Italic"]

# M-BEIR's numbers (support/files.py), those that a single character can ask in.
TASKS = {number: M_BEIR_TASKS[number] for number in (0, 1, 2, 3, 4, 6, 7, 8)}
EDIT_TASKS = (1, 6, 7, 8)  # the query names a relation, the target is the other character
CLIP_DATASET, CLIP_DATASET_ID = "motion", 11
# Few characters: only if clips of the same one meet in a batch, the loss asks how it moves.
# What is held out is drawn over more of them (seen, zero-shot): tiny-qwen2-vl saw those move.
CLIP_CHARACTERS, CAN_MOVE = {True: 6, False: 6, "zero": 8}, (123, 13)
CLIP_TASKS = {number: M_BEIR_TASKS[number] for number in (9, 10)}
# A motion and its reverse: the same frames in the other order. Blinking has none.
MOTIONS = {
    ("left", "right"): ("slides to the left", "slides to the right"),
    ("up", "down"): ("slides upwards", "slides downwards"),
    ("clockwise", "anticlockwise"): ("rotates clockwise", "rotates anticlockwise"),
    ("grow", "shrink"): ("grows", "shrinks"),
    ("appear", "vanish"): ("fades in", "fades out"),
    ("blink",): ("blinks",),
}
VERBS = {motion: verb for pair, verbs in MOTIONS.items() for motion, verb in zip(pair, verbs)}
REVERSE = {motion: other for pair in MOTIONS for motion, other in zip(pair, pair[::-1])}
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
    9: ["Find a clip of this motion", "Show the character moving like this",
        "Which clip shows what is described"],
    10: ["Describe what moves in this clip", "Find the description of the motion",
         "Which description fits the clip"],
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


def domain_of(char):
    """The dataset of a character in the world of four: by script, as the first word of its name."""
    script = unicodedata.name(char).split()[0].lower()
    if script in ("latin", "modifier"):  # most modifier letters are small raised Latin ones
        return 12
    if script in ("greek", "coptic", "cyrillic", "armenian", "georgian"):
        return 13
    return 15 if script in SCRIPTS.split() else 14


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
    `domains`: four datasets of two tasks each, as M-BEIR has them, and no clips.
    """

    def __init__(self, seed=0, domains=False):
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

        self.dataset = {char: domain_of(char) if domains else DATASET_ID for char in self.names}
        self.datasets = {number: name for number, (name, *_) in DOMAINS.items()}
        if not domains:
            self.datasets = {DATASET_ID: DATASET, CLIP_DATASET_ID: CLIP_DATASET}

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
        self._choose_motions(random.Random(f"{seed}-motion"))

    def _choose_motions(self, rng):
        """`moving` characters, `motion_split`: {(character, motion): split}.

        A motion and its reverse share the split, so that neither is more familiar than the other
        where the two must be told apart.
        """
        plain = set(string.ascii_letters + string.digits)  # first: everybody's example
        order = sorted(rng.sample(list(self.names), len(self.names)), key=lambda c: c not in plain)
        self.moving, looks = [], set()
        left = dict(zip((False, True), CAN_MOVE))
        for char in order:
            held_out = char in self.zero
            if left[held_out] and len(self.drawable(char, list(self.faces))) == len(self.faces):
                look = can_move(char)
                if look and look not in looks:  # A and Alpha look alike: one of them
                    looks.add(look)
                    left[held_out] -= 1
                    self.moving.append(char)
        pairs = [(char, pair) for char in self.moving for pair in MOTIONS]
        rng.shuffle(pairs)
        seen = [pair for pair in pairs if pair[0] not in self.zero]
        test, val = int(0.15 * len(seen)), int(0.20 * len(seen))
        self.motion_split = {(char, motion): "zero" for char, pair in pairs for motion in pair}
        for i, (char, pair) in enumerate(seen):
            split = "test" if i < test else "val" if i < val else "train"
            self.motion_split |= {(char, motion): split for motion in pair}
        groups = defaultdict(list)  # half of the seen ones have a motion for validation
        for char in self.moving:
            groups["zero" if char in self.zero else
                   "val" in (self.motion_split[char, motion] for motion in VERBS)].append(char)
        self.moving = [char for kind, count in CLIP_CHARACTERS.items()
                       for char in groups[kind][:count]]
        self.motion_split = {pair: split for pair, split in self.motion_split.items()
                             if pair[0] in self.moving}

    def has(self, task, char):
        """Is it a task of the dataset that this character belongs to?"""
        return self.dataset[char] == DATASET_ID or task in DOMAINS[self.dataset[char]][1]

    def prompts(self):
        """{(dataset id, query modality, candidate modality): instructions}"""
        kinds = {**TASKS, **CLIP_TASKS}
        if CLIP_DATASET_ID in self.datasets:
            return {(CLIP_DATASET_ID if task in CLIP_TASKS else DATASET_ID, *kinds[task]): texts
                    for task, texts in INSTRUCTIONS.items()}
        return {(number, *kinds[task]): [f"{text} among {called}" for text in INSTRUCTIONS[task]]
                for number, (_, tasks, called) in DOMAINS.items() for task in tasks}

    def description(self, char, motion):
        return f"{self.names[char]} {VERBS[motion]}"

    def drawable_chars(self, face, chars):
        return [char for char in chars if ord(char) in self.faces[face]]

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


def centred(image):
    """An `L` image whose ink stands in the middle."""
    box = ImageChops.invert(image).getbbox() or (0, 0, 1, 1)
    ink, image = image.crop(box), Image.new("L", image.size, 255)
    image.paste(ink, ((IMAGE_SIZE - ink.width) // 2, (IMAGE_SIZE - ink.height) // 2))
    return image


def can_move(char):
    """The look of a character, or None if its motion would be hard to see: it is too small or too
    large, or looks much the same after a quarter turn."""
    image = centred(render(char, TRAIN_FACES[0]))
    left, top, right, bottom = ImageChops.invert(image).getbbox() or (0, 0, 0, 0)
    turned = place(image, angle=math.pi / 2)
    ink, change = (sum(pixel * count for pixel, count in enumerate(picture.histogram()))
                   for picture in (ImageChops.invert(image), ImageChops.difference(image, turned)))
    sides = sorted((right - left, bottom - top))
    return image.tobytes() if sides[0] >= 8 and 14 <= sides[1] <= 44 and change > ink else None


def place(image, scale=1.0, angle=0.0, right=0.0, down=0.0):
    """An image made smaller, turned clockwise (radians) and moved (pixels), on white."""
    middle, cos, sin = IMAGE_SIZE / 2, math.cos(angle) / scale, math.sin(angle) / scale
    x, y = middle + right, middle + down  # where the middle goes; Pillow asks whence pixels come
    back = (cos, sin, middle - cos * x - sin * y, -sin, cos, middle + sin * x - cos * y)
    return image.transform(image.size, Image.Transform.AFFINE, back,
                           Image.Resampling.BILINEAR, fillcolor=255)


def draw_clip(char, face, motion):
    """The frames of a moving character. What is random about them follows from character, face
    and pair of motions, so the reverse motion has the same frames in reverse."""
    pair = next(pair for pair in MOTIONS if motion in pair)
    return animate(render(char, face), motion, random.Random(f"{char}-{face}-{pair[-1]}"))


def animate(image, motion, rng):
    """A still moves: 4, 6 or 8 frames, `L` images of 56 x 56 pixels with five greys.

    It comes to rest as it was: slid in, turned upright, grown or faded in; or, the same frames in
    reverse, it leaves from there. So the last or first pair of frames, which Qwen2-VL takes
    together, shows what moves, and the others how. (The two differ a little, as animation files
    drop equal frames.) `rng` draws the number of frames and the track.
    """
    pair = next(pair for pair in MOTIONS if motion in pair)
    count, aside, frames = rng.choice((4, 6, 8)), rng.uniform(-4, 4), []
    for i in range(count):
        t = 1 - (i / (count - 2) if i < count - 2 else (0.95, 1.0)[i - count])  # 1 to 0: at rest
        how, ink = {
            "left": ({"right": 20 * t, "down": aside * t}, 1.0),
            "up": ({"right": aside * t, "down": 20 * t}, 1.0),
            "clockwise": ({"angle": math.radians(-90 * t)}, 1.0),
            "grow": ({"scale": 1 - 0.7 * t}, 1.0),
            "appear": ({}, 1 - 0.85 * t),
            "blink": ({}, float(i % 2 == 0) if i < count - 2 else 1 - t),
        }[pair[0]]
        frame = place(image, **how)
        # Few greys compress well.
        frames.append(frame.point([255 - round(ink * 63.75 * round((255 - grey) / 63.75))
                                   for grey in range(256)]))
    return frames if motion == pair[0] else frames[::-1]


def clip_path(char, face, motion):
    return f"mbeir_images/{CLIP_DATASET}/{face}/{ord(char):05x}-{motion}.webp"


def do_job(job):
    """What a worker does: a function and its arguments. A folder belongs to one job: two that
    create files in it would wait for each other."""
    function, *arguments = job
    function(*arguments)


def parent_is_gone():
    """Was the process that started this worker killed? The next call removes what is written."""
    parent = multiprocessing.parent_process()
    return parent and not parent.is_alive()


def write_clips(root, face, clips):
    """Draw the clips of one face, (character, motion) pairs."""
    for char, motion in clips:
        if parent_is_gone():
            return
        first, *rest = draw_clip(char, face, motion)
        first.save(Path(root, clip_path(char, face, motion)), save_all=True, append_images=rest,
                   duration=150, loop=0, lossless=True, method=2, minimize_size=True)


def write_images(root, face, chars):
    """Render the characters of one face."""
    for char in chars:
        if parent_is_gone():
            return
        render(char, face).save(Path(root, image_path(char, face)))


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
                did = f"{world.dataset[char]}:{next_did}"
                next_did += 1
                self.dids[modality][char].append(did)
                path = image_path(char, face) if face else None
                self.rows.append({"txt": text, "img_path": path, "modality": modality,
                                  "did": did, "src_content": None})


def make_queries(world, pool, split, task, count, query_faces, rng, numbers):
    """Up to `count` query rows of one task and split, numbered by `numbers`.

    `count` None: one for each character or relation.
    """
    sources = sorted(world.zero) if split == "zero" else world.seen
    sources = [char for char in sources if world.has(task, char)]
    if task in EDIT_TASKS:
        sources = [r for r in world.relations if world.relation_split[r] == split
                   and world.has(task, r.source) and world.has(task, r.target)]
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
            "qid": f"{world.dataset[shown]}:{next(numbers)}",
            "query_txt": text if "text" in query_modality else None,
            "query_img_path": image,
            "query_modality": query_modality,
            "query_src_content": None,
            "pos_cand_list": dids[wanted],
            "neg_cand_list": [dids[c][0] for c in near if dids[c]][:4],
            "task_id": task,
        })
    return rows


class ClipPool:
    """As `Pool`, of descriptions and clips: `dids[modality][char, motion]`.

    `faces` maps each (character, motion) to the faces that it is drawn in.
    """

    def __init__(self, world, faces, first_did):
        self.rows, self.faces = [], faces
        self.dids = {modality: defaultdict(list) for modality in ("text", "video")}
        for char, motion in faces:
            entries = [("text", world.description(char, motion), None)]
            entries += [("video", None, face) for face in faces[char, motion]]
            for modality, text, face in entries:
                did = f"{CLIP_DATASET_ID}:{first_did + len(self.rows)}"
                self.dids[modality][char, motion].append(did)
                path = clip_path(char, face, motion) if face else None
                self.rows.append({"txt": text, "img_path": None, "modality": modality, "did": did,
                                  "src_content": None, "video_path": path})

    def queries(self, world, task, faces):
        """Rows of task 9, one for each (character, motion) of `faces`, or 10: for each face."""
        query_modality, target_modality = CLIP_TASKS[task]
        dids, rows = self.dids[target_modality], []
        for (char, motion), shown in faces.items():
            near = [(char, other) for other in [REVERSE[motion], *VERBS] if other != motion]
            near = [pair for pair in dict.fromkeys(near) if pair in dids]
            for face in shown if task == 10 else [None]:
                rows.append({
                    "qid": None,
                    "query_txt": None if face else world.description(char, motion),
                    "query_img_path": None,
                    "query_modality": query_modality,
                    "query_src_content": None,
                    "pos_cand_list": dids[char, motion],
                    "neg_cand_list": [dids[pair][0] for pair in near][:4],
                    "task_id": task,
                    "query_video_path": clip_path(char, face, motion) if face else None,
                })
        return rows


class Motion:
    """The dataset of tasks 9 and 10: `train` (queries), `queries[split]`; `train_pool` and `pool`;
    `clips[face]`, the (character, motion) pairs to draw in it."""

    def __init__(self, world, seed):
        rng, numbers = random.Random(f"{seed}-clips"), iter(range(1, 1_000_000))
        order = sorted(world.motion_split)
        trained = {pair: TRAIN_FACES for pair in order if world.motion_split[pair] == "train"}
        self.train_pool = ClipPool(world, trained, 1)
        self.pool = ClipPool(world, dict.fromkeys(order, [TARGET_FACE]),
                             len(self.train_pool.rows) + 1)

        def numbered(rows):
            return [{**row, "qid": f"{CLIP_DATASET_ID}:{next(numbers)}"} for row in rows]

        train = [self.train_pool.queries(world, task, trained) for task in CLIP_TASKS]
        train = rng.sample(rows := sum(train, []), len(rows))
        self.train, self.queries, used = numbered(train), {}, [trained, self.pool.faces]
        for split, shown in (("val", VAL_QUERY_FACES), ("test", TEST_QUERY_FACES),
                             ("zero", TEST_QUERY_FACES)):
            asked = {pair: shown[:1] for pair in order if world.motion_split[pair] == split}
            used.append(asked)
            self.queries[split] = numbered(
                [row for task in CLIP_TASKS for row in self.pool.queries(world, task, asked)])
        self.clips = defaultdict(list)
        for part in used:
            for pair, shown in part.items():
                for face in shown:
                    self.clips[face].append(pair)


def make_splits(world, train_pool, pool, seed):
    """Rows of all queries: training, {split: rows}. Query ids run on over all of them."""
    numbers, rng = iter(range(1, 1_000_000)), random.Random(seed)
    # Repeats draw another face; their instruction and positive are drawn anew by the reader.
    repeats = {0: 2, 1: 1, 2: 2, 3: 2, 4: 2, 6: 1, 7: 2, 8: 1}
    train = [
        row
        for task, times in repeats.items()
        for _ in range(times)
        for row in make_queries(world, train_pool, "train", task, None, TRAIN_FACES, rng, numbers)
    ]
    rng.shuffle(train)
    splits = {"val": (200, VAL_QUERY_FACES), "test": (500, TEST_QUERY_FACES),
              "zero": (500, TEST_QUERY_FACES)}
    return train, {
        split: [row for task in TASKS
                for row in make_queries(world, pool, split, task, count, faces, rng, numbers)]
        for split, (count, faces) in splits.items()
    }


def draw_samples(root, queries, path):
    """samples.png: for each task one test query beside its target, read back from the files."""
    from support.pictures import draw_gallery

    pool_file = root / "cand_pool/global/mbeir_union_test_cand_pool.jsonl"
    pool = {row["did"]: row for row in map(json.loads, pool_file.open(encoding="utf-8"))}
    tasks, first, shown = TASKS | CLIP_TASKS, {row["task_id"]: row for row in reversed(queries)}, []
    for task, row in sorted(first.items()):
        target, (asked, wanted) = pool[row["pos_cand_list"][0]], tasks[task]
        query = make_item(root, *(row.get(f"query_{field}") for field in CANDIDATE))
        target = make_item(root, *map(target.get, CANDIDATE))
        shown.append([(f"task {task}, query: {asked}", query, "query"),
                      (f"target: {wanted}", target, True)])
    # Two tasks in a row of the gallery.
    rows = [sum(shown[i : i + 2], []) for i in range(0, len(shown), 2)]
    draw_gallery(path, [(title, query, rest) for (title, query, _), *rest in rows], columns=3)


def build(out, seed=0, processes=None, domains=False):
    """Write the benchmark to folder `out`, which must not exist; a killed run leaves no `out`.

    `domains`: four datasets of still pictures. Returns a one-line summary. Raises FileExistsError.
    """
    out = Path(out)
    with new_folder(out) as root:
        world = World(seed, domains)
        train_pool = Pool(world, world.seen, TRAIN_FACES, first_did=1)
        pool = Pool(world, world.names, [TARGET_FACE], first_did=len(train_pool.rows) + 1)
        wanted = {face: world.seen for face in TRAIN_FACES}
        wanted |= {face: list(world.names) for face in [TARGET_FACE, *TEST_QUERY_FACES]}
        jobs = [(write_images, str(root), face, world.drawable_chars(face, chars))
                for face, chars in wanted.items()]
        motion = None if domains else Motion(world, seed)
        if motion:
            jobs += [(write_clips, str(root), *job) for job in motion.clips.items()]
        # Folders are not made by the workers: after a kill, one would make it anew.
        for name, faces in ((DATASET, wanted), (CLIP_DATASET, motion.clips if motion else ())):
            for face in faces:
                Path(root, f"mbeir_images/{name}/{face}").mkdir(parents=True)
        context = multiprocessing.get_context("spawn")
        with context.Pool(processes or os.cpu_count(), ignore_interrupts) as workers:
            images = workers.map_async(do_job, jobs, chunksize=1)
            train, splits = make_splits(world, train_pool, pool, seed)
            pools = {"train": train_pool.rows, "val": pool.rows, "test": pool.rows}
            if motion:
                train += motion.train
                splits = {split: rows + motion.queries[split] for split, rows in splits.items()}
                pools = {split: rows + (motion.train_pool if split == "train" else motion.pool).rows
                         for split, rows in pools.items()}
            write_m_beir(root, world.datasets, world.prompts(), train, splits, pools)
            images.get()
        draw_samples(root, splits["test"], root / "samples.png")
    clips = f", {sum(map(len, motion.clips.values())):,} clips" if motion else ""
    return (
        f"{out}: {len(world.names):,} characters ({len(world.zero)} zero-shot), "
        f"{len(world.relations):,} relations, {len(train):,} training queries, "
        f"{len(pools['train']):,} training and {len(pools['test']):,} test candidates{clips}"
    )


def premise(model, data, tasks_per_batch, batches=4, batch_size=128):
    """What MAC-Loss assumes, looked at in training batches that mix so many tasks.

    -> {line of a table: number}: mean cosines of queries to positives, intra- and inter-modality
    negatives (known duplicates left out); the share of negatives, and of the queries' hardest ones,
    that are of another modality, or of another dataset; distances of the modalities' centroids.
    """
    import torch

    from data import Benchmark, TrainSet, duplicate_mask
    from support.items import MODALITIES

    found, centroids = defaultdict(list), defaultdict(list)
    for batch in TrainSet(Benchmark(data), batch_size, batches, tasks_per_batch):
        queries, targets = (model.encode(batch[part], show_progress=False)
                            for part in ("queries", "targets"))
        cosines, datasets = queries @ targets.T, batch["target_keys"] >> 40
        negative = ~duplicate_mask(batch["positive_keys"], batch["target_keys"])
        hardest = cosines.masked_fill(~negative, -2).argmax(1, keepdim=True)
        found["cosine to the positive"] += cosines.diagonal().tolist()
        for kind, labels in (("modality", batch["modality"]), ("dataset", datasets)):
            other = labels != labels[:, None]  # (B, B)
            for name, where in ((f"intra-{kind}", ~other), (f"inter-{kind}", other)):
                found[f"cosine to {name} negatives"] += cosines[negative & where].tolist()
            found[f"share of negatives of another {kind}"] += other[negative].float().tolist()
            found[f"share of hardest negatives of another {kind}"] += (
                other.gather(1, hardest).flatten().float().tolist())
        for label, vector in zip(batch["modality"].tolist(), targets):
            centroids[label].append(vector)
    table = {name: sum(values) / len(values) for name, values in found.items() if values}
    means = {label: torch.stack(vectors).mean(0) for label, vectors in sorted(centroids.items())}
    for one, other in itertools.combinations(means, 2):
        name = f"centroids of {MODALITIES[one]} and {MODALITIES[other]} apart"
        table[name] = (means[one] - means[other]).norm().item()
    return table


def direction(model, data, splits=("test", "zero"), shuffled=False):
    """Does the model use time? -> share of the queries of tasks 9 and 10 whose target is nearer
    than the same frames in reverse, or than the description of these; chance is 0.5.

    Blinking has no reverse and is left out. `shuffled`: the frames of each clip in random order.
    """
    from data import Benchmark
    from support.files import did_keys
    from support.items import load_video

    benchmark, rng, triples = Benchmark(data), random.Random(0), []
    cells = [cell for split in splits for cell in benchmark.cells(split)
             if "video" in (cell.query_modality, cell.target_modality)]
    for cell in cells:
        pool = benchmark.pool(cell.pool_path)
        for item, row in zip(cell.items, map(json.loads, cell.path.open(encoding="utf-8"))):
            # The generator puts the reverse first among the hard negatives.
            dids = did_keys([row["pos_cand_list"][0], row["neg_cand_list"][0]])
            right, reverse = (pool[int(place)] for place in pool.find(dids))
            if "-blink" not in (item.get("video") or right["video"]):
                triples.append((item, right, reverse))
    if not triples:
        raise ValueError(f"{data}: expected clips, found none")

    def shuffle(item):
        if not shuffled or not item.get("video"):
            return item
        return {**item, "video": rng.sample(frames := load_video(item["video"]), len(frames))}

    queries, right, reverse = (model.encode(list(map(shuffle, items)), show_progress=False)
                               for items in zip(*triples))
    return (((queries * right).sum(1) > (queries * reverse).sum(1)).float().mean()).item()


def print_premise(name, data, keep_layers):
    """The table of `premise`, for batches of two tasks, and of all, as train.py's."""
    from puma import PUMA

    model = PUMA.from_pretrained(name, keep_layers)
    two, every = (premise(model, data, tasks) for tasks in (2, 0))
    print(f"{'tasks in a batch':<52}   two   all")
    for line in dict.fromkeys([*every, *two]):
        print(f"{line:<52}" + "".join(f"{table[line]:6.2f}" if line in table else "     -"
                                      for table in (two, every)))
    if Path(data, "query/train", f"mbeir_{CLIP_DATASET}_train.jsonl").exists():
        in_order, shuffled = (direction(model, data, shuffled=mixed) for mixed in (False, True))
        print(f"clips told from their reverse: {in_order:.1%}, with shuffled frames {shuffled:.1%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="data/glyph_beir", help="folder to write; must not exist")
    parser.add_argument("--seed", type=int, default=0, help="splits and query order follow from it")
    parser.add_argument("--domains", action="store_true", help="the second form: four datasets, "
                        "each of one kind of script and two tasks, as M-BEIR is made of ten")
    parser.add_argument("--premise", metavar="MODEL", help="write nothing if --out exists: print "
                        "how easy its negatives of another modality are for this model")
    parser.add_argument("--keep-layers", type=int, help="of the model of --premise, only these")
    args = parser.parse_args()
    with clear_errors():
        check_option("--seed", args.seed, int, 0, 2**31)
        check_option("--out", args.out, str, 1)
        check_option("--keep-layers", args.keep_layers, int | None, 1)
        if not args.premise or not Path(args.out).exists():
            print(build(args.out, args.seed, domains=args.domains))
        if args.premise:
            print_premise(args.premise, args.out, args.keep_layers)


if __name__ == "__main__":
    main()
