"""A generated M-BEIR: the 16 cells under their real names, with every trap of method.md, section 6;
read by `Benchmark` and `TrainSet`, and checked by `python data.py DIR`."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image

import check_data
from data import MODALITIES, TASKS, Benchmark, TrainSet, did_key

DATASETS = ["visualnews", "fashion200k", "webqa", "edis", "nights", "oven", "infoseek", "fashioniq",
            "cirr", "mscoco"]  # the index is the dataset id
CELLS = [("visualnews", 0), ("mscoco", 0), ("fashion200k", 0), ("webqa", 1), ("edis", 2),
         ("webqa", 2), ("visualnews", 3), ("mscoco", 3), ("fashion200k", 3), ("nights", 4),
         ("oven", 6), ("infoseek", 6), ("fashioniq", 7), ("cirr", 7), ("oven", 8), ("infoseek", 8)]
SIZE = 6  # queries, and candidates, of a cell


def row_of(kind, dataset, number, modality):
    """Text and image path of a row; its image is written later."""
    text = f"{kind} {number}" if "text" in modality else None
    image = f"mbeir_images/{dataset}_images/{kind}/{number}.png" if "image" in modality else None
    return text, image


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("mbeir")
    files, union, train = {}, [], []
    instructions = ["query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2"]
    for dataset, task in CELLS:
        wanted, found = TASKS[task]
        number = DATASETS.index(dataset)
        instructions.append(f"{wanted}\t{found}\t{dataset}\t{number}\tfind it\tWhich one?")
        pool, queries, qrels = [], [], []
        for n in range(100 * task + 1, 100 * task + 1 + SIZE):
            text, image = row_of("candidate", dataset, n, found)
            pool.append({"did": f"{number}:{n}", "txt": text, "img_path": image,
                         "modality": found, "src_content": None})
            text, image = row_of("query", dataset, n, wanted)
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
        queries[3]["neg_cand_list"] = [pool[0]["did"], {"did": pool[1]["did"]}]
        cell = f"mbeir_{dataset}_task{task}"
        files[f"query/test/{cell}_test.jsonl"] = queries
        files[f"qrels/test/{cell}_test_qrels.txt"] = qrels
        if dataset == "mscoco":  # the name without a split has the training images as well
            more = [{**row, "did": f"9:{9000 + i}"} for i, row in enumerate(pool)]
            files[f"cand_pool/local/{cell}_cand_pool.jsonl"] = pool + more
            files[f"cand_pool/local/{cell}_test_cand_pool.jsonl"] = pool
        else:
            files[f"cand_pool/local/{cell}_cand_pool.jsonl"] = pool
        union += pool
        train += queries * (3 if dataset == "nights" else 1)  # up-sampled
    files["cand_pool/global/mbeir_union_test_cand_pool.jsonl"] = union
    files["cand_pool/global/mbeir_union_train_cand_pool.jsonl"] = union
    files["query/union_train/mbeir_union_up_train.jsonl"] = train
    files["query/train/mbeir_nights_train.jsonl"] = [q for q in train if q["qid"] < "5"][-SIZE:]
    files["instructions/query_instructions.tsv"] = instructions
    for name, lines in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    for row in union + train:
        image = root / (row.get("img_path") or row.get("query_img_path") or "no.png")
        image.parent.mkdir(parents=True, exist_ok=True)
        if not image.exists():
            Image.new("L", (8, 8)).save(image)
    return root


@pytest.fixture
def mbeir(original, tmp_path):
    """A copy to break; the images of the original, by a link."""
    for path in original.rglob("*.*"):
        if path.suffix != ".png":
            copy = tmp_path / path.relative_to(original)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    (tmp_path / "mbeir_images").symlink_to(original / "mbeir_images")
    return tmp_path


@pytest.fixture
def check(monkeypatch, capsys):
    """check(directory, *options) -> (exit status, lines printed, error output)"""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            check_data.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out.splitlines(), captured.err

    return run


def edit(path, number, change):
    """Replace line `number` of a file by `change(line)`."""
    lines = path.read_text().splitlines(keepends=True)
    lines[number - 1] = change(lines[number - 1])
    path.write_text("".join(lines))


# What is read.


def test_all_16_cells_are_found_with_their_pool_instruction_and_relevance(original):
    cells = {cell.name: cell for cell in Benchmark(original).cells("test")}
    assert set(cells) == {f"{dataset}_task{task}" for dataset, task in CELLS}
    for dataset, task in CELLS:
        cell, number = cells[f"{dataset}_task{task}"], DATASETS.index(dataset)
        part = "_test" if dataset == "mscoco" else ""
        assert cell.pool_path.name == f"mbeir_{dataset}_task{task}{part}_cand_pool.jsonl"
        assert len(Benchmark(original).pool(cell.pool_path)) == SIZE
        both = dataset in ("oven", "infoseek")
        for qid, item, relevant in zip(cell.qids, cell.items, cell.relevant):
            own = qid.split(":")[1]
            assert relevant == {did_key(f"{n}:{own}") for n in ((5, 6) if both else (number,))}
            assert item["instruction"] in ("Find it.", "Which one?")
            assert bool(item["text"]) == ("text" in TASKS[task][0])
            assert bool(item["image"]) == ("image" in TASKS[task][0])


def test_training_draws_targets_of_both_datasets_with_the_modality_that_the_pool_names(original):
    batches = TrainSet(Benchmark(original), batch_size=16, steps=40, tasks_per_batch=4)
    drawn, pairs = set(), set()
    for batch in batches:
        for query, keys, key, modality in zip(batch["queries"], batch["positive_keys"],
                                              batch["target_keys"].tolist(), batch["modality"]):
            assert key in keys
            drawn.add((len(keys), keys.index(key)))
            kind = ",".join(kind for kind in ("image", "text") if query[kind])
            pairs.add((kind, MODALITIES[modality]))
    assert drawn == {(1, 0), (2, 0), (2, 1)}
    assert pairs == set(TASKS.values())


# What is checked.


def test_a_clean_directory_gives_a_line_a_cell_and_status_0(original, check):
    status, lines, _ = check(original)
    assert status == 0, lines
    table = {line.split()[0]: line.split()[1:] for line in lines[1:-1]}
    for dataset, task in CELLS:
        positives = 2 * SIZE if dataset in ("oven", "infoseek") else SIZE
        assert table[f"test/{dataset}_task{task}"] == [str(SIZE), str(positives), str(SIZE), "0"]
    assert table["union_train/union_up_train"] == [str(18 * SIZE), str(22 * SIZE), "96", "0"]
    assert "cand_pool/local/mbeir_mscoco_task0_cand_pool" in table
    assert lines[-1].endswith(" 0 problems")
    images = len(list((original / "mbeir_images").rglob("*.png")))
    assert f" {images:,} images" in lines[-1]


POOL = "cand_pool/local/mbeir_{}_cand_pool.jsonl"
QUERY = "query/test/mbeir_{}_test.jsonl"
QRELS = "qrels/test/mbeir_{}_test_qrels.txt"
UNION = "query/union_train/mbeir_union_up_train.jsonl"
BROKEN = {  # file, line, what is replaced there by what, what must be reported for that line
    "JSON": (POOL.format("webqa_task1"), 2, '{"did"', '{"did', "expected a candidate, a JSON obj"),
    "field": (QUERY.format("cirr_task7"), 4, '"qid"', '"id"', "expected a field 'qid'"),
    "modality": (QUERY.format("edis_task2"), 6, '"text"', '"audio"', "expected a modality out of"),
    "positive": (UNION, 5, '["0:5"]', '["0:5555"]', "expected the positive 0:5555 in a can"),
    "negative": (QUERY.format("fashioniq_task7"), 4, '"7:701"', '"7:1"', "the negative 7:1 in a c"),
    "image": (POOL.format("nights_task4"), 3, "candidate/403.png", "candidate/1403.png",
              "expected the image mbeir_images/nights_images/candidate/1403.png, which does not"),
    "query image": (QUERY.format("oven_task8"), 1, "query/801.png", "query/1801.png",
                    "expected the image mbeir_images/oven_images/query/1801.png, which does not"),
    "outside": (POOL.format("nights_task4"), 1, "mbeir_images", "../x",
                "expected an image path inside the data directory"),
    "instructions": (UNION, 1, '"0:1", "query_txt"', '"3:1", "query_txt"',
                     "query_instructions.tsv for dataset 3, text -> image"),
    "qrels did": (QRELS.format("mscoco_task3"), 2, " 9:302 ", " 9:7 ", "expected 9:7 in a cand"),
    "qrels qid": (QRELS.format("oven_task6"), 3, "5:602 ", "5:1 ",
                  "expected a query of .*, got 5:1$"),
    "qrels line": (QRELS.format("oven_task6"), 4, " 0 ", " ", "expected `qid 0 did 1 task`"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_named_with_file_line_and_what_was_expected(mbeir, check, name):
    file, number, old, new, message = BROKEN[name]
    line = (mbeir / file).read_text().splitlines()[number - 1]
    assert old in line
    edit(mbeir / file, number, lambda line: line.replace(old, new, 1))
    status, lines, _ = check(mbeir)
    named = [line for line in lines if line.startswith(f"{mbeir / file}:{number}: ")]
    assert status == 1 and len(named) == 1 and re.search(message, named[0]), lines


def test_problems_are_counted_in_the_cells_line_and_only_some_are_shown(mbeir, check):
    path = mbeir / POOL.format("cirr_task7")
    path.write_text(path.read_text().replace("candidate/7", "candidate/17"))
    status, lines, _ = check(mbeir, "--show", 2)
    assert status == 1
    assert [line for line in lines if line.startswith("test/cirr_task7 ")][0].split()[-1] == "6"
    assert sum("expected the image" in line for line in lines) == 2
    assert "... and 4 more" in lines[-2] and lines[-1].endswith(" 6 problems")
    assert check(mbeir, "--images", "none")[0] == 0


def test_a_query_whose_pool_lacks_all_its_positives_cannot_be_answered(mbeir, check):
    path = mbeir / POOL.format("oven_task6")  # the global pool still has them
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    status, lines, _ = check(mbeir)
    assert status == 1 and lines[-1].endswith(" 1 problems")
    where = QRELS.format("oven_task6")
    assert f"{where}: expected a relevant candidate of query 5:601 in " in lines[-2]
    (mbeir / QRELS.format("oven_task6")).unlink()  # then the listed positives count
    status, lines, _ = check(mbeir)
    assert status == 1 and lines[-1].endswith(" 1 problems")
    assert f"{QUERY.format('oven_task6')}:1: expected a positive in " in lines[-2]


def test_an_image_cut_short_passes_by_its_header_and_not_when_decoded(mbeir, check):
    (mbeir / "mbeir_images").unlink()
    whole, cut = (mbeir / f"mbeir_images/{name}.png" for name in ("whole", "cut"))
    for file in mbeir.rglob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            for key in {"img_path", "query_img_path"} & set(row):
                row[key] = row[key] and f"mbeir_images/{'cut' if row is rows[0] else 'whole'}.png"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole.parent.mkdir()
    Image.effect_noise((64, 64), 50).save(whole)
    cut.write_bytes(whole.read_bytes()[:2000])
    assert check(mbeir)[0] == 0
    status, lines, _ = check(mbeir, "--images", "full")
    assert status == 1 and "cut.png is not: " in lines[-2] and lines[-1].endswith(" 1 problems")
    cut.write_text("no image")
    status, lines, _ = check(mbeir)
    assert status == 1 and "cut.png is not: cannot identify" in lines[-2]


def test_missing_pools_empty_files_and_odd_names_are_problems_of_their_file(mbeir, check):
    (mbeir / POOL.format("webqa_task2")).unlink()
    (mbeir / POOL.format("edis_task2")).write_text("\n")
    (mbeir / QUERY.format("cirr_task7")).write_text("")
    (mbeir / "query/test/mbeir_x_task5_test.jsonl").write_text("")
    status, lines, _ = check(mbeir, "--show", 100)
    assert status == 1
    pool = mbeir / POOL.format("webqa_task2")
    for file, message in (
        (QUERY.format("webqa_task2"), f"{pool}: expected the candidate pool of mbeir_webqa_task2_"),
        (POOL.format("edis_task2"), "expected a candidate on each line, found no line"),
        (QUERY.format("cirr_task7"), "expected a query on each line, found no line"),
        ("query/test/mbeir_x_task5_test.jsonl", "expected a task out of [0, 1, 2, 3, 4, 6, 7, 8]"),
    ):
        assert any(line.startswith(f"{mbeir / file}: {message}") for line in lines), (file, lines)


def test_line_numbers_and_counts_are_the_same_in_small_parts_and_several_processes(
    mbeir, check, monkeypatch
):
    for name in ("positive", "image", "qrels did", "field"):
        file, number, old, new, _ = BROKEN[name]
        edit(mbeir / file, number, lambda line, old=old, new=new: line.replace(old, new, 1))
    whole = check(mbeir)
    assert whole[0] == 1 and whole[1][-1].endswith(" 6 problems"), whole
    monkeypatch.setattr(check_data, "PART", 300)  # bytes: a line or two
    assert check(mbeir, "--processes", 1) == whole
    assert check(mbeir, "--processes", 2) == whole


def test_what_is_no_mbeir_directory_gives_one_line_and_status_2(tmp_path, check):
    for arguments in ([tmp_path], [tmp_path / "nowhere"]):
        status, lines, error = check(*arguments)
        assert status == 2 and not lines and error.count("\n") == 1
        assert "is no M-BEIR directory: expected the folder query" in error


def test_data_py_is_the_command(original):
    command = [sys.executable, ROOT / "data.py", original]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.endswith(" 0 problems\n"), run.stderr
