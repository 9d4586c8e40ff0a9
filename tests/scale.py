"""Measure data.py at M-BEIR's size, on generated files: a script, not a test.

    python tests/scale.py --out data/scale             # 1.3 M training queries, 5.6 M candidates

writes the directory if it is not there (about 3 GB, no images), opens the training set as train.py
does, and prints the seconds until the first batch and the most memory that was resident. `--only
write` or `--only train` does one of both, so that writing does not count in what is measured.

    python tests/scale.py --out data/glyph_beir --only loader

prints the batches a second that train.py's loader prepares, by its number of worker processes, and
the steps a second of the toy model on a batch that is ready: the former should be more. Last, how
many photos of M-BEIR's size a worker makes ready: how many workers a GPU needs follows from that.

The texts' lengths are like M-BEIR's: captions, and Wikipedia snippets of up to 900 characters; the
queries of the up-sampled training set repeat, and list positives of both OVEN and InfoSeek.
"""

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

WORDS = "the of a plain red old river house near seen from hill with people who walk by it in snow "
DATASETS = {  # dataset id -> (query modality, candidate modality, share of the files)
    0: ("text", "image", 0.25), 2: ("text", "text", 0.15), 3: ("text", "image,text", 0.15),
    4: ("image", "image", 0.05), 5: ("image,text", "text", 0.2), 6: ("image,text", "text", 0.2)}


def text(rng, most):
    start, length = rng.randrange(80), rng.randrange(30, most)
    return (WORDS * 12)[start : start + length]


def write(root, queries, candidates):
    """The files that training needs, as the real ones are named. Fixed seed."""
    rng = random.Random(0)
    for folder in ("query/union_train", "cand_pool/global", "instructions"):
        (root / folder).mkdir(parents=True)
    lines = ["query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\n"]
    lines += [f"{query}\t{candidate}\tdataset {dataset}\t{dataset}\tFind what is meant.\n"
              for dataset, (query, candidate, _) in DATASETS.items()]
    (root / "instructions/query_instructions.tsv").write_text("".join(lines))

    def image(kind, dataset, number):
        return f"mbeir_images/dataset_{dataset}_images/{kind}/{number // 1000:05d}/{number}.jpg"

    sizes = {dataset: int(candidates * share) for dataset, (*_, share) in DATASETS.items()}
    with (root / "cand_pool/global/mbeir_union_train_cand_pool.jsonl").open("w") as file:
        for dataset, (_, modality, _) in DATASETS.items():
            for n in range(1, sizes[dataset] + 1):
                row = {"txt": text(rng, 900) if "text" in modality else None,
                       "img_path": image("c", dataset, n) if "image" in modality else None,
                       "modality": modality, "did": f"{dataset}:{n}", "src_content": None}
                file.write(json.dumps(row) + "\n")
    with (root / "query/union_train/mbeir_union_up_train.jsonl").open("w") as file:
        for dataset, (modality, _, share) in DATASETS.items():
            for n in range(1, int(queries * share) + 1):
                n = n % (int(queries * share) // 2) + 1  # each query comes twice
                known = (5, 6) if dataset in (5, 6) else (dataset,)
                dids = [f"{d}:{rng.randrange(1, sizes[d] + 1)}" for d in known * 4]
                row = {"qid": f"{dataset}:{n}", "query_modality": modality,
                       "query_txt": text(rng, 200) if "text" in modality else None,
                       "query_img_path": image("q", dataset, n) if "image" in modality else None,
                       "query_src_content": None, "pos_cand_list": dids[: len(known)],
                       "neg_cand_list": dids[len(known):], "task_id": 0}
                file.write(json.dumps(row) + "\n")


def train(root, batch_size):
    """Open the training set as train.py does and get one batch; print seconds and memory."""
    from data import Benchmark, TrainSet

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    batches = TrainSet(Benchmark(root), batch_size, steps=4000)
    seconds = time.perf_counter() - started
    batch = batches[0]
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{len(batches.queries):,} queries, {len(batches.pool):,} candidates: start-up "
          f"{seconds:.1f} s, first batch of {len(batch['queries'])} after "
          f"{time.perf_counter() - started:.1f} s, most memory resident {most / 2**20:.2f} GiB, "
          f"of which {before / 2**20:.2f} GiB before it began")


def loader(root, batch_size):
    """Batches a second of the loader with 0, 1, 2 workers; steps a second of the toy model."""
    import torch

    from data import Benchmark, TrainSet
    from puma import PUMA
    from settings import Config
    from train import Batcher, stage_losses, training_step

    config = Config(batch_size=batch_size)
    batches = TrainSet(Benchmark(root), batch_size, steps=20)
    student = PUMA.from_pretrained(config.model, keep_layers=config.keep_layers)
    for workers in (0, 1, 2):
        ready = iter(torch.utils.data.DataLoader(
            batches, batch_size=None, num_workers=workers, collate_fn=Batcher(student, config)))
        batch = next(ready)  # the workers have started
        started = time.perf_counter()
        count = sum(1 for _ in ready)
        print(f"{workers} workers: {count / (time.perf_counter() - started):.1f} batches/s")
    student.train()
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        training_step(student, None, batch,
                      lambda states, teacher: stage_losses(states, teacher, batch, 2, 0.5, config))
        seconds.append(time.perf_counter() - started)
    print(f"model, stage 2, without optimizer: {1 / sorted(seconds)[2]:.1f} steps/s of "
          f"{batch_size} pairs")
    student.image_processor.size = {"shortest_edge": 4 * 28**2, "longest_edge": 300 * 28**2}
    with tempfile.TemporaryDirectory() as folder:
        for quality in range(40, 72):  # 32 different files
            Image.effect_noise((500, 375), 60).convert("RGB").save(
                f"{folder}/{quality}.jpg", quality=quality)
        items = [{"image": path} for path in Path(folder).iterdir()]
        started = time.perf_counter()
        student.collate(items)
        print(f"JPEG files of 500 x 375 pixels: {len(items) / (time.perf_counter() - started):.0f} "
              "items/s in one process")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the directory; written if absent")
    parser.add_argument("--queries", type=int, default=1_300_000, help="training queries")
    parser.add_argument("--candidates", type=int, default=5_600_000, help="size of the pool")
    parser.add_argument("--batch-size", type=int, default=128, help="pairs in a batch")
    parser.add_argument("--only", choices=["write", "train", "loader"],
                        help="default: write, train")
    args = parser.parse_args()
    if not args.out.exists():
        write(args.out, args.queries, args.candidates)
    if args.only in (None, "train"):
        train(args.out, args.batch_size)
    if args.only == "loader":
        loader(args.out, args.batch_size)


if __name__ == "__main__":
    main()
