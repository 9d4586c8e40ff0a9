"""GlyphBEIR's files: M-BEIR's format, and that nothing held out is in a training file.

What a line shows is derived from the line itself (code point in an image's path, name in a text),
not from the generator, whose word on the splits is then checked against it.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageChops, ImageSequence

import data
import toy.glyph_beir as generator
from toy.glyph_beir import World

CLIP_TASKS = {task: kinds for task, kinds in data.TASKS.items() if "video" in kinds}  # dataset 11
TASKS = {task: data.TASKS[task] for task in (0, 1, 2, 3, 4, 6, 7, 8)}  # dataset 10
ALL = {**TASKS, **CLIP_TASKS}
EDIT_TASKS = (1, 6, 7, 8)
SPLITS = ("val", "test", "zero")
HELD_OUT_FACES = {"Serif-Italic", "SansMono-Oblique", "Sans-BoldOblique"}
POOL = "cand_pool/global/mbeir_union_{}_cand_pool.jsonl".format
TRAIN_FILES = ("query/train/mbeir_glyph_train.jsonl", "query/train/mbeir_motion_train.jsonl",
               "query/union_train/mbeir_union_up_train.jsonl", POOL("train"))
NAMES = {task: f"mbeir_{'motion' if task in CLIP_TASKS else 'glyph'}_task{task}"
         for task in ALL}
QUERIES = {(split, task): f"query/{split}/{name}_{split}.jsonl"
           for split in SPLITS for task, name in NAMES.items()}
LOCAL = {task: f"cand_pool/local/{name}_cand_pool.jsonl" for task, name in NAMES.items()}
JSONL_FILES = {*TRAIN_FILES, POOL("val"), POOL("test"), *LOCAL.values(), *QUERIES.values()}
QRELS = {key: name.replace("query/", "qrels/").replace(".jsonl", "_qrels.txt")
         for key, name in QUERIES.items()}
PROMPTS = "instructions/query_instructions.tsv"


class Files:
    """The directory's lines: `train` and `queries[split, task]`; `train_pool` and `pool` by did.

    Of dataset 10; those of 11 are `clip_train`, `clip_queries`, `clip_train_pool`, `clip_pool`.
    """

    def __init__(self, root):
        self.root = root
        self.rows = {name: [json.loads(line) for line in (root / name).open(encoding="utf-8")]
                     for name in JSONL_FILES}
        self.train, self.clip_train = (self.rows[name] for name in TRAIN_FILES[:2])
        self.queries, self.clip_queries = (
            {key: self.rows[name] for key, name in QUERIES.items() if key[1] in tasks}
            for tasks in (TASKS, CLIP_TASKS))
        self.train_pool, self.pool, self.clip_train_pool, self.clip_pool = (
            {row["did"]: row for row in self.rows[POOL(split)] if row["did"].startswith(dataset)}
            for dataset in ("10:", "11:") for split in ("train", "test"))

    def parts(self):
        """Each file's queries with the pool that their dids are from."""
        return [(self.train, self.train_pool), *((q, self.pool) for q in self.queries.values())]

    def target(self, query):
        """The character that all positives of a query stand for."""
        pool = self.train_pool if query["pos_cand_list"][0] in self.train_pool else self.pool
        (char,) = {character(pool[did]) for did in query["pos_cand_list"]}
        return char

    def relation(self, query):
        """The unordered pair of characters that an edit query relates."""
        return frozenset((source(query), self.target(query)))


@pytest.fixture(scope="module")
def files(glyph_beir):
    return Files(glyph_beir)


@pytest.fixture(scope="module")
def world():
    return World(0)


def drawn(path):
    """The character of an image, by the code point in its path."""
    return chr(int(Path(path).stem, 16))


def named(name):
    """The character of a name, or None if it is no character's name."""
    try:
        char = unicodedata.lookup(name)
    except KeyError:
        return None
    return char if unicodedata.name(char).lower() == name else None


def character(candidate):
    """The character that a candidate shows or names."""
    return drawn(candidate["img_path"]) if candidate["img_path"] else named(candidate["txt"])


def source(query):
    """The character that a query shows or names, the one to be edited in tasks 1, 6, 7, 8."""
    text = query["query_txt"]
    if query["query_img_path"]:
        return drawn(query["query_img_path"])
    if query["task_id"] != 1:
        return named(text)
    parts = [text[match.end() :] for match in re.finditer(" form of ", text)]
    parts += [text[: match.start()] for match in re.finditer(" plus | minus ", text)]
    (char,) = {char for char in map(named, parts) if char}  # "plus sign plus ..." has one reading
    return char


def moving(row):
    """The (character, motion) that a clip shows or a description names."""
    path = row.get("video_path") or row.get("query_video_path")
    if path:
        char, _, motion = Path(path).stem.partition("-")
        return chr(int(char, 16)), motion
    text = row.get("txt") or row.get("query_txt")
    (found,) = {(named(text.removesuffix(f" {verb}")), motion)
                for motion, verb in generator.VERBS.items() if text.endswith(f" {verb}")}
    return found


def card_partners(card):
    """The characters whose names a card tells, as its case partner."""
    return [named(name) for name in re.findall(r"(?:capital|small) form ([^,]+)", card)]


def face(path):
    return Path(path).parent.name


def images(rows):
    """All image paths in query or candidate lines."""
    return {row.get("img_path") or row.get("query_img_path") for row in rows} - {None}


# ---- the format ----------------------------------------------------------------------------------


def test_the_directory_has_exactly_the_files_of_an_m_beir_directory(glyph_beir):
    found = {Path(folder, name).relative_to(glyph_beir).as_posix()
             for folder, _, names in os.walk(glyph_beir) for name in names
             if "mbeir_images" not in folder}
    assert found == {*JSONL_FILES, *QRELS.values(), PROMPTS, "samples.png"}


def test_lines_have_m_beirs_fields_and_types_and_their_tasks_modality(files):
    queries = [(row, row["task_id"]) for row in files.train]
    queries += [(row, task) for (_, task), rows in files.queries.items() for row in rows]
    candidates = [*files.train_pool.values(), *files.pool.values()]
    for row, task in queries:
        assert set(row) == {"qid", "query_txt", "query_img_path", "query_modality",
                            "query_src_content", "pos_cand_list", "neg_cand_list", "task_id"}
        assert row["task_id"] == task and row["query_modality"] == TASKS[task][0]
        dids = row["pos_cand_list"] + row["neg_cand_list"]
        assert row["pos_cand_list"] and len(dids) == len(set(dids)), "a candidate is listed twice"
    for row in candidates:
        assert set(row) == {"did", "txt", "img_path", "modality", "src_content"}
        assert character(row), row
    for prefix, key, rows in (("query_", "qid", [row for row, _ in queries]),
                              ("", "did", candidates)):
        assert len({row[key] for row in rows}) == len(rows)
        for row in rows:
            assert re.fullmatch(r"10:\d+", row[key]) and row[f"{prefix}src_content"] is None
            for kind, field in (("text", f"{prefix}txt"), ("image", f"{prefix}img_path")):
                present = kind in row[f"{prefix}modality"].split(",")
                value = row[field]
                assert isinstance(value, str) and value if present else value is None, row


def test_local_pools_are_the_parts_of_the_global_one(files):
    test = files.rows[POOL("test")]
    assert files.rows[POOL("val")] == test
    assert files.rows[TRAIN_FILES[2]] == files.train + files.clip_train
    for task, (_, modality) in ALL.items():
        dataset = "11:" if task in CLIP_TASKS else "10:"
        assert files.rows[LOCAL[task]] == [row for row in test if row["modality"] == modality
                                           and row["did"].startswith(dataset)]


def test_a_querys_positives_are_all_candidates_of_the_right_character_and_no_negative_is(files):
    all_of = defaultdict(list)
    for pool in (files.train_pool, files.pool):
        for did, row in pool.items():
            all_of[id(pool), character(row), row["modality"]].append(did)
    for rows, pool in files.parts():
        for row in rows:
            task, right = row["task_id"], files.target(row)
            assert (right == source(row)) == (task not in EDIT_TASKS)
            assert row["pos_cand_list"] == all_of[id(pool), right, TASKS[task][1]]
            negatives = [pool[did] for did in row["neg_cand_list"]]
            assert right not in map(character, negatives)
            assert {negative["modality"] for negative in negatives} <= {TASKS[task][1]}


def test_qrels_have_five_columns_and_agree_with_pos_cand_list(files):
    for (split, task), rows in {**files.queries, **files.clip_queries}.items():
        lines = [f"{r['qid']} 0 {did} 1 {task}" for r in rows for did in r["pos_cand_list"]]
        assert (files.root / QRELS[split, task]).read_text().splitlines() == lines


def test_each_task_has_several_instructions_under_a_dataset_id_that_m_beir_does_not_use(glyph_beir):
    header, *lines = [line.split("\t") for line in (glyph_beir / PROMPTS).read_text().splitlines()]
    assert header[:4] == ["query_modality", "cand_modality", "dataset_name", "dataset_id"]
    assert {(query, candidate) for query, candidate, *_ in lines} == set(ALL.values())
    assert len(lines) == len(ALL)
    for query, candidate, _, dataset, *prompts in lines:
        assert dataset == ("11" if (query, candidate) in CLIP_TASKS.values() else "10")
        assert len(set(prompts)) >= 3 and all(prompts)


def test_there_are_enough_queries(files, world):
    assert len(files.train) >= 30_000
    assert {row["task_id"] for row in files.train} == set(TASKS)
    zero_edits = sum(bool(r.pair & world.zero) for r in world.relations)
    for task in TASKS:
        assert len(files.queries["test", task]) >= 500
        assert len(files.queries["val", task]) >= 100
        available = zero_edits if task in EDIT_TASKS else len(world.zero)
        assert len(files.queries["zero", task]) == min(500, available) >= 300


def test_every_referenced_image_exists_is_56_pixels_square_and_shows_something(files):
    empty = {named("braille pattern blank"), named("object replacement character")}
    paths = sorted(set().union(*map(images, files.rows.values())))
    assert len(paths) > 25_000
    for i, path in enumerate(paths):
        with Image.open(files.root / path) as image:
            assert image.size == (56, 56) and image.format == "PNG"
            assert image.getextrema()[0] < 255 or drawn(path) in empty, path
            if i % 400 == 0:  # its character, in its face, and the same in each build
                again = generator.render(drawn(path), face(path))
                assert ImageChops.difference(image, again).getbbox() is None, path


# ---- clips ---------------------------------------------------------------------------------------


def test_lines_of_clips_have_their_path_beside_m_beirs_fields_and_their_tasks_modality(files):
    queries = [(row, row["task_id"]) for row in files.clip_train]
    queries += [(row, task) for (_, task), rows in files.clip_queries.items() for row in rows]
    candidates = [*files.clip_train_pool.values(), *files.clip_pool.values()]
    assert set(queries[0][0]) == {*files.train[0], "query_video_path"}
    assert set(candidates[0]) == {*files.rows[LOCAL[0]][0], "video_path"}
    for row, task in queries:
        assert row["task_id"] == task and row["query_modality"] == CLIP_TASKS[task][0]
    for prefix, key, rows in (("query_", "qid", [row for row, _ in queries]),
                              ("", "did", candidates)):
        assert len({row[key] for row in rows}) == len(rows)
        for row in rows:
            kind = row[f"{prefix}modality"]
            assert re.fullmatch(r"11:\d+", row[key]) and row[f"{prefix}img_path"] is None
            assert bool(row[f"{prefix}txt"]) == (kind == "text")
            assert bool(row[f"{prefix}video_path"]) == (kind == "video")


def test_positives_of_a_clip_or_description_are_of_its_motion_and_the_reverse_is_a_negative(files):
    parts = [(files.clip_train, files.clip_train_pool),
             *((rows, files.clip_pool) for rows in files.clip_queries.values())]
    for rows, pool in parts:
        all_of = defaultdict(list)
        for did, row in pool.items():
            all_of[moving(row), row["modality"]].append(did)
        for row in rows:
            (char, motion), wanted = moving(row), CLIP_TASKS[row["task_id"]][1]
            assert row["pos_cand_list"] == all_of[(char, motion), wanted]
            reverse = (char, generator.REVERSE[motion])
            first = pool[row["neg_cand_list"][0]]
            assert first["modality"] == wanted and moving(first)[0] == char
            assert (moving(first) == reverse) == (motion != "blink")


def test_a_clip_has_4_to_8_frames_that_differ_and_its_reverse_the_same_from_last_to_first(files):
    paths = {row["video_path"] for row in files.clip_train_pool.values()}
    paths |= {row["video_path"] for row in files.clip_pool.values()}
    paths |= {row["query_video_path"] for rows in files.clip_queries.values() for row in rows}
    paths = sorted(paths - {None})
    assert len(paths) > 1000
    for i, path in enumerate(paths):
        with Image.open(files.root / path) as file:
            assert file.n_frames in (4, 6, 8) and file.size == (56, 56)
        if i % 40 == 0:
            char, motion = moving({"video_path": path})
            frames, back = ([frame.convert("L").tobytes() for frame in ImageSequence.Iterator(
                Image.open(files.root / path.replace(f"-{name}.", f"-{other}.")))]
                for name, other in ((motion, motion), (motion, generator.REVERSE[motion])))
            assert frames == back[::-1] or motion == "blink"
            assert all(one != other for one, other in zip(frames, frames[1:]))
            again = generator.draw_clip(char, face(path), motion)
            assert frames == [frame.tobytes() for frame in again]


def test_no_face_character_or_motion_of_test_clips_is_in_training(files, world):
    trained, known = files.clip_train + list(files.clip_train_pool.values()), world.motion_split
    shown = {row.get("video_path") or row.get("query_video_path") for row in trained} - {None}
    assert len({face(path) for path in shown}) == 9
    assert not {face(path) for path in shown} & HELD_OUT_FACES
    pairs = {moving(row) for row in trained}
    assert pairs == {pair for pair, split in known.items() if split == "train"}
    assert {char for char, _ in pairs} <= set(world.seen)
    for split in SPLITS:
        asked = {moving(row) for task in CLIP_TASKS for row in files.clip_queries[split, task]}
        assert asked == {pair for pair, own in known.items() if own == split} and len(asked) >= 10
        assert {char in world.zero for char, _ in asked} == {split == "zero"}
        # A motion whose reverse was trained would be less familiar than it, and lose.
        assert not {(char, generator.REVERSE[motion]) for char, motion in asked} & pairs
    counts = Counter(known.values())
    assert 0.18 < (counts["test"] + counts["val"]) / (len(known) - counts["zero"]) < 0.26
    assert {moving(row) for row in files.clip_pool.values()} == set(known)


# ---- what is held out ----------------------------------------------------------------------------


def test_no_face_of_test_queries_or_of_their_targets_is_in_a_training_file(files):
    asked = {face(path) for rows in files.queries.values() for path in images(rows)}
    shown = {face(path) for path in images(files.pool.values())}
    held_out = asked | shown
    assert held_out == HELD_OUT_FACES and not asked & shown
    trained = {face(path) for path in images(files.train) | images(files.train_pool.values())}
    assert len(trained) == 9 and not trained & held_out
    for name in TRAIN_FILES:
        text = (files.root / name).read_text(encoding="utf-8")
        assert not any(f"/{face}/" in text for face in held_out)


def test_no_zero_shot_character_is_in_a_training_file(files, world):
    zero = {files.target(row) for task in (0, 2, 3, 4) for row in files.queries["zero", task]}
    assert zero == world.zero and len(zero) >= 300
    cards = [row["txt"] for row in files.train_pool.values() if row["modality"] == "image,text"]
    trained = {
        "drawn": {drawn(p) for p in images(files.train) | images(files.train_pool.values())},
        "named": {named(row["txt"]) for row in files.train_pool.values() if not row["img_path"]},
        "asked": {source(row) for row in files.train},
        "wanted": {files.target(row) for row in files.train},
        "partners": {char for card in cards for char in card_partners(card)},
        "code points": {chr(int(re.search("code point ([0-9a-f]+)", c)[1], 16)) for c in cards},
    }
    for where, chars in trained.items():
        assert chars and None not in chars, where
        assert not chars & zero, where
    # Edit queries of this split touch such a character, those of the others never do.
    for (split, task), rows in files.queries.items():
        for row in rows:
            assert bool({source(row), files.target(row)} & zero) == (split == "zero"), (split, task)


def test_no_training_text_is_or_describes_a_zero_shot_characters_name(files, world):
    """No whole text, no fact of a card, no name that a description starts from. (The mark in
    "e plus tilde" is a word, though TILDE happens to be a zero-shot character as well.)"""
    rows = [*files.train, *files.train_pool.values()]
    texts = {row.get("query_txt") or row.get("txt") for row in rows} - {None}
    parts = {part for text in texts for part in re.split(r", | form (?:of )?", text)} | texts
    parts |= {part[: m.start()] for part in parts for m in re.finditer(" plus | minus ", part)}
    assert len(parts & {world.names[char] for char in world.seen}) == len(world.seen)
    assert not parts & {world.names[char] for char in world.zero}


def test_no_held_out_relation_is_among_the_training_queries(files, world):
    trained = {files.relation(row) for row in files.train if row["task_id"] in EDIT_TASKS}
    assert len(trained) > 2000 and all(len(pair) == 2 for pair in trained)
    for split in SPLITS:
        tested = {files.relation(row) for task in EDIT_TASKS for row in files.queries[split, task]}
        assert len(tested) > 100 and not tested & trained, split
        # The generator's own list is longer than what was sampled into the files.
        planned = {relation.pair for relation, s in world.relation_split.items() if s == split}
        assert tested <= planned and not planned & trained, split


def test_no_card_tells_a_held_out_relation_or_its_own_name(files):
    held_out = {files.relation(row) for (_, task), rows in files.queries.items()
                if task in EDIT_TASKS for row in rows}
    told = set()
    for row in [*files.train_pool.values(), *files.pool.values()]:
        if row["modality"] == "image,text":
            char, partners = drawn(row["img_path"]), card_partners(row["txt"])
            assert None not in partners and char not in partners
            assert row["txt"].count(" form ") == len(partners)
            told |= {frozenset((char, partner)) for partner in partners}
    assert len(told) > 200 and not told & held_out


def test_names_of_zero_shot_characters_are_made_of_words_that_training_names_contain(files, world):
    names = [row["txt"] for row in files.train_pool.values() if row["modality"] == "text"]
    known = Counter(word for name in names for word in set(generator.words(name)))
    for char in world.zero:
        assert all(known[word] >= 2 for word in generator.words(world.names[char]))


def test_pretraining_reads_training_files_only_and_never_shows_anything_held_out(
    files, world, tmp_path
):
    from toy.pretrain import Corpus

    faces = {face(path) for path in images(files.train_pool.values())} - HELD_OUT_FACES
    for name in [*TRAIN_FILES, *(f"mbeir_images/{dataset}/{face}" for face in faces
                                 for dataset in ("glyph", "motion"))]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(files.root / name)
    corpus = Corpus(tmp_path)  # where nothing else can be read
    seen, zero = ({world.names[char] for char in chars} for chars in (world.seen, world.zero))
    held_out = {r.pair for r, split in world.relation_split.items() if split != "train"}
    paths = {str(path) for path in tmp_path.glob("mbeir_images/*/*/*.*")}
    clips = [corpus.candidates.pop(kind) for kind in ("video", "description")]
    clips += [corpus.queries.pop(task) for task in CLIP_TASKS]
    checked = set()
    for pairs in clips:
        assert pairs
        for item, name in pairs:
            pair = moving({"video_path": item["video"], "txt": item["text"]})
            assert world.motion_split[pair] == "train" and name == world.description(*pair)
            assert item["video"] in paths | {None} and item["image"] is None
            checked.add((item["video"], name))
    groups = [(None, pairs) for pairs in corpus.candidates.values()] + [*corpus.queries.items()]
    for task, pairs in groups:
        assert pairs
        for item, name in pairs:
            assert name in seen and (item["image"] is None or item["image"] in paths)
            chars = {named(name)} | {drawn(path) for path in {item["image"]} - {None}}
            if task in EDIT_TASKS:
                chars.add(source({"query_txt": item["text"], "query_img_path": item["image"],
                                  "task_id": task}))
            assert not chars & world.zero and item["text"] not in zero
            assert frozenset(chars) not in held_out
            checked.add((item["image"], name))
    rng, corpus, animated = random.Random(0), Corpus(tmp_path), 0
    for _ in range(3000):  # what training draws consists of the items above
        for item, name in (corpus.sample_answer(rng), corpus.sample_summary(rng, 0.5)):
            if isinstance(item["video"], list):  # a picture that is made to move
                pair = moving({"video_path": None, "txt": name})
                animated += world.names[pair[0]] in seen and pair not in world.motion_split
                assert world.motion_split.get(pair, "train") == "train"
                assert pair[0] not in world.zero
            else:
                assert (item["image"] or item["video"], name) in checked
            assert item["text"] not in zero and zero.isdisjoint([item.get("instruction")])
    assert animated > 300  # also characters that have no clips
    assert not zero & set(corpus.texts())


# ---- building ------------------------------------------------------------------------------------


def command(out):
    return [sys.executable, "toy/glyph_beir.py", "--out", str(out)]


def write_without_pictures(out, *options):
    """What the generator prints in another process, with other hashes. Pictures take longest."""
    code = ("import toy.glyph_beir as g; g.write_images = g.write_clips = zip; "
            "g.draw_samples = lambda *_: None; g.main()")
    run = subprocess.run([sys.executable, "-c", code, "--out", str(out), *options], cwd=ROOT,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_second_build_writes_the_same_files_and_prints_one_line_of_counts(glyph_beir, tmp_path):
    printed = write_without_pictures(tmp_path / "again")
    for name in [*JSONL_FILES, *QRELS.values(), PROMPTS]:
        assert (glyph_beir / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    counts = ("3,189 characters (318 zero-shot), 7,308 relations, 46,598 training queries, "
              "35,908 training and 10,007 test candidates, 1,240 clips")
    assert printed == f"{tmp_path / 'again'}: {counts}\n"


def test_the_second_form_is_four_datasets_of_two_tasks_whose_characters_are_disjoint(
        files, tmp_path):
    write_without_pictures(root := tmp_path / "domains", "--domains")

    def rows(name):
        return [json.loads(line) for line in (root / name).open(encoding="utf-8")]

    benchmark, tasks, chars = data.Benchmark(root), {}, {}
    datasets = {}  # name -> id
    for line in (root / PROMPTS).read_text().splitlines()[1:]:
        *kinds, name, number, _, _, _ = line.split("\t")
        datasets[name] = number
    for cell in benchmark.cells("test"):
        name, task = re.fullmatch(r"(\w+)_task(\d)", cell.name).groups()
        tasks.setdefault(name, []).append(int(task))
        local = rows(f"cand_pool/local/mbeir_{name}_task{task}_cand_pool.jsonl")
        assert {row["did"].partition(":")[0] for row in local} == {datasets[name]}
        assert {row["modality"] for row in local} == {TASKS[int(task)][1]}
        dids = {row["did"] for row in local}
        assert all(dids >= set(row["pos_cand_list"])
                   for row in rows(f"query/test/mbeir_{name}_task{task}_test.jsonl"))
        prompts = [item["instruction"] for item in cell.items]
        assert all("among" in prompt for prompt in prompts)  # instructions of its own
    assert len(tasks) == 4 and sorted(sum(tasks.values(), [])) == [*TASKS]
    assert {len(each) for each in tasks.values()} == {2}
    pool = rows(POOL("test"))
    for row in pool:
        chars.setdefault(character(row), set()).add(row["did"].partition(":")[0])
    assert {len(numbers) for numbers in chars.values()} == {1}  # disjoint
    # The global pool shows what that of the first form shows, clips apart.
    assert (Counter((row["txt"], row["img_path"]) for row in pool)
            == Counter((row["txt"], row["img_path"]) for row in files.pool.values()))
    train = rows("query/union_train/mbeir_union_up_train.jsonl")
    assert {row["qid"].partition(":")[0] for row in train} == set(datasets.values())
    assert {row["task_id"] for row in train} == set(TASKS)


def test_another_seed_gives_other_splits_of_the_same_world(world):
    other = World(1)
    assert (other.names, other.relations) == (world.names, world.relations)
    assert other.zero != world.zero and len(other.zero) == len(world.zero)
    assert other.motion_split != world.motion_split
    changed = sum(other.relation_split[r] != split for r, split in world.relation_split.items())
    assert changed > 1000


def test_an_existing_folder_is_left_alone_with_a_one_line_error_and_exit_status_2(tmp_path):
    (tmp_path / "out").mkdir()
    run = subprocess.run(command(tmp_path / "out"), cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and "out exists: choose another folder" in run.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_a_failed_build_leaves_nothing_and_gives_a_one_line_error(tmp_path, monkeypatch, capsys):
    def fail(root, *_):
        assert root.parent == tmp_path and root.name != "out"
        raise OSError("No space left on device")

    monkeypatch.setattr(generator, "write_m_beir", fail)  # some images are written
    monkeypatch.setattr(sys, "argv", ["glyph_beir.py", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        generator.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: No space left on device\n"
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_leaves_no_out_folder(tmp_path):
    run = subprocess.Popen(command(tmp_path / "out"), cwd=ROOT, start_new_session=True)
    while not list(tmp_path.glob("out.tmp-*/mbeir_images/*/*")):  # workers draw images
        assert run.poll() is None
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)  # the session made above: the build and its workers
    assert run.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()


# ---- the premise ---------------------------------------------------------------------------------


class Known:
    """A model whose embedding of an item depends on its modality alone."""

    def encode(self, items, show_progress):
        kinds = [3 if item.get("video") else 2 * bool(item["image"]) + bool(item["text"])
                 for item in items]
        return torch.eye(4)[torch.tensor(kinds)]


def test_the_premises_table_counts_what_a_model_that_sees_modalities_only_confuses(glyph_beir):
    table = generator.premise(Known(), glyph_beir, 3, batches=2, batch_size=32)
    right, negatives = [], []  # of positives, of negatives: (same embedding, same modality)
    for batch in data.TrainSet(data.Benchmark(glyph_beir), 32, 2, 3):
        known = data.duplicate_mask(batch["positive_keys"], batch["target_keys"])
        queries, targets = (Known().encode(batch[part], False).argmax(1).tolist()
                            for part in ("queries", "targets"))
        right += [query == target for query, target in zip(queries, targets)]
        negatives += [(queries[i] == targets[j], bool(batch["modality"][i] == batch["modality"][j]))
                      for i in range(32) for j in range(32) if not known[i, j]]
    assert table["cosine to the positive"] == pytest.approx(sum(right) / len(right))
    for kind, wanted in (("intra", True), ("inter", False)):
        alike = [same for same, intra in negatives if intra == wanted]
        assert table[f"cosine to {kind}-modality negatives"] == pytest.approx(
            sum(alike) / len(alike))
    assert table["share of negatives of another modality"] == pytest.approx(
        sum(not intra for _, intra in negatives) / len(negatives))
    gaps = [value for name, value in table.items() if name.startswith("centroids")]
    assert gaps and gaps == pytest.approx([2**0.5] * len(gaps))


class Watcher:
    """Knows what moves how in a clip or a description; of shuffled frames it knows nothing."""

    def __init__(self, sign):
        self.sign, self.shuffled = sign, 0

    def encode(self, items, show_progress):
        return torch.stack([self.vector(item) for item in items])

    def vector(self, item):
        if isinstance(item.get("video"), list):
            self.shuffled += 1
            return torch.zeros(64)
        motions = {verb: motion for motion, verb in generator.VERBS.items()}
        if item.get("video"):
            code, motion = Path(item["video"]).stem.split("-")
            char, sign = chr(int(code, 16)), 1
        else:
            verb = next(verb for verb in motions if item["text"].endswith(verb))
            char, sign = named(item["text"].removesuffix(verb).strip()), self.sign
            motion = motions[verb]
        seed = ord(char) * 100 + sorted(generator.VERBS).index(motion)
        vector = torch.randn(64, generator=torch.Generator().manual_seed(seed))
        return sign * torch.nn.functional.normalize(vector, dim=0)


@pytest.mark.parametrize("sign, expected", [(1, 1.0), (-1, 0.0)])
def test_direction_is_the_share_of_clips_and_descriptions_told_from_their_reverse(
        sign, expected, glyph_beir):
    assert generator.direction(Watcher(sign), glyph_beir, ["val"]) == expected
    blind = Watcher(sign)
    assert generator.direction(blind, glyph_beir, ["val"], shuffled=True) == 0  # a tie is no win
    assert blind.shuffled > 10
