"""toy/evidence.py: its search for a temperature, its statistics and tables; it resumes."""

import math
import re
import statistics
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from mac_loss import mac_loss
from settings import Config
from support.files import write_json
from toy import evidence

WORLD, OTHER = evidence.WORLDS


def settings(loss="InfoNCE", mix=2, tau=0.05, **more):
    return evidence.settings_of(WORLD, loss, mix, tau, **more)


def put(folder, local, wide, seed=0, about=None, **named):
    name = evidence.run_id(settings(**named))
    result = {"id": name, "seed": seed, "local": local, "global": wide, "wrong modality": 0.1}
    write_json(folder / f"{name} seed={seed}.json", result | (about or {}))


def test_every_run_of_the_grid_has_settings_that_exist_and_a_name_of_its_own():
    names = set()
    for world in evidence.WORLDS:
        for loss in evidence.LOSSES:
            for mix in evidence.MIXES:
                for tau in evidence.TAUS:
                    one = evidence.settings_of(world, loss, mix, tau)
                    names.add(evidence.run_id(one))
                    own = {k: v for k, v in one.items() if k != "variant"}
                    replace(evidence.BASE, **own).check()
    assert len(names) == 2 * len(evidence.LOSSES) * len(evidence.MIXES) * len(evidence.TAUS)
    assert not any("/" in name for name in names)  # they name files


@pytest.mark.parametrize("quality, tried", [
    ({0.03: 1, 0.05: 2, 0.08: 1}, [0.03, 0.05, 0.08]),
    ({0.03: 1, 0.05: 2, 0.08: 3, 0.12: 2}, [0.03, 0.05, 0.08, 0.12]),
    ({0.01: 3, 0.02: 4, 0.03: 3, 0.05: 2, 0.08: 1}, [0.01, 0.02, 0.03, 0.05, 0.08]),
])
def test_tau_is_followed_in_both_directions_until_it_gets_worse(quality, tried, monkeypatch,
                                                                tmp_path):
    runs = []

    def run_one(own, seed, folder):
        runs.append(own["temperature"])
        return dict.fromkeys(("local", "global"), quality[own["temperature"]])

    monkeypatch.setattr(evidence, "run_one", run_one)
    evidence.follow_tau(WORLD, "InfoNCE", 2, tmp_path)
    assert sorted(runs) == tried


def test_the_variants_of_the_trials_are_the_papers_turned_round():
    assert evidence.risen(0.05, 0.0, 0.5) == pytest.approx(0.05 * math.exp(-0.5))
    assert evidence.risen(0.05, 0.5, 0.5) == evidence.risen(0.05, 1.0, 0.5) == 0.05
    query, target, modality = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 0, 1])
    swapped, usual = (loss(query, target, modality=modality, temperature=a, tau_hard=b)
                      for loss, a, b in ((evidence.swapped, 0.2, 0.1), (mac_loss, 0.1, 0.2)))
    assert swapped == usual


def test_pair_by_pair_each_negative_meets_the_positive_at_its_own_temperature():
    query, target = torch.randn(4, 5), torch.randn(4, 5)
    modality, duplicate = torch.tensor([0, 0, 1, 1]), torch.eye(4, dtype=torch.bool)
    duplicate[0, 1] = True
    s = torch.cosine_similarity(query[:, None], target, dim=2)
    rows = [1 + sum(math.exp((s[i, j] - s[i, i]) / (0.1 if modality[i] == modality[j] else 0.2))
                    for j in range(4) if j != i and not duplicate[i, j]) for i in range(4)]
    loss = evidence.pair_by_pair(query, target, modality=modality, temperature=0.2, tau_hard=0.1,
                                 duplicate=duplicate, intra_offset=0)
    assert loss.item() == pytest.approx(statistics.mean(map(math.log, rows)), rel=1e-5)


def test_a_learnt_temperature_begins_as_infonce_and_takes_adams_steps():
    query, target, modality = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 0, 1, 1])
    about = {"modality": modality, "duplicate": torch.eye(4, dtype=torch.bool)}
    cosines = torch.cosine_similarity(query[:, None], target, dim=2)
    log_tau = torch.tensor(math.log(0.2), requires_grad=True)
    adam = torch.optim.Adam([log_tau], lr=evidence.BASE.lr)
    with evidence.replaced("learnt") as learnt:
        for _ in range(5):
            loss = learnt(query, target, temperature=0.2, tau_hard=0.2, **about)
            loss.backward()
            expected = cross_entropy(cosines / log_tau.exp(), torch.arange(4))
            assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
            adam.zero_grad()
            expected.backward()
            adam.step()
    with evidence.replaced("learnt") as another:
        assert another.log_tau is None  # each run learns its own


def test_a_loss_is_judged_at_its_best_by_both_pools_and_by_local_pools_alone(tmp_path):
    put(tmp_path, 0.8, 0.5, tau=0.03)
    put(tmp_path, 0.7, 0.9, tau=0.05)
    put(tmp_path, 0.75, 0.8, tau=0.05, mix=evidence.ALL)
    lines = evidence.final_lines(tmp_path, WORLD)
    assert lines["InfoNCE"] == settings(tau=0.05, stage2_steps=480, split="test")
    assert lines["InfoNCE, best local"] == settings(tau=0.03, stage2_steps=480, split="test")
    assert lines["InfoNCE, 4 tasks a batch"] == {**lines["InfoNCE"], "tasks_per_batch": 4}
    assert lines["InfoNCE, all layers"] == {**lines["InfoNCE"], "keep_layers": 8}
    puma, usual = lines["PUMA, both stages"], Config()
    assert puma["stage1_steps"] + puma["stage2_steps"] == 480  # as many samples
    assert puma["temperature"] == usual.temperature and "loss" not in puma and len(lines) == 8
    assert lines["both stages, InfoNCE"] == {**puma, "loss": "infonce", "temperature": 0.05}
    assert evidence.final_lines(tmp_path, OTHER) == {}
    assert "| InfoNCE | 2 tasks a batch |  |  | 80.0 / 50.0 | **70.0 / 90.0** |  |  |  |" in (
        evidence.grid_table(tmp_path, WORLD))


def test_paired_differences_have_students_interval():
    values, reference = {0: 5.0, 1: 7.0, 2: 6.5, 9: 100.0}, {0: 4.0, 1: 5.0, 2: 6.0, 3: -50.0}
    count, mean, half = evidence.paired(values, reference)
    differences = [1.0, 2.0, 0.5]  # seeds 9 and 3 have no partner
    assert count == 3 and mean == pytest.approx(statistics.mean(differences))
    assert half == pytest.approx(4.303 * statistics.stdev(differences) / math.sqrt(3))


def test_the_report_pairs_the_finals_with_infonce_by_seed(tmp_path):
    put(tmp_path, 0.7, 0.7)
    put(tmp_path, 0.7, 0.5, loss="MAC-Loss")
    for seed, (one, other) in enumerate([(0.80, 0.83), (0.70, 0.74)]):
        for mix, loss, value in ((2, "InfoNCE", one), (2, "MAC-Loss", other),
                                 (4, "InfoNCE", one + 0.1), (4, "MAC-Loss", one)):
            put(tmp_path, value, 0.5, seed, {"premise after": {"cosine to the positive": value}},
                loss=loss, mix=mix, stage2_steps=480, split="test")
    one = {"local": 0.2, "global": 0.1}
    write_json(tmp_path / "layers.json", {"loss": [3.0, 2.0, 1.0]} | {
        f"{depth}{cut}": one for depth in (1, 2) for cut in ("", " without the last MLP")})
    write_json(tmp_path / "premise.json", {WORLD: {"all tasks": {"cosine to the positive": 0.6}}})
    (docs := tmp_path / "docs").mkdir()
    evidence.write_report(tmp_path, docs)
    text = (docs / "evidence.md").read_text(encoding="utf-8")
    half = 12.706 * statistics.stdev([3, 4]) / math.sqrt(2)
    assert "| InfoNCE | 2 tasks a batch, 0.05 | 2 | 75.0 |  | 50.0 |  | 10.0 |  |" in text
    assert f"| MAC-Loss | 2 tasks a batch, 0.05 | 2 | 78.5 | +3.5 ± {half:.1f} | " in text
    four = "4 tasks a batch | 4 tasks a batch, 0.05 | 2"  # MAC-Loss against InfoNCE with as many
    assert f"| InfoNCE, {four} | 85.0 | +10.0 ± 0.0 |" in text
    assert f"| MAC-Loss, {four} | 75.0 | -10.0 ± 0.0 |" in text
    assert "| before training, all tasks | 0.60 |  |" in text
    assert "| InfoNCE | 0.75 |  |" in text
    assert (docs / "evidence.png").exists()
    # Whoever clones the repository goes on from its results, with the same MLLM and worlds only.
    for name, files in ((tmp_path.name, 12), ("another", 0)):
        evidence.restore(tmp_path / "clone" / name, docs)
        found = sorted((tmp_path / "clone" / name).glob("*.json"))
        assert [path.name for path in found] == [
            path.name for path in sorted(tmp_path.glob("*.json"))][:files]
        assert all(path.read_text() == (tmp_path / path.name).read_text() for path in found)


def test_half_the_layers_are_set_against_all_of_them_seed_by_seed(tmp_path):
    put(tmp_path, 0.7, 0.7)
    for seed, whole in enumerate([0.7, 0.8, 0.9]):
        for keep, found in ((4, 0.6), (8, whole)):
            put(tmp_path, found, 0.5, seed, keep_layers=keep, stage2_steps=80, split="test")
    gap = f"-20.0 ± {4.303 * 10 / math.sqrt(3):.1f} / +0.0 ± 0.0"  # of -10, -20 and -30
    assert evidence.depth_table(tmp_path).endswith(f"\n| 4 against 8 | {gap} |  |  |  |")
    evidence.draw_depth(tmp_path / "depth.png", tmp_path)
    assert (tmp_path / "depth.png").exists()


def test_a_teacher_is_set_against_none_and_its_distance_is_told_before_and_after(tmp_path):
    put(tmp_path, 0.7, 0.7)
    about = {"direction": [0.7, 0.5]} | {
        f"apart {when}": {"distance": value} for when, value in (("before", 3), ("after", 1))}
    for seed in range(3):
        for steps, weight, local in ((120, 0.0, 0.5), (120, 1.0, 0.6), (200, 0.0, 0.55)):
            put(tmp_path, local, 0.5, seed, about, stage1_steps=steps, distill_weight=weight)
    assert evidence.distil_table(tmp_path).splitlines()[2:] == [
        "| all | 120 | no teacher | 3 | 50.0 / 50.0 |  |  | 3.00 to 1.00 | 70 |",
        "| all | 120 | MLLM, distillation alone | 3 | 60.0 / 50.0 | +10.0 ± 0.0 / +0.0 ± 0.0 | "
        "+5.0 ± 0.0 / +0.0 ± 0.0 | 3.00 to 1.00 | 70 |",
        "| all | 200 | no teacher | 3 | 55.0 / 50.0 |  |  | 3.00 to 1.00 | 70 |"]
    evidence.draw_distil(tmp_path / "distil.png", tmp_path)
    assert (tmp_path / "distil.png").exists()


def test_a_teacher_has_rivals_in_as_many_steps_and_in_as_much_time(monkeypatch, tmp_path):
    put(tmp_path, 0.7, 0.7)
    jobs, trained = [], []
    monkeypatch.setattr(evidence, "run_one", lambda *_, keep: trained.append(keep))
    monkeypatch.setattr(evidence, "side_by_side", lambda found, workers: jobs.extend(found))
    evidence.distil(tmp_path, 1, seeds=1)
    own = [settings for _, settings, *_ in jobs if settings["labels"] == 450]
    assert len(own) == 4 * 5 + 4  # four lengths, five kinds of teacher; a step of one takes 5/3
    plain = {one["stage1_steps"] for one in own if not one["distill_weight"]}
    assert plain == {40, 66, 120, 200, 240, 400, 480, 800}
    for _, *run in jobs:
        write_json(evidence.path_of(*run), {})
    evidence.distil(tmp_path, 1, seeds=1)
    assert trained == [tmp_path / "teacher"]  # not again, where nobody is left to learn from it


def test_a_report_without_results_leaves_the_docs_alone(tmp_path):
    (docs := tmp_path / "docs").mkdir()
    (docs / "evidence.json").write_text("of five seeds")
    with pytest.raises(FileNotFoundError, match="expected the results of runs, found none"):
        evidence.write_report(tmp_path, docs)
    assert (docs / "evidence.json").read_text() == "of five seeds"


def test_every_claim_with_an_interval_stands_in_the_evidence():
    root = evidence.ROOT
    table = (root / "docs/evidence.md").read_text(encoding="utf-8")
    claims = [claim for name in ("README.md", "tutorial.ipynb") for claim in re.findall(
        r"[+-]\d+\.\d ± \d+\.\d", (root / name).read_text(encoding="utf-8"))]
    assert len(claims) >= 5 and not [claim for claim in claims if f" {claim} " not in table]


def test_a_run_that_has_its_file_is_not_done_again(tmp_path):
    put(tmp_path, 0.5, 0.25)
    assert evidence.run_one(settings(), 0, tmp_path)["global"] == 0.25
