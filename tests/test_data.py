"""The M-BEIR reader, its batches, its checker, on a generated M-BEIR: the 16 cells under their real
names, with the traps of method.md, section 6."""

import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
from data import MODALITIES, TASKS, Benchmark, TrainSet, duplicate_mask
from support.files import Pool, Table, did_key, did_text, modality_class, write_json, write_text

DATASETS = ["visualnews", "fashion200k", "webqa", "edis", "nights", "oven", "infoseek", "fashioniq",
            "cirr", "mscoco"]  # the index is the dataset id
CELLS = [("visualnews", 0), ("mscoco", 0), ("fashion200k", 0), ("webqa", 1), ("edis", 2),
         ("webqa", 2), ("visualnews", 3), ("mscoco", 3), ("fashion200k", 3), ("nights", 4),
         ("oven", 6), ("infoseek", 6), ("fashioniq", 7), ("cirr", 7), ("oven", 8), ("infoseek", 8)]
SIZE = 6  # queries, and candidates, of a cell
POOL = "cand_pool/local/mbeir_{}_cand_pool.jsonl"
QUERY = "query/test/mbeir_{}_test.jsonl"
QRELS = "qrels/test/mbeir_{}_test_qrels.txt"
UNION = "query/union_train/mbeir_union_up_train.jsonl"
UNION_POOL = "cand_pool/global/mbeir_union_{}_cand_pool.jsonl"
TSV = "instructions/query_instructions.tsv"
HEADER = "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2\tprompt_3"


def write(path, lines):
    """Lines, each a str or something to write as JSON. The last one ends without a newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in lines]
    path.write_text("\n".join(texts), encoding="utf-8")


def content(kind, dataset, n, modality):
    """Text and image path of a row."""
    image = f"mbeir_images/{dataset}_{kind}.png" if "image" in modality else None
    return f"{kind} {n}, ä" if "text" in modality else None, image


def cell(dataset, task):
    """Queries, qrels lines and candidates of a cell, as the dataset and its card write them."""
    wanted, found = TASKS[task]
    number, numbers = DATASETS.index(dataset), range(100 * task + 1, 100 * task + 1 + SIZE)
    pool, queries, qrels = [], [], []
    for n in numbers:
        text, image = content("candidate", dataset, n, found)
        pool.append({"did": f"{number}:{n}", "txt": text, "img_path": image, "modality": found,
                     "src_content": None})
        text, image = content("query", dataset, n, wanted)
        positives = [f"{number}:{n}"]
        if dataset in ("oven", "infoseek"):  # and one of the other, only in the global pool
            positives.insert(0, f"{11 - number}:{n}")
        queries.append({"qid": f"{number}:{n}", "query_txt": text, "query_img_path": image,
                        "query_modality": wanted, "query_src_content": None,
                        "pos_cand_list": positives, "neg_cand_list": [], "task_id": task})
        qrels += [f"{number}:{n} 0 {did} 1 {task}" for did in positives]
    if wanted == "image,text":  # the dataset card's way to write it
        queries[1]["query_modality"] = "text,image"
        queries[1]["pos_cand_list"] = [{"did": did} for did in queries[1]["pos_cand_list"]]
    del queries[2]["task_id"], pool[2]["src_content"]
    pool[2]["txt"] = pool[2]["txt"] or ""
    queries[3]["neg_cand_list"] = [pool[0]["did"], {"did": pool[1]["did"]}]
    return queries, qrels, pool


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("mbeir")
    union, train, instructions = [], [], [HEADER]
    for dataset, task in CELLS:
        queries, qrels, pool = cell(dataset, task)
        names = f"{dataset}\t{DATASETS.index(dataset)}"
        instructions.append("\t".join([*TASKS[task], names, " find it ", "Which one?", "so!"]))
        name = f"{dataset}_task{task}"
        write(root / QUERY.format(name), queries)
        write(root / QRELS.format(name), qrels)
        write(root / POOL.format(name), pool)
        if dataset == "mscoco":  # the name without a split has the training images as well
            write(root / POOL.format(f"{name}_test"), pool)
            more = [{**row, "did": f"9:{9000 + i}"} for i, row in enumerate(pool)]
            write(root / POOL.format(name), pool + more)
        union += pool
        train += queries * (3 if dataset == "nights" else 1)  # up-sampled
    for split in ("train", "test"):
        write(root / UNION_POOL.format(split), union)
    write(root / UNION, train)
    write(root / TSV, instructions)
    (root / "mbeir_images").mkdir()
    for name in {row.get("img_path") or row.get("query_img_path") for row in union + train}:
        if name:
            Image.effect_noise((64, 64), 50).save(root / name)
    return root


@pytest.fixture
def mbeir(original, tmp_path):
    """A copy to break."""
    return shutil.copytree(original, tmp_path / "mbeir")


def edit(path, number, old, new):
    """Replace text that must stand in line `number` of a file."""
    lines = path.read_bytes().split(b"\n")
    old, new = (text if isinstance(text, bytes) else text.encode() for text in (old, new))
    assert old in lines[number - 1]
    lines[number - 1] = lines[number - 1].replace(old, new, 1)
    path.write_bytes(b"\n".join(lines))


def cells(root, **options):
    return {cell.name: cell for cell in Benchmark(root).cells("test", **options)}


def keys(*dids):
    return {did_key(did) for did in dids}


def read_everything(root):
    """What training and evaluation read at their start."""
    benchmark = Benchmark(root)
    for cell in benchmark.cells("test"):
        benchmark.pool(cell.pool_path, benchmark.global_pool_path("test"))
    return TrainSet(benchmark, batch_size=2, steps=1)


@pytest.fixture
def check(monkeypatch, capsys):
    """check(directory, *options) -> (exit status, lines printed, error output)"""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            data.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out.splitlines(), captured.err

    return run


# What is read.


def test_dids_become_integers_and_back_and_modalities_classes_in_both_orders():
    for did in ("0:0", "9:77", "10:5600000", "6:999999999999"):
        assert did_text(did_key(did)) == did
    assert len(keys("1:0", "0:1", "1:1", "0:999999999999")) == 4
    names = [*MODALITIES, "text,image", "text,video"]
    assert [modality_class(name) for name in names] == [0, 1, 2, 3, 4, 2, 4]


def test_all_16_cells_are_found_with_their_pool_items_and_relevance(original):
    found = cells(original)
    assert set(found) == {f"{dataset}_task{task}" for dataset, task in CELLS}
    for dataset, task in CELLS:
        cell, number = found[f"{dataset}_task{task}"], DATASETS.index(dataset)
        assert cell.path == original / QUERY.format(cell.name)
        assert (cell.query_modality, cell.target_modality) == TASKS[task]
        part = "_test" if dataset == "mscoco" else ""  # though the name without it exists as well
        assert cell.pool_path == original / POOL.format(f"{cell.name}{part}")
        assert len(Benchmark(original).pool(cell.pool_path)) == SIZE
        both = dataset in ("oven", "infoseek")
        for qid, item, relevant in zip(cell.qids, cell.items, cell.relevant, strict=True):
            n = qid.split(":")[1]
            assert relevant == {did_key(f"{i}:{n}") for i in ((5, 6) if both else (number,))}
            text, image = content("query", dataset, n, TASKS[task][0])
            assert item.pop("instruction") in ("Find it.", "Which one?", "So!")
            assert item == {"text": text, "image": image and str(original / image)}


def test_a_pool_gives_items_keys_and_modality_classes(original):
    benchmark = Benchmark(original)
    pool = benchmark.pool(original / POOL.format("infoseek_task8"))
    assert [pool.name(i) for i in range(len(pool))] == [f"6:{n}" for n in range(801, 801 + SIZE)]
    assert [MODALITIES[i] for i in pool.modality] == ["image,text"] * SIZE
    assert pool.find([did_key("6:803"), did_key("5:803")]).tolist() == [2, -1]
    image = str(original / "mbeir_images/infoseek_candidate.png")
    assert pool[2] == {"text": "candidate 803, ä", "image": image}
    assert benchmark.pool(original / POOL.format("nights_task4"))[2]["text"] is None  # it is ""


def test_a_pool_finds_what_it_holds_as_a_dictionary_would_and_holds_each_id_once(tmp_path):
    rng = random.Random(0)
    dids = [f"{rng.randrange(12)}:{rng.randrange(40)}" for _ in range(200)]  # many of them twice
    rows = [{"did": did, "txt": str(i), "modality": "text"} for i, did in enumerate(dids)]
    write(tmp_path / "a.jsonl", rows[:90])
    write(tmp_path / "b.jsonl", rows[90:])
    tables = [Table(tmp_path / name, data.candidate_columns, "qb", "a candidate")
              for name in ("a.jsonl", "b.jsonl")]
    pool = Pool(tables, tmp_path)
    first = {did: i for i, did in reversed(list(enumerate(dids)))}  # the first line of each counts
    order = sorted(first, key=first.get)
    assert [pool.name(i) for i in range(len(pool))] == order and len(order) < 190
    assert [pool[i]["text"] for i in range(len(pool))] == [str(first[did]) for did in order]
    wanted = [f"{a}:{b}" for a in range(13) for b in range(41)]
    index = {did: i for i, did in enumerate(order)}
    found = pool.find([did_key(did) for did in wanted])
    assert found.tolist() == [index.get(did, -1) for did in wanted]
    with pytest.raises(IndexError):
        pool[len(pool)]


def test_a_sample_of_a_pool_has_the_wanted_and_so_many_others_in_the_pools_order(original):
    pool = Benchmark(original).pool(original / UNION_POOL.format("test"))
    wanted = keys("4:405", "0:2", "5:99999")
    small = pool.sample(wanted, others=20)
    rows = pool.find(small.keys).tolist()
    assert len(small) == 22 and rows == sorted(rows)
    assert small.find(sorted(wanted)).tolist() == [small.keys.tolist().index(did_key("0:2")),
                                                   small.keys.tolist().index(did_key("4:405")), -1]
    assert [small[i] for i in range(22)] == [pool[row] for row in rows]
    assert small.modality.tolist() == pool.modality[rows].tolist()
    assert small.keys.tolist() == pool.sample(wanted, 20).keys.tolist()
    assert small.keys.tolist() != pool.sample(wanted, 20, seed=1).keys.tolist()
    assert len(pool.sample(wanted, others=1000)) == len(pool)


def test_a_video_path_stands_beside_the_image_paths_though_m_beir_has_none(mbeir):
    query = {"qid": "11:1", "query_txt": None, "query_img_path": None, "query_modality": "video",
             "pos_cand_list": ["11:1"], "query_video_path": "mbeir_images/q.webp"}
    clip = {"did": "11:2", "txt": None, "img_path": None, "modality": "video",
            "video_path": "mbeir_images/c.webp"}
    text = {"did": "11:1", "txt": "it moves", "img_path": None, "modality": "text"}
    name = "motion_task10"
    write(mbeir / QUERY.format(name), [query])
    write(mbeir / QRELS.format(name), ["11:1 0 11:1 1 10"])
    write(mbeir / POOL.format(name), [text, clip])
    with (mbeir / TSV).open("a") as file:
        file.write("\nvideo\ttext\tMotion\t11\tDescribe it.")
    found = cells(mbeir)[name]
    assert (found.query_modality, found.target_modality) == ("video", "text")
    assert found.items == [{"text": None, "image": None, "instruction": "Describe it.",
                            "video": str(mbeir / "mbeir_images/q.webp")}]
    pool = Benchmark(mbeir).pool(mbeir / POOL.format(name))
    assert [pool[i] for i in range(2)] == [
        {"text": "it moves", "image": None},
        {"text": None, "image": None, "video": str(mbeir / "mbeir_images/c.webp")}]
    assert pool.modality.tolist() == [0, 3]
    for bad in ({"video_path": "../c.webp"}, {"video_path": "/c.webp"}, {"video_path": 3},
                {"img_path": "c.png"}):  # an image and a video
        write(mbeir / POOL.format(name), [text, clip | bad])
        (value,) = bad.values()
        with pytest.raises(ValueError, match=f"task10_cand_pool.jsonl:2: .*got .*{value}"):
            Benchmark(mbeir).pool(mbeir / POOL.format(name))


def test_limit_reads_the_first_queries_of_each_cell(original):
    found, whole = cells(original, limit=2), cells(original)
    for name, cell in found.items():
        assert cell.qids == whole[name].qids[:2] and cell.items == whole[name].items[:2]
        assert cell.relevant == whole[name].relevant[:2]


def test_qrels_decide_what_is_relevant_with_five_columns_or_four_and_grade_0_is_not(mbeir):
    lines = [f"0:{n} 0 0:{n} 1 0" for n in range(3, SIZE + 1)]
    more = ["0:1\t0\t0:2\t1", "", "0:1 0 0:1 0 0", "0:2 0 0:2 2 0", "0:2 0 0:1 1", "0:99 0 0:1 1 0"]
    write(mbeir / QRELS.format("visualnews_task0"), [*lines, *more, ""])
    relevant = cells(mbeir)["visualnews_task0"].relevant
    assert relevant[:3] == [keys("0:2"), keys("0:1", "0:2"), keys("0:3")]


def test_without_a_qrels_file_the_listed_positives_are_relevant_here_of_two_datasets(mbeir):
    (mbeir / QRELS.format("oven_task6")).unlink()
    assert cells(mbeir)["oven_task6"].relevant == [keys(f"5:{n}", f"6:{n}")
                                                   for n in range(601, 601 + SIZE)]


def test_a_query_id_that_occurs_twice_counts_once(mbeir):
    path = mbeir / QUERY.format("visualnews_task0")
    write(path, [*path.read_text().splitlines()[:2], path.read_text().splitlines()[0]])
    assert cells(mbeir)["visualnews_task0"].relevant == [keys("0:1"), keys("0:2")]


def test_the_zero_shot_split_is_marked_and_shares_the_global_test_pool(mbeir):
    name = "visualnews_task0"
    write(mbeir / QUERY.format(name).replace("test", "zero"), cell("visualnews", 0)[0])
    benchmark = Benchmark(mbeir)
    assert [cell.name for cell in benchmark.cells("zero")] == [f"zero_{name}"]
    test = mbeir / UNION_POOL.format("test")
    assert benchmark.global_pool_path("zero") == benchmark.global_pool_path("test") == test
    assert benchmark.global_pool_path("train") == mbeir / UNION_POOL.format("train")
    test.unlink()
    assert benchmark.global_pool_path("test") is None


def test_a_table_keeps_integers_skips_blank_lines_and_reads_a_row_when_asked(tmp_path):
    path = tmp_path / "t.jsonl"
    write(path, ["", '{"n": 1, "text": "öö"}\r', "  ", {"n": 2, "text": "b"}, "", ""])
    table = Table(path, lambda row: (row["n"], -row["n"]), "qb", "a row")
    assert [list(column) for column in table.columns] == [[1, 2], [-1, -2]]
    assert len(table) == 2 and list(table.numbers) == [2, 4]
    assert list(table) == [{"n": 1, "text": "öö"}, {"n": 2, "text": "b"}]
    path.write_bytes(path.read_bytes().replace(b'"b"', b'"c"'))
    assert table[1]["text"] == "c"


def test_a_text_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"ä": 1})
    assert json.loads(path.read_text()) == {"ä": 1}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, float("nan"))
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half\ud800")
    assert json.loads(path.read_text()) == {"ä": 1} and list(tmp_path.iterdir()) == [path]


# Instructions.


@pytest.mark.parametrize("written, expected", [
    ("  find it ", "Find it."), ("Find it.", "Find it."), ("which one?", "Which one?"),
    ("now!", "Now!"), ("e.g. this:", "E.g. this:."), ("find the US flag", "Find the US flag."),
])
def test_an_instruction_is_stripped_capitalised_and_ends_with_a_full_stop(written, expected):
    assert data.format_instruction(written) == expected


def test_an_instruction_is_one_of_its_dataset_and_modalities(mbeir):
    with (mbeir / TSV).open("a") as file:
        file.write("\nimage,text\ttext\tOVEN\t5\tName the entity.\t\n"
                   "text,image\tvideo\tFuture\t11\tFind the film.")
    benchmark = Benchmark(mbeir)
    assert benchmark.prompts[0, 1, 0] == ["Find it.", "Which one?", "So!"]
    assert benchmark.prompts[2, 0, 5] == ["Name the entity."]  # the empty column is no prompt
    assert benchmark.prompts[2, 3, 11] == ["Find the film."]  # "text,image" is "image,text"
    row = cell("visualnews", 0)[0][0]
    drawn = {benchmark.query_item(row | {"qid": f"0:{n}"}, 1)["instruction"] for n in range(50)}
    assert drawn == set(benchmark.prompts[0, 1, 0])


def test_row_18_the_instruction_follows_from_seed_and_query_id_whatever_the_order(original):
    rows = [cell("visualnews", 0)[0][0] | {"qid": f"0:{n}"} for n in range(40)]

    def draw(seed, rows, salt=""):
        benchmark = Benchmark(original, seed)
        return {row["qid"]: benchmark.query_item(row, 1, salt)["instruction"] for row in rows}

    assert draw(0, rows) == draw(0, rows[::-1]) == draw(0, rows)
    assert draw(0, rows[7:9]).items() <= draw(0, rows).items()
    assert draw(0, rows) != draw(1, rows) and draw(0, rows) != draw(0, rows, salt=3)


# What is refused by training and evaluation, and named by the checker.

NEWS = "visualnews_task0"  # query 0:n has the candidate 0:n
REFUSED = {  # file, line, what is replaced there by what, what must be said of that line
    "JSON": (POOL.format("webqa_task1"), 2, '{"did"', '{"did', "expected a candidate, a JSON obj"),
    "not UTF-8": (QUERY.format(NEWS), 3, "query 3", b"\xff", "expected a query, a JSON object"),
    "lone surrogate": (QUERY.format(NEWS), 3, "query 3", "\\ud800", "expected .*valid Unicode"),
    "deep nesting": (UNION, 3, "[]", "[" * 10**5, "expected a query, a JSON object .*recursion"),
    "a list": (QUERY.format(NEWS), 2, "{", "[1, 2]\n{", "expected a query, a JSON object"),
    "null": (POOL.format(NEWS), 1, "{", "null\n{", "expected a candidate, a JSON object"),
    "no qid": (QUERY.format("cirr_task7"), 4, '"qid"', '"id"', "expected a field 'qid'"),
    "bad qid": (QUERY.format(NEWS), 2, '"0:2"', '"0-2"', "expected an id like \"9:77\", got '0-2'"),
    "huge qid": (QUERY.format(NEWS), 2, '"0:2"', '"0:9999999999999"', "expected an id like"),
    "no did": (POOL.format(NEWS), 3, '"did"', '"id"', "expected a field 'did'"),
    "numeric did": (POOL.format(NEWS), 3, '"0:3"', "3", 'expected an id like "9:77", got 3$'),
    "no positives field": (UNION, 2, '"pos_cand_list"', '"x"', "expected a field 'pos_cand_list'"),
    "no positives": (QUERY.format(NEWS), 2, '["0:2"]', "[]", r"expected a list of ids.*got \[\]"),
    "positives no list": (QUERY.format(NEWS), 2, '["0:2"]', '"0:2"', "expected a list.*'0:2'"),
    "positive no id": (QUERY.format(NEWS), 2, '"0:2"]', '"0:2", "x"]', "expected an id .*got 'x'"),
    "positive null": (QUERY.format(NEWS), 2, '["0:2"]', '[{"id": "0:2"}]', "expected an id .*None"),
    "no modality": (POOL.format(NEWS), 2, '"modality"', '"x"', "expected a field 'modality'"),
    "modality": (QUERY.format("edis_task2"), 6, '"text"', '"audio"', "expected a modality out of "
                 "text, image, .*; got 'audio'"),
    "modality list": (POOL.format(NEWS), 2, '"image"', '["text"]', "expected a modality out of"),
    "no content": (POOL.format(NEWS), 2, '"mbeir_images/visualnews_candidate.png"', "null",
                   "expected a text or an image path or both, got None and None"),
    "text no string": (QUERY.format(NEWS), 1, '"query 1, ä"', '["a"]', r"expected .*got \['a'\]"),
    "outside": (POOL.format("nights_task4"), 1, "mbeir_images", "../x", "expected an image path "
                "inside the data directory, got '../x"),
    "upwards": (QUERY.format("nights_task4"), 1, "mbeir_images", "a/../..", "expected an image "
                "path inside the data directory"),
    "absolute": (POOL.format("nights_task4"), 1, "mbeir_images", "/etc", "expected an image path "
                 "inside the data directory"),
    "no positive in the pool": (UNION, 5, '["0:5"]', '["0:5555"]', "expected 0:5555 in .*train_c"),
    "qrels without 0": (QRELS.format("oven_task6"), 4, " 0 ", " ", "expected an id .*got '1'"),
    "short qrels": (QRELS.format("oven_task6"), 4, " 1 6", "", "expected `qid 0 did 1 task`"),
    "qrels grade": (QRELS.format(NEWS), 1, " 1 ", " yes ", "expected `qid 0 did 1 task`"),
    "huge grade": (QRELS.format(NEWS), 1, " 1 ", f" {'1' * 5000} ", "expected `qid 0 did 1 task`"),
    "no qrels did": (QRELS.format(NEWS), 1, " 0:1 ", " 1 ", "expected an id like"),
    "TSV spaces": (TSV, 2, "\t", " ", "expected a modality out of .*got 'text image'"),
    "TSV without prompt": (TSV, 8, " find it \tWhich one?\tso!", "\t", "expected query modality"),
    "TSV dataset": (TSV, 2, "\t0\t", "\tone\t", "expected query modality, .*'one'"),
    "TSV modality": (TSV, 3, "text\t", "smell\t", "expected a modality out of .*got 'smell'"),
    "TSV not UTF-8": (TSV, 2, "find", b"\xff", "expected query modality"),
}
NAMED = {  # only the checker looks at these
    "positive": (QUERY.format(NEWS), 5, '"0:5"]', '"0:5", "0:55"]', "expected 0:55 in .*test_c"),
    "negative": (QUERY.format("cirr_task7"), 4, '"8:701"', '"8:1"', "expected 8:1 in .*test_cand"),
    "negative no id": (UNION, 4, '"0:1"', '"0"', "expected an id like \"9:77\", got '0'"),
    "image": (POOL.format("nights_task4"), 3, "nights_c", "x", "expected an image that can be read,"
              " mbeir_images/xandidate.png is not: .*No such file"),
    "query image": (QUERY.format("oven_task8"), 1, "oven_q", "x", "mbeir_images/xuery.png is not"),
    "instructions": (UNION, 1, '"0:1", "query_txt"', '"3:1", "query_txt"',
                     "expected prompts for dataset 3, text -> image in .*query_instructions.tsv"),
    "qrels did": (QRELS.format("mscoco_task3"), 2, " 9:302 ", " 9:7 ", "expected 9:7 in .*test_c"),
    "qrels qid": (QRELS.format("oven_task6"), 3, "5:602 ", "5:1 ", "expected a query .*, got 5:1$"),
    "did twice": (POOL.format(NEWS), 4, '"0:4"', '"0:2"', "expected each id once, 0:2 came before"),
    "qid twice": (QUERY.format(NEWS), 4, '"0:4"', '"0:2"', "expected each id once, 0:2 came"),
}


@pytest.mark.parametrize("name", [*REFUSED, *NAMED])
def test_a_broken_line_is_named_with_file_line_and_what_was_expected(mbeir, check, name):
    file, number, old, new, message = {**REFUSED, **NAMED}[name]
    edit(mbeir / file, number, old, new)
    if name in REFUSED:
        with pytest.raises(ValueError) as error:
            read_everything(mbeir)
        expected = rf"{re.escape(f'{mbeir / file}:{number}: ')}{message}"
        assert re.match(expected, str(error.value)) and "\n" not in str(error.value), error.value
    status, lines, _ = check(mbeir, "--show", 100)
    named = [line for line in lines if line.startswith(f"{mbeir / file}:{number}: ")]
    assert status == 1 and len(named) == 1 and re.search(f" {message}", named[0]), lines


def test_files_without_a_line_or_without_what_belongs_to_them_are_named(mbeir, check):
    odd = "query/test/mbeir_x_task11_test.jsonl"
    broken = {  # file -> what becomes of it, what is said of which file
        QUERY.format("cirr_task7"): ("\n", "expected a query, a JSON object on each line, found"),
        POOL.format("edis_task2"): ("", "expected a candidate, a JSON object on each line"),
        POOL.format("webqa_task2"): (None, "expected the candidate pool of mbeir_webqa_task2_test"),
        QRELS.format("nights_task4"): ("4:401 0 4:401 1", "expected a relevant .* for 4:402"),
        odd: ("", r"expected a task out of \[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10\]"),
    }
    for file, (text, message) in broken.items():
        before = (mbeir / file).read_text() if file != odd else None
        (mbeir / file).unlink() if text is None else (mbeir / file).write_text(text)
        with pytest.raises(ValueError, match=f"{mbeir / file}: {message}"):
            read_everything(mbeir)
        (mbeir / file).unlink() if before is None else (mbeir / file).write_text(before)
    for file, (text, _) in broken.items():
        (mbeir / file).unlink() if text is None else (mbeir / file).write_text(text)
    status, lines, _ = check(mbeir, "--show", 100)
    assert status == 1
    for start in (
        f"{QUERY.format('webqa_task2')}: {mbeir / POOL.format('webqa_task2')}: expected the cand",
        f"{POOL.format('edis_task2')}: expected a candidate, a JSON object on each line, found no",
        f"{QUERY.format('cirr_task7')}: expected a query, a JSON object on each line, found no",
        f"{QUERY.format('nights_task4')}:2: expected a positive of 4:402 in ",
        f"{odd}: expected a task out of [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]",
    ):
        assert any(line.startswith(f"{mbeir}/{start}") for line in lines), (start, lines)


@pytest.mark.parametrize("missing", [TSV, UNION, UNION_POOL.format("train")])
def test_a_missing_file_is_named(mbeir, missing):
    (mbeir / missing).unlink()
    with pytest.raises((ValueError, OSError)) as error:
        read_everything(mbeir)
    named = mbeir / "query/union_train" if missing == UNION else mbeir / missing
    assert str(named) in str(error.value)
    assert re.search("expected 1 .jsonl file, got 0|No such file", str(error.value))


def test_what_is_no_mbeir_directory_is_said_in_one_line(mbeir, check):
    for folder in ("query", "cand_pool", "instructions"):
        (mbeir / folder).rename(mbeir / "elsewhere")
        status, lines, error = check(mbeir)
        assert status == 2 and not lines and error.count("\n") == 1
        assert f"error: {mbeir} is no M-BEIR directory: expected the folder {folder}" in error
        (mbeir / "elsewhere").rename(mbeir / folder)
    shutil.rmtree(mbeir / "query")
    (mbeir / "query").mkdir()
    assert "expected files query/<split>/*.jsonl, found none" in check(mbeir)[2]
    with pytest.raises(ValueError, match=r"query/val: expected files mbeir_<dataset>_task<T>_val"):
        Benchmark(mbeir).cells("val")


def test_two_training_files_are_refused_and_a_dataset_without_prompts_is_named(mbeir):
    shutil.copy(mbeir / UNION, (mbeir / UNION).with_name("second.jsonl"))
    with pytest.raises(ValueError, match="union_train: expected 1 .jsonl file, got 2"):
        read_everything(mbeir)
    edit(mbeir / TSV, 2, "\t0\t", "\t7\t")
    with pytest.raises(ValueError, match=f"dataset 0, text -> image in {mbeir / TSV}"):
        cells(mbeir)


def test_an_image_that_a_link_leads_out_of_the_directory_is_refused(mbeir, check):
    (mbeir / "mbeir_images").rename(mbeir.parent / "images")
    (mbeir / "mbeir_images").symlink_to(mbeir.parent / "images")
    with pytest.raises(ValueError, match="expected an image inside the data dir.* leads out"):
        cells(mbeir)
    status, lines, _ = check(mbeir)
    assert status == 1 and any("nights_candidate.png leads out" in line for line in lines)
    (mbeir / "mbeir_images").unlink()
    (mbeir.parent / "images").rename(mbeir / "images")
    (mbeir / "mbeir_images").symlink_to(mbeir / "images")  # within the directory a link is fine
    assert check(mbeir)[0] == 0 and cells(mbeir)


# What the checker counts.


def test_a_clean_directory_gives_a_line_a_file_and_status_0_also_as_a_command(original):
    command = [sys.executable, ROOT / "data.py", original]
    run = subprocess.run(command, capture_output=True, text=True)
    *table, last = run.stdout.splitlines()
    assert run.returncode == 0, run.stderr + run.stdout
    counts = {line.split()[0]: line.split()[1:] for line in table}
    files = {str(path.relative_to(original)) for path in original.rglob("*.jsonl")}
    assert set(counts) == files and counts[UNION] == [str(18 * SIZE), "lines", "0", "problems"]
    images = len(list((original / "mbeir_images").iterdir()))
    assert last.endswith(f" lines, {images} images, 0 problems")


def test_problems_are_counted_by_file_and_only_some_are_shown(mbeir, check):
    path = mbeir / POOL.format("cirr_task7")
    for number in range(1, SIZE + 1):
        edit(path, number, "cirr_candidate", f"none{number}")
    status, lines, _ = check(mbeir, "--show", 2)
    assert status == 1 and lines[-1].endswith(f" {SIZE} problems")
    row = next(line for line in lines if line.startswith(POOL.format("cirr_task7")))
    assert row.split()[-2:] == [str(SIZE), "problems"]
    assert [line for line in lines if "can be read" in line] == lines[-4:-2]
    assert lines[-2] == "... and 4 more; --show shows as many as you like"
    assert check(mbeir, "--images", "none")[0] == 0


def test_one_text_that_holds_for_many_lines_is_shown_once(mbeir, check):
    edit(mbeir / TSV, 11, "\t4\t", "\t44\t")  # no prompts for NIGHTS
    status, lines, _ = check(mbeir)
    assert status == 1 and sum("expected prompts for dataset 4" in line for line in lines) == 1
    problems = SIZE + 3 * SIZE  # of the cell, and of the up-sampled training set
    assert int(lines[-1].split()[-2]) >= problems and "more; --show" in lines[-2]


def test_a_query_whose_pool_lacks_all_its_positives_cannot_be_answered(mbeir, check):
    path = mbeir / POOL.format("oven_task6")  # the global pool still has them
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    expected = f"{mbeir / QUERY.format('oven_task6')}:1: expected a positive of 5:601 in {path}"
    for _ in range(2):
        status, lines, _ = check(mbeir)
        assert status == 1 and lines[-1].endswith(" 1 problems") and lines[-2] == expected
        (mbeir / QRELS.format("oven_task6")).unlink(missing_ok=True)  # then the listed ones count


def test_the_checker_does_without_a_global_pool_and_says_which_pool_is_missing(mbeir, check):
    (mbeir / UNION_POOL.format("test")).unlink()
    for name in ("oven_task6", "infoseek_task6", "oven_task8", "infoseek_task8"):
        for file in (QUERY, QRELS):
            (mbeir / file.format(name)).unlink()
    assert check(mbeir)[0] == 0
    (mbeir / UNION_POOL.format("train")).unlink()
    expected = f"{mbeir / UNION}: expected a global or local pool of its candidates"
    assert check(mbeir)[1][-2] == expected


def test_a_modality_that_contradicts_the_content_is_said_once(mbeir, check, capsys):
    path = mbeir / POOL.format("cirr_task7")
    for number in (2, 4):
        edit(path, number, '"modality": "image"', '"modality": "text"')
    said = f"{path}:2: a candidate is text but has image; 2 such lines"
    assert Benchmark(mbeir).cells("test") and Benchmark(mbeir).pool(path)
    assert capsys.readouterr().err == f"warning: {said}\n"
    status, lines, _ = check(mbeir)
    assert status == 1 and said in lines


def test_an_image_cut_short_passes_by_its_header_and_not_when_decoded(mbeir, check):
    cut = mbeir / "mbeir_images/edis_candidate.png"
    cut.write_bytes(cut.read_bytes()[:2000])
    assert check(mbeir, "--images", "header")[0] == 0
    for options, text in (([], "cannot read image"), (["--images", "header"], "cannot identify")):
        status, lines, _ = check(mbeir, *options)
        assert status == 1 and lines[-1].endswith(" 1 problems")
        assert f"mbeir_images/edis_candidate.png is not: {text}" in lines[-2]
        cut.write_text("no image")


# Training batches.

SIZES = {0: 31, 1: 12, 5: 7, 4: 23}  # dataset -> queries, each of another modality pair


def query(qid, text, image, positives):
    modality = ",".join(kind for kind, value in (("image", image), ("text", text)) if value)
    return {"qid": qid, "query_txt": text, "query_img_path": image, "query_modality": modality,
            "pos_cand_list": positives}


@pytest.fixture
def training(tmp_path):
    """A training directory of four groups; every query lists two of its dataset's candidates."""
    queries, pool = [], []
    for dataset, size in SIZES.items():
        for n in range(size):
            text = None if dataset == 4 else f"query {dataset}:{n}"
            image = f"{dataset}-{n}.jpg" if dataset in (4, 5) else None
            dids = [f"{dataset}:{n}", f"{dataset}:{(n + 1) % size}"]
            queries.append(query(f"{dataset}:{n}", text, image, dids))
            candidate = ({"txt": f"text {n}", "modality": "text"} if dataset == 5 else
                         {"img_path": f"c{dataset}-{n}.jpg", "modality": "image"})
            pool.append({"did": f"{dataset}:{n}", **candidate})
    queries[3]["pos_cand_list"].append("0:99")  # in no pool: never drawn
    write(tmp_path / TSV, [HEADER, "text\timage\tA\t0\ta\tb\tc", "text\timage\tB\t1\ta",
                           "image,text\ttext\tC\t5\ta", "image\timage\tD\t4\ta"])
    write(tmp_path / UNION, queries)
    write(tmp_path / UNION_POOL.format("train"), pool)
    return tmp_path


def ids(batch):
    """The query ids of a batch, from what its items hold."""
    return [
        item["text"].removeprefix("query ") if item["text"]
        else re.search(r"(\d+-\d+)\.jpg", item["image"])[1].replace("-", ":")
        for item in batch["queries"]
    ]


def same(one, other):
    return all(torch.equal(v, other[k]) if isinstance(v, torch.Tensor) else v == other[k]
               for k, v in one.items())


def test_a_batch_is_the_same_alone_in_sequence_and_for_a_new_object_with_the_seed(training):
    benchmark = Benchmark(training)
    one, other = (TrainSet(benchmark, batch_size=8, steps=30, seed=5) for _ in range(2))
    in_sequence = [one[step] for step in range(len(one))]
    assert len(in_sequence) == 30
    for step in (29, 0, 17, 17):
        assert same(in_sequence[step], other[step])
    longer = TrainSet(benchmark, batch_size=8, steps=50, seed=5)
    assert same(longer[17], other[17])  # how many steps follow does not matter
    third = TrainSet(benchmark, batch_size=8, steps=30, seed=6)
    assert ids(third[0]) != ids(one[0])


@pytest.mark.parametrize("batch_size, count, parts", [
    (9, 3, [3, 3, 3]), (10, 3, [4, 3, 3]), (8, 1, [8]), (6, 2, [3, 3]), (8, 9, [2, 2, 2, 2]),
    (8, 0, [2, 2, 2, 2]),
])
def test_row_21_a_batch_mixes_groups_in_equal_parts(training, batch_size, count, parts):
    batches = TrainSet(Benchmark(training), batch_size, steps=40, tasks_per_batch=count, seed=1)
    seen = Counter()
    for batch in batches:
        groups = Counter(int(qid.split(":")[0]) for qid in ids(batch))
        assert sorted(groups.values(), reverse=True) == parts
        seen.update(groups.keys())
    assert set(seen) == set(SIZES)
    if 0 < count < 3:
        assert seen[0] > seen[5]  # drawn by size: 31 against 7


def test_groups_differ_in_modality_as_well_as_in_dataset(training):
    queries = [query(f"0:{n}", None, f"0-{n}.jpg", ["0:0"]) for n in range(1, 31)]
    write(training / UNION, [*queries, query("0:0", "query 0:0", None, ["0:0"])])
    more = "image\timage\tA\t0\tFind it."
    write(training / TSV, [*(training / TSV).read_text().splitlines(), more])
    for batch in TrainSet(Benchmark(training), batch_size=4, steps=20, tasks_per_batch=2):
        assert ids(batch).count("0:0") == 2


def test_within_a_group_no_query_comes_again_before_all_have_come(training):
    drawn = {dataset: [] for dataset in SIZES}
    for batch in TrainSet(Benchmark(training), batch_size=9, steps=60, seed=2):
        for qid in ids(batch):
            drawn[int(qid.split(":")[0])].append(qid)
    for dataset, size in SIZES.items():
        everything = {f"{dataset}:{n}" for n in range(size)}
        rounds = [drawn[dataset][i : i + size] for i in range(0, len(drawn[dataset]), size)]
        assert len(rounds) > 2
        assert all(set(full) == everything for full in rounds[:-1])
        assert len(set(rounds[-1])) == len(rounds[-1])
        assert rounds[0] != rounds[1], "each round has an order of its own"


@pytest.mark.parametrize("labels", [1, 10, 73, 1000])
@pytest.mark.parametrize("copies", [1, 3])
def test_labels_n_uses_exactly_n_queries_however_often_they_come(training, labels, copies):
    write(training / UNION, (training / UNION).read_text().splitlines() * copies)

    def used(seed):
        found = [{qid for batch in TrainSet(Benchmark(training, seed), 9, steps=60, seed=stage,
                                            labels=labels) for qid in ids(batch)}
                 for stage in range(2)]
        assert found[0] == found[1]  # both stages of a run see the same labels
        return found[0]

    assert len(used(0)) == min(labels, sum(SIZES.values()))
    assert used(0) != used(1) or labels > 72


def test_targets_are_listed_positives_with_their_keys_and_modality(training):
    benchmark = Benchmark(training)
    union = {row["qid"]: row for row in map(json.loads, (training / UNION).open())}
    picked, patterns = {}, set()
    for batch in TrainSet(benchmark, batch_size=9, steps=60):
        qids = ids(batch)
        for i, qid in enumerate(qids):
            dataset, positives = int(qid.split(":")[0]), union[qid]["pos_cand_list"]
            did = did_text(int(batch["target_keys"][i]))
            assert did in positives and did != "0:99"
            assert batch["positive_keys"][i] == [did_key(did) for did in positives]
            assert batch["modality"][i] == (0 if dataset == 5 else 1)
            number = did.split(":")[1]
            assert batch["targets"][i] == (
                {"text": f"text {number}", "image": None} if dataset == 5
                else {"text": None, "image": str(training / f"c{dataset}-{number}.jpg")}
            )
            assert batch["queries"][i]["instruction"] in benchmark.prompts[
                {4: 1, 5: 2}.get(dataset, 0), 0 if dataset == 5 else 1, dataset]
            picked.setdefault(qid, set()).add(did)
        first = zip(batch["target_keys"].tolist(), batch["positive_keys"])
        patterns.add(tuple(key == positives[0] for key, positives in first))
    assert any(len(dids) == 2 for dids in picked.values()), "the positive is drawn anew"
    assert "0:0" in set.union(*picked.values()), "the pool's first line as well"
    assert len(patterns) > 10, "and otherwise in each step"
    assert batch["modality"].dtype == batch["target_keys"].dtype == torch.int64


def test_a_query_draws_its_instruction_anew_in_each_step(training):
    drawn = {}
    for batch in TrainSet(Benchmark(training), batch_size=9, steps=60):
        for qid, item in zip(ids(batch), batch["queries"]):
            drawn.setdefault(qid, set()).add(item["instruction"])
    assert max(map(len, drawn.values())) == 3


def test_duplicate_mask_agrees_with_a_double_loop():
    generator = torch.Generator().manual_seed(0)
    for queries, targets, known in ((1, 1, 1), (6, 6, 4), (5, 17, 6), (40, 40, 30)):
        keys = torch.randint(0, known, (targets,), generator=generator) + (10 << 40)
        counts = torch.randint(1, 4, (queries,), generator=generator).tolist()
        positives = [(torch.randint(0, known, (count,), generator=generator) + (10 << 40)).tolist()
                     for count in counts]
        expected = torch.zeros(queries, targets, dtype=torch.bool)
        for i in range(queries):
            for j in range(targets):
                expected[i, j] = int(keys[j]) in positives[i]
        mask = duplicate_mask(positives, keys)
        assert mask.dtype == torch.bool and torch.equal(mask, expected)


def test_duplicate_mask_marks_a_repeated_target_and_a_second_listed_positive():
    mask = duplicate_mask([[1], [2, 3], [1]], torch.tensor([1, 2, 1, 3]))
    assert mask.tolist() == [
        [True, False, True, False], [False, True, False, True], [True, False, True, False]
    ]
