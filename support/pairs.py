"""Write M-BEIR directories: of a file of pairs, or of rows of queries and candidates.

    python data.py --from pairs.csv --out my_data --valid 10%

A pair has a query and a target, each a text, an image or both; see `COLUMNS`.
"""

import csv
import hashlib
import json
import random
import re
import shutil
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

from support.files import TASKS, check_content, make_item, new_folder, parse_lines, warn
from support.items import MODALITIES, check_text, load_image, regular

COLUMNS = ("query_text", "query_image", "target_text", "target_image", "instruction")


def write_m_beir(root, names, prompts, train, splits, pools):
    """Write an M-BEIR directory, images apart. `names` {dataset id: name}; `prompts` {(dataset id,
    query modality, candidate modality): texts}; `train`, `splits` {split: ...}: rows of queries;
    `pools` {split: rows of candidates}. A local pool is what the test pool has of a dataset in the
    modality that a task looks for."""
    files = {f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl": map(json.dumps, rows)
             for split, rows in pools.items()}
    files["query/union_train/mbeir_union_up_train.jsonl"] = map(json.dumps, train)
    for number, name in names.items():
        own = [row for row in train if of_dataset(number, row["qid"])]
        files[f"query/train/mbeir_{name}_train.jsonl"] = map(json.dumps, own)
        found = [row for row in pools["test"] if of_dataset(number, row["did"])]
        for split in splits:
            queries = defaultdict(list)
            for row in splits[split]:
                if of_dataset(number, row["qid"]):
                    queries[row["task_id"]].append(row)
            for task, rows in queries.items():
                cell, wanted = f"mbeir_{name}_task{task}", TASKS[task][1]
                local = [row for row in found if row["modality"] == wanted]
                files[f"query/{split}/{cell}_{split}.jsonl"] = map(json.dumps, rows)
                files[f"cand_pool/local/{cell}_cand_pool.jsonl"] = map(json.dumps, local)
                files[f"qrels/{split}/{cell}_{split}_qrels.txt"] = [
                    f"{row['qid']} 0 {did} 1 {task}" for row in rows
                    for did in row["pos_cand_list"]]
    numbers = range(1, 1 + max(map(len, prompts.values())))
    lines = [["query_modality", "cand_modality", "dataset_name", "dataset_id",
              *(f"prompt_{n}" for n in numbers)]]
    lines += [[*kinds, names[number], str(number), *texts]
              for (number, *kinds), texts in prompts.items()]
    files["instructions/query_instructions.tsv"] = map("\t".join, lines)
    for path, lines in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        with (root / path).open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)


def of_dataset(number, key):
    return key.startswith(f"{number}:")


def read_pairs(path, on_error):
    """Yield (line number, row) of a .jsonl file, or of a .csv file whose first line has names."""
    if path.suffix == ".jsonl":
        for number, _, row in parse_lines(path, json.loads, "a JSON object", on_error):
            yield number, row
        return
    # Bytes that are no UTF-8 become what `check_text` refuses: their line is named like any other.
    with regular(path).open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows, number = csv.DictReader(file, restkey="more values than names", strict=True), 1
        try:
            for row in rows:
                yield (number := rows.line_num), row
        except csv.Error as error:  # an open quote, say: where the next row begins is unknown
            on_error(path, number + 1, f"expected CSV ({error})")


def pair_sides(row, digest):
    """Yield (what makes it equal to another, fields in M-BEIR) of a pair's query and target."""
    if not isinstance(row, dict) or set(row) - set(COLUMNS):
        raise ValueError(f"expected columns out of {', '.join(COLUMNS)}; got {row!r:.200}")
    check_text(row.get("instruction"), "instruction")
    for side, prefix in (("query", "query_"), ("target", "")):
        text, image = (row.get(f"{side}_{part}") or None for part in ("text", "image"))
        if not (text or image):
            raise ValueError(f"expected a {side}_text or a {side}_image, got neither")
        modality = MODALITIES[check_content(text, image)]
        path = image and Path("mbeir_images", image).as_posix()
        fields = {"txt": text, "img_path": path, "modality": modality, "src_content": None}
        yield (text, image and digest(image)), {prefix + key: fields[key] for key in fields}


def join_pairs(path, dataset):
    """A file of pairs -> rows of queries, of candidates, prompts, as `write_m_beir` takes them.

    Equal content (the text, the image's bytes) is one candidate, or one query with several
    positives. A query has its own instruction, if any, a field that M-BEIR has not; the prompt is
    the most frequent one. Every bad line is named on stderr, then ValueError is raised.
    """
    queries, candidates, prompts, bad = {}, {}, defaultdict(Counter), []

    def note(*place):
        bad.append(place)
        warn(*place)

    @cache
    def digest(name):
        image = make_item(path.parent, None, name)["image"]
        load_image(image)  # raises what is wrong with it
        return hashlib.sha256(Path(image).read_bytes()).digest()

    for number, row in read_pairs(path, note):
        try:
            (query, asked), (target, found) = pair_sides(row, digest)
        except ValueError as error:
            note(path, number, str(error))
            continue
        kinds = asked["query_modality"], found["modality"]
        own = " ".join((row.get("instruction") or "").split())
        usual = "Find the {1} that belongs to the {0}".format(*kinds).replace(",", " with ")
        prompts[kinds][own or usual] += 1
        found = candidates.setdefault(target, found | {"did": f"{dataset}:{len(candidates) + 1}"})
        asked = queries.setdefault((query, kinds, own), asked | {
            "qid": f"{dataset}:{len(queries) + 1}", "pos_cand_list": {}, "neg_cand_list": [],
            "task_id": next(t for t in TASKS if TASKS[t] == kinds)})
        asked["pos_cand_list"][found["did"]] = True  # an ordered set
        asked |= {"instruction": own} if own else {}
    if bad:
        raise ValueError(f"{path}: {len(bad):,} bad lines, nothing is written")
    queries = [row | {"pos_cand_list": [*row["pos_cand_list"]]} for row in queries.values()]
    prompts = {(dataset, *kinds): [counts.most_common(1)[0][0]]
               for kinds, counts in prompts.items()}
    return queries, [*candidates.values()], prompts


def write_pairs(path, out, valid, dataset=11):
    """Write a file of pairs as the M-BEIR directory `out`; -> a line that says what is in it.

    Columns: `COLUMNS`, any may be missing; image paths are relative to the file's folder. `valid`
    ("10%") of the queries are held out, as `val` and as `test`, and have all candidates to choose
    from. Raises ValueError; FileExistsError if `out` exists.
    """
    share = re.fullmatch(r"([0-9]+|[0-9]*\.[0-9]+)%", valid)
    if path.suffix not in (".csv", ".jsonl") or not share or not 0 < float(share[1]) < 100:
        raise ValueError(f"expected a .csv or .jsonl file and 0% to 100%, got {path} and {valid}")
    with new_folder(out) as root:
        queries, candidates, prompts = join_pairs(path, dataset)
        random.Random(0).shuffle(queries)
        count = max(1, round(float(share[1]) / 100 * len(queries)))
        train, test = queries[count:], queries[:count]
        if not train:
            raise ValueError(f"{path}: expected more different queries, got {len(queries)}")
        write_m_beir(root, {dataset: "pairs"}, prompts, train, {"val": test, "test": test},
                     dict.fromkeys(("train", "val", "test"), candidates))
        images = {row.get("img_path") or row.get("query_img_path") for row in queries + candidates}
        for image in images - {None}:
            (root / image).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path.parent / Path(image).relative_to("mbeir_images"), root / image)
    return (f"{out}: {len(train):,} queries to train with, {count:,} held out as val and test, "
            f"{len(candidates):,} candidates, {len(images - {None}):,} images")
