"""Speed, memory and agreement on a GPU, with random weights in Qwen2-VL's true shapes: no download.

    python tests/gpu_check.py                            # 2B table, a 7B LoRA step of 600 pairs
    python tests/gpu_check.py --shape 7b --layers 12
    python tests/gpu_check.py --device cpu --shape tiny  # the same code in seconds, to try it

writes a Markdown table to --out (default gpu_check.md):

1. agreement: embeddings and gradients of a small float32 model, on the CPU and on the device;
2. for each number of kept layers: seconds of a training step (`train.training_step`, AdamW, bf16
   autocast), pairs a second, MFU, peak memory; items encoded a second (bf16), its MFU, the speed-up
   over all layers and beside it the ratio of the operations, which it could reach at best;
3. one step with GradCache and LoRA of the paper's batch of 600 pairs, for the 7B shape.

MFU is the share of the operations a second of a large matrix product, measured first. Operations
are counted by torch for a plain step, so what GradCache computes twice is counted once. The aim:
40 % in training and 50 % in encoding for 12 layers of the 2B shape. Items are ready in memory:
reading images is not measured here.
"""

import argparse
import copy
import random
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    Qwen2VLConfig,
)

from distributed import pick_device  # noqa: E402
from memory import add_lora  # noqa: E402
from puma import PUMA  # noqa: E402
from run import measure_peak  # noqa: E402
from settings import Config  # noqa: E402
from train import Batcher, autocast, move, stage_losses, training_step  # noqa: E402

TOY = ROOT / "toy/tiny-qwen2-vl"  # its tokenizer and special tokens; not its weights
# hidden size, MLP, heads, key-value heads, vocabulary, vision (depth, width, heads); layers
SHAPES = {
    "2b": (1536, 8960, 12, 2, 151936, (32, 1280, 16), 28),
    "7b": (3584, 18944, 28, 4, 152064, (32, 1280, 16), 28),
    "tiny": (64, 128, 4, 2, 2048, (2, 32, 2), 4),
}
SIDE = {"2b": 336, "7b": 336, "tiny": 56}  # pixels: 144 visual tokens an image, or 4


def build(shape, keep, device, dtype):
    """A PUMA with random weights and `keep` decoder layers of a shape, made on the device."""
    hidden, mlp, heads, kv_heads, vocabulary, (depth, width, vision_heads), _ = SHAPES[shape]
    toy = AutoConfig.from_pretrained(TOY)
    half = hidden // heads // 2  # of a head's width: M-RoPE shares it 2 : 3 : 3
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": keep,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "vocab_size": vocabulary, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
            "bos_token_id": None, "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6,
                                "mrope_section": [half // 4, 3 * half // 8, 3 * half // 8]},
        },
        vision_config={"depth": depth, "embed_dim": width, "num_heads": vision_heads,
                       "hidden_size": hidden, "mlp_ratio": 4},
        **{key: getattr(toy, key) for key in (
            "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")},
    )
    with torch.device(device):
        backbone = AutoModel.from_config(config, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    processor = AutoImageProcessor.from_pretrained(TOY)
    processor.size = {"shortest_edge": 4 * 28**2, "longest_edge": 300 * 28**2}
    return PUMA(backbone, tokenizer, processor).to(device)


def make_pairs(count, side):
    """As `TrainSet` gives them: text queries, images with a text as targets."""
    rng = random.Random(0)
    words = "plain red old river house near the hill with people who walk in snow".split()
    images = [Image.effect_noise((side, side), 90).convert("RGB") for _ in range(min(count, 16))]

    def text(length):
        return " ".join(rng.choices(words, k=length))

    return {
        "queries": [{"text": text(20), "image": None, "instruction": "Find a picture of the event."}
                    for _ in range(count)],
        "targets": [{"text": text(10), "image": images[i % len(images)]} for i in range(count)],
        "modality": torch.full((count,), 2), "target_keys": torch.arange(count),
        "positive_keys": [[i] for i in range(count)],
    }


def seconds_of(step, device, runs):
    """Median seconds of a call, after one to warm up."""
    times = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[(runs - 1) // 2]


def operations(step):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # can be counted
        step()
    return counter.get_total_flops()


class Memory:
    """Around some work: `.gib` is the most memory that it had allocated on a GPU, as a text."""

    def __init__(self, device):
        self.device, self.gib = device, "-"

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *_):
        if self.device.type == "cuda":
            self.gib = f"{torch.cuda.max_memory_allocated(self.device) / 2**30:.1f}"


def training(student, pairs, chunk_size, device):
    """-> a function of no arguments that does one optimizer step on the batch."""
    config = Config(chunk_size=chunk_size)
    batch = move(Batcher(student, config)(pairs), device)
    weights = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=device.type == "cuda")
    student.train()

    def losses_of(states, teacher_states):
        return stage_losses(states, teacher_states, batch, 2, 0.5, config)

    def step():
        optimizer.zero_grad()
        with autocast(device):
            losses = training_step(student, None, batch, losses_of, chunk_size > 0)
        optimizer.step()
        return losses

    return step


def agreement(device):
    """Largest difference of embeddings, and of gradients relative to the largest, CPU and GPU."""
    torch.manual_seed(0)
    ours = build("tiny", 4, torch.device("cpu"), torch.float32)
    theirs = copy.deepcopy(ours).to(device)
    pairs, results = make_pairs(6, SIDE["tiny"]), []
    items = pairs["queries"] + pairs["targets"]
    for model in (ours, theirs):
        embeddings = model.encode(items, show_progress=False)
        batch = move(Batcher(model, Config(chunk_size=4))(pairs), model.device)
        losses_of = partial(stage_losses, batch=batch, stage=2, progress=0.5, config=Config())
        training_step(model, None, batch, losses_of, grad_cache=True)
        results.append((embeddings, {name: weight.grad.cpu() for name, weight
                                     in model.named_parameters() if weight.grad is not None}))
    (one, ours), (other, theirs) = results
    assert ours.keys() == theirs.keys() and len(ours) > 10
    worst = max(float((ours[name] - theirs[name]).abs().max() / ours[name].abs().max())
                for name in ours if ours[name].abs().max() > 1e-6)
    return float((one - other).abs().max()), worst


def measure(args, device, keep, peak):
    """One row of the table, as a dict."""
    student = build(args.shape, keep, device, torch.float32 if args.shape != "7b" else None)
    if args.shape == "7b":  # all weights in float32 with their moments would take 120 GB
        student = student.to(torch.bfloat16)
        add_lora(student, 128, 256)
    pairs = make_pairs(args.pairs, SIDE[args.shape])
    few = {key: value[:4] for key, value in pairs.items()}
    row = {"layers": keep, "parameters": sum(p.numel() for p in student.parameters())}
    plain = operations(training(student, few, 0, device)) / 4
    with Memory(device) as memory:
        row["step_s"] = seconds_of(training(student, pairs, args.chunk_size, device), device,
                                   args.steps)
    row |= {"pairs_per_s": args.pairs / row["step_s"], "train_gib": memory.gib}
    row["train_mfu"] = plain * row["pairs_per_s"] / peak
    student.zero_grad()
    student = student.eval().to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    batch = move(Batcher(student, Config(chunk_size=args.chunk_size))(pairs), device)

    def encode():
        with torch.inference_mode():
            return [student(chunk) for chunk in batch["chunks"]]

    with Memory(device) as memory:
        seconds = seconds_of(encode, device, args.steps)
    flops = operations(encode) / (2 * args.pairs)
    row |= {"items_per_s": 2 * args.pairs / seconds, "encode_gib": memory.gib, "flops": flops}
    row["encode_mfu"] = flops * row["items_per_s"] / peak
    return row


def table(rows):
    lines = ["| layers | parameters | step, s | pairs/s | MFU | GiB | encode items/s | MFU | GiB "
             "| speed-up | FLOP ratio |", "|" + "---|" * 11]
    full = rows[-1]
    for row in rows:
        if "step_s" not in row:
            lines.append(f"| {row['layers']} | out of memory |" + " |" * 9)
            continue
        ratios = ("-", "-")
        if "flops" in full:
            ratios = (f"{row['items_per_s'] / full['items_per_s']:.2f}",
                      f"{full['flops'] / row['flops']:.2f}")
        lines.append(
            f"| {row['layers']} | {row['parameters']:,} | {row['step_s']:.3f} | "
            f"{row['pairs_per_s']:.1f} | {row['train_mfu']:.0%} | {row['train_gib']} | "
            f"{row['items_per_s']:.1f} | {row['encode_mfu']:.0%} | {row['encode_gib']} | "
            f"{ratios[0]} | {ratios[1]} |")
    return lines


def big_batch(shape, keep, pairs, chunk_size, rank, device):
    """One GradCache step with LoRA; -> a line of the report."""
    student = build(shape, keep, device, None).to(torch.bfloat16)
    add_lora(student, rank, 2 * rank, 0.1)
    step = training(student, make_pairs(pairs, SIDE[shape]), chunk_size, device)
    with Memory(device) as memory:
        seconds = seconds_of(step, device, 1)
    return (f"{shape}, {keep} layers, LoRA rank {rank}, {pairs} pairs, chunks of {chunk_size} "
            f"items: {seconds:.2f} s a step, {memory.gib} GiB at most, loss "
            f"{step()['loss'].item():.3f}")


def out_of_memory_is(value, function, *arguments):
    try:
        return function(*arguments)
    except torch.OutOfMemoryError:
        return value
    finally:
        torch.cuda.empty_cache()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("--shape", choices=SHAPES, default="2b", help="of the table; 7b trains LoRA adapters")
    option("--layers", type=int, nargs="+", help="default: 4 8 12 16 20 28; tiny: 2 4")
    option("--pairs", type=int, help="in a batch of the table; default: 64, tiny: 6")
    option("--chunk-size", type=int, default=32, help="items a forward pass, as in train.py")
    option("--steps", type=int, default=5, help="timed, after one to warm up")
    option("--device", default="cuda", help="cpu only to try the script")
    option("--out", type=Path, default=Path("gpu_check.md"), help="Markdown file to write")
    args = parser.parse_args()
    tiny = args.shape == "tiny"
    layers = args.layers or ([2, 4] if tiny else [4, 8, 12, 16, 20, 28])
    args.pairs = args.pairs or (6 if tiny else 64)
    try:
        device = pick_device(args.device)
        most = SHAPES[args.shape][-1]
        if not all(1 <= keep <= most for keep in layers):
            raise ValueError(f"--layers must be in 1..{most}, got {layers}")
        peak = measure_peak(device, 8192 if device.type == "cuda" else 1024)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        lines = [f"{name}, torch {torch.__version__}, {peak / 1e12:.2f} TFLOP/s in a large matrix "
                 f"product; shape {args.shape}, {args.pairs} pairs, chunks of {args.chunk_size} "
                 "items. Aim for 2b with 12 layers: MFU 40 % in training, 50 % in encoding.", ""]
        embedding, gradient = agreement(device)
        lines += [f"CPU and {device.type} agree: embeddings within {embedding:.1e}, gradients "
                  f"within {gradient:.1e} of the largest of each weight.", ""]
        rows = [out_of_memory_is({"layers": keep}, measure, args, device, keep, peak)
                for keep in layers]
        lines += [*table(rows), ""]
        big = ("tiny", 2, 10, 8, 4) if tiny else ("7b", 12, 600, 50, 128)
        lines.append(out_of_memory_is(f"{big}: out of memory", big_batch, *big, device))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    text = "\n".join(lines) + "\n"
    args.out.write_text(text, encoding="utf-8")
    print(text + f"wrote {args.out}")
    if max(embedding, gradient) > 1e-3:
        print("error: CPU and GPU do not agree", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
