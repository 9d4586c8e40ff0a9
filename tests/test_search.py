"""search.py against a full sort."""

import numpy as np
import pytest
import torch

from search import _plain, search, stable_topk


def slow_ranking(scores, k):
    """Indices by falling score; among equals the lower index first."""
    return [sorted(range(len(row)), key=lambda j: (-row[j], j))[:k] for row in scores]


@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("coarse", [False, True])
def test_search_agrees_with_a_full_sort_ties_included(levels, chunk_size, coarse, monkeypatch):
    monkeypatch.setattr("search.BLOCK", 6)
    torch.manual_seed(levels)
    queries = torch.randint(0, levels, (20, 3)).float()
    candidates = torch.randint(0, levels, (31, 3)).float()
    rows = torch.randperm(31)[:22]
    for k in (1, 5, 31, 50):
        scores, indices = search(queries, candidates, k, chunk_size, coarse=coarse)
        assert indices.tolist() == slow_ranking((queries @ candidates.T).tolist(), k)
        assert torch.equal(scores, (queries @ candidates.T).gather(1, indices))
        _, indices = search(queries, candidates, k, chunk_size, rows, coarse=coarse)
        assert indices.tolist() == slow_ranking((queries @ candidates[rows].T).tolist(), k)


@pytest.mark.parametrize("k", [1, 4, 9, 10, 12])
def test_topk_prefers_the_lower_column_among_equals(k):
    torch.manual_seed(k)
    scores = torch.randint(0, 3, (200, 10)).float()
    values, columns = stable_topk(scores, k)
    assert columns.tolist() == slow_ranking(scores.tolist(), k)
    assert torch.equal(values, scores.gather(1, columns))


@pytest.mark.parametrize("spread", [1e-4, 1e-2, 0.1, 1.0])
def test_the_bfloat16_filter_loses_nothing_however_close_the_scores(spread, monkeypatch):
    torch.manual_seed(0)
    centre = torch.randn(1, 48, dtype=torch.float64)
    queries = (centre + spread * torch.randn(30, 48)).float()
    candidates = (centre + spread * torch.randn(3000, 48)).half()  # |c| differs, scores are close
    plain = []
    monkeypatch.setattr("search._plain", lambda *args: plain.append(1) or _plain(*args))
    scores, indices = search(queries, candidates, 10, chunk_size=500, coarse=True)
    assert (spread == 1.0) <= (not plain), "far apart, the filter is used"
    exact = queries.double() @ candidates.double().T
    expected = exact.sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(scores.double(), expected.values[:, :10], rtol=1e-5, atol=1e-5)
    assert (exact.gather(1, indices) >= expected.values[:, 9:10] - 1e-4 * scores[:, :1].abs()).all()
    assert all(len(set(row)) == 10 for row in indices.tolist())


@pytest.mark.parametrize("chunk_size", [1, 20])
def test_a_candidate_that_bfloat16_underestimates_is_found(chunk_size):
    """With 8 bits, the first scores 2^-7 instead of 0.0020, the second 0 instead of 0.0029."""
    pairs = [(1 + 5 / 1024, -1 - 3 / 1024), (1 + 3 / 1024, -1.0), *[(-1.0, 0.5)] * 18]
    candidates, query = torch.tensor(pairs).half(), torch.ones(1, 2)
    assert (query.bfloat16() @ candidates.bfloat16().T)[0, :2].tolist() == [2**-7, 0]
    scores, indices = search(query, candidates, 1, chunk_size, coarse=True)
    assert indices.tolist() == [[1]] and scores.tolist() == [[3 / 1024]]


def test_equal_candidates_in_different_chunks_keep_the_pools_order():
    torch.manual_seed(0)
    one = torch.randn(5, 96)
    candidates = torch.cat([torch.randn(700, 96), *[one] * 8, torch.randn(203, 96)])
    _, indices = search(one, candidates, 8, chunk_size=100, coarse=True)
    assert indices.tolist() == [[700 + i + 5 * copy for copy in range(8)] for i in range(5)]


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
