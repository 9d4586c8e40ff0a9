"""support/index.py: exact search, and files of embeddings that survive a kill."""

import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT

from support.index import BLOCK, embed_to_file, fingerprint, search, stored_path

# ---- searching -----------------------------------------------------------------------------------


def slow_ranking(scores, k):
    """Indices by falling score; among equals the lower index first."""
    return [sorted(range(len(row)), key=lambda j: (-row[j], j))[:k] for row in scores.tolist()]


@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize("chunk_size", [1, 7, 100])
def test_search_agrees_with_a_full_sort_ties_included(levels, chunk_size):
    torch.manual_seed(levels)
    queries = torch.randint(0, levels, (20, 3)).float()
    candidates = torch.randint(0, levels, (31, 3)).float()
    rows = torch.randperm(31)[:22]
    for k in (1, 5, 31, 50):
        scores, indices = search(queries, candidates, k, chunk_size)
        assert indices.tolist() == slow_ranking(queries @ candidates.T, k)
        assert torch.equal(scores, (queries @ candidates.T).gather(1, indices))
        _, indices = search(queries, candidates, k, chunk_size, rows)
        assert indices.tolist() == slow_ranking(queries @ candidates[rows].T, k)


def test_more_queries_than_fit_into_a_block_keep_their_order():
    torch.manual_seed(0)
    queries, candidates = torch.randn(BLOCK + 5, 4), torch.randn(30, 4)
    scores, indices = search(queries, candidates, 2, chunk_size=20)
    expected = (queries @ candidates.T).topk(2)
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(scores, expected.values)


def test_half_precision_is_scored_in_float32_and_double_precision_stays():
    torch.manual_seed(0)
    vectors, queries = torch.randn(1000, 16).half(), torch.randn(5, 16)
    scores, indices = search(queries, vectors, 10, chunk_size=64)
    expected = queries @ vectors.float().T
    assert indices.tolist() == slow_ranking(expected, 10) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected.gather(1, indices))
    assert search(queries.double(), vectors, 3)[0].dtype == torch.float64


def test_search_refuses_empty_pools_other_widths_and_numbers_that_are_none():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(0, 3\)"):
        search(torch.zeros(2, 3), torch.zeros(0, 3), 1)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(5, 4\)"):
        search(torch.zeros(2, 3), torch.zeros(5, 4), 1)
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = torch.zeros(5, 3)
        bad[3, 1] = value
        with pytest.raises(ValueError, match="embedding of candidate 3 is NaN or infinite"):
            search(torch.zeros(2, 3), bad, 1, chunk_size=2)
        with pytest.raises(ValueError, match="embedding of query 3 is NaN or infinite"):
            search(bad, torch.zeros(2, 3), 1)


# ---- files ---------------------------------------------------------------------------------------

TEXTS = [f"text {i}" for i in range(50)]


class Encoder:
    """Stands for a model: a text's vector is its number, its length and 1. `seen`: its texts."""

    def __init__(self, seconds=0):
        self.seen, self.seconds = [], seconds

    def __call__(self, items):
        time.sleep(self.seconds)
        self.seen += items
        return torch.tensor([[float(text.split()[1]), len(text), 1.0] for text in items])


EXPECTED = Encoder()(TEXTS).half()
embed_in_fours = partial(embed_to_file, items=TEXTS, width=3, chunk_size=4)


def start(code, path, **variables):
    """A process in the repository that has this file's names, runs `code` and prints."""
    code = f"import sys; sys.path[:0] = ['tests']\nfrom test_index import *\n{code}"
    return subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, text=True,
                            env=os.environ | variables, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def test_a_bar_is_shown_only_where_there_is_something_to_do_and_goes_when_it_is_done(tmp_path):
    code = "embed_in_fours(sys.argv[1], encode=Encoder()); print('done', file=sys.stderr)\n" * 2
    error = start(code, tmp_path / "a.npy", TQDM_DISABLE="").communicate(timeout=100)[1]
    first, second, _ = error.split("done\n")
    assert "encode" in first and first.splitlines()[-1].isspace() and second == "", error


def test_a_run_that_was_killed_continues_where_it_stopped(tmp_path):
    path = tmp_path / "a.npy"
    child = start("embed_in_fours(sys.argv[1], encode=Encoder(0.05))", path)
    while not path.exists() or not np.load(path)[15].any():  # the fourth chunk
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    encode = Encoder()
    vectors = embed_in_fours(path, encode=encode)
    left = len(encode.seen)
    assert 0 < left <= 50 - 12 and encode.seen == TEXTS[50 - left :], "killed in the middle"
    assert torch.equal(vectors, EXPECTED)
    again = Encoder()
    assert torch.equal(embed_in_fours(path, encode=again), EXPECTED) and again.seen == []
    assert np.array_equal(np.load(path), EXPECTED.numpy()), "an ordinary .npy file"
    assert list(tmp_path.iterdir()) == [path]


RANK = """
from support import distributed
distributed.start("cpu")
encode = Encoder()
vectors = embed_in_fours(sys.argv[1], encode=encode)
print(len(encode.seen), torch.equal(vectors, EXPECTED))
distributed.stop()
"""


def test_two_processes_share_the_work_and_both_see_all_of_it(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [start(RANK, tmp_path / "a.npy", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                   MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in range(2)]
    outputs = [rank.communicate(timeout=100)[0].split() for rank in ranks]
    assert outputs == [["26", "True"], ["24", "True"]], "7 chunks and 6, the last of 2 texts"


FULL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (250, 250))
for name in ("a.npy", "b.npy"):
    try:
        embed_in_fours(f"{sys.argv[1]}/{name}", encode=Encoder())
    except OSError as error:
        print(error)
"""


def test_a_full_disk_is_an_error_and_what_was_done_before_is_kept(tmp_path):
    """A limit on the size of files stands for it: the system refuses the write in the same way."""
    begun = tmp_path / "b.npy"

    def stopping(items):
        if "text 8" in items:
            raise KeyboardInterrupt
        return Encoder()(items)

    with pytest.raises(KeyboardInterrupt):  # a run that ends after two chunks
        embed_in_fours(begun, encode=stopping)
    child = start(FULL_DISK, tmp_path)
    message, error = child.communicate()
    assert child.returncode == 0 and message == 2 * "[Errno 27] File too large\n", error
    assert list(tmp_path.iterdir()) == [begun], "nothing half-made is left"
    encode = Encoder()
    assert torch.equal(embed_in_fours(begun, encode=encode), EXPECTED)
    assert encode.seen == TEXTS[8:]


def test_empty_pools_other_files_and_embeddings_that_are_no_numbers_are_errors(tmp_path):
    with pytest.raises(ValueError, match="the pool is empty"):
        embed_to_file(tmp_path / "a.npy", [], Encoder(), 3)
    embed_to_file(tmp_path / "a.npy", TEXTS, Encoder(), 3)
    with pytest.raises(ValueError, match=r"a.npy: .*\(50, 3\).*expected .*\(50, 4\).*delete it"):
        embed_to_file(tmp_path / "a.npy", TEXTS, Encoder(), 4)
    with pytest.raises(ValueError, match=r"\), 1\), expected .*\), 13\); delete it"):
        embed_in_fours(tmp_path / "a.npy", encode=Encoder())
    (tmp_path / "a.npy").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="cannot use the embeddings .*a.npy: .*delete it"):
        embed_in_fours(tmp_path / "a.npy", encode=Encoder())

    def broken(items):
        return torch.stack([row / (row[0] != 7) for row in Encoder()(items)])

    with pytest.raises(ValueError, match="embedding of text 7 is NaN or infinite"):
        embed_in_fours(tmp_path / "b.npy", encode=broken)
    encode = Encoder()
    embed_in_fours(tmp_path / "b.npy", encode=encode)
    assert encode.seen == TEXTS[4:], "the chunk before it is kept"


def test_a_fingerprint_changes_with_every_part_and_with_files(tmp_path):
    file = tmp_path / "pool.jsonl"
    file.write_text("old")
    key = fingerprint([file, "model", 3])
    assert key == fingerprint([file, "model", 3]) and len(key) == 16
    for other in ([file, "model", 4], [file, "mode", 3], [file, "model"], ["model", file, 3]):
        assert fingerprint(other) != key
    os.utime(file, ns=(0, 0))
    assert fingerprint([file, "model", 3]) != key
    long_ago = fingerprint([file, "model", 3])
    file.write_text("newer")
    os.utime(file, ns=(0, 0))
    assert fingerprint([file, "model", 3]) != long_ago, "another size"


def test_embeddings_are_computed_again_when_the_model_settings_or_the_pool_change(tmp_path):
    model, pool = tmp_path / "model", tmp_path / "pool.jsonl"
    model.mkdir()
    for file in (model / "config.json", pool):
        file.write_text("{}")
    encode, of_a_file = Encoder(), type("OfAFile", (list,), {"files": [pool]})
    five = of_a_file(TEXTS[:5])

    def computed(*settings, items=five):
        encode.seen = []
        vectors = embed_to_file(stored_path(model, items, *settings), items, encode, 3)
        assert torch.equal(vectors, Encoder()(items).half())
        return len(encode.seen)

    assert [computed("a"), computed("a"), computed("b"), computed("b")] == [5, 0, 5, 0]
    assert [computed("a", items=of_a_file(TEXTS[:4])), computed("a")] == [4, 0]
    assert [computed("a", items=texts) for texts in (TEXTS[:5], TEXTS[1:6], TEXTS[:5])] == [5, 5, 0]
    for file in (model / "config.json", pool):
        file.write_text("{ }")
        assert [computed("a"), computed("a")] == [5, 0]
    assert (model / "cache/.gitignore").read_text() == "*\n"


def test_the_files_of_a_hub_model_are_under_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub").mkdir()
    monkeypatch.setattr("support.index.cached_file", lambda name, file: tmp_path / "hub" / file)
    path = stored_path("Qwen/Qwen2-VL-2B-Instruct", TEXTS)
    assert path.match("results/Qwen-Qwen2-VL-2B-Instruct/cache/*.npy") and path.parent.is_dir()
    assert not list((tmp_path / "hub").iterdir()), "the hub's folder is not ours"


def test_the_files_of_a_model_in_a_read_only_folder_are_under_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/puma-1/model").mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert stored_path("runs/puma-1/model", TEXTS).match("results/puma-1-model/cache/*.npy")


def test_unreadable_items_are_named_or_skipped(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    items = [{"text": "text 1"}, {"image": str(tmp_path / "bad.png")}, {"text": "text 2"}]

    def encode(part):
        for item in part:
            if "text" not in item:
                raise ValueError(f"cannot read image {item['image']}")
        return Encoder()([item["text"] for item in part])

    paths = {skip_bad: stored_path(tmp_path, items, skip_bad) for skip_bad in (False, True)}
    for _ in range(2):  # what was skipped in between is an error again
        with pytest.raises(ValueError, match="cannot read image .*bad.png"):
            embed_to_file(paths[False], items, encode, 3)
        vectors = embed_to_file(paths[True], items, encode, 3, skip_bad=True)
        assert vectors.isnan().all(1).tolist() == [False, True, False]
        assert vectors[2].tolist() == [2, 6, 1]
    with pytest.raises(ValueError, match="^cannot read image .*bad.png"):
        embed_to_file(tmp_path / "d.npy", items, encode, 3)

    nothing = embed_to_file(tmp_path / "c.npy", items[1:2], encode, 3, skip_bad=True)
    assert nothing.isnan().all()
