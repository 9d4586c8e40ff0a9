"""Two processes train as one: same loss, same gradients; and what happens when one of them dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import MODEL, ROOT

import train
from data import Benchmark, TrainSet
from puma import PUMA
from support import distributed


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment(rank, port, world_size=2):
    """What torchrun sets for one process. One thread each, as two cores are all there may be."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}


def gradients_of_one_step(data, stage, chunk_size):
    """(loss, {name: gradient}) of the batch of 12 pairs, or of this process's share of it.

    Six labels for twelve pairs: every query is there about twice, so duplicates are masked.
    """
    config = train.Config(batch_size=12, chunk_size=chunk_size)
    pairs = TrainSet(Benchmark(data), 12, 1, labels=6)[0]
    student = PUMA.from_pretrained(MODEL, keep_layers=2)
    teacher = PUMA.from_pretrained(MODEL, keep_layers=3) if stage == 1 else None
    batch = train.Batcher(student, config)(pairs)
    assert batch["masked_duplicates"] > 0
    alone = distributed.world_size() == 1
    step = train.plain_step if alone else train.large_batch_step
    losses = step(student, teacher, batch, stage, 0.4, config)
    found = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    return losses["loss"].item(), found


def work(rank, port, folder, data, cases):
    os.environ |= environment(rank, port)
    torch.set_num_threads(1)
    distributed.start("cpu")
    found = [gradients_of_one_step(data, *case) for case in cases]
    torch.save(found, f"{folder}/rank{rank}.pt")
    distributed.stop()


CASES = [(stage, chunk_size) for stage in (1, 2) for chunk_size in (0, 5)]


@pytest.fixture(scope="module")
def two_processes(glyph_beir, tmp_path_factory):
    """For each rank the losses and gradients of all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    arguments = (free_port(), folder, glyph_beir, CASES)
    torch.multiprocessing.spawn(work, arguments, nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: f"stage, chunk {CASES[case]}")
def test_row_15_two_processes_have_the_loss_and_gradients_of_one(glyph_beir, two_processes, case):
    loss, gradients = gradients_of_one_step(glyph_beir, CASES[case][0], 0)
    assert len(gradients) > 20
    for rank in (0, 1):
        other_loss, other = two_processes[rank][case]
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (other[name] - gradient).norm() < 1e-5 * gradient.norm(), (name, rank)


SETTINGS = {"batch_size": 12, "stage1_steps": 2, "stage2_steps": 3, "workers": 0, "eval": False,
            "model": MODEL, "keep_layers": 2}


def options(**settings):
    return [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]


def test_torchrun_trains_as_one_process_does_and_only_rank_0_writes(glyph_beir, tmp_path):
    rows = []
    for launcher in ([], ["-m", "torch.distributed.run", "--nproc_per_node=2",
                          f"--master_port={free_port()}"]):
        out = tmp_path / f"run{len(rows)}"
        command = [sys.executable, *launcher, str(ROOT / "train.py"),
                   *options(**SETTINGS, data=glyph_beir, out=out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("wrote") == 1
        assert sorted(path.name for path in out.iterdir()) == [
            ".lock", "checkpoints", "config.json", "curves.png", "metrics.jsonl", "model"]
        rows.append([json.loads(line) for line in (out / "metrics.jsonl").open()])
    alone, together = rows
    assert len(alone) == len(together) == 5
    for one, two in zip(alone, together):
        for key in ("loss", "contrastive", "grad_norm"):
            # Other chunks round otherwise, in bfloat16 by more; half of a gradient would show.
            assert two[key] == pytest.approx(one[key], rel=0.05)


def test_a_dead_process_ends_the_others_with_a_clear_message(glyph_beir, tmp_path):
    port, out = free_port(), tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"),
               *options(**{**SETTINGS, "stage1_steps": 0, "stage2_steps": 10_000},
                        data=glyph_beir, out=out)]
    processes = [
        subprocess.Popen(command, env=os.environ | environment(rank, port), text=True, cwd=tmp_path,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    try:
        deadline = time.time() + 100
        while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size):
            assert time.time() < deadline and processes[0].poll() is None
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGKILL)
        _, error = processes[0].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode == 2
    assert "error: another process of this run has died" in error.splitlines()[-1]
    assert "Traceback" not in error


def test_a_batch_that_cannot_be_shared_out_is_refused_also_when_resuming(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    (tmp_path / "config.json").write_text('{"batch_size": 7}')
    for config in (train.Config(batch_size=7), train.Config(resume=str(tmp_path))):
        with pytest.raises(ValueError, match="--batch-size must be a multiple of 4 .*, got 7"):
            train.run_stages(config)


def test_without_torchrun_gathering_is_the_identity_without_gradient():
    states = torch.randn(3, 2, requires_grad=True)
    gathered = distributed.gather(states)
    assert torch.equal(gathered, states) and not gathered.requires_grad
    assert torch.equal(distributed.own_part(states), states)
    assert distributed.gather_objects("x") == ["x"] and distributed.rank() == 0
