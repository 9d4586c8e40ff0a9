"""data.py --from: pairs become an M-BEIR directory that trains; the README's ten lines do it."""

import csv
import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import data
from data import TASKS, Benchmark, TrainSet, duplicate_mask

README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("\n## Your own data\n")[2].partition("\n## ")[0]
COLUMNS = ["query_text", "query_image", "target_text", "target_image", "instruction"]
UNION = "query/union_train/mbeir_union_up_train.jsonl"
POOL = "cand_pool/global/mbeir_union_test_cand_pool.jsonl"


@pytest.fixture
def photos(tmp_path):
    """A folder with eight images; two of the same name, two of the same content."""
    folder = tmp_path / "photos"
    for i, name in enumerate(("1.png", "2.png", "cats/1.png", "cats/2.jpg", "dogs/ä b.png", "3.gif",
                              "4.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 40), (30 * i, 90, 200)).save(folder / name)
    (folder / "copy of 1.png").write_bytes((folder / "1.png").read_bytes())
    return folder


@pytest.fixture
def convert(tmp_path, photos, monkeypatch, capsys):
    """convert(rows or bytes, suffix, *options) -> (exit status, output, error output)"""
    def run(content, suffix=".csv", *options):
        file = photos / f"pairs{suffix}"
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif suffix == ".csv":
            with file.open("w", newline="", encoding="utf-8") as opened:
                names = [name for name in COLUMNS if any(name in row for row in content)]
                writer = csv.DictWriter(opened, names)
                writer.writeheader()
                writer.writerows(content)
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in content))
        argv = ["--from", file, "--out", tmp_path / "out", *options]
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, argv)])
        try:
            status = data.main() or 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def rows(path):
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def check(folder, monkeypatch, capsys):
    """-> the checker's last line; it must find no problem."""
    monkeypatch.setattr(sys, "argv", ["data.py", str(folder), "--images", "full"])
    with pytest.raises(SystemExit) as stop:
        data.main()
    printed = capsys.readouterr().out
    assert stop.value.code == 0, printed
    return printed.splitlines()[-1]


KINDS = {"text": {"text": "a cat"}, "image": {"image": "cats/1.png"},
         "image,text": {"text": "it sleeps", "image": "cats/2.jpg"}}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_all_pairs_of_modalities_become_a_directory_that_training_and_evaluation_read(
        suffix, convert, tmp_path, monkeypatch, capsys):
    pairs = [{**{f"query_{part}": value for part, value in KINDS[asked].items()},
              **{f"target_{part}": value for part, value in KINDS[found].items()}}
             for asked, found in TASKS.values() if "video" not in (asked, found)]
    status, printed, error = convert(pairs, suffix, "--valid", "50%")
    assert (status, error) == (0, "") and printed.count("\n") == 1
    assert ": 5 queries to train with, 4 held out as val and test, 3 candidates, 2 im" in printed
    out = tmp_path / "out"
    assert check(out, monkeypatch, capsys).endswith(" images, 0 problems")
    benchmark = Benchmark(out)
    assert len(TrainSet(benchmark, batch_size=4, steps=1)[0]["queries"]) == 4
    held_out = [cell for split in ("val", "test") for cell in benchmark.cells(split)]
    assert len(held_out) == 8 and all(len(cell.items) == 1 for cell in held_out)
    for cell in held_out:
        task = int(cell.name.removeprefix("pairs_task"))
        pool = benchmark.pool(cell.pool_path)
        (target,), asked = cell.relevant[0], KINDS[TASKS[task][0]]
        found = pool[int(pool.find([target])[0])]
        assert (cell.query_modality, cell.target_modality) == TASKS[task]
        for item, kind in ((cell.items[0], asked), (found, KINDS[TASKS[task][1]])):
            image = kind.get("image") and str(out / "mbeir_images" / kind["image"])
            assert (item["text"], item["image"]) == (kind.get("text"), image)
        words = [kind.replace(",", " with ") for kind in TASKS[task]]
        expected = f"Find the {words[1]} that belongs to the {words[0]}."
        assert cell.items[0]["instruction"] == expected
    assert [path.name for path in tmp_path.iterdir() if path.name != "photos"] == ["out"]


def test_the_rows_are_m_beirs_and_the_directory_may_lie_in_a_new_folder(convert, tmp_path):
    out = tmp_path / "new/out"
    convert([{"query_text": f"{n}", "target_image": "1.png"} for n in range(3)], ".csv",
            "--out", out)
    query, candidate = rows(out / UNION)[0], rows(out / POOL)[0]
    assert query | {"qid": 0, "query_txt": ""} == {
        "qid": 0, "query_txt": "", "query_img_path": None, "query_modality": "text",
        "query_src_content": None, "pos_cand_list": ["11:1"], "neg_cand_list": [], "task_id": 0}
    assert candidate == {"did": "11:1", "txt": None, "img_path": "mbeir_images/1.png",
                         "modality": "image", "src_content": None}
    prompts = (out / "instructions/query_instructions.tsv").read_text()
    assert prompts.splitlines() == [
        "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1",
        "text\timage\tpairs\t11\tFind the image that belongs to the text"]


def test_equal_candidates_share_an_id_and_equal_queries_list_all_their_targets(convert, tmp_path):
    pairs = [{"query_text": "the first", "target_image": "1.png"},
             {"query_text": "number one", "target_image": "copy of 1.png"},  # the same bytes
             {"query_text": "the first", "target_image": "./2.png"},
             {"query_text": "the first", "target_image": "2.png"},  # the same pair again
             {"query_image": "1.png", "target_text": "a caption"},
             {"query_image": "2.png", "target_text": "a caption"},
             {"query_image": "copy of 1.png", "target_text": "another caption"}]
    assert convert(pairs, ".jsonl", "--valid", "1%")[0] == 0
    queries = rows(tmp_path / "out" / UNION) + [
        row for path in (tmp_path / "out/query/test").iterdir() for row in rows(path)]
    candidates = {row["did"]: row for row in rows(tmp_path / "out" / POOL)}
    found = {row["query_txt"] or row["query_img_path"]:
             [candidates[did]["txt"] or candidates[did]["img_path"] for did in row["pos_cand_list"]]
             for row in queries}
    assert found == {"the first": ["mbeir_images/1.png", "mbeir_images/2.png"],
                     "number one": ["mbeir_images/1.png"],
                     "mbeir_images/1.png": ["a caption", "another caption"],
                     "mbeir_images/2.png": ["a caption"]}
    assert len(candidates) == 4 and len(queries) == 4


def test_equal_captions_are_no_negatives_of_each_other(convert, tmp_path):
    pairs = [{"query_image": name, "target_text": "a cat"} for name in ("1.png", "2.png")]
    pairs += [{"query_image": name, "target_text": "a dog"} for name in ("3.gif", "4.png")]
    convert(pairs, ".csv", "--valid", "25%")
    batch = TrainSet(Benchmark(tmp_path / "out"), batch_size=3, steps=1)[0]
    mask = duplicate_mask(batch["positive_keys"], batch["target_keys"])
    captions = np.array([item["text"] for item in batch["targets"]])
    assert set(captions) == {"a cat", "a dog"}
    assert (mask.numpy() == (captions[:, None] == captions)).all()


def test_images_are_copied_with_their_folders_so_that_equal_names_stay_apart(
        convert, photos, tmp_path, monkeypatch, capsys):
    names = ["1.png", "cats/1.png", "dogs/ä b.png", "cats/2.jpg"]
    (photos / "link.png").symlink_to("4.png")  # a link within the folder: its image is copied
    convert([{"query_text": f"n {name}", "target_image": name} for name in (*names, "link.png")])
    copies = tmp_path / "out/mbeir_images"
    files = [path for path in copies.rglob("*") if path.is_file()]
    found = {path.relative_to(copies).as_posix(): path.read_bytes() for path in files}
    assert found == {name: (photos / name).read_bytes() for name in (*names, "link.png")}
    assert not any(path.is_symlink() for path in files)
    for path in photos.rglob("*.*"):
        path.unlink()
    assert check(tmp_path / "out", monkeypatch, capsys)


@pytest.mark.parametrize("valid, count", [("25%", 10), (None, 4), (".5%", 1)])
def test_a_share_of_the_queries_is_held_out_and_searches_among_all_candidates(
        valid, count, convert, tmp_path):
    convert([{"query_text": f"query {n}", "target_text": f"target {n}"} for n in range(40)],
            ".csv", *(["--valid", valid] if valid else []))
    out = tmp_path / "out"
    held_out = rows(out / "query/test/mbeir_pairs_task1_test.jsonl")
    assert len(held_out) == count
    assert held_out == rows(out / "query/val/mbeir_pairs_task1_val.jsonl")
    asked = [row["query_txt"] for row in held_out + rows(out / UNION)]
    assert sorted(asked) == sorted(f"query {n}" for n in range(40))
    first = [f"query {n}" for n in range(count)]
    assert asked[:count] != first or count == 1  # they are drawn
    pool, local = rows(out / POOL), out / "cand_pool/local/mbeir_pairs_task1_cand_pool.jsonl"
    assert len(pool) == 40 and pool == rows(local)


def test_a_query_has_its_own_instruction_or_the_usual_one_of_its_modalities(convert, tmp_path):
    def ask(n, **more):
        return {"query_text": f"q {n}", "target_text": f"t {n}", **more}

    pairs = [ask(1, instruction="find\ta  synonym"), ask(2, instruction="find a synonym"), ask(3),
             ask(4, instruction="find the opposite"),
             ask(1, instruction="find the opposite", target_text="not t 1")]
    convert(pairs, ".jsonl", "--valid", "1%")
    benchmark = Benchmark(tmp_path / "out")
    queries = rows(tmp_path / "out" / UNION) + rows(
        tmp_path / "out/query/test/mbeir_pairs_task1_test.jsonl")
    said = sorted((row["query_txt"], benchmark.query_item(row, 0)["instruction"])
                  for row in queries)
    assert said == [("q 1", "Find a synonym."), ("q 1", "Find the opposite."),
                    ("q 2", "Find a synonym."), ("q 3", "Find a synonym."),
                    ("q 4", "Find the opposite.")]


def test_csv_may_have_a_byte_order_mark_quotes_line_breaks_and_windows_line_ends(convert, tmp_path):
    text = '\ufeffquery_text,target_text\r\n"a ""big"", red\r\nhouse",x\r\n\r\nä,y\r\nlast,z'
    assert convert(text.encode(), ".csv", "--valid", "10%")[0] == 0
    queries = rows(tmp_path / "out" / UNION) + rows(
        tmp_path / "out/query/test/mbeir_pairs_task1_test.jsonl")
    assert {row["query_txt"] for row in queries} == {'a "big", red\r\nhouse', "ä", "last"}


CSV = "query_text,query_image,target_text,target_image\n"
BAD = {  # name: (suffix, the lines after a CSV's first one, {number of a bad line: what is said})
    "no query": (".csv", ",,a,\nb,,b,\n", {2: "expected a query_text or a query_image, got nei"}),
    "no target": (".csv", "a,,,\n", {2: "expected a target_text or a target_image, got neither"}),
    "short": (".csv", "b,,b,\na\n", {3: "expected a target_text or a target_image, got neither"}),
    "no image": (".csv", "a,,,5.png\n,x/1.png,a,\n", {
        2: "cannot read image .*photos/5.png: .*No such file", 3: "cannot read image .*x/1.png"}),
    "not an image": (".csv", "a,,,pairs.csv\n", {2: "cannot read image .*/pairs.csv: cannot id"}),
    "a folder": (".csv", "a,,,cats\n", {2: "cannot read image .*/cats: expected a regular"}),
    "out": (".csv", "a,,,../photos/1.png\n", {2: "expected an image path inside the data dir"}),
    "absolute": (".csv", "a,,,/etc/1.png\n", {2: "expected an image path inside the data dir"}),
    "cut short": (".csv", "a,,,cut.png\n", {2: "cannot read image .*cut.png: .*truncated"}),
    "a link out": (".csv", "a,,,out.png\n", {2: "expected an image inside .*out.png leads out"}),
    "too many": (".csv", "a,,a big, red house,\n", {2: "expected columns .*more values than na"}),
    "open quote": (".csv", 'a,,a,\nb,,"b,\nc,,c,\n', {3: "expected CSV .*unexpected end of data"}),
    "open from the start": (".csv", '"b,,b,\nc,,c,\n', {2: "expected CSV .*end of data"}),
    "quote inside": (".csv", 'a,,a,\nb,,"b"b,\n', {3: "expected CSV "}),
    "not UTF-8": (".csv", "a,,a,\nb,,\xff,\nc,,,6.png\n",
                  {3: "text: expected valid Unicode, got '.udcff'", 4: ".*6.png"}),
    "no JSON": (".jsonl", '{"query_text": "a"\n\n[]\n3\nnull\n',
                {1: "expected a JSON object .*delimiter", 3: "expected columns out of query_text, ",
                 4: "expected columns .*got 3", 5: "expected columns .*got None"}),
    "JSON not UTF-8": (".jsonl", '{"query_text": "\xff"}\n', {1: "expected a JSON obj.*codec"}),
    "unknown column": (".jsonl", '{"query": "a", "target_text": "b"}\n',
                       {1: "expected columns out of query_text, .*, instruction; got {'query'"}),
    "no text": (".jsonl", '{"query_text": 5, "target_text": "b"}\n'
                '{"query_text": "a", "target_image": ["1.png"]}\n'
                '{"query_text": "a", "target_text": "b", "instruction": 1}\n',
                {1: "expected a text or an image path .*got 5", 2: "expected .*'1.png'",
                 3: "instruction: expected valid Unicode, got 1"}),
}


@pytest.mark.parametrize("name", BAD)
def test_every_bad_line_is_named_and_nothing_is_written(name, convert, photos, tmp_path):
    suffix, lines, named = BAD[name]
    Image.new("L", (9, 9)).save(tmp_path / "elsewhere.png")
    (photos / "out.png").symlink_to(tmp_path / "elsewhere.png")
    Image.effect_noise((40, 40), 50).save(photos / "cut.png")
    (photos / "cut.png").write_bytes((photos / "cut.png").read_bytes()[:500])
    text = (CSV if suffix == ".csv" else "") + lines
    status, printed, error = convert(text.encode("latin-1"), suffix)
    *said, last = error.splitlines()
    assert (status, printed) == (2, "")
    file = photos / f"pairs{suffix}"
    assert last == f"error: {file}: {len(named)} bad lines, nothing is written"
    assert len(said) == len(named), said
    for line, (number, text) in zip(said, named.items()):
        assert re.match(rf"warning: {re.escape(str(file))}:{number}: .*{text}", line), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere.png", "photos"]


@pytest.mark.parametrize("options, said", [
    (["--valid", "0%"], "0% to 100%, got .*pairs.csv and 0%"),
    (["--valid", "100%"], "0% to 100%, got .*pairs.csv and 100%"),
    (["--valid", "0.1"], "0% to 100%, got .*pairs.csv and 0.1"),
    (["--valid", "1e1%"], "0% to 100%, got .*pairs.csv and 1e1%"),
    (["--valid", "90%"], "pairs.csv: expected more different queries, got 1"),
    (["--from", "{photos}/pairs.txt"], "expected a .csv or .jsonl file .*pairs.txt"),
    (["--from", "{photos}/none.csv"], "No such file or directory: .*none.csv"),
    (["--out", "{photos}"], "photos exists: choose another folder"),
    (["{photos}"], "expected an M-BEIR directory, or --from FILE --out DIRECTORY"),
])
def test_bad_options_are_refused_in_one_line(options, said, convert, photos, tmp_path):
    before = sorted(photos.rglob("*"))
    options = [option.format(photos=photos) for option in options]
    status, printed, error = convert([{"query_text": "a", "target_text": "b"}], ".csv", *options)
    assert (status, printed) == (2, "") and error.count("\n") == 1
    assert re.search(f"^error: .*{said}", error), error
    assert sorted(photos.rglob("*")) == sorted([*before, photos / "pairs.csv"])
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_without_a_directory_or_without_out_it_says_what_is_expected(monkeypatch, capsys):
    for arguments in ([], ["--from", "pairs.csv"], ["--out", "x"]):
        monkeypatch.setattr(sys, "argv", ["data.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            data.main()
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and "or --from FILE" in error


def test_the_same_file_gives_the_same_directory(convert, tmp_path):
    pairs = [{"query_text": f"query {n}", "target_text": f"target {n}"} for n in range(20)]
    contents = []
    for name in ("first", "second"):
        assert convert(pairs)[0] == 0
        (tmp_path / "out").rename(tmp_path / name)
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        contents.append({path.relative_to(tmp_path / name): path.read_bytes() for path in files})
    assert contents[0] == contents[1] and len(contents[0]) > 8


# ---- the README's section ------------------------------------------------------------------------


def test_the_readmes_ten_lines_train_on_twenty_pictures_as_they_stand(tmp_path):
    for name in ("data.py", "train.py", "toy"):  # as in a clone
        (tmp_path / name).symlink_to(ROOT / name)
    code, commands = re.search(r"```python\n(.*?)```.*?```bash\n(.*?)```", SECTION, re.S).groups()
    assert len([line for line in (code + commands).splitlines() if line]) <= 10
    scripts = [[sys.executable, "-c", code]]
    for line in commands.splitlines():
        python, *words = shlex.split(line)
        assert python == "python"
        scripts.append([sys.executable, *words])
    runs = [subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
            for script in scripts]
    assert [run.returncode for run in runs] == [0] * len(scripts), runs[-1].stderr
    assert len(list((tmp_path / "photos").glob("*.png"))) == 20
    assert "16 queries to train with, 4 held out as val and test, 19 candid" in runs[1].stdout
    assert re.search(r"^pairs_task0( +[\d.]+){6}$", runs[2].stdout, re.M)  # the table at the end
    (results,) = tmp_path.glob("runs/*/results.json")
    assert json.loads(results.read_text())["cells"]["pairs_task0"]["queries"] == 4
