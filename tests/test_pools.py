"""pools.py: folders of files, and several pool files as one."""

import pytest
from PIL import Image

from data import Benchmark
from pools import Folder, Union


def test_a_folders_images_and_texts_are_its_candidates(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "b/one.JPG", "JPEG")
    (tmp_path / "a.txt").write_text(" a text\n")
    (tmp_path / "ignored.csv").write_text("x")
    (tmp_path / ".hidden/c.txt").write_text("x")
    (tmp_path / "empty.txt").write_text("\n")
    pool = Folder(tmp_path)
    assert [pool.name(i) for i in range(len(pool))] == ["a.txt", "b/one.JPG", "empty.txt"]
    assert pool.modality.tolist() == [0, 1, 0]
    assert pool[0] == {"text": "a text", "image": None}
    assert pool[1] == {"text": None, "image": str(tmp_path / "b/one.JPG")}
    with pytest.raises(ValueError, match="empty.txt is empty"):
        pool[2]


def test_a_folder_without_candidates_or_none_at_all_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="is empty: expected an M-BEIR directory, or images"):
        Folder(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        Folder(tmp_path / "missing")


def test_a_union_holds_each_candidate_once_in_the_order_of_the_files(glyph_beir):
    benchmark = Benchmark(glyph_beir)
    local = [benchmark.pool(glyph_beir / f"cand_pool/local/mbeir_glyph_task{task}_cand_pool.jsonl")
             for task in (1, 0, 3)]  # 1 and 3 both hold names
    union = Union(local)
    expected = {}  # did key -> item
    for pool in local:
        for i, key in enumerate(pool.keys):
            expected.setdefault(key, (pool[i], pool.modality[i]))
    assert union.keys.tolist() == list(expected) and len(union) < sum(map(len, local))
    assert list(union) == [item for item, _ in expected.values()]
    assert union.modality.tolist() == [modality for _, modality in expected.values()]
    for row in (0, 1, len(union) // 2, len(union) - 1):
        assert union[row] == list(expected.values())[row][0]
    assert union.rows(union.keys).tolist() == list(range(len(union)))
    with pytest.raises(IndexError):
        union[len(union)]
