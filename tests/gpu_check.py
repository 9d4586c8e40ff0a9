"""Speed, memory and agreement on a GPU, with random weights in Qwen2-VL's true shapes: no download.

    python tests/gpu_check.py                            # 2B table, a 7B LoRA step of 600 pairs
    python tests/gpu_check.py --shape 7b --layers 12
    python tests/gpu_check.py --device cpu --shape tiny  # the same code in seconds, to try it

writes a Markdown table to --out (default gpu_check.md):

1. agreement: embeddings and gradients of a small float32 model, and its vision tower in bfloat16,
   on the CPU and on the device;
2. for each number of kept layers: seconds of a training step (`train.large_batch_step`, AdamW, bf16
   autocast), pairs a second, MFU, peak memory; items encoded a second (bf16), its MFU, the speed-up
   over all layers and beside it the ratio of the operations, which it could reach at best;
3. one step with GradCache and LoRA of the paper's batch of 600 pairs, for the 7B shape.

Training the 7B shape takes LoRA, and so `pip install peft`; without, the rest is measured. MFU is
the share of the operations a second of a large matrix product, measured first. Operations are
counted by torch for a plain step, so what GradCache computes twice is counted once. The aim: 40 %
in training and 50 % in encoding for 12 layers of the 2B shape. Items are ready in memory: reading
images is not measured here.
"""

import argparse
import copy
import ctypes
import importlib.util
import random
import re
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    Qwen2VLConfig,
)

from prune_distill import find_decoder  # noqa: E402
from puma import PUMA  # noqa: E402
from settings import Config  # noqa: E402
from support.distributed import pick_device  # noqa: E402
from support.lora import add_lora  # noqa: E402
from support.run import autocast, compile_layers, count_flops, measure_peak  # noqa: E402
from train import Batcher, large_batch_step, move, plain_step  # noqa: E402

TOY = ROOT / "toy/tiny-qwen2-vl"  # its tokenizer and special tokens; not its weights
# hidden size, MLP, heads, key-value heads, vocabulary, vision (depth, width, heads), layers
SHAPES = {
    "2b": (1536, 8960, 12, 2, 151936, (32, 1280, 16), 28),
    "7b": (3584, 18944, 28, 4, 152064, (32, 1280, 16), 28),
    "tiny": (64, 128, 4, 2, 2048, (2, 32, 2), 4),
}
SIDE = {"2b": 336, "7b": 336, "tiny": 56}  # pixels: 144 visual tokens an image, or 4
LINUX = sys.platform == "linux"


# ---- models and batches (tests/benchmark.py uses them as well) -----------------------------------


def build(shape, keep, device, dtype):
    """A PUMA with random weights and `keep` decoder layers of a shape, made on the device."""
    hidden, mlp, heads, kv_heads, vocabulary, (depth, width, vision_heads), _ = shape
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
    processor = AutoImageProcessor.from_pretrained(TOY, backend="pil")
    processor.size = {"shortest_edge": 4 * 28**2, "longest_edge": 300 * 28**2}
    return PUMA(backbone, tokenizer, processor).to(device)


def make_items(count, side):
    """`count` queries, texts with an instruction, and as many targets, images with a text."""
    rng = random.Random(0)
    words = "plain red old river house near the hill with people who walk in snow".split()
    images = [Image.effect_noise((side, side), 90).convert("RGB") for _ in range(min(count, 16))]

    def text(length):
        return " ".join(rng.choices(words, k=length))

    return ([{"text": text(20), "image": None, "instruction": "Find a picture of the event."}
             for _ in range(count)],
            [{"text": text(10), "image": images[i % len(images)]} for i in range(count)])


def ready_batch(student, config, queries, targets):
    """The pairs as a training step takes them, on the student's device, of one modality."""
    count = len(queries)
    pairs = {"queries": queries, "targets": targets, "modality": torch.zeros(count).long(),
             "target_keys": torch.arange(count), "positive_keys": [[i] for i in range(count)]}
    return move(Batcher(student, config)(pairs), student.device)


# ---- measuring -----------------------------------------------------------------------------------


def seconds_of(*functions, runs=3):
    """The median time of each function, called in turn; one first call of each is not timed."""
    free_for_real(1 << 25)  # the most that malloc itself would choose
    times = [[] for _ in functions]
    for run in range(runs + 1):
        for function, own in zip(functions, times):
            started = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            own += [time.perf_counter() - started] if run else []
    return [statistics.median(own) for own in times]


def peak_memory(function, device):
    """Bytes that `function()` takes at most, above what was there before: allocated on a GPU, else
    resident, which Linux alone tells (elsewhere: 0)."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    if not LINUX:
        function()
        return 0
    free_for_real(1 << 16)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before goes back, so it is not reused
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def resident(key):
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


def free_for_real(size):
    """Blocks above `size` bytes go back to the system when freed; malloc keeps smaller ones."""
    if LINUX:
        ctypes.CDLL(None).mallopt(-3, size)  # M_MMAP_THRESHOLD


def training(student, items, chunk_size):
    """-> a function of no arguments that does one optimizer step on the batch."""
    config, device = Config(chunk_size=chunk_size), student.device
    batch = ready_batch(student, config, *items)
    weights = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=device.type == "cuda")
    step_of = large_batch_step if chunk_size else plain_step
    student.train()

    def step():
        optimizer.zero_grad()
        with autocast(device):
            losses = step_of(student, None, batch, 2, 0.5, config)
        optimizer.step()
        return losses

    return step


def ready(model, args):
    return compile_layers(model) if args.compile else model


def agreement(args, device):
    """Largest difference of embeddings, and of gradients relative to the largest, CPU and GPU."""
    torch.manual_seed(0)
    ours = build(SHAPES["tiny"], 4, torch.device("cpu"), torch.float32)
    queries, targets = make_items(6, SIDE["tiny"])
    config, results = Config(chunk_size=4), []
    for model in (ours, ready(copy.deepcopy(ours).to(device), args)):
        embeddings = model.encode(queries + targets, show_progress=False)
        batch = ready_batch(model, config, queries, targets)
        large_batch_step(model, None, batch, 2, 0.5, config)
        results.append((embeddings, {name: weight.grad.cpu() for name, weight
                                     in model.named_parameters() if weight.grad is not None}))
    (one, ours), (other, theirs) = results
    assert ours.keys() == theirs.keys() and len(ours) > 10
    worst = max(float((ours[name] - theirs[name]).abs().max() / ours[name].abs().max())
                for name in ours if ours[name].abs().max() > 1e-6)
    return float((one - other).abs().max()), worst


def tower_agreement(device):
    """Largest difference of the vision tower's tokens, relative to the largest: on the CPU in
    float32, and on the device in bfloat16, where a GPU takes all images in one call."""
    torch.manual_seed(0)
    ours = build(SHAPES["tiny"], 1, torch.device("cpu"), torch.float32)
    batch = ours.collate(make_items(6, SIDE["tiny"])[1])
    exact = ours.visual_tokens(batch)
    half = copy.deepcopy(ours).to(device, torch.bfloat16)
    rounded = half.visual_tokens({key: part.to(device) for key, part in batch.items()})
    return float((exact - rounded.float().cpu()).abs().max() / exact.abs().max())


def no_peft():
    """What is missing where peft is not installed, else ""."""
    return "" if importlib.util.find_spec("peft") else "LoRA needs peft: pip install peft"


def measure(args, device, keep, peak):
    """One row of the table, as a dict; without what training takes if that needs peft."""
    lora = args.shape == "7b"  # all weights in float32 with their moments would take 120 GB
    student = build(SHAPES[args.shape], keep, device, torch.bfloat16 if lora else torch.float32)
    if lora and not no_peft():
        add_lora(find_decoder(student), 128, 256)
    ready(student, args)
    items = make_items(args.pairs, SIDE[args.shape])
    row = {"layers": keep, "parameters": sum(p.numel() for p in student.parameters())}
    if not (lora and no_peft()):
        plain = count_flops(training(student, [part[:4] for part in items], 0)) / 4
        step = training(student, items, args.chunk_size)
        (row["step_s"],) = seconds_of(step, runs=args.steps)
        row |= {"pairs_per_s": args.pairs / row["step_s"], "train_gib": gib(step, device)}
        row["train_mfu"] = plain * row["pairs_per_s"] / peak
        student.zero_grad()
    student = student.eval().to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    batch = ready_batch(student, Config(chunk_size=args.chunk_size), *items)

    @torch.no_grad()
    def encode():
        return [student(chunk) for chunk in batch["chunks"]]

    (seconds,) = seconds_of(encode, runs=args.steps)
    row |= {"items_per_s": 2 * args.pairs / seconds, "encode_gib": gib(encode, device)}
    row["flops"] = count_flops(encode) / (2 * args.pairs)
    row["encode_mfu"] = row["flops"] * row["items_per_s"] / peak
    return row


def gib(function, device):
    """GiB that are allocated on a GPU at most, the weights included, as a text; "-" on a CPU."""
    if device.type != "cuda":
        return "-"
    peak_memory(function, device)
    return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f}"


FORMATS = {"layers": "d", "parameters": ",", "step_s": ".3f", "pairs_per_s": ".1f",
           "train_mfu": ".0%", "train_gib": "s", "items_per_s": ".1f", "encode_mfu": ".0%",
           "encode_gib": "s", "speed_up": ".2f", "flop_ratio": ".2f"}


def table(rows):
    """Markdown; "-" for what was not measured."""
    lines = ["| layers | parameters | step, s | pairs/s | MFU | GiB | encode items/s | MFU | GiB "
             "| speed-up | FLOP ratio |", "|" + "---|" * len(FORMATS)]
    full = rows[-1]
    for row in rows:
        if "flops" in row and "flops" in full:
            row = {**row, "speed_up": row["items_per_s"] / full["items_per_s"],
                   "flop_ratio": full["flops"] / row["flops"]}
        cells = [f"{row[key]:{form}}" if key in row else "-" for key, form in FORMATS.items()]
        lines.append(f"| {' | '.join(cells)} |" + row.get("note", ""))
    return lines


def big_batch(args, device, shape, keep, pairs, chunk_size, rank):
    """One GradCache step with LoRA; -> a line of the report."""
    what = f"{shape}, {keep} layers, LoRA rank {rank}, {pairs} pairs, chunks of {chunk_size} items"
    if no_peft():
        return f"{what}: not measured, {no_peft()}"
    student = build(SHAPES[shape], keep, device, torch.bfloat16)
    add_lora(find_decoder(student), rank, 2 * rank, 0.1)
    ready(student, args)
    step = training(student, make_items(pairs, SIDE[shape]), chunk_size)
    (seconds,) = seconds_of(step, runs=1)
    return (f"{what}: {seconds:.2f} s a step, {gib(step, device)} GiB at most, loss "
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
    option("--compile", action="store_true", help="with compiled layers, as train.py --compile")
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
                 f"items{', compiled layers' * args.compile}. Aim for 2b with 12 layers: "
                 "MFU 40 % in training, 50 % in encoding.", ""]
        embedding, gradient = agreement(args, device)
        lines += [f"CPU and {device.type} agree: embeddings within {embedding:.1e}, gradients "
                  f"within {gradient:.1e} of the largest of each weight; the vision tower in "
                  f"bfloat16 within {(tower := tower_agreement(device)):.1e} of its largest.", ""]
        rows = [out_of_memory_is({"layers": keep, "note": " out of memory"}, measure, args,
                                 device, keep, peak) for keep in layers]
        lines += [*table(rows), ""]
        if no_peft() and args.shape == "7b":
            lines += [f"Training is not measured: {no_peft()}.", ""]
        big = ("tiny", 2, 10, 8, 4) if tiny else ("7b", 12, 600, 50, 128)
        lines.append(out_of_memory_is(f"{big}: out of memory", big_batch, args, device,
                                      *big))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    text = "\n".join(lines) + "\n"
    args.out.write_text(text, encoding="utf-8")
    print(text + f"wrote {args.out}")
    if max(embedding, gradient) > 1e-3 or tower > 0.05:
        print("error: CPU and GPU do not agree", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
