"""evaluate.py: one evaluation and its files, searching, comparing depths, bad input."""

import copy
import json
import re
import shutil
from functools import partial

import pytest
import torch
from conftest import MODEL
from PIL import Image

import evaluate
from data import Benchmark
from evaluate import Embedded, compare_depths, efficiency, read_out, storing_encoder
from prune_distill import find_decoder, prune_layers
from puma import PUMA
from support.pictures import draw_gallery

CELLS = [*(f"glyph_task{task}" for task in (0, 1, 2, 3, 4, 6, 7, 8)), "motion_task9",
         "motion_task10"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pruned, untrained model; (its folder, the model)."""
    folder = tmp_path_factory.mktemp("model") / "model"
    PUMA.from_pretrained(MODEL, keep_layers=1).save_pretrained(folder)
    return folder, PUMA.from_pretrained(folder)


@pytest.fixture(scope="module")
def results(glyph_beir, model, tmp_path_factory):
    """One evaluation of it; (results, folder)."""
    out = tmp_path_factory.mktemp("out") / "evaluation"
    models = {"PUMA": model[1]}
    return evaluate.evaluate_models(models, model[0], glyph_beir, out=out, limit=20), out


def lines_of(path):
    return [line.split() for line in path.read_text().splitlines()]


# ---- scoring -------------------------------------------------------------------------------------


def test_results_hold_every_cell_on_both_pools(results):
    results, out = results
    assert json.loads((out / "results.json").read_text()) == results
    assert set(results["cells"]) == {zero + name for zero in ("", "zero_") for name in CELLS}
    for cell in results["cells"].values():
        assert cell["queries"] == 20
        for pool in ("local", "global"):
            rates = [cell[pool][f"hit_rate@{k}"] for k in (1, 5, 10)]
            assert 0 <= rates[0] <= rates[1] <= rates[2] <= 1
    seen = [results["cells"][name]["local"]["hit_rate@5"] for name in CELLS]
    assert results["average"]["local"]["hit_rate@5"] == pytest.approx(sum(seen) / 10) and max(seen)
    for heading in ("local pool, %", "global pool, %", "average, zero-shot", "parameters"):
        assert heading in (out / "results.md").read_text()
    assert (out / "gallery.png").stat().st_size > 10_000


def test_trec_files_give_the_same_hit_rates_and_kinds_of_wrong_results(results, glyph_beir):
    results, out = results
    pool = glyph_beir / "cand_pool/global/mbeir_union_test_cand_pool.jsonl"
    modality = {row["did"]: row["modality"] for row in map(json.loads, pool.open())}
    for name, cell in results["cells"].items():
        qrels = lines_of(out / f"{name}.qrels")
        right = {(qid, did) for qid, _, did, _ in qrels}
        assert len(right) == len(qrels) and all(row[1::2] == ["0", "1"] for row in qrels)
        for which in ("local", "global"):
            run = lines_of(out / f"{name}.{which}.trec")
            assert all(len(row) == 6 for row in run)
            assert len({(row[0], row[2]) for row in run}) == len(run) == 200, "no id twice"
            hits = {row[0] for row in run if int(row[3]) <= 5 and (row[0], row[2]) in right}
            assert len(hits) / 20 == pytest.approx(cell[which]["hit_rate@5"])
        kinds = results["confusion"][re.sub("glyph_|motion_", "", name)]
        wrong = [modality[row[2]] != kinds["target"] for row in run if row[3] == "1"]
        assert kinds["wrong modality"] == pytest.approx(sum(wrong) / 20)
        assert kinds["right item"] == pytest.approx(cell["global"]["hit_rate@1"])


def test_queries_without_a_right_candidate_in_a_pool_are_said_once(tmp_path, glyph_beir, capsys):
    data = tmp_path / "data"
    shutil.copytree(glyph_beir, data, ignore=shutil.ignore_patterns("mbeir_images"))
    path = data / "cand_pool/global/mbeir_union_test_cand_pool.jsonl"
    rows = [line for line in path.read_text().splitlines() if '"modality": "text"' not in line]
    path.write_text("\n".join(rows))
    benchmark = Benchmark(data)
    cells = [cell for cell in benchmark.cells("test", 5) if cell.name[-5:] in ("task0", "task3")]
    Embedded(benchmark, cells, "test", lambda items: torch.zeros(len(items), 1))
    assert capsys.readouterr().err == (
        f"warning: {path}: it has no right candidate for 5 of 5 queries of glyph_task3, which "
        "count as misses\n")


def test_the_results_are_written_before_any_picture(tmp_path, glyph_beir, model):
    (tmp_path / "gallery.png").mkdir()  # so that drawing fails
    with pytest.raises(OSError):
        evaluate.evaluate_models({"PUMA": model[1]}, model[0], glyph_beir, out=tmp_path, limit=1)
    assert json.loads((tmp_path / "results.json").read_text())["cells"]
    assert (tmp_path / "zero_glyph_task8.global.trec").exists()


def test_row_17_the_popularity_penalty_subtracts_the_mean_similarity_to_all_queries(glyph_beir):
    torch.manual_seed(0)
    benchmark = Benchmark(glyph_beir)
    cells = benchmark.cells("test", 6)[:2]
    embedded = Embedded(benchmark, cells, "test", lambda items: torch.randn(len(items), 3, 4))
    for penalty in (0.0, 0.2):
        rankings = embedded.rank(cells, 2, popularity_penalty=penalty)
        for cell in cells:
            for which, path in (("local", cell.pool_path), ("global", embedded.global_path)):
                keys = embedded.pools[path].keys.tolist()
                vectors = embedded.candidates[[embedded.row(key) for key in keys], 2]
                similarity = embedded.queries[cell.name][:, 2] @ vectors.T
                expected = similarity - penalty * similarity.mean(0)
                scores, ranked = rankings[cell.name, which]
                best = expected.sort(dim=1, descending=True, stable=True)
                assert ranked == [[keys[i] for i in row[:10]] for row in best.indices.tolist()]
                torch.testing.assert_close(torch.tensor(scores), best.values[:, :10])


def test_several_models_in_one_pass_equal_each_ones_own_and_a_second_run_reads_them(
        tmp_path, glyph_beir, model, puma, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    shutil.copytree(model[0], tmp_path / "model", ignore=shutil.ignore_patterns("cache"))
    models, calls = [puma, copy.deepcopy(model[1])], []
    for each in models:
        each.register_forward_hook(lambda *_: calls.append(1))
    items = Benchmark(glyph_beir).cells("test", 5)[6].items + [{"text": "a"}]
    vectors = storing_encoder(models, tmp_path / "model", batch_size=4)(items)
    assert vectors.shape == (6, 2, 128) and len(calls) == 4
    for i, each in enumerate(models):
        torch.testing.assert_close(vectors[:, i].float(), each.encode(items), atol=1e-3, rtol=0)
    calls.clear()
    assert torch.equal(storing_encoder(models, tmp_path / "model")(items), vectors)
    assert not calls
    # With bfloat16 products they have three digits, and a file of their own.
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    rounded = storing_encoder(models, tmp_path / "model")(items)
    assert calls and not torch.equal(rounded, vectors)
    torch.testing.assert_close(rounded, vectors, atol=4e-3, rtol=0)


# ---- the command line, searching -----------------------------------------------------------------


def run_cli(monkeypatch, capsys, *arguments):
    """evaluate.py's main -> (exit status, lines on the standard output, those of errors)."""
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
    status = 0
    try:
        evaluate.main()
    except SystemExit as stop:
        status = stop.code
    out, error = capsys.readouterr()
    assert "Traceback" not in error
    return status, out.splitlines(), [x for x in error.splitlines() if x.startswith("error")]


def test_bad_input_gives_one_line_and_exit_status_2(monkeypatch, capsys, tmp_path, glyph_beir,
                                                    model, tmp_path_factory):
    missing, empty = tmp_path / "missing\33[31m", tmp_path_factory.mktemp("empty")
    name = str(missing).replace("\33", "\\x1b")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    film = empty.parent / "film.mp4"
    film.write_bytes(b"\0\0\0 ftypisom")
    model = ("--data", glyph_beir, model[0])
    cases = [
        (("--data", tmp_path, model[2]), "is no M-BEIR directory: expected the folder"),
        (("--data", glyph_beir, missing), f"{name} does not exist"),
        ((*model, "--split", "nonsense"), "expected files mbeir_"),
        ((*model, "--image", missing, "--out", tmp_path / "a"), f"cannot read image {name}"),
        ((*model, "--out", tmp_path), "exists: choose another"),
        ((*model, "--limit", "0"), "--limit must be in 1..1,000,000, got 0"),
        ((*model, "--batch-size", "-1"), "--batch-size must be in 1..1,000,000, got -1"),
        ((*model, "--pool", glyph_beir), "give --query, --image or --video"),
        ((*model, "--instruction", "a"), "give --query, --image or --video"),
        ((*model, "--image", missing, "--video", missing), "for --image or for --video, not for"),
        ((*model, "--video", film), f"cannot read video {film}: "),
        ((*model, "--out", ""), "--out must be a text, not empty"),
        ((*model, "--out", tmp_path / "file/x"), "Not a directory"),
        ((*model, "--popularity-penalty", "nan"), "--popularity-penalty must be in 0..1,000,000"),
        ((*model, "--limit", 10**9), "--limit must be in 1..1,000,000, got 1000000000"),
        ((*model, "--query", "a", "--pool", empty), f"--pool {empty}"),
        ((*model, "--query", "a", "--k", "0"), "--k must be in 1..1,000,000, got 0"),
        ((*model, "--depths", "2,x"), "--depths must be all or numbers like 2,4, got 2,x"),
        ((*model, "--depths", "1,2"), "--depths must be in 1..1, got [1, 2]"),
        ((*model, "--depths", "0"), "--depths must be in 1..1, got [0]"),
    ]
    for arguments, message in cases:
        status, _, errors = run_cli(monkeypatch, capsys, *arguments)
        assert status == 2 and len(errors) == 1 and message in errors[0], (arguments, errors)
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing may be left"


def test_a_search_prints_ten_candidates_of_the_embeddings_that_are_there_and_draws_them(
        monkeypatch, capsys, tmp_path, glyph_beir, model, results):
    arguments = [model[0], "--data", glyph_beir, "--device", "cpu",  # as the evaluation
                 "--query", "latin small letter a", "--out"]
    stored = {path: path.stat().st_mtime_ns for path in (model[0] / "cache").glob("*.npy")}
    _, lines, _ = run_cli(monkeypatch, capsys, *arguments, tmp_path / "a")
    assert [int(line.split()[0]) for line in lines[:-1]] == list(range(1, 11))
    assert (tmp_path / "a/search.png").stat().st_size > 5_000
    _, lines, _ = run_cli(monkeypatch, capsys, *arguments, tmp_path / "b", "--modality", "image",
                          "--k", 3)
    assert [line.split()[2] for line in lines[:3]] == ["image"] * 3 and len(lines) == 4
    assert {path: path.stat().st_mtime_ns for path in stored} == stored
    assert len(stored) == len(list((model[0] / "cache").glob("*.npy"))), "the evaluation's"


def test_a_search_with_compiled_layers_and_processes_that_read_finds_the_same(
        monkeypatch, capsys, tmp_path, glyph_beir, model, results):
    seen, compile_layers = [], evaluate.compile_layers
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(evaluate, "compile_layers", lambda model: (
        seen.append(model) or compile_layers(model)))
    found = [run_cli(monkeypatch, capsys, model[0], "--data", glyph_beir, "--query", "an arrow",
                     "--out", tmp_path / name, *options)[1][:-1]
             for name, options in (("a", ()), ("b", ("--compile", "--workers", 2)))]
    assert found[0] == found[1] and [model.workers for model in seen] == [2]


def save_clip(path, *colours):
    """An animation of squares of these colours, as exact as its format allows."""
    first, *rest = (Image.new("RGB", (56, 56), colour) for colour in colours)
    first.save(path, save_all=True, append_images=rest, lossless=True)


def test_a_search_for_a_video_finds_the_same_frames_and_its_text_tells_two_searches_apart(
        monkeypatch, capsys, tmp_path, model):
    pool = tmp_path / "pool"
    pool.mkdir()
    save_clip(pool / "moves.gif", "red", "blue", "lime")
    save_clip(pool / "back.png", "lime", "blue", "red")
    save_clip(pool / "still.gif", "red")
    (pool / "text.txt").write_text("red, then blue, then lime")
    save_clip(tmp_path / "asked.webp", "red", "blue", "lime")
    monkeypatch.chdir(tmp_path)
    search = [model[0], "--pool", pool, "--video", "asked.webp"]
    _, lines, _ = run_cli(monkeypatch, capsys, *search)
    assert lines[0].split()[:4] == ["1", "1.000", "video", "moves.gif"]
    assert {tuple(line.split()[2:4]) for line in lines[1:4]} == {
        ("video", "back.png"), ("image", "still.gif"), ("text", "text.txt")}
    _, both, _ = run_cli(monkeypatch, capsys, *search, "--query", "the other way round",
                         "--modality", "video")
    assert {line.split()[3] for line in both[:2]} == {"moves.gif", "back.png"} and len(both) == 3
    assert both[0].split()[1] != "1.000", "the text counts"
    assert both[-1].endswith("search.png")


def test_a_search_from_video_to_text_has_the_benchmarks_instruction_and_finds_descriptions(
        monkeypatch, capsys, tmp_path, glyph_beir, model, results):
    benchmark = Benchmark(glyph_beir)
    cell = next(cell for cell in benchmark.cells("test", 1) if cell.name == "motion_task10")
    prompt = benchmark.prompts[3, 0, 11][0]  # video -> text of dataset 11
    search = [model[0], "--data", glyph_beir, "--video", cell.items[0]["video"], "--k", 3, "--out"]
    found = {name: run_cli(monkeypatch, capsys, *search, tmp_path / name, *options)[1][:-1]
             for name, options in {"text": ["--modality", "text"],
                                   "prompt": ["--modality", "text", "--instruction", prompt],
                                   "other": ["--modality", "text", "--instruction", "Find."],
                                   "clip": ["--modality", "video"]}.items()}
    assert found["text"] == found["prompt"] != found["other"]
    assert [line.split()[2] for line in found["text"]] == ["text"] * 3
    assert all(line.split()[2] == "video" for line in found["clip"])
    assert all(line.split()[3].startswith("11:") for line in found["clip"])


def test_a_gallery_shows_the_frames_of_a_clip_and_says_which_file_it_cannot_read(tmp_path):
    colours = [(255, 0, 0), (0, 0, 255), (0, 255, 0), (255, 255, 0)]
    save_clip(tmp_path / "clip.webp", *colours)
    save_clip(tmp_path / "one.gif", (255, 0, 255))
    save_clip(tmp_path / "cut.gif", *colours)
    (tmp_path / "cut.gif").write_bytes((tmp_path / "cut.gif").read_bytes()[:-40])
    names = ("clip.webp", "one.gif", "cut.gif")
    clip, one, cut = ({"video": str(tmp_path / name)} for name in names)
    found = [("1.", one, True), ("2.", {"text": "a $\\frac{$", **clip}, None), ("3.", cut, False)]

    def drawn(query, found):
        draw_gallery(tmp_path / "gallery.png", [("query", query, found)])
        picture = Image.open(tmp_path / "gallery.png").convert("RGB")
        return {colour for count, colour in picture.getcolors(1 << 24) if count > 100}

    assert {*colours, (255, 0, 255)} <= drawn(clip, found)
    assert not {*colours} & drawn(cut, found[:1]), "a broken clip leaves its reason, no picture"


def test_a_folder_of_files_is_a_pool_and_bad_files_are_skipped_only_when_asked(
        monkeypatch, capsys, tmp_path, model):
    pool, strange = tmp_path / "pool", "$\\frac{$ \33[31m\u202e"
    pool.mkdir()
    for name in ("red", "green", "blue"):
        Image.new("RGB", (56, 56), name).save(pool / f"{name}.png")
        (pool / f"{name}.txt").write_text(f"the colour {name}")
    (pool / "broken.png").write_bytes(b"no image")
    (pool / "$\33[31m_{.txt").write_text(strange)  # no mathematics, and no red terminal
    monkeypatch.chdir(tmp_path)
    arguments = [model[0], "--query", strange, "--pool", pool]
    status, _, errors = run_cli(monkeypatch, capsys, *arguments)
    assert status == 2 and f"cannot read image {pool / 'broken.png'}" in errors[0]
    _, lines, _ = run_cli(monkeypatch, capsys, *arguments, "--skip-bad", "--k", "99")
    assert lines[0] == "skipped 1 of 8 files that cannot be read, first broken.png"
    assert lines[1].split() == ["1", "1.000", "text", r"$\x1b[31m_{.txt", r"$\frac{$",
                                r"\x1b[31m\u202e"]
    assert {line.split()[3] for line in lines[2:-1]} == {
        f"{name}.{kind}" for name in ("red", "green", "blue") for kind in ("png", "txt")}
    assert lines[-1].startswith("wrote ")


# ---- comparing depths ----------------------------------------------------------------------------


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def test_read_out_equals_models_that_are_pruned_so_and_leaves_the_model_whole(puma, glyph_beir):
    batch = puma.collate(Benchmark(glyph_beir).cells("test", 2)[6].items + ["snowman"])
    states, depth = read_out(puma, keep_last=True)(batch), len(find_decoder(puma).layers)
    assert states.shape == (3, 2 * (depth + 1), 128)
    assert len(find_decoder(puma).layers) == depth
    assert torch.equal(states[:, : depth + 1], read_out(puma)(batch))
    for place, keep, keep_last in ((1, 1, False), (depth - 1, depth - 1, False),
                                   (depth + 2, 1, True), (depth + 4, 3, True)):
        cut = prune_layers(copy.deepcopy(puma), keep, keep_last)
        torch.testing.assert_close(states[:, place], cut(batch), rtol=1e-4, atol=1e-4)
    assert (states[:, 3] - states[:, depth + 4]).abs().max() > 0.01


def test_a_hand_count_confirms_the_operations(puma):
    items = ["latin small letter a", "digit seven", "snowman", "leftwards arrow with hook"]
    rows, length = puma.collate(items)["input_ids"].shape  # texts only: no vision tower
    layer, width = find_decoder(puma).layers[0], puma.ret_embedding.numel()
    linear = sum(part.weight.numel() for part in layer.modules()
                 if isinstance(part, torch.nn.Linear))  # multiply-adds a token
    attention = 2 * length * width  # query x key and probability x value, a token
    # The last layer: keys, values, queries everywhere; output projection and MLP for [RET] only.
    ret_only = sum(part.weight.numel() for part in (
        layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj))
    last = length * (linear - ret_only + attention) + ret_only
    full = parameters(puma)
    for depth in (8, 3, 1):
        cost = efficiency(prune_layers(puma, depth), items, runs=1)
        operations = (depth - 1) * length * (linear + attention) + last
        assert cost["gflops_per_item"] == pytest.approx(2 * operations / 1e9, rel=1e-12)
        assert cost["parameters"] == full - (8 - depth) * parameters(layer)
        assert cost["items_per_s"] > 0 and cost["latency_ms"] > 0
    image = [{"image": Image.new("RGB", (56, 56))}]
    tower = efficiency(puma, image, runs=1)["gflops_per_item"]
    with torch.no_grad():
        seen = puma.visual_tokens(puma.collate(image))
    assert seen is not None and tower > cost["gflops_per_item"], "the tower is paid at every depth"


def test_a_sample_holds_every_positive_and_other_candidates_of_the_local_pools(glyph_beir):
    benchmark = Benchmark(glyph_beir)
    cells = benchmark.cells("test", 6)
    embedded = Embedded(benchmark, cells, "test", lambda items: torch.zeros(len(items), 1), 30)
    union = set()
    for cell in cells:
        keys = set(embedded.pools[cell.pool_path].keys.tolist())
        positives = set.union(*cell.relevant)
        assert positives < keys < set(benchmark.pool(cell.pool_path).keys.tolist())
        assert len(keys) == len(positives) + 30
        union |= keys
    assert set(embedded.union.keys.tolist()) == union == set(
        embedded.pools[embedded.global_path].keys.tolist())


def test_the_comparison_of_depths_equals_evaluations_of_models_cut_there(puma, glyph_beir):
    benchmark, options = Benchmark(glyph_beir), {"queries": 4, "candidates": 12}
    rows = compare_depths(copy.deepcopy(puma), benchmark, depths=[3, 8], keep_last=True, **options)
    assert [row["depth"] for row in rows] == [3, 8]
    cells = benchmark.cells("test", 4)

    def embed(model):
        return Embedded(benchmark, cells, "test", lambda items: model.encode(
            items, show_progress=False), 12)

    whole = embed(puma).candidates
    for kind, keep_last in (("", False), ("last_", True)):
        cut = prune_layers(copy.deepcopy(puma), 3, keep_last)
        embedded = embed(cut)
        for pool in ("local", "global"):
            hits = {cell.name: [any(key in right for key in keys[:5]) for keys, right in zip(
                embedded.rank(cells)[cell.name, pool][1], cell.relevant)] for cell in cells}
            rates = {name: sum(hit) / len(hit) for name, hit in hits.items()}
            assert rows[0][kind + pool] == pytest.approx(sum(rates.values()) / 10)
            assert pool == "global" or rows[0][f"{kind}cells"] == pytest.approx(rates)
        likeness = (embedded.candidates * whole).sum(1).mean().item()
        assert rows[0][f"{kind}cosine"] == pytest.approx(likeness, abs=1e-5) and likeness < 0.99
        assert rows[1][f"{kind}cosine"] == pytest.approx(1) == rows[1][f"{kind}cka"]
        assert rows[0][f"{kind}cka"] < 0.99
    assert [row["parameters"] for row in rows] == [parameters(cut), parameters(puma)]
    assert rows[0]["gflops_per_item"] < rows[1]["gflops_per_item"]


def test_the_command_prints_a_line_a_depth_and_draws_them(monkeypatch, capsys, tmp_path,
                                                          glyph_beir):
    PUMA.from_pretrained(MODEL, keep_layers=2).save_pretrained(tmp_path / "model")
    status, lines, _ = run_cli(monkeypatch, capsys, tmp_path / "model", "--data", glyph_beir,
                               "--depths", "all", "--limit", 3, "--out", tmp_path / "out")
    assert status == 0 and [line.split()[0] for line in lines[2:4]] == ["1", "2"]
    assert lines[-1].startswith("wrote ")
    saved = json.loads((tmp_path / "out/depths.json").read_text())
    assert [row["depth"] for row in saved["rows"]] == [1, 2] and saved["settings"]["limit"] == 3
    assert (tmp_path / "out/depths.png").stat().st_size > 10_000
