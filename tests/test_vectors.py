"""vectors.py: files of embeddings that survive a kill and know when they are out of date."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from vectors import Cache, embed_to_file, fingerprint

TEXTS = [f"text {i}" for i in range(50)]


def vector(text):
    """What stands for a model here: a vector that only its own text has."""
    return torch.tensor([float(text.split()[1]), len(text), 1.0])


class Encoder:
    """encode(), counting what it embeds."""

    def __init__(self):
        self.seen = []

    def __call__(self, items):
        self.seen += items
        return torch.stack([vector(item) for item in items])


CHILD = """
import sys, time, torch
from vectors import embed_to_file
sys.path.insert(0, "tests")
from test_vectors import TEXTS, Encoder
encode = Encoder()
def slowly(items):
    time.sleep(0.05)
    return encode(items)
embed_to_file(sys.argv[1], TEXTS, slowly, 3, chunk_size=4)
"""


def test_a_run_that_was_killed_continues_where_it_stopped(tmp_path):
    path, progress = tmp_path / "a.npy", tmp_path / "a.progress"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], cwd=ROOT,
                             stderr=subprocess.DEVNULL)
    started = time.time()
    while not (progress.exists() and sum(progress.read_bytes()) >= 4):
        assert child.poll() is None and time.time() - started < 60
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = sum(progress.read_bytes())
    assert 4 <= done < 13, "it was to be killed in the middle"
    encode = Encoder()
    vectors = embed_to_file(path, TEXTS, encode, 3, chunk_size=4)
    assert encode.seen == TEXTS[4 * done :]
    assert torch.equal(vectors, torch.stack([vector(text) for text in TEXTS]).half())
    again = Encoder()
    assert torch.equal(embed_to_file(path, TEXTS, again, 3, chunk_size=4), vectors)
    assert again.seen == []
    assert np.load(path).shape == (50, 3), "an ordinary .npy file"
    assert not list(tmp_path.glob("*.tmp*"))


RANK = """
import sys
import distributed
from vectors import embed_to_file
sys.path.insert(0, "tests")
from test_vectors import TEXTS, Encoder
distributed.start("cpu")
encode = Encoder()
vectors = embed_to_file(sys.argv[1], TEXTS, encode, 3, chunk_size=4)
print(len(encode.seen), vectors.float().sum().item())
distributed.stop()
"""


def test_two_processes_share_the_work_and_both_see_all_of_it(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in range(2):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        children.append(subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path / "a.npy")], cwd=ROOT, text=True,
            env=os.environ | variables, stdout=subprocess.PIPE))
    outputs = [child.communicate(timeout=100)[0].split() for child in children]
    whole = embed_to_file(tmp_path / "b.npy", TEXTS, Encoder(), 3, chunk_size=4)
    assert [int(count) for count, _ in outputs] == [26, 24], "7 chunks and 6, the last of 2 texts"
    assert {float(total) for _, total in outputs} == {whole.float().sum().item()}
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "a.npy")), whole)


def test_empty_pools_other_shapes_and_embeddings_that_are_no_numbers_are_errors(tmp_path):
    with pytest.raises(ValueError, match="the pool is empty"):
        embed_to_file(tmp_path / "a.npy", [], Encoder(), 3)
    embed_to_file(tmp_path / "a.npy", TEXTS, Encoder(), 3)
    with pytest.raises(ValueError, match=r"shape \(50, 3\).*make \(50, 4\): delete it"):
        embed_to_file(tmp_path / "a.npy", TEXTS, Encoder(), 4)
    with pytest.raises(ValueError, match="in 1 chunks, expected 5: delete it"):
        embed_to_file(tmp_path / "a.npy", TEXTS, Encoder(), 3, chunk_size=10)

    def broken(items):
        return torch.stack([vector(i) / (0 if i == "text 7" else 1) for i in items])

    with pytest.raises(ValueError, match="embedding of item 7 is NaN or infinite: text 7"):
        embed_to_file(tmp_path / "b.npy", TEXTS, broken, 3, chunk_size=4)
    assert sum((tmp_path / "b.progress").read_bytes()) == 1, "the chunk before it is kept"
    (tmp_path / "a.npy").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="cannot read the embeddings .*a.npy: .*delete it"):
        embed_to_file(tmp_path / "a.npy", TEXTS, Encoder(), 3)


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("vectors.shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="needs 0.0 GB, the disk has 0.0 GB free"):
        embed_to_file(tmp_path / "a.npy", TEXTS, Encoder(), 3)
    assert not list(tmp_path.iterdir())


def test_a_fingerprint_changes_with_texts_instructions_and_image_files(tmp_path):
    image = tmp_path / "a.bmp"
    Image.new("L", (8, 8), 0).save(image)
    item = {"text": "a", "instruction": None, "image": str(image)}
    key = fingerprint("model", [item])
    assert key == fingerprint("model", [dict(item)]) and len(key) == 16
    for other in (["model", [{**item, "text": "b"}]], ["model", [{**item, "instruction": "b"}]],
                  ["model", [item, item]], ["other", [item]], ["model", [{**item, "image": None}]]):
        assert fingerprint(*other) != key
    status, size = image.stat(), image.stat().st_size
    time.sleep(0.05)  # the file system's clock ticks every few milliseconds
    Image.new("L", (8, 8), 255).save(image)  # as many bytes, and an old date
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert image.stat().st_size == size
    assert fingerprint("model", [item]) != key


@pytest.fixture
def model_folder(puma, tmp_path):
    puma.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_cache_is_used_again_until_a_text_or_the_model_changes(puma, model_folder, monkeypatch):
    items, counts = [{"text": text} for text in TEXTS[:5]], []
    encode = puma.encode
    monkeypatch.setattr(puma, "encode", lambda items, *args, **options: (
        counts.append(len(items)), encode(items, *args, **options))[1])
    first = Cache(puma, model_folder).embed(items, "texts")
    torch.testing.assert_close(first.float(), encode(items), atol=1e-3, rtol=0)
    assert torch.equal(Cache(puma, model_folder).embed(items, "texts"), first) and counts == [5]
    items[2] = {"text": "another"}
    second = Cache(puma, model_folder).embed(items, "texts")
    assert counts == [5, 5] and not torch.equal(first[2], second[2])
    about = [json.loads(path.read_text()) for path in (model_folder / "cache").glob("*.json")]
    assert about == [{"what": "texts", "shape": [5, puma.ret_embedding.numel()]}], "no old ones"
    config = model_folder / "config.json"
    config.write_text(config.read_text() + "\n")
    Cache(puma, model_folder).embed(items, "texts")
    assert counts == [5, 5, 5]


def test_a_model_folder_that_cannot_be_written_has_its_cache_elsewhere(
        puma, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (model_folder / "cache").write_text("a file where the folder should be")
    items = [{"text": "a"}, {"text": "b"}]
    cache = Cache(puma, model_folder)
    assert cache.folder.resolve().is_relative_to(tmp_path / "results")
    vectors = cache.embed(items, "texts")
    (tmp_path / "results").rename(tmp_path / "kept")
    (tmp_path / "results").write_text("and here as well")
    cache = Cache(puma, model_folder)
    assert cache.folder is None
    torch.testing.assert_close(cache.embed(items, "texts"), vectors.float(), atol=1e-3, rtol=0)


def test_a_hub_model_has_its_cache_under_results(puma, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.utils.cached_file", lambda name, file: model_folder / file)
    cache = Cache(puma, "Qwen/Qwen2-VL-2B-Instruct")
    assert str(cache.folder) == "results/Qwen-Qwen2-VL-2B-Instruct/cache"
    assert not (model_folder / "cache").exists(), "the hub's files are not ours"


def test_unreadable_items_are_named_or_skipped(puma, model_folder, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    items = [{"text": "a"}, {"image": str(tmp_path / "bad.png")}, {"text": "b"}]
    cache = Cache(puma, model_folder)
    with pytest.raises(ValueError, match=r"cannot read image .*bad.png"):
        cache.embed(items, "items")
    vectors = cache.embed(items, "items", skip_bad=True)
    assert vectors.isnan().any(1).tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"cannot read image .*bad.png"):
        cache.embed(items, "items")  # what an earlier run skipped is an error again
