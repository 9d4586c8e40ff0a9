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


def random_case(queries, targets):
    """float64 query (queries, 6) and target (targets, 6), modalities 0, 1, 2, 0, ..., and taus."""
    random = torch.Generator().manual_seed(0)
    query, target = (torch.randn(rows, 6, dtype=torch.float64, generator=random,
                                 requires_grad=True) for rows in (queries, targets))
    return query, target, torch.arange(targets) % 3, TAU, TAU_HARD


def at_cosines(*cosines):
    """One query, targets at these cosines to it, and the cosines, which the targets depend on."""
    cosines = torch.tensor(cosines, dtype=torch.float64, requires_grad=True)
    targets = torch.stack([cosines, (1 - cosines ** 2).sqrt()], dim=1)
    return torch.tensor([[1.0, 0.0]]).double(), targets, cosines


CASE = QUERY, TARGET, MODALITY, *_ = random_case(5, 8)
POSITIVE = torch.tensor([6, 1, 3, 0, 4])
DUPLICATE = torch.arange(40).reshape(5, 8) % 3 == 0  # (0, 6) as well: a positive always counts
ALL = {"positive": POSITIVE, "duplicate": DUPLICATE, "intra_offset": 0.7}


# ---- the equation --------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [
    {}, {"positive": POSITIVE}, {"positive": torch.tensor([1, 0, 1, 1, 0])},
    {"duplicate": DUPLICATE}, {"positive_temperature": "base"}, {"intra_offset": 0.7}, ALL,
    ALL | {"positive_temperature": "base"},
], ids=lambda options: " ".join(options) or "default")
def test_values_and_gradients_equal_a_double_loop(options):
    fast = mac_loss(*CASE, reduction="none", **options)
    slow = slow_losses(*CASE, **options)
    assert fast.dtype == torch.float64
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    assert not options or (slow - slow_losses(*CASE)).abs().max() > 0.01
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)  # unequal, so that rows cannot swap
    torch.testing.assert_close(*(torch.autograd.grad(losses @ weights, (QUERY, TARGET))
                                 for losses in (fast, slow)), rtol=1e-10, atol=1e-12)


def test_the_derivative_by_a_similarity_is_probability_over_temperature():
    query, target, cosines = at_cosines(0.5, 0.4, -0.1, 0.3)
    loss = mac_loss(query, target, torch.tensor([1, 0, 1, 2]), TAU, TAU_HARD)
    tau = torch.tensor([TAU_HARD, TAU, TAU_HARD, TAU]).double()
    probability = torch.softmax(cosines / tau, dim=0)
    expected = (probability - torch.tensor([1, 0, 0, 0])) / tau
    torch.testing.assert_close(*torch.autograd.grad(loss, cosines), expected, rtol=1e-6, atol=0)


# ---- known numbers and invariances ---------------------------------------------------------------

def test_loss_equals_infonce_when_both_temperatures_agree():
    ours = mac_loss(QUERY, TARGET, MODALITY, TAU, TAU, positive=POSITIVE)
    cosine = F.normalize(QUERY, dim=1) @ F.normalize(TARGET, dim=1).T
    infonce = F.cross_entropy(cosine / TAU, POSITIVE)
    torch.testing.assert_close(ours, infonce)
    torch.testing.assert_close(*(torch.autograd.grad(loss, (QUERY, TARGET))
                                 for loss in (ours, infonce)))


@pytest.mark.parametrize("reading", ["hard", "base"])
def test_loss_is_ln_n_when_all_similarities_are_zero_whatever_the_temperatures(reading):
    query, target, modality = torch.eye(3, 8), torch.eye(8)[3:], torch.tensor([0, 1, 0, 1, 2])
    for tau, tau_hard in ((0.03, 0.03), (0.03, 0.0182), (1.0, 0.1)):
        losses = mac_loss(query, target, modality, tau, tau_hard, positive_temperature=reading,
                          reduction="none")
        torch.testing.assert_close(losses, torch.full((3,), math.log(5)))


def test_equal_similarities_across_modalities_give_ln_n_only_at_equal_temperatures():
    """At cosine 1 an inter-modality negative counts exp(1 / tau - 1 / tau_hard) times: nearly 0."""
    query, target = torch.ones(2, 4).double(), torch.ones(5, 4).double()
    modality = torch.tensor([0, 0, 0, 1, 1])  # three of the positives' modality, two others
    same = mac_loss(query, target, modality, 0.03, 0.03)
    assert same.item() == pytest.approx(math.log(5))
    apart = mac_loss(query, target, modality, 0.03, 0.02)
    assert apart.item() == pytest.approx(math.log(3 + 2 * math.exp(1 / 0.03 - 1 / 0.02)))


def test_order_scale_and_the_names_of_the_modalities_do_not_matter():
    order = torch.tensor([6, 2, 7, 0, 5, 1, 4, 3])
    target = (TARGET * torch.logspace(-3, 3, 8).double()[:, None])[order]
    modality = torch.tensor([7, -1, 100])[MODALITY[order]]  # only equality counts
    changed = mac_loss(QUERY * 50, target, modality, TAU, TAU_HARD, duplicate=DUPLICATE[:, order],
                       positive=order.argsort()[POSITIVE])
    torch.testing.assert_close(changed, mac_loss(*CASE, positive=POSITIVE, duplicate=DUPLICATE))


def test_the_default_is_the_mean_and_the_sum_is_the_sum_of_the_queries_losses():
    losses = mac_loss(*CASE, reduction="none")
    torch.testing.assert_close(mac_loss(*CASE), losses.mean())
    torch.testing.assert_close(mac_loss(*CASE, reduction="mean"), losses.mean())
    torch.testing.assert_close(mac_loss(*CASE, reduction="sum"), losses.sum())


# ---- edges ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("queries, targets", [(1, 1), (0, 3)])
def test_without_a_negative_or_without_a_query_loss_and_gradient_are_zero(queries, targets):
    query, target, *rest = random_case(queries, targets)
    loss = mac_loss(query, target, *rest)
    assert loss.item() == 0
    assert all(g.eq(0).all() for g in torch.autograd.grad(loss, (query, target)))


def test_a_column_that_is_left_out_gets_no_gradient_and_a_positive_is_never_left_out():
    sixth = torch.arange(8).expand(5, 8) == 6
    (gradient,) = torch.autograd.grad(mac_loss(*CASE, duplicate=sixth), TARGET)
    assert gradient[6].abs().max() == 0 and gradient[7].abs().max() > 0
    everything = torch.ones(5, 8, dtype=torch.bool)
    losses = mac_loss(*CASE, positive=POSITIVE, duplicate=everything, reduction="none")
    assert losses.tolist() == [0.0] * 5  # the positive alone: probability 1, not 0 / 0
    assert everything.all()  # the caller's mask is left as it was


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_and_autocast_are_computed_in_float32(dtype):
    query, target = QUERY.detach().to(dtype).requires_grad_(), TARGET.detach().to(dtype)
    exact = slow_losses(query.double(), target.double(), *CASE[2:]).mean()
    with torch.autocast("cpu", torch.bfloat16):
        assert (query.float() @ target.float().T).dtype == torch.bfloat16  # it is really on
        loss = mac_loss(query, target, *CASE[2:])
    torch.testing.assert_close(loss, exact.float())  # only the inputs were rounded
    (gradient,) = torch.autograd.grad(loss, query)
    assert gradient.dtype == dtype and gradient.isfinite().all() and gradient.abs().max() > 0


def test_positions_may_be_integers_of_any_width():
    case, positive = random_case(5, 5), torch.tensor([3, 1, 0, 2, 1])
    for dtype in (torch.uint8, torch.int32):  # five of five: uint8 could be taken for a mask
        assert mac_loss(*case, positive=positive.to(dtype)) == mac_loss(*case, positive=positive)


@pytest.mark.parametrize("bad, message", [
    ({"target": torch.ones(3, 5)}, r"\(2, 4\) and \(3, 5\)"),
    ({"query": torch.ones(4)}, r"\(4,\) and \(3, 4\)"),
    ({"modality": torch.tensor([0, 1])}, r"modality must be 3 integers.*\(2,\)"),
    ({"modality": torch.zeros(3)}, r"\(3,\) torch.float32"),
    ({"temperature": 0.0}, r"> 0, got 0.0 and 0.02"),
    ({"temperature": math.inf}, r"finite and > 0, got inf and 0.02"),
    ({"tau_hard": 0.0}, r"> 0, got 0.03 and 0.0"),
    ({"tau_hard": math.inf}, r"finite and > 0, got 0.03 and inf"),
    ({"positive": torch.tensor([0])}, r"positive must be 2 integers.*\(1,\)"),
    ({"positive": torch.tensor([1, 3])}, r"0\.\.2, .*got 1\.\.3"),
    ({"positive": torch.tensor([-1, 2])}, r"0\.\.2, .*got -1\.\.2"),
    ({"duplicate": torch.zeros(3, 2).bool()}, r"\(2, 3\) bool.*\(3, 2\)"),
    ({"duplicate": torch.zeros(2, 3).int()}, r"\(2, 3\) torch.int32"),
    ({"positive_temperature": "soft"}, "hard, base, got 'soft'"),
    ({"reduction": "max"}, "mean, sum, none, got 'max'"),
])
def test_a_value_error_names_the_offending_value(bad, message):
    good = {"query": torch.ones(2, 4), "target": torch.ones(3, 4), "temperature": 0.03,
            "modality": torch.tensor([0, 1, 0]), "tau_hard": 0.02}
    mac_loss(**good)
    with pytest.raises(ValueError, match=message):
        mac_loss(**good | bad)


# ---- the schedule --------------------------------------------------------------------------------

def test_hard_temperature_starts_at_the_temperature_falls_and_ends_halfway():
    assert hard_temperature(0.03, 0.0) == 0.03
    assert hard_temperature(0.03, 0.25) == pytest.approx(0.03 * math.exp(-0.25))
    values = [hard_temperature(0.03, step / 100) for step in range(101)]
    assert all(before > after for before, after in zip(values[:50], values[1:]))
    assert set(values[50:]) == {0.03 * math.exp(-0.5)}
    assert values[50] == pytest.approx(0.0182, abs=5e-5)  # the paper's number
    assert hard_temperature(0.05, 0.5, decay=2.0) == pytest.approx(0.05 * math.exp(-2))
    assert hard_temperature(0.05, 0.5, decay=0.0) == 0.05


def test_a_schedule_out_of_range_is_an_error_that_names_the_value():
    for *arguments, got in ((0.0, 0.5, "got 0.0"), (math.inf, 0.5, "got inf"),
                            (0.03, -0.1, "got -0.1"), (0.03, 1.5, "got 1.5"),
                            (0.03, 0.5, -2.0, "and -2.0"), (0.03, 0.5, math.inf, "and inf")):
        with pytest.raises(ValueError, match=got):
            hard_temperature(*arguments)


# ---- method.md, section 5 ------------------------------------------------------------------------

def test_row_1_the_positive_gets_the_hard_temperature_unless_base_is_asked_for():
    query, target, _ = at_cosines(0.5, 0.4)
    modality = torch.tensor([0, 1])  # no intra-modality negative: tau_hard is the positive's alone
    for options, tau in (({}, TAU_HARD), ({"positive_temperature": "hard"}, TAU_HARD),
                         ({"positive_temperature": "base"}, TAU)):
        loss = mac_loss(query, target, modality, TAU, TAU_HARD, **options)
        assert loss.item() == pytest.approx(math.log1p(math.exp(0.4 / TAU - 0.5 / tau)))


def test_row_2_an_image_with_text_is_another_modality_than_an_image():
    names, cosines = ["image", "text", "image,text", "video", "image"], [0.5, 0.4, 0.1, -0.3, 0.2]
    query, target, _ = at_cosines(*cosines)
    modality = torch.tensor([sorted(set(names)).index(name) for name in names])
    loss = mac_loss(query, target, modality, TAU, TAU_HARD)
    terms = [math.exp(cosine / (TAU_HARD if name == "image" else TAU))
             for name, cosine in zip(names, cosines)]
    assert loss.item() == pytest.approx(-math.log(terms[0] / sum(terms)))


def test_row_3_the_official_rounding_gives_thirteen_temperatures_and_ours_none():
    progress = [step / 10_000 for step in range(10_001)]
    official = {hard_temperature(0.03, p, round_digits=3) for p in progress}
    assert sorted(official) == [round(0.018 + 0.001 * i, 3) for i in range(13)]  # 0.018 to 0.030
    ours = {hard_temperature(0.03, p) for p in progress}
    assert len(ours) == 5001  # a new one every step until half of training is done


def test_row_4_only_the_query_to_candidate_direction_counts():
    query, target, *rest = random_case(5, 5)
    together = mac_loss(query, target, *rest, reduction="none")
    for i in range(5):  # a query's loss does not know the other queries
        alone = mac_loss(query[i : i + 1], target, *rest, positive=torch.tensor([i]))
        torch.testing.assert_close(together[i], alone)
    swapped = mac_loss(target, query, *rest)
    assert abs(swapped - together.mean()) > 1e-3  # the other direction would have been seen


def test_row_5_another_copy_of_the_target_is_a_negative_unless_it_is_masked():
    query, target, modality, *taus = random_case(3, 4)
    copied = torch.cat([target, target[:1]]), torch.cat([modality, modality[:1]])  # into column 4
    duplicate = torch.zeros(3, 5, dtype=torch.bool)
    duplicate[0, 4] = True
    official, masked = (mac_loss(query, *copied, *taus, reduction="none", duplicate=mask)
                        for mask in (None, duplicate))
    without = mac_loss(query, target, modality, *taus, reduction="none")
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
