"""toy/ablation.py: its groups name what they compare, its statistics are right, it resumes."""

import json
import math
import statistics
from dataclasses import replace

import pytest

from support.files import write_json
from toy import ablation


def test_every_group_has_runs_that_differ_and_settings_that_exist():
    for group, lines in ablation.GROUPS.items():
        ids = [ablation.run_id(settings) for settings in lines.values()]
        assert len(set(ids)) == len(ids) > 1, group
        for settings in lines.values():
            replace(ablation.BASE, **settings).check()


def test_the_same_settings_are_the_same_run_in_every_group():
    groups = ablation.GROUPS
    same = [groups["parts"]["pruned, InfoNCE"], groups["losses"]["InfoNCE"],
            groups["layers"]["4 layers"], groups["all labels"]["no stage 1"]]
    assert len({ablation.run_id(settings) for settings in same}) == 1
    assert ablation.run_id({}) == ablation.run_id({"keep_layers": 4}) == "base"


def test_paired_differences_have_students_interval():
    values, reference = {0: 5.0, 1: 7.0, 2: 6.5, 9: 100.0}, {0: 4.0, 1: 5.0, 2: 6.0, 3: -50.0}
    count, mean, half = ablation.paired(values, reference)
    differences = [1.0, 2.0, 0.5]  # seeds 9 and 3 have no partner
    assert count == 3 and mean == pytest.approx(statistics.mean(differences))
    assert half == pytest.approx(4.303 * statistics.stdev(differences) / math.sqrt(3))


def result(settings, seed, local, wrong):
    shares = {"task0": {"wrong modality": wrong}, "zero_task0": {"wrong modality": 0.5}}
    values = {f"{split} {pool}": local for split in ("seen", "zero-shot")
              for pool in ("local", "global")}
    return {"id": ablation.run_id(settings), "seed": seed, "confusion": shares, **values}


def test_the_table_shows_mean_spread_and_difference_to_its_first_line():
    first, second = list(ablation.GROUPS["losses"].values())[:2]
    results = [result(first, 0, 0.50, 0.1), result(first, 1, 0.60, 0.3),
               result(second, 0, 0.55, 0.1), result(second, 1, 0.67, 0.1)]
    lines = ablation.table("losses", results).splitlines()
    assert lines[4].startswith("| InfoNCE | 2 | 55.0 ± 7.1 |  |")
    assert lines[4].endswith("| 20.0 ± 14.1 |  |")
    half = 12.706 * statistics.stdev([5, 7]) / math.sqrt(2)
    assert lines[5].startswith(f"| MAC | 2 | 61.0 ± 8.5 | +6.0 ± {half:.1f} |")
    assert len(lines) == 6  # lines without a result are left out


def test_the_table_by_task_pairs_both_losses_by_seed():
    infonce, mac = (ablation.GROUPS["losses"][name] for name in ("InfoNCE", "MAC"))
    rates = [(infonce, 0, 0.5), (infonce, 1, 0.7), (mac, 0, 0.4), (mac, 1, 0.5)]
    results = [{**result(settings, seed, local, 0.0),
                "tasks": {"task7": {"local": local, "global": local / 2}}}
               for settings, seed, local in rates]
    line = ablation.task_table(results).splitlines()[-1]
    half = 12.706 * statistics.stdev([-10, -20]) / math.sqrt(2)
    assert line.startswith(f"| task7 | 60.0 | 45.0 | -15.0 ± {half:.1f} | 30.0 | 22.5 | -7.5 ± ")


def test_the_report_pairs_each_distillation_with_the_same_steps_without_a_teacher(tmp_path):
    lines = {**ablation.GROUPS["layers"]}
    for group in ablation.LABELS:
        lines |= {(group, name): settings for name, settings in ablation.GROUPS[group].items()}
    taught = ablation.GROUPS["450 labels"]["the same, 3 x as long"]
    for settings in lines.values():
        for seed in range(2):
            better = settings in (taught, ablation.GROUPS["layers"]["2 layers, the last one kept"])
            local = 0.5 + 0.1 * seed + (0.03 + 0.01 * seed) * better
            write_json(ablation.result_path(tmp_path, settings, seed),
                       result(settings, seed, local, 0.1))
    docs = tmp_path / "docs"
    docs.mkdir()
    ablation.write_report(tmp_path, docs)
    text = (docs / "ablation.md").read_text(encoding="utf-8")
    half = 12.706 * statistics.stdev([3, 4]) / math.sqrt(2)
    assert f"| distillation alone, 120 steps | seen local | +3.5 ± {half:.1f} (2 seeds) | " in text
    assert "| distillation alone, 40 steps | seen local | +0.0 ± 0.0 (2 seeds) | " in text
    assert f"| seen global | +0.0 ± 0.0 | +3.5 ± {half:.1f} | +0.0 ± 0.0 | " in text
    assert [run["seed"] for run in json.loads((docs / "ablation.json").read_text())][:2] == [0, 1]
    assert "## layers" in text and "## losses" not in text  # a group without results
    assert all((docs / name).exists() for name in ("ablation.png", "ablation_curves.png"))


def test_a_report_without_results_leaves_the_docs_alone(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "ablation.json").write_text("of five seeds")
    with pytest.raises(FileNotFoundError, match="expected the results of runs, found none"):
        ablation.write_report(tmp_path, docs)
    assert (docs / "ablation.json").read_text() == "of five seeds"


def test_a_run_that_has_its_file_is_not_done_again(tmp_path, monkeypatch, capsys):
    for settings in ablation.GROUPS["losses"].values():
        ablation.result_path(tmp_path, settings, 0).write_text("{}")
    monkeypatch.setattr(ablation, "run_one", None)  # would fail
    ablation.run_group("losses", 1, tmp_path, 1)
    assert "losses: 0 runs to do" in capsys.readouterr().out
