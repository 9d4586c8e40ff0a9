"""The M-BEIR reader on small hand-written directories; method.md, section 6."""

import json
import random
import re
from collections import Counter

import pytest
import torch

import data
from data import Benchmark, TrainSet, did_key, did_text, duplicate_mask
from lines import Table

HEADER = "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2\tprompt_3"
INSTRUCTIONS = [
    HEADER,
    "text\timage\tVisualNews\t0\t  find a picture of the event \tWhich image shows it?\tshow it!",
    "text\timage\tMSCOCO\t9\tfind the captioned picture",
    "image,text\ttext\tOVEN\t5\tName the entity.\t",
    "image,text\ttext\tInfoSeek\t6\tAnswer the question.",
    "image\timage\tNIGHTS\t4\tFind a similar picture.",
    "text,image\tvideo\tFuture\t11\tFind the film.",
]
NEWS = "visualnews_task0"
TSV = "instructions/query_instructions.tsv"
QUERIES = f"query/test/mbeir_{NEWS}_test.jsonl"
QRELS = f"qrels/test/mbeir_{NEWS}_test_qrels.txt"
LOCAL = f"cand_pool/local/mbeir_{NEWS}_cand_pool.jsonl"
UNION = "query/union_train/mbeir_union_up_train.jsonl"
UNION_POOL = "cand_pool/global/mbeir_union_train_cand_pool.jsonl"


def query(qid, text=None, image=None, positives=(), **more):
    modality = ",".join(kind for kind, value in (("image", image), ("text", text)) if value)
    return {"qid": qid, "query_txt": text, "query_img_path": image, "query_modality": modality,
            "query_src_content": None, "pos_cand_list": list(positives), "neg_cand_list": [],
            **more}


def candidate(did, text=None, image=None, **more):
    modality = ",".join(kind for kind, value in (("image", image), ("text", text)) if value)
    return {"did": did, "txt": text, "img_path": image, "modality": modality, **more}


def write(path, lines):
    """Lines, each a str or something to write as JSON. The last one ends without a newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in lines]
    path.write_text("\n".join(texts), encoding="utf-8")


# file -> lines, of a directory with every variant that real M-BEIR files have
FILES = {
    TSV: INSTRUCTIONS,
    QUERIES: [
        query("0:7", "a räce", positives=["0:2"], task_id=0),
        query("0:5", "a vote", positives=["0:1", "0:3"], query_src_content="BBC"),  # no task_id
    ],
    QRELS: ["0:5 0 0:1 1 0", "0:7 0 0:2 1 0", "0:5 0 0:3 1 0"],
    LOCAL: [
        candidate("0:1", image="mbeir_images/1.jpg", src_content=None),
        candidate("0:2", image="mbeir_images/2.jpg"),
        candidate("0:3", image="mbeir_images/3.jpg", txt=""),
    ],
    "query/test/mbeir_mscoco_task0_test.jsonl": [query("9:1", "a dog", positives=["9:4"])],
    "qrels/test/mbeir_mscoco_task0_test_qrels.txt": ["9:1 0 9:4 1"],  # TREC's four columns
    "cand_pool/local/mbeir_mscoco_task0_test_cand_pool.jsonl": [candidate("9:4", image="4.jpg")],
    "query/test/mbeir_oven_task6_test.jsonl": [  # as the dataset card says; no qrels
        query("5:1", "what is it?", "q.jpg", [{"did": "5:9"}, {"did": "6:2"}])
        | {"query_modality": "text,image"},
    ],
    "cand_pool/local/mbeir_oven_task6_cand_pool.jsonl": [
        candidate("5:9", "Crane (bird)"),
        candidate("5:10", "Crane (machine)"),
        candidate("6:2", "Crane", "crane.jpg") | {"modality": "text,image"},
    ],
    "cand_pool/global/mbeir_union_test_cand_pool.jsonl": [candidate("0:1", image="1.jpg")],
    UNION: [
        query("0:1", "a storm", positives=["0:2"]),
        query("5:2", "who?", "w.jpg", ["5:9", "6:2"]),
    ],
    UNION_POOL: [
        candidate("0:2", image="2.jpg"),
        candidate("5:9", "Crane (bird)"),
    ],
}


@pytest.fixture
def directory(tmp_path):
    for name, lines in FILES.items():
        write(tmp_path / name, lines)
    return tmp_path


def cells(directory, **options):
    return {cell.name: cell for cell in Benchmark(directory).cells("test", **options)}


def keys(*dids):
    return {did_key(did) for did in dids}


# What is read.


def test_dids_become_integers_and_back():
    for did in ("0:0", "9:77", "10:5600000", "6:999999999999"):
        assert did_text(did_key(did)) == did
    assert len(keys("1:0", "0:1", "1:1", "0:999999999999")) == 4


def test_both_orders_of_a_double_modality_are_the_same_class():
    names = [*data.MODALITIES, "text,image", "text,video"]
    assert [data.modality_class(name) for name in names] == [0, 1, 2, 3, 4, 2, 4]


def test_written_lines_come_back_as_cells_of_items_with_instruction(directory):
    found = cells(directory)
    assert list(found) == ["mscoco_task0", "oven_task6", NEWS]
    news = found[NEWS]
    assert news.qids == ["0:7", "0:5"]
    assert [(item["text"], item["image"]) for item in news.items] == [("a räce", None),
                                                                      ("a vote", None)]
    assert news.relevant == [keys("0:2"), keys("0:1", "0:3")]
    assert news.pool_path == directory / LOCAL
    image = str(directory / "q.jpg")
    assert found["oven_task6"].items == [
        {"text": "what is it?", "image": image, "instruction": "Name the entity."}
    ]


def test_a_pool_gives_items_keys_and_modality_classes_and_no_instruction(directory):
    benchmark = Benchmark(directory)
    pool = benchmark.pool(directory / "cand_pool/local/mbeir_oven_task6_cand_pool.jsonl")
    assert [did_text(key) for key in pool.keys] == ["5:9", "5:10", "6:2"]
    assert [data.MODALITIES[i] for i in pool.modality] == ["text", "text", "image,text"]
    assert len(pool) == 3 and pool.find([did_key("5:10")]).tolist() == [1]
    assert pool[0] == {"text": "Crane (bird)", "image": None}
    assert pool[2] == {"text": "Crane", "image": str(directory / "crane.jpg")}
    empty_text = benchmark.pool(directory / LOCAL)[2]
    assert empty_text == {"text": None, "image": str(directory / "mbeir_images/3.jpg")}


def test_a_pool_finds_what_it_holds_as_a_dictionary_would(tmp_path):
    rng = random.Random(0)
    dids = [f"{rng.randrange(12)}:{rng.randrange(40)}" for _ in range(200)]  # many of them twice
    write(tmp_path / "pool.jsonl", [candidate(did, "text") for did in dids])
    index = {did_key(did): i for i, did in reversed(list(enumerate(dids)))}  # the first one counts
    wanted = [did_key(f"{a}:{b}") for a in range(13) for b in range(41)]
    found = data.Pool(tmp_path / "pool.jsonl", tmp_path).find(wanted)
    assert found.tolist() == [index.get(key, -1) for key in wanted]
    assert 100 < (found < 0).sum() < 400


def test_both_stages_share_the_files_that_one_benchmark_has_read(directory):
    benchmark = Benchmark(directory)
    one, other = (TrainSet(benchmark, batch_size=2, steps=1, seed=seed) for seed in (0, 1))
    assert one.queries is other.queries and one.pool is other.pool
    assert Benchmark(directory).pool(directory / UNION_POOL) is not one.pool


def test_limit_reads_the_first_queries_of_each_cell(directory):
    found = cells(directory, limit=1)
    assert [cell.qids for cell in found.values()] == [["9:1"], ["5:1"], ["0:7"]]
    assert found[NEWS].relevant == [keys("0:2")]


def test_qrels_decide_what_is_relevant_with_five_columns_or_four_and_grade_0_is_not(directory):
    lines = ["0:7\t0\t0:1\t1", "", "0:7 0 0:2 0 0", "0:5 0 0:3 2 0", "0:99 0 0:1 1 0", ""]
    write(directory / QRELS, lines)
    assert cells(directory)[NEWS].relevant == [keys("0:1"), keys("0:3")]
    assert cells(directory)["mscoco_task0"].relevant == [keys("9:4")]


def test_a_query_id_that_occurs_twice_has_its_relevance_twice(directory):
    write(directory / QUERIES, [FILES[QUERIES][i] for i in (0, 1, 0)])
    assert cells(directory)[NEWS].relevant == [keys("0:2"), keys("0:1", "0:3"), keys("0:2")]


def test_without_a_qrels_file_the_listed_positives_are_relevant_here_of_two_datasets(directory):
    assert not (directory / "qrels/test/mbeir_oven_task6_test_qrels.txt").exists()
    assert cells(directory)["oven_task6"].relevant == [keys("5:9", "6:2")]


def test_mscocos_pool_is_found_under_its_own_name(directory):
    path = cells(directory)["mscoco_task0"].pool_path
    assert path.name == "mbeir_mscoco_task0_test_cand_pool.jsonl"
    # The usual name exists as well, and holds the training images: not what is to be searched.
    write(path.with_name("mbeir_mscoco_task0_cand_pool.jsonl"), [candidate("9:4", image="4.jpg")])
    assert cells(directory)["mscoco_task0"].pool_path == path
    path.unlink()
    path = cells(directory)["mscoco_task0"].pool_path
    assert path.name == "mbeir_mscoco_task0_cand_pool.jsonl"


def test_the_zero_shot_split_is_marked_and_shares_the_global_test_pool(directory):
    write(directory / QUERIES.replace("test", "zero"), FILES[QUERIES])
    benchmark = Benchmark(directory)
    assert [cell.name for cell in benchmark.cells("zero")] == [f"zero_{NEWS}"]
    test = directory / "cand_pool/global/mbeir_union_test_cand_pool.jsonl"
    assert benchmark.global_pool_path("zero") == benchmark.global_pool_path("test") == test
    test.unlink()
    assert benchmark.global_pool_path("test") is None


def test_a_table_keeps_offsets_and_integers_and_parses_a_line_only_when_asked(
    tmp_path, monkeypatch
):
    write(tmp_path / "t.jsonl", [{"n": n, "text": "ö" * n} for n in range(50)])
    parsed = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda line: parsed.append(line) or loads(line))
    table = Table(tmp_path / "t.jsonl", lambda row: (row["n"], -row["n"]), "qb", "a row")
    assert len(table) == 50 and len(parsed) == 50
    assert [list(column) for column in table.columns] == [list(range(50)),
                                                          list(range(0, -50, -1))]
    assert table[49] == {"n": 49, "text": "ö" * 49} and table[3] == {"n": 3, "text": "ööö"}
    assert len(parsed) == 52
    # Nothing but the file knows the lines: what is changed there is what is read.
    content = (tmp_path / "t.jsonl").read_bytes().replace(b'{"n": 7,', b'{"n": 8,')
    (tmp_path / "t.jsonl").write_bytes(content)
    assert table[7]["n"] == 8
    kept = [table.starts, *table.columns]
    assert [column.itemsize for column in kept] == [8, 8, 1]
    assert set(vars(table)) == {"path", "starts", "columns"}


def test_blank_lines_are_skipped(tmp_path):
    write(tmp_path / "t.jsonl", ["", '{"n": 1}\r', "  ", '{"n": 2}', "", ""])
    table = Table(tmp_path / "t.jsonl", lambda row: (row["n"],), "q", "a row")
    assert [table[i] for i in range(len(table))] == [{"n": 1}, {"n": 2}]


# Instructions.


@pytest.mark.parametrize("written, expected", [
    ("  find it ", "Find it."),
    ("Find it.", "Find it."),
    ("which one?", "Which one?"),
    ("now!", "Now!"),
    ("e.g. this:", "E.g. this:."),
    ("iPhone", "IPhone."),
    ("find the US flag", "Find the US flag."),
])
def test_an_instruction_is_stripped_capitalised_and_ends_with_a_full_stop(written, expected):
    assert data.format_instruction(written) == expected


def test_an_instruction_is_one_of_its_dataset_and_modalities(directory):
    benchmark = Benchmark(directory)
    prompts = ["Find a picture of the event.", "Which image shows it?", "Show it!"]
    assert benchmark.prompts[0, 1, 0] == prompts
    assert benchmark.prompts[2, 0, 5] == ["Name the entity."]  # the empty column is no prompt
    assert benchmark.prompts[2, 3, 11] == ["Find the film."]  # "text,image" is "image,text"
    drawn = {benchmark.query_item(query(f"0:{n}", "a"), 1)["instruction"] for n in range(50)}
    assert drawn == set(prompts)


def test_row_18_the_instruction_follows_from_seed_and_query_id_whatever_the_order(directory):
    rows = [query(f"0:{n}", "a") for n in range(40)]

    def draw(seed, rows, salt=""):
        benchmark = Benchmark(directory, seed)
        return {row["qid"]: benchmark.query_item(row, 1, salt)["instruction"] for row in rows}

    assert draw(0, rows) == draw(0, rows[::-1]) == draw(0, rows)
    assert draw(0, rows[7:9]).items() <= draw(0, rows).items()
    assert draw(0, rows) != draw(1, rows) and draw(0, rows) != draw(0, rows, salt=3)


# What is refused.


def mutated(name, number, **fields):
    """The lines of a file with fields of line `number` (from 1) replaced; `...` removes a field."""
    lines = [dict(line) for line in FILES[name]]
    line = lines[number - 1] | fields
    lines[number - 1] = {key: value for key, value in line.items() if value is not ...}
    return lines


BAD_FILES = {
    "broken JSON": (QUERIES, ['{"qid": "0:1", ', "{}"], ":1: expected a query, a JSON object"),
    "not UTF-8": (QUERIES, b'\n\n{"qid": "\xff"}', ":3: expected a query, a JSON object"),
    "a list": (QUERIES, [FILES[QUERIES][0], [1, 2]], ":2: expected a query, a JSON object"),
    "null": (LOCAL, ["null"], ":1: expected a candidate, a JSON object"),
    "no qid": (QUERIES, mutated(QUERIES, 2, qid=...), ":2: expected a field 'qid'"),
    "no positives field": (QUERIES, mutated(QUERIES, 1, pos_cand_list=...),
                           ":1: expected a field 'pos_cand_list'"),
    "no positives": (QUERIES, mutated(QUERIES, 2, pos_cand_list=[]), ":2: expected .*at least one"),
    "positives no list": (QUERIES, mutated(QUERIES, 2, pos_cand_list="0:1"),
                          ":2: expected .*list of ids.*'0:1'"),
    "positive no id": (QUERIES, mutated(QUERIES, 2, pos_cand_list=["0:1", "x"]),
                       ":2: expected .*an id like \"9:77\", got 'x'"),
    "positive null": (QUERIES, mutated(QUERIES, 2, pos_cand_list=[{"id": "0:1"}]),
                      ":2: expected .*an id like \"9:77\", got None"),
    "bad qid": (QUERIES, mutated(QUERIES, 2, qid="0-5"), ":2: expected .*like \"9:77\", got '0-5'"),
    "huge qid": (QUERIES, mutated(QUERIES, 2, qid="0:9999999999999"), ":2: expected .*\"9:77\""),
    "numeric did": (LOCAL, mutated(LOCAL, 3, did=3), ":3: expected .*an id like \"9:77\", got 3"),
    "no did": (LOCAL, mutated(LOCAL, 3, did=...), ":3: expected a field 'did'"),
    "no modality": (LOCAL, mutated(LOCAL, 2, modality=...), ":2: expected a field 'modality'"),
    "bad modality": (LOCAL, mutated(LOCAL, 2, modality="sound"),
                     ":2: expected .*a modality out of text, image, .*; got 'sound'"),
    "modality list": (LOCAL, mutated(LOCAL, 2, modality=["text"]),
                      r":2: expected .*a modality out of text, image, .*; got \['text'\]"),
    "query modality": (QUERIES, mutated(QUERIES, 2, query_modality=None),
                       ":2: expected .*a modality out of .*; got None"),
    "no content": (LOCAL, mutated(LOCAL, 2, img_path=None), ":2: expected .*a text or an image"),
    "text no string": (QUERIES, mutated(QUERIES, 1, query_txt=["a"]),
                       r":1: expected .*a text or an image.*\['a'\]"),
    "absolute path": (LOCAL, mutated(LOCAL, 2, img_path="/etc/passwd"),
                      ":2: expected .*an image path inside the data directory, got '/etc/passwd'"),
    "path upwards": (QUERIES, mutated(QUERIES, 2, query_img_path="a/../../b.jpg"),
                     ":2: expected .*an image path inside the data directory"),
    "empty file": (QUERIES, [""], ": expected a query, a JSON object"),
    "empty pool": (LOCAL, [], ": expected a candidate, a JSON object"),
    "short qrels": (QRELS, ["0:5 0 0:1 1 0", "", "0:7 0 0:2"], ":3: expected `qid 0 did 1 task`"),
    "qrels grade": (QRELS, ["0:5 0 0:1 yes 0"], ":1: expected `qid 0 did 1 task`"),
    "qrels did": (QRELS, ["0:5 0 1 1 0"], ":1: expected `qid 0 did 1 task`"),
    "qrels lack a query": (QRELS, ["0:5 0 0:1 1 0"], ": expected a relevant candidate for 0:7"),
    "TSV spaces": (TSV, [HEADER, "text image VisualNews 0 Find it."], ":2: expected query mod"),
    "TSV without prompt": (TSV, [*INSTRUCTIONS, "text\timage\tX\t1\t\t"], ":8: expected query mod"),
    "TSV dataset": (TSV, [HEADER, "text\timage\tX\tone\tFind."], ":2: expected .*dataset id"),
    "TSV modality": (TSV, [HEADER, "", "text\tsmell\tX\t1\tFind."], ":3: expected .*got 'smell'"),
    "TSV not UTF-8": (TSV, b"header\n\xff\n", ":2: expected query modality"),
    "TSV lacks the dataset": (TSV, INSTRUCTIONS[:1] + INSTRUCTIONS[2:],
                              ": expected prompts for dataset 0, text -> image"),
    "union: no positives field": (UNION, mutated(UNION, 2, pos_cand_list=...),
                                  ":2: expected a field 'pos_cand_list'"),
    "union: positive not in pool": (UNION, mutated(UNION, 2, pos_cand_list=["5:10"]),
                                    "expected 5:10, the first positive of query 5:2"),
    "union pool: bad line": (UNION_POOL, ["{}"], ":1: expected a"),
}


def read_everything(directory):
    benchmark = Benchmark(directory)
    for cell in benchmark.cells("test"):
        benchmark.pool(cell.pool_path)
    return TrainSet(benchmark, batch_size=2, steps=1)


@pytest.mark.parametrize("name, content, message", BAD_FILES.values(), ids=BAD_FILES)
def test_malformed_input_is_a_value_error_that_names_file_line_and_what_was_expected(
    directory, name, content, message
):
    read_everything(directory)
    if isinstance(content, bytes):
        (directory / name).write_bytes(content)
    else:
        write(directory / name, content)
    with pytest.raises(ValueError) as error:
        read_everything(directory)
    assert name.rpartition("/")[2] in str(error.value)
    assert re.search(message, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", [TSV, LOCAL, QUERIES, UNION, UNION_POOL])
def test_a_missing_file_is_named(directory, missing):
    (directory / missing).unlink()
    if missing == QUERIES:  # one cell less
        assert list(cells(directory)) == ["mscoco_task0", "oven_task6"]
        return
    with pytest.raises(ValueError) as error:
        read_everything(directory)
    message = str(error.value)
    assert str((directory / missing).parent if missing == UNION else directory / missing) in message
    assert re.search("expected (1 .jsonl|the candidate pool)|cannot read: No such", message)


@pytest.mark.parametrize("folder", ["query", "cand_pool", "instructions"])
def test_a_missing_folder_is_named(directory, folder):
    (directory / folder).rename(directory / "elsewhere")
    with pytest.raises(ValueError, match=f"no M-BEIR directory: expected the folder {folder}"):
        Benchmark(directory)
    with pytest.raises(ValueError, match="nowhere is no M-BEIR directory"):
        Benchmark(directory / "nowhere")


def test_a_split_without_files_a_wrong_task_and_two_training_files_are_refused(directory):
    with pytest.raises(ValueError, match=r"query/val: expected files mbeir_<dataset>_task<T>_val"):
        Benchmark(directory).cells("val")
    (directory / "query/union_train/second.jsonl").touch()
    with pytest.raises(ValueError, match="union_train: expected 1 .jsonl file, got 2"):
        TrainSet(Benchmark(directory), batch_size=2, steps=1)
    (directory / "query/test/mbeir_x_task5_test.jsonl").touch()
    with pytest.raises(ValueError, match=r"task5_test.jsonl: expected a task out of \[0, 1, 2"):
        cells(directory)


# Training batches.

SIZES = {0: 31, 9: 12, 5: 7, 4: 23}  # dataset -> queries, each of another modality pair


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
            pool.append(candidate(f"{dataset}:{n}", f"text {n}" if dataset == 5 else None,
                                  None if dataset == 5 else f"c{dataset}-{n}.jpg"))
    queries[3]["pos_cand_list"].append("0:99")  # in no pool: never drawn
    write(tmp_path / TSV, INSTRUCTIONS)
    write(tmp_path / UNION, queries)
    write(tmp_path / UNION_POOL, pool)
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
])
def test_a_batch_mixes_groups_in_equal_parts(training, batch_size, count, parts):
    batches = TrainSet(Benchmark(training), batch_size, steps=40, tasks_per_batch=count, seed=1)
    seen = Counter()
    for batch in batches:
        groups = Counter(int(qid.split(":")[0]) for qid in ids(batch))
        assert sorted(groups.values(), reverse=True) == parts
        seen.update(groups.keys())
    assert set(seen) == set(SIZES)
    if count < 3:
        assert seen[0] > seen[5]  # drawn by size: 31 against 7


def test_groups_differ_in_modality_as_well_as_in_dataset(training):
    queries = [query(f"0:{n}", None, f"0-{n}.jpg", ["0:0"]) for n in range(1, 31)]
    write(training / UNION, [*queries, query("0:0", "query 0:0", None, ["0:0"])])
    write(training / TSV, [*INSTRUCTIONS, "image\timage\tVisualNews\t0\tFind it."])
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
def test_labels_n_uses_exactly_n_queries(training, labels):
    def used(seed):
        batches = TrainSet(Benchmark(training), 9, steps=60, seed=seed, labels=labels)
        return {qid for batch in batches for qid in ids(batch)}

    assert len(used(0)) == min(labels, sum(SIZES.values()))
    assert used(0) == used(0) and (used(0) != used(1) or labels > 72)


def test_labels_count_queries_and_not_the_lines_that_repeat_them(training):
    lines = (training / UNION).read_text().splitlines()
    write(training / UNION, lines * 3)  # up-sampled
    batches = TrainSet(Benchmark(training), batch_size=9, steps=60, labels=20)
    drawn = Counter(qid for batch in batches for qid in ids(batch))
    assert len(drawn) == 20


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
