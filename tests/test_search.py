"""search.py against a full sort."""

import numpy as np
import pytest
import torch

from search import search, stable_topk


def slow_ranking(scores, k):
    """Indices by falling score; among equals the lower index first."""
    return [sorted(range(len(row)), key=lambda j: (-row[j], j))[:k] for row in scores]


@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_search_agrees_with_a_full_sort_ties_included(levels, chunk_size, monkeypatch):
    monkeypatch.setattr("search.BLOCK", 6)
    torch.manual_seed(levels)
    queries = torch.randint(0, levels, (20, 3)).float()
    candidates = torch.randint(0, levels, (31, 3)).float()
    rows = torch.randperm(31)[:22]
    for k in (1, 5, 31, 50):
        scores, indices = search(queries, candidates, k, chunk_size)
        assert indices.tolist() == slow_ranking((queries @ candidates.T).tolist(), k)
        assert torch.equal(scores, (queries @ candidates.T).gather(1, indices))
        _, indices = search(queries, candidates, k, chunk_size, rows)
        assert indices.tolist() == slow_ranking((queries @ candidates[rows].T).tolist(), k)


@pytest.mark.parametrize("k", [1, 4, 9, 10, 12])
def test_topk_prefers_the_lower_column_among_equals(k):
    torch.manual_seed(k)
    scores = torch.randint(0, 3, (200, 10)).float()
    values, columns = stable_topk(scores, k)
    assert columns.tolist() == slow_ranking(scores.tolist(), k)
    assert torch.equal(values, scores.gather(1, columns))


class Watched:
    """Candidates that note how many rows are taken at once."""

    def __init__(self, vectors):
        self.vectors, self.shape, self.largest = vectors, vectors.shape, 0

    def __len__(self):
        return len(self.vectors)

    def __getitem__(self, rows):
        part = self.vectors[rows]
        self.largest = max(self.largest, len(part))
        return part


def test_a_memory_map_of_half_precision_is_read_in_chunks_and_scored_in_float32(tmp_path):
    torch.manual_seed(0)
    vectors, queries = torch.randn(1000, 16).half(), torch.randn(5, 16)
    np.save(tmp_path / "pool.npy", vectors.numpy())
    watched = Watched(torch.from_numpy(np.load(tmp_path / "pool.npy", mmap_mode="c")))
    scores, indices = search(queries, watched, 10, chunk_size=64)
    assert watched.largest == 64
    expected = queries @ vectors.float().T
    assert indices.tolist() == slow_ranking(expected.tolist(), 10)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected.gather(1, indices))


def test_search_refuses_empty_pools_other_widths_and_numbers_that_are_none():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(0, 3\)"):
        search(torch.zeros(2, 3), torch.zeros(0, 3), 1)
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(5, 4\)"):
        search(torch.zeros(2, 3), torch.zeros(5, 4), 1)
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = torch.zeros(5, 3)
        bad[3, 1] = value
        with pytest.raises(ValueError, match="embedding of candidate 3 is NaN or infinite"):
            search(torch.zeros(2, 3), bad, 1, chunk_size=2)
        with pytest.raises(ValueError, match="embedding of query 3 is NaN or infinite"):
            search(bad, torch.zeros(2, 3), 1)
