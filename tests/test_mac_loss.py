"""mac_loss.py against loops written from its docstring's equations; method.md, section 5."""

import ast
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import mac_loss as module
from mac_loss import hard_temperature, mac_loss

TAU, TAU_HARD = 0.3, 0.2  # far enough apart to be told apart, high enough for exp in a plain loop


def slow_losses(query, target, modality, tau, tau_hard, positive=None, duplicate=None,
                positive_temperature="hard", intra_offset=0.0):
    """L_i = -log exp(s_ip / tau_ip) / sum_j exp(s_ij / tau_ij), one number at a time: (B,)."""
    losses = []
    for i in range(len(query)):
        p = i if positive is None else int(positive[i])
        numerator, denominator = None, 0.0
        for j in range(len(target)):
            if duplicate is not None and duplicate[i, j] and j != p:
                continue
            cosine = sum(query[i] * target[j])
            cosine = cosine / sum(query[i] ** 2) ** 0.5 / sum(target[j] ** 2) ** 0.5
            tau_ij = tau_hard if modality[j] == modality[p] else tau
            if j == p and positive_temperature == "base":
                tau_ij = tau
            offset = intra_offset if j != p and modality[j] == modality[p] else 0.0
            term = torch.exp(cosine / tau_ij + offset)
            denominator = denominator + term
            if j == p:
                numerator = term
        losses.append(-torch.log(numerator / denominator))
    return torch.stack(losses)


def random_case(queries=5, targets=8, width=6, seed=0):
    """float64 query, target; three modalities; positives in no order; some duplicates."""
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(queries, width, dtype=torch.float64, generator=random, requires_grad=True)
    target = torch.randn(targets, width, dtype=torch.float64, generator=random, requires_grad=True)
    modality = torch.arange(targets) % 3
    positive = torch.randperm(targets, generator=random)[:queries]
    duplicate = torch.rand(queries, targets, generator=random) < 0.3
    duplicate[0, positive[0]] = True  # a query's own positive always counts
    return query, target, modality, positive, duplicate


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


# ---- the equation --------------------------------------------------------------------------------

@pytest.mark.parametrize("positive_temperature", ["hard", "base"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("columns", ["default", "given"])
@pytest.mark.parametrize("intra_offset", [0.0, 0.7])
def test_values_and_gradients_equal_a_double_loop(columns, masked, positive_temperature,
                                                  intra_offset):
    query, target, modality, positive, duplicate = random_case()
    options = {"positive": positive if columns == "given" else None,
               "duplicate": duplicate if masked else None,
               "positive_temperature": positive_temperature, "intra_offset": intra_offset}
    fast = mac_loss(query, target, modality, TAU, TAU_HARD, reduction="none", **options)
    slow = slow_losses(query, target, modality, TAU, TAU_HARD, **options)
    assert fast.dtype == torch.float64
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)  # unequal, so that rows cannot swap
    for ours, reference in zip(gradients(fast @ weights, query, target),
                               gradients(slow @ weights, query, target)):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


def test_the_two_readings_the_mask_and_the_columns_all_change_the_loss():
    """So that the double-loop test above cannot pass by ignoring one of its arguments."""
    query, target, modality, positive, duplicate = random_case()
    options = [{}, {"positive": positive}, {"duplicate": duplicate},
               {"positive_temperature": "base"}, {"intra_offset": 0.7}]
    values = [mac_loss(query, target, modality, TAU, TAU_HARD, **o).item() for o in options]
    values.append(mac_loss(query, target, modality, TAU, TAU).item())
    assert len({round(value, 6) for value in values}) == len(values), values


def free_similarities(queries, targets):
    """Similarities that are free parameters: query i is the i-th axis, and a target's coordinates
    are its similarities, plus one that makes its length 1 (so that normalising changes nothing)."""
    random = torch.Generator().manual_seed(1)
    similarity = torch.rand(queries, targets, dtype=torch.float64, generator=random) - 0.5
    similarity.requires_grad_()
    rest = (1 - similarity.square().sum(0)).sqrt()
    target = torch.cat([similarity, rest[None]]).T
    return similarity, torch.eye(queries, queries + 1).double(), target


@pytest.mark.parametrize("positive_temperature", ["hard", "base"])
def test_the_derivative_by_a_similarity_is_probability_over_temperature(positive_temperature):
    similarity, query, target = free_similarities(3, 7)
    modality = torch.tensor([0, 1, 0, 0, 1, 1, 2])
    duplicate = torch.zeros(3, 7, dtype=torch.bool)
    duplicate[0, 5] = duplicate[2, 3] = True
    loss = mac_loss(query, target, modality, TAU, TAU_HARD, duplicate=duplicate, reduction="sum",
                    positive_temperature=positive_temperature)
    (derivative,) = gradients(loss, similarity)
    for i in range(3):
        tau = [TAU_HARD if modality[j] == modality[i] else TAU for j in range(7)]
        if positive_temperature == "base":
            tau[i] = TAU
        terms = [0.0 if duplicate[i, j] else math.exp(similarity[i, j].item() / tau[j])
                 for j in range(7)]
        for j in range(7):
            probability = terms[j] / sum(terms)
            expected = (probability - (i == j)) / tau[j]
            assert derivative[i, j].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_gradcheck():
    query, target, modality, positive, duplicate = random_case(3, 5, 3)

    def loss(query, target):
        return mac_loss(query, target, modality, TAU, TAU_HARD, positive=positive,
                        duplicate=duplicate, reduction="none")

    assert torch.autograd.gradcheck(loss, (query, target))


# ---- known numbers and invariances ---------------------------------------------------------------

def test_loss_equals_infonce_when_both_temperatures_agree():
    query, target, modality, positive, _ = random_case()
    ours = mac_loss(query, target, modality, TAU, TAU, positive=positive)
    cosine = F.normalize(query, dim=1) @ F.normalize(target, dim=1).T
    infonce = F.cross_entropy(cosine / TAU, positive)
    torch.testing.assert_close(ours, infonce)
    for mine, reference in zip(gradients(ours, query, target), gradients(infonce, query, target)):
        torch.testing.assert_close(mine, reference)


def test_loss_equals_infonce_at_the_hard_temperature_when_all_targets_share_a_modality():
    query, target, _, positive, _ = random_case()
    modality = torch.full((8,), 4)
    ours = mac_loss(query, target, modality, TAU, TAU_HARD, positive=positive)
    cosine = F.normalize(query, dim=1) @ F.normalize(target, dim=1).T
    torch.testing.assert_close(ours, F.cross_entropy(cosine / TAU_HARD, positive))


@pytest.mark.parametrize("tau, tau_hard", [(0.03, 0.03), (0.03, 0.0182), (1.0, 0.1)])
def test_loss_is_ln_n_when_every_similarity_is_zero_whatever_the_temperatures(tau, tau_hard):
    query = torch.eye(3, 8).double()
    target = torch.eye(8).double()[3:]  # five targets, orthogonal to every query
    modality = torch.tensor([0, 1, 0, 1, 2])
    for reading in ("hard", "base"):
        losses = mac_loss(query, target, modality, tau, tau_hard, reduction="none",
                          positive_temperature=reading)
        torch.testing.assert_close(losses, torch.full((3,), math.log(5)).double())


@pytest.mark.parametrize("tau, tau_hard", [(0.03, 0.03), (0.03, 0.0182), (1.0, 0.1)])
def test_loss_is_ln_n_when_all_similarities_agree_within_one_modality(tau, tau_hard):
    query, target = torch.ones(3, 4).double(), torch.ones(5, 4).double()
    losses = mac_loss(query, target, torch.zeros(5).long(), tau, tau_hard, reduction="none")
    torch.testing.assert_close(losses, torch.full((3,), math.log(5)).double())


def test_equal_similarities_across_modalities_give_ln_n_only_at_equal_temperatures():
    """At cosine 1 an inter-modality negative counts exp(1 / tau - 1 / tau_hard) times: nearly 0."""
    query, target = torch.ones(2, 4).double(), torch.ones(5, 4).double()
    modality = torch.tensor([0, 0, 0, 1, 1])  # three of the positives' modality, two others
    same = mac_loss(query, target, modality, 0.03, 0.03)
    assert same.item() == pytest.approx(math.log(5))
    apart = mac_loss(query, target, modality, 0.03, 0.02)
    assert apart.item() == pytest.approx(math.log(3 + 2 * math.exp(1 / 0.03 - 1 / 0.02)))


def test_permuting_the_targets_with_their_labels_changes_nothing():
    query, target, modality, positive, duplicate = random_case()
    order = torch.tensor([6, 2, 7, 0, 5, 1, 4, 3])
    options = {"reduction": "none"}
    before = mac_loss(query, target, modality, TAU, TAU_HARD, positive=positive,
                      duplicate=duplicate, **options)
    after = mac_loss(query, target[order], modality[order], TAU, TAU_HARD,
                     positive=order.argsort()[positive], duplicate=duplicate[:, order], **options)
    torch.testing.assert_close(before, after)


def test_the_scale_of_the_embeddings_and_the_names_of_the_modalities_do_not_matter():
    query, target, modality, positive, _ = random_case()
    before = mac_loss(query, target, modality, TAU, TAU_HARD, positive=positive)
    scale = torch.logspace(-3, 3, 8).double()[:, None]
    names = torch.tensor([7, -1, 100])  # only equality counts
    after = mac_loss(query * 50, target * scale, names[modality], TAU, TAU_HARD, positive=positive)
    torch.testing.assert_close(before, after)


def test_reductions_are_consistent():
    query, target, modality, _, _ = random_case()
    none, total, mean = (mac_loss(query, target, modality, TAU, TAU_HARD, reduction=reduction)
                         for reduction in ("none", "sum", "mean"))
    assert none.shape == (5,) and total.shape == mean.shape == ()
    torch.testing.assert_close(none.sum(), total)
    torch.testing.assert_close(none.mean(), mean)
    torch.testing.assert_close(mac_loss(query, target, modality, TAU, TAU_HARD), mean)


# ---- edges ---------------------------------------------------------------------------------------

def test_one_query_with_one_target_has_loss_and_gradient_zero():
    query, target, modality, _, _ = random_case(1, 1)
    loss = mac_loss(query, target, modality, TAU, TAU_HARD)
    assert loss.item() == 0
    assert all(g.abs().max() == 0 for g in gradients(loss, query, target))


def test_one_query_with_several_targets_equals_the_loop():
    query, target, modality, positive, duplicate = random_case(1, 8)
    options = {"positive": positive, "duplicate": duplicate}
    torch.testing.assert_close(
        mac_loss(query, target, modality, TAU, TAU_HARD, **options),
        slow_losses(query, target, modality, TAU, TAU_HARD, **options)[0],
    )


def test_several_queries_may_share_a_target():
    query, target, modality, _, _ = random_case(5, 2)
    positive = torch.tensor([1, 0, 1, 1, 0])
    torch.testing.assert_close(
        mac_loss(query, target, modality, TAU, TAU_HARD, positive=positive, reduction="none"),
        slow_losses(query, target, modality, TAU, TAU_HARD, positive),
    )


def test_a_querys_own_positive_is_never_left_out():
    query, target, modality, positive, _ = random_case()
    everything = torch.ones(5, 8, dtype=torch.bool)
    losses = mac_loss(query, target, modality, TAU, TAU_HARD, positive=positive,
                      duplicate=everything, reduction="none")
    assert losses.tolist() == [0.0] * 5  # the positive alone: probability 1, not 0 / 0
    diagonal = torch.zeros(5, 8, dtype=torch.bool).scatter(1, positive[:, None], True)
    marked = diagonal.clone()
    torch.testing.assert_close(
        mac_loss(query, target, modality, TAU, TAU_HARD, positive=positive, duplicate=marked),
        mac_loss(query, target, modality, TAU, TAU_HARD, positive=positive),
    )
    assert torch.equal(marked, diagonal)  # the caller's mask is left as it was


def test_a_column_that_is_left_out_gets_no_gradient():
    query, target, modality, _, _ = random_case()
    duplicate = torch.zeros(5, 8, dtype=torch.bool)
    duplicate[:, 6] = True
    loss = mac_loss(query, target, modality, TAU, TAU_HARD, duplicate=duplicate)
    (gradient,) = gradients(loss, target)
    assert gradient[6].abs().max() == 0 and gradient[7].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_inputs_are_computed_in_float32(dtype, autocast):
    query, target, modality, positive, _ = random_case()
    half = [query.detach().to(dtype).requires_grad_(), target.detach().to(dtype)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = mac_loss(*half, modality, 0.03, 0.02, positive=positive)
    assert loss.dtype == torch.float32
    same = mac_loss(*(x.detach().float() for x in half), modality, 0.03, 0.02, positive=positive)
    torch.testing.assert_close(loss, same)  # only the inputs were rounded
    (gradient,) = gradients(loss, half[0])
    assert gradient.dtype == dtype and gradient.isfinite().all() and gradient.abs().max() > 0


def test_autocast_does_not_round_the_similarities_of_float32_inputs():
    query, target, modality, positive, _ = random_case()
    query, target = query.detach().float(), target.detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert (query @ query.T).dtype == torch.bfloat16  # autocast is really on
        inside = mac_loss(query, target, modality, 0.03, 0.02, positive=positive)
    outside = mac_loss(query, target, modality, 0.03, 0.02, positive=positive)
    assert torch.equal(inside, outside)


QUERY, TARGET, MODALITY = torch.ones(2, 4), torch.ones(3, 4), torch.tensor([0, 1, 0])
MISTAKES = {
    "widths differ": ({"target": torch.ones(3, 5)}, r"\(2, 4\) and \(3, 5\)"),
    "query has one axis": ({"query": torch.ones(4)}, r"\(4,\) and \(3, 4\)"),
    "target has three axes": ({"target": torch.ones(3, 4, 1)}, r"\(2, 4\) and \(3, 4, 1\)"),
    "modality of the queries": ({"modality": torch.tensor([0, 1])}, r"3 integers.*\(2,\)"),
    "modality of pairs": ({"modality": torch.zeros(2, 3).long()}, r"3 integers.*\(2, 3\)"),
    "modality in floats": ({"modality": torch.zeros(3)}, r"\(3,\) torch.float32"),
    "temperature zero": ({"temperature": 0.0}, r"> 0, got 0.0 and 0.02"),
    "temperature negative": ({"temperature": -0.5}, r"> 0, got -0.5 and 0.02"),
    "hard temperature zero": ({"hard_temperature": 0.0}, r"> 0, got 0.03 and 0.0"),
    "temperature not a number": ({"temperature": math.nan}, r"> 0, got nan and 0.02"),
    "too few targets": ({"target": torch.ones(1, 4), "modality": torch.tensor([0])},
                        r"2 queries but only 1 targets"),
    "positive too short": ({"positive": torch.tensor([0])}, r"2 integers.*\(1,\)"),
    "positive in floats": ({"positive": torch.tensor([0.0, 1.0])}, r"\(2,\) torch.float32"),
    "positive too large": ({"positive": torch.tensor([1, 3])}, r"0\.\.2, got 1\.\.3"),
    "positive negative": ({"positive": torch.tensor([-1, 2])}, r"0\.\.2, got -1\.\.2"),
    "duplicate transposed": ({"duplicate": torch.zeros(3, 2).bool()}, r"\(2, 3\) bool.*\(3, 2\)"),
    "duplicate in integers": ({"duplicate": torch.zeros(2, 3).int()}, r"\(2, 3\) torch.int32"),
    "unknown reading": ({"positive_temperature": "soft"}, r"'hard' or 'base', got 'soft'"),
    "unknown reduction": ({"reduction": "max"}, r"'mean' or 'sum' or 'none', got 'max'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_value_error_names_the_offending_value(mistake):
    good = {"query": QUERY, "target": TARGET, "modality": MODALITY, "temperature": 0.03,
            "hard_temperature": 0.02}
    mac_loss(**good)  # the rest of the call is right
    bad, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        mac_loss(**good | bad)


# ---- the schedule --------------------------------------------------------------------------------

def test_hard_temperature_starts_at_the_temperature_and_ends_halfway():
    assert hard_temperature(0.03, 0.0) == 0.03
    assert hard_temperature(0.03, 0.25) == pytest.approx(0.03 * math.exp(-0.25))
    end = 0.03 * math.exp(-0.5)
    for progress in (0.5, 0.6, 0.99, 1.0):
        assert hard_temperature(0.03, progress) == end
    assert end == pytest.approx(0.0182, abs=5e-5)  # the paper's number
    assert hard_temperature(0.05, 0.5, decay=2.0) == pytest.approx(0.05 * math.exp(-2))
    assert hard_temperature(0.05, 0.5, decay=0.0) == 0.05


def test_hard_temperature_falls_without_a_jump():
    values = [hard_temperature(0.03, step / 1000) for step in range(1001)]
    steps = [before - after for before, after in zip(values, values[1:])]
    assert all(step > 0 for step in steps[:500]) and all(step == 0 for step in steps[500:])
    assert max(steps) < 4e-5


@pytest.mark.parametrize("arguments, message", [
    ((0.0, 0.5), "got 0.0"), ((-1.0, 0.5), "got -1.0"), ((0.03, -0.1), "got -0.1"),
    ((0.03, 1.5), "got 1.5"), ((0.03, math.nan), "got nan"), ((0.03, 0.5, -2.0), "got .*-2.0"),
])
def test_a_schedule_out_of_range_is_an_error_that_names_the_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        hard_temperature(*arguments)


# ---- method.md, section 5 ------------------------------------------------------------------------

def test_row_1_the_positive_gets_the_hard_temperature_unless_base_is_asked_for():
    similarity, query, target = free_similarities(1, 2)
    modality = torch.tensor([0, 1])  # no intra-modality negative: tau_hard is the positive's alone
    positive, negative = similarity[0].tolist()
    for reading, tau in (("hard", TAU_HARD), ("base", TAU)):
        loss = mac_loss(query, target, modality, TAU, TAU_HARD, positive_temperature=reading)
        assert loss.item() == pytest.approx(math.log1p(math.exp(negative / TAU - positive / tau)))
    default = mac_loss(query, target, modality, TAU, TAU_HARD)
    assert default == mac_loss(query, target, modality, TAU, TAU_HARD, positive_temperature="hard")
    assert default != mac_loss(query, target, modality, TAU, TAU_HARD, positive_temperature="base")


def test_row_2_an_image_with_text_is_another_modality_than_an_image():
    names = ["image", "text", "image,text", "video", "image"]
    modality = torch.tensor([sorted(set(names)).index(name) for name in names])
    similarity, query, target = free_similarities(1, 5)
    loss = mac_loss(query, target, modality, TAU, TAU_HARD)
    taus = [TAU_HARD if name == "image" else TAU for name in names]
    terms = [math.exp(s / tau) for s, tau in zip(similarity[0].tolist(), taus)]
    assert loss.item() == pytest.approx(-math.log(terms[0] / sum(terms)))


def test_row_3_the_official_rounding_gives_thirteen_temperatures_and_ours_none():
    progress = [step / 10_000 for step in range(10_001)]
    official = {hard_temperature(0.03, p, round_digits=3) for p in progress}
    assert sorted(official) == [round(0.018 + 0.001 * i, 3) for i in range(13)]  # 0.018 to 0.030
    ours = {hard_temperature(0.03, p) for p in progress}
    assert len(ours) == 5001  # a new one every step until half of training is done


def test_row_4_only_the_query_to_candidate_direction_counts():
    query, target, modality, _, _ = random_case(5, 5)
    together = mac_loss(query, target, modality, TAU, TAU_HARD, reduction="none")
    for i in range(5):  # a query's loss does not know the other queries
        alone = mac_loss(query[i : i + 1], target, modality, TAU, TAU_HARD,
                         positive=torch.tensor([i]))
        torch.testing.assert_close(together[i], alone)
    swapped = mac_loss(target, query, modality, TAU, TAU_HARD)
    assert abs(swapped - together.mean()) > 1e-3  # the other direction would have been seen


def test_row_5_another_copy_of_the_target_is_a_negative_unless_it_is_masked():
    query, target, modality, _, _ = random_case(3, 4)
    target = torch.cat([target, target[:1]])  # column 4 repeats the target of query 0
    modality = torch.cat([modality, modality[:1]])
    duplicate = torch.zeros(3, 5, dtype=torch.bool)
    duplicate[0, 4] = True
    official = mac_loss(query, target, modality, TAU, TAU_HARD, reduction="none")
    masked = mac_loss(query, target, modality, TAU, TAU_HARD, reduction="none",
                      duplicate=duplicate)
    without = mac_loss(query, target[:4], modality[:4], TAU, TAU_HARD, reduction="none")
    torch.testing.assert_close(masked[0], without[0])
    assert official[0] > masked[0]
    torch.testing.assert_close(official[1:], masked[1:])  # for the others it is a plain negative


# ---- the file ------------------------------------------------------------------------------------

def test_the_file_imports_torch_and_the_standard_library_only():
    nodes = list(ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    roots = {name.split(".")[0] for name in names}
    assert "torch" in roots and roots - {"torch"} <= set(sys.stdlib_module_names), roots


def test_the_demonstration_shows_the_gradient_moving_to_the_intra_modality_negative(capsys):
    module.main()
    lines = capsys.readouterr().out.splitlines()
    shares = [int(line.rstrip("%").split()[-1]) for line in lines]
    assert len(shares) == 4 and lines[0].startswith("progress 0.00  tau_hard 0.300")
    assert shares[0] < shares[1] < shares[2] == shares[3]
