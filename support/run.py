"""A training run's folder: config.json, metrics.jsonl, checkpoints/, and its stop signals.

Of several processes only the first one writes. A checkpoint is written beside its final name and
renamed when whole, so that neither a kill nor a full disk harms the one before.
"""

import json
import shutil
import signal
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from support import distributed
from support.files import write_json, write_text


class Run:
    """One run's folder, opened or made; `settings`, a dictionary, go to its config.json first.
    `stopping` is True after Ctrl-C or SIGTERM."""

    def __init__(self, folder, device, keep_checkpoints=2, settings=None):
        self.folder, self.keep_checkpoints = Path(folder), keep_checkpoints
        self.metrics, self.checkpoints = self.folder / "metrics.jsonl", self.folder / "checkpoints"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.writes = distributed.rank() == 0
        if self.writes and settings:
            write_json(self.folder / "config.json", settings)
        self.metrics.touch()
        self.peak = measure_peak(device) * distributed.world_size()
        self.stopping = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def _stop(self, number, _frame):
        if self.stopping:  # asked twice: do not wait for the step
            raise SystemExit(128 + number)
        self.stopping = True

    def log(self, row, items, flops, started, bar):
        """One line in metrics.jsonl; loss, items a second and MFU on the progress bar. MFU (model
        FLOPs utilisation): operations a second (`flops` an item) over the machine's peak."""
        if not self.writes:
            return
        row = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in row.items()}
        row["samples_per_s"] = speed = items / (time.perf_counter() - started)
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        bar.set_postfix(loss=f"{row['loss']:.3f}", samples_s=f"{speed:.0f}",
                        mfu=f"{flops * speed / self.peak:.0%}")

    def rows(self):
        """metrics.jsonl as dictionaries; a line cut off by a kill is left out."""
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def save(self, model, optimizer, schedule, stage, step):
        """Trainable weights (safetensors), optimizer, schedule, each process's random state."""
        random = [torch.get_rng_state(), torch.cuda.get_rng_state_all()]  # [] without a GPU
        state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                 "random": distributed.gather_objects(random)}
        if not self.writes:
            return
        folder = self.checkpoints / f"stage{stage}-step{step:06d}"
        temporary = folder.with_suffix(".tmp")
        temporary.mkdir(exist_ok=True)  # of a killed save
        weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        save_file(weights, temporary / "model.safetensors")
        torch.save(state, temporary / "state.pt")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        for old in self._saved()[: -self.keep_checkpoints]:
            shutil.rmtree(old)

    def _saved(self):
        return sorted(self.checkpoints.glob("stage?-step??????"))

    def position(self):
        """(stage, steps done in it) of the last checkpoint, (1, 0) without one. Drops later lines
        of metrics.jsonl: those steps will be done again."""
        name = self._saved()[-1].name if self._saved() else "stage1-step000000"
        done = int(name[5]), int(name[-6:])
        if self.writes:
            kept = [row for row in self.rows() if (row["stage"], row["step"]) <= done]
            write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))
        return done

    def load_weights(self, model):
        """The last checkpoint's weights; ValueError unless they are the model's trained ones."""
        path = self._saved()[-1] / "model.safetensors"
        weights = load_file(path)
        found = {(name, weight.shape) for name, weight in weights.items()}
        own = {(name, p.shape) for name, p in model.named_parameters() if p.requires_grad}
        if found != own:
            name, shape = min(found ^ own)
            raise ValueError(f"{path} is of another model than config.json says: {name} {shape}")
        model.load_state_dict(weights, strict=False)  # frozen weights are not in it

    def load_state(self, optimizer, schedule):
        """Bring optimizer, schedule and random numbers to where the last checkpoint left them."""
        state = torch.load(self._saved()[-1] / "state.pt", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        cpu, gpu = state["random"][distributed.rank() % len(state["random"])]
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(gpu[: torch.cuda.device_count()])


def count_flops(function, *args):
    """Floating-point operations of a call, forward and backward; a multiply-add is 2."""
    # torch does not count the fused attention of a CPU. The plain one rounds differently, so a
    # counted step must not be one of the training.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


def measure_peak(device, size=2048):
    """Operations a second of a large matrix product: the practical peak of this machine."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, best = torch.randn(size, size, device=device, dtype=dtype), float("inf")
    for _ in range(4):
        started = time.perf_counter()
        (a @ a).sum().item()  # waits for a GPU
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
