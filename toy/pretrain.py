"""Train tiny-qwen2-vl: the multimodal LLM that the laptop run prunes.

It plays the part that Qwen's own pre-training plays for the paper: a real
`Qwen2VLForConditionalGeneration` of 2.6 M parameters, trained generatively on GlyphBEIR's *training
files* (so nothing held out is seen), never contrastively:

    python toy/pretrain.py                 # resumes by itself; writes runs/tiny-qwen2-vl

Half of each batch is question answering, half is the one-word prompt that PUMA embeds with:

    image + "name this character"                         -> latin capital letter a
    image + "what is it with acute added?"                -> latin capital letter a with acute
    "latin small letter a plus acute"                     -> latin small letter a with acute
    clip + "describe the motion"                          -> latin small letter a slides upwards
    item + "Summarize above image in one word: " + [RET]  -> any word of the name or description

A fifth of both halves is of clips and their descriptions (MOVING): of 80 sequences 64 are the ones
that there would be without any. For the last kind the label is a distribution, 1/n on each of the n
words of the name (the
expectation over "any one word", instead of a draw). To predict it, the state at [RET] must hold the
whole content. The items are candidates; edits are answered but never summarised. A query with its
instruction is rare here (INSTRUCTED), as it is in a real MLLM's pre-training: to obey one, and to
bring what the model can compose to the state at [RET], is left to retrieval training.
"""

import argparse
import json
import math
import os
import random
import shutil
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import support  # noqa: E402, F401  before torch: it says how threads wait
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import (  # noqa: E402
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from data import Benchmark  # noqa: E402
from evaluate import Embedded, split_cells  # noqa: E402
from prune_distill import find_decoder, layer_embeddings  # noqa: E402
from puma import PROMPT, PUMA, RET, load_config, visual_of  # noqa: E402
from support.files import check_option, clear_errors  # noqa: E402
from support.report import score  # noqa: E402
from support.run import autocast  # noqa: E402
from toy.glyph_beir import (  # noqa: E402
    CLIP_TASKS,
    INSTRUCTIONS,
    TARGET_FACE,
    TEST_QUERY_FACES,
    VERBS,
    World,
    animate,
    build,
    clip_path,
    image_path,
    words,
)

VOCABULARY = 2048
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", RET]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAME_IT, DESCRIBE_IT = "name this character", "describe the motion"
MOVING = 0.2  # the share of clips and their descriptions, in the answers and in the summaries
PLAIN_TASKS = (0, 2, 3, 4)  # the query names or shows its target: nothing to compose
# This share of the clips is made of training pictures: the characters that have clips are too few
# to learn from them that a moving character is the still one.
ANIMATED = 0.75
INSTRUCTED = (3_000, 0.005)  # from this step on, this share of the summaries is of such a query


def read_jsonl(path):
    return [json.loads(line) for line in path.open(encoding="utf-8")]


class Corpus:
    """GlyphBEIR's training files as items with the name that each stands for.

    `queries[task]` and `candidates[modality]` are lists of (item, name); an item is what
    `PUMA.collate` takes, with an image path. A query stands for the name of its target. A clip and
    its description (a modality of its own here: "description") stand for the description.
    """

    def __init__(self, data):
        self.data = Path(data)
        pool = read_jsonl(self.data / "cand_pool/global/mbeir_union_train_cand_pool.jsonl")
        # Pools list characters in turn: a did stands for the last text candidate before it.
        name_of, self.candidates = {}, {modality: [] for modality in (
            "text", "image", "image,text", "video", "description")}
        for row in pool:
            name = row["txt"] if row["modality"] == "text" else name  # noqa: F821
            name_of[row["did"]] = name
            item = self.item(row["txt"], row["img_path"], row.get("video_path"))
            moving = row["modality"] == "text" and "video_path" in row
            self.candidates["description" if moving else row["modality"]].append((item, name))
        # Motions that a character is never seen in are held out.
        self.motions = defaultdict(list)
        for _, text in self.candidates["description"]:
            motion = next(motion for motion, verb in VERBS.items() if text.endswith(f" {verb}"))
            self.motions[text.removesuffix(f" {VERBS[motion]}")].append(motion)
        self.queries = {task: [] for task in INSTRUCTIONS}
        for dataset in ("glyph", "motion"):
            for row in read_jsonl(self.data / f"query/train/mbeir_{dataset}_train.jsonl"):
                item = self.item(row["query_txt"], row["query_img_path"],
                                 row.get("query_video_path"))
                self.queries[row["task_id"]].append((item, name_of[row["pos_cand_list"][0]]))

    def item(self, text, image, video=None):
        image, video = (str(self.data / path) if path else None for path in (image, video))
        return {"text": text, "image": image, "video": video}

    def texts(self):
        """All texts, to train the tokenizer on."""
        for group in [*self.queries.values(), *self.candidates.values()]:
            yield from (item["text"] for item, _ in group if item["text"])
        for prompts in INSTRUCTIONS.values():
            yield from (prompt + ".\n" for prompt in prompts)
        yield from (NAME_IT, DESCRIBE_IT)
        for kind in ("image", "video", "sentence", "image and sentence") * 20:
            yield PROMPT.format(kind)

    def sample_clip(self, rng):
        """A training clip, or a training picture that moves, and its description."""
        if rng.random() >= ANIMATED:
            return rng.choice(self.candidates["video"])
        item, name = rng.choice(self.candidates["image"])
        motion = rng.choice(self.motions.get(name) or list(VERBS))
        with Image.open(item["image"]) as image:
            frames = animate(image.convert("L"), motion, rng)
        return {**item, "image": None, "video": frames}, f"{name} {VERBS[motion]}"

    def sample_answer(self, rng):
        """An item with a question and the name or description that answers it."""
        if rng.random() < MOVING:
            item, description = self.sample_clip(rng)
            return {**item, "text": DESCRIBE_IT}, description
        kind = rng.choices(("name", 1, 6), (0.6, 0.1, 0.3))[0]
        if kind == "name":
            item, name = rng.choice(self.candidates["image"])
            return {**item, "text": NAME_IT}, name
        return rng.choice(self.queries[kind])

    def sample_summary(self, rng, instructed):
        """A candidate as retrieval will embed it, and its name; with the probability `instructed` a
        query with an instruction instead."""
        moving = rng.random() < MOVING
        if not instructed or rng.random() >= instructed:  # mostly to be seen: that is hardest
            kinds, shares = ((("video", "description"), (4, 1)) if moving
                             else (("text", "image", "image,text"), (1, 3, 1)))
            if (kind := rng.choices(kinds, shares)[0]) == "video":
                return self.sample_clip(rng)
            return rng.choice(self.candidates[kind])
        task = rng.choice(list(CLIP_TASKS) if moving else PLAIN_TASKS)
        item, name = rng.choice(self.queries[task])
        return {**item, "instruction": rng.choice(INSTRUCTIONS[task]) + "."}, name


def make_tokenizer(corpus):
    """Byte-level BPE with Qwen2-VL's special tokens and `[RET]`."""
    tokenizer = Tokenizer(models.BPE())
    # Digits stand alone, so that "dots-138" shares its parts with other braille patterns.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus.texts(), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[3:], padding_side="left", chat_template=TEMPLATE,
    )
    wrapped.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    return wrapped


def make_model(tokenizer, seed):
    """The untrained Qwen2-VL: 8 decoder layers of width 128, 2 vision blocks, tied embeddings."""
    torch.manual_seed(seed)
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=8,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
            rope_parameters={
                "rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10_000.0,
            },
            bos_token_id=ids("<|endoftext|>"), eos_token_id=ids("<|im_end|>"),
            pad_token_id=ids("<|endoftext|>"), tie_word_embeddings=True,
        ),
        vision_config=dict(
            depth=2, embed_dim=128, hidden_size=128, num_heads=4, mlp_ratio=2, patch_size=14,
            spatial_merge_size=2, temporal_patch_size=2,
        ),
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids("<|im_end|>")
    model.generation_config.pad_token_id = ids("<|endoftext|>")
    return model


class CachedPUMA(PUMA):
    """Keeps the patches of every file that was read (1.2 GB in half precision)."""

    def patches(self, items):
        if not hasattr(self, "cache"):
            self.cache = {}
        # Frames of no file are new each time, and not kept.
        names = [name if isinstance(name := visual_of(item), str) else id(item) for item in items]
        found = {name: self.cache[name] for name in names if name in self.cache}
        if new := {name: item for name, item in zip(names, items) if name not in found}:
            pixels, grids = super().patches(list(new.values()))
            parts = pixels.half().split(grids.prod(-1).tolist())
            found |= zip(new, zip(parts, grids))
            self.cache |= {name: found[name] for name in new if isinstance(name, str)}
        parts, grids = zip(*(found[name] for name in names))
        return torch.cat(parts).float(), torch.stack(grids)


def answer_batch(puma, corpus, rng, size):
    """`size` questions with their answers appended, for next-token prediction.

    Returns (batch, positions (rows, columns) of the M predicting states, labels (M, vocabulary),
    each row a distribution). Answers and summaries differ in length, hence a batch of each.
    """
    end = puma.tokenizer.convert_tokens_to_ids("<|im_end|>")
    pairs = [corpus.sample_answer(rng) for _ in range(size)]
    answers = [[*ids, end] for ids in puma.tokenize([name for _, name in pairs])]
    batch = puma.collate([item for item, _ in pairs], [[*puma.after_ids, *ids] for ids in answers])
    length = batch["input_ids"].shape[1]
    rows = torch.tensor([row for row, ids in enumerate(answers) for _ in ids])
    # Rows end with the answer (padding is on the left); the state before a token predicts it.
    columns = torch.tensor([length - 1 - k for ids in answers for k in range(len(ids), 0, -1)])
    labels = F.one_hot(torch.tensor([t for ids in answers for t in ids]), VOCABULARY).float()
    return batch, (rows, columns), labels


def summary_batch(puma, corpus, rng, size, instructed):
    """`size` items with the one-word prompt; the label of each is its name's word distribution."""
    pairs = [corpus.sample_summary(rng, instructed) for _ in range(size)]
    batch = puma.collate([item for item, _ in pairs])
    labels = torch.zeros(size, VOCABULARY)
    for row, (_, name) in enumerate(pairs):
        for token, share in word_distribution(puma, name).items():
            labels[row, token] = share
    columns = torch.full((size,), batch["input_ids"].shape[1] - 1)
    return batch, (torch.arange(size), columns), labels


def word_distribution(puma, name):
    """{token: probability}: 1/n on each word of the name; the tokens of a word share its 1/n."""
    label = {}
    pieces = puma.tokenize([" " + word if word.isalpha() else word for word in words(name)])
    for tokens in pieces:
        for token in tokens:
            label[token] = label.get(token, 0) + 1 / len(pieces) / len(tokens)
    return label


def loss_of(model, batch, positions, labels):
    """Mean cross-entropy at `positions` against the labels' distributions, in nats."""
    ids, config = batch["input_ids"], model.config
    embeds = model.get_input_embeddings()(ids)
    with autocast(model.device):
        if "pixel_values" in batch:  # stills and clips in one go; the stock forward takes two
            visual = model.model.visual(batch["pixel_values"], grid_thw=batch["grid_thw"])
            slots = (ids == config.image_token_id) | (ids == config.video_token_id)
            visual = visual.pooler_output.to(embeds.dtype)
            embeds = embeds.masked_scatter(slots[..., None], visual)
        hidden = model.model.language_model(
            inputs_embeds=embeds, attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"], use_cache=False,
        ).last_hidden_state  # (B, L, D)
        return F.cross_entropy(model.lm_head(hidden[positions]), labels)


def save_checkpoint(path, settings, step, model, optimizer, history):
    state = {
        "settings": settings,
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": history,
    }
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def learning_rate(step, steps, peak):
    """Warm-up over 300 steps, then a cosine down to a fiftieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * min(1, (step + 1) / 300) * (0.02 + 0.98 * cosine)


def train(corpus, puma, model, args):
    """AdamW, cosine schedule with warm-up. Step s draws its batch from seed and s alone, so a
    resumed run continues with the batches that an uninterrupted one would have seen."""
    puma.requires_grad_(True)  # all of it: here the tower and the table are trained, too
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.98), fused=True,
    )
    checkpoint = Path(args.work) / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    first, history = 0, []
    settings = {name: getattr(args, name) for name in ("steps", "batch_size", "lr", "seed")}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state.get("settings") != settings:  # else the card would name another recipe
            raise ValueError(f"{checkpoint} is of the settings {state.get('settings')}, not of "
                             f"{settings}: choose another --work")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, history = state["step"], state["history"]
    model.train().set_attn_implementation("float32")  # see support/run.py
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, mininterval=10)
    started = time.time() - (history[-1]["seconds"] if history else 0)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        rng = random.Random(f"{args.seed}-{step}")
        instructed, half = INSTRUCTED[1] if step >= INSTRUCTED[0] else 0, args.batch_size // 2
        answer = loss_of(model, *answer_batch(puma, corpus, rng, half))
        answer.backward()
        summary = loss_of(model, *summary_batch(puma, corpus, rng, half, instructed))
        summary.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            history.append({
                "step": step + 1, "answer": round(answer.item(), 4),
                "summary": round(summary.item(), 4), "seconds": round(time.time() - started),
            })
            bar.set_postfix(answer=f"{answer.item():.3f}", summary=f"{summary.item():.3f}")
        if step % 500 == 499 or step + 1 == args.steps:
            save_checkpoint(checkpoint, settings, step + 1, model, optimizer, history)
    return history


@torch.inference_mode()
def answers_to(model, puma, items, batch_size=256):
    """The model's answers by greedy decoding to items with a question: all images or all clips."""
    model.eval()
    answers, config = [], model.config
    for start in tqdm(range(0, len(items), batch_size), desc="answers", leave=False):
        chunk = items[start : start + batch_size]
        batch = puma.collate(chunk, [puma.after_ids] * len(chunk))
        ids, grid, pixels = batch["input_ids"], batch.pop("grid_thw"), batch.pop("pixel_values")
        batch["mm_token_type_ids"] = ((ids == config.image_token_id).int()
                                      + 2 * (ids == config.video_token_id).int())
        batch |= ({"pixel_values_videos": pixels, "video_grid_thw": grid} if chunk[0].get("video")
                  else {"pixel_values": pixels, "image_grid_thw": grid})
        del batch["position_ids"]  # generate() makes its own, for the growing sequence
        out = model.generate(**batch, do_sample=False, max_new_tokens=40)
        answers += puma.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return answers


def share_of(flags):
    flags = list(flags)
    return sum(flags) / len(flags)


def measure(folder, data):
    """For the model card: naming accuracy on held-out faces, zero-shot retrieval by depth."""
    world = World()
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    puma = PUMA.from_pretrained(folder)
    figures = {}
    for kind, chars in (("seen", world.seen), ("zero-shot", sorted(world.zero))):
        for face in (TARGET_FACE, TEST_QUERY_FACES[0]):
            drawn = [char for char in chars if world.drawable(char, [face])]
            items = [{"image": str(Path(data, image_path(char, face))), "text": NAME_IT}
                     for char in drawn]
            figures[f"names exactly right, {face}, {kind} characters"] = share_of(
                answer == world.names[char]
                for char, answer in zip(drawn, answers_to(model, puma, items)))
    for kind, split in (("seen", "test"), ("zero-shot", "zero")):
        clips = sorted(pair for pair, own in world.motion_split.items() if own == split)
        paths = [Path(data, clip_path(char, TEST_QUERY_FACES[0], motion)) for char, motion in clips]
        items = [{"video": str(path), "text": DESCRIBE_IT} for path in paths]
        answers = answers_to(model, puma, items)
        figures[f"descriptions of held-out clips exactly right, {kind} characters"] = share_of(
            answer == world.description(*clip) for clip, answer in zip(clips, answers))
        figures[f"their motions right, {kind} characters"] = share_of(
            answer.endswith(f" {VERBS[motion]}") for (_, motion), answer in zip(clips, answers))

    benchmark = Benchmark(data)
    cells = split_cells(benchmark, "test")
    depth = len(find_decoder(puma).layers)

    def states_of(batch):  # (B, L + 1, D)
        return layer_embeddings(puma, batch).transpose(0, 1)

    embedded = Embedded(benchmark, cells, "test",
                        lambda items: puma.encode(items, forward=states_of))
    for layers in range(depth, 0, -1):
        result = score(cells, embedded.rank(cells, layers))
        for kind, start in (("seen", "glyph"), ("zero-shot", "zero_glyph"), ("clips", "motion"),
                            ("zero-shot clips", "zero_motion")):
            for pool in ("local", "global"):
                rates = [cell[pool]["hit_rate@5"] for name, cell in result["cells"].items()
                         if name.startswith(start)]
                key = f"hit rate @5 read after layer {layers}, {kind}, {pool} pools"
                figures[key] = sum(rates) / len(rates)
    return figures


def export(model, puma, history, args):
    """Write the model as an ordinary transformers folder in bfloat16, with its model card."""
    out = Path(args.out)
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(temporary)
    puma.tokenizer.save_pretrained(temporary)
    puma.image_processor.save_pretrained(temporary)
    figures = measure(temporary, args.data)
    card = [
        "# tiny-qwen2-vl",
        "",
        "A real `Qwen2VLForConditionalGeneration`, only small: "
        f"{model.num_parameters():,} parameters, 8 decoder layers of width 128, 2 vision blocks, "
        "56 x 56 pixel images = 4 visual tokens. It knows Unicode glyphs, their names and how some "
        "of them move (GlyphBEIR's training files) and has never seen a contrastive loss. Made by",
        "",
        f"    python toy/pretrain.py --steps {args.steps} --batch-size {args.batch_size} "
        f"--lr {args.lr} --seed {args.seed}",
        "",
        f"in {history[-1]['seconds'] / 60:.0f} minutes on one CPU core (other work ran beside it). "
        "Final losses, nats, mean of the last 500 steps: "
        f"answers {sum(h['answer'] for h in history[-10:]) / 10:.3f}, "
        f"one-word summaries {sum(h['summary'] for h in history[-10:]) / 10:.3f}.",
        "",
        "| measured on what training never saw (`python toy/pretrain.py --measure`) | % |",
        "|---|---|",
        *(f"| {name} | {100 * value:.1f} |" for name, value in figures.items()),
    ]
    (temporary / "README.md").write_text("\n".join(card) + "\n", encoding="utf-8")
    temporary.rename(out)
    print("\n".join(card))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data/glyph_beir", help="GlyphBEIR; written when absent")
    parser.add_argument("--out", default="runs/tiny-qwen2-vl", help="the finished model's folder")
    parser.add_argument("--work", default="runs/pretrain", help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=10_000, help="0.4 to 0.6 s each on one core")
    parser.add_argument("--batch-size", type=int, default=80, help="sequences a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="weights and batches follow from it")
    parser.add_argument("--measure", nargs="?", const="toy/tiny-qwen2-vl", metavar="FOLDER",
                        help="only measure a model, by default the committed one")
    args = parser.parse_args()
    with clear_errors():
        run(args)


def run(args):
    """What the arguments ask for. Raises ValueError or OSError on bad ones, before any work."""
    check_option("--steps", args.steps, int, 1)
    check_option("--batch-size", args.batch_size, int, 2)
    check_option("--lr", args.lr, float, 1e-12, 1)
    check_option("--seed", args.seed, int, 0, 2**31)
    for name in ("data", "out", "work"):
        check_option(f"--{name}", getattr(args, name), str, 1)
    if args.measure:
        load_config(args.measure)
    elif Path(args.out).exists():
        raise ValueError(f"--out {args.out} exists: choose another folder")
    if not args.measure:
        Path(args.work).mkdir(parents=True, exist_ok=True)  # fails now or never
    if not Path(args.data).exists():
        print(build(args.data))
    if args.measure:
        for name, value in measure(args.measure, args.data).items():
            print(f"{100 * value:5.1f}  {name}")
        return
    corpus = Corpus(args.data)
    tokenizer = make_tokenizer(corpus)
    model = make_model(tokenizer, args.seed)
    size = {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}  # every image: 2 x 2 visual tokens
    puma = CachedPUMA(model.model, tokenizer, Qwen2VLImageProcessorPil(size=size))
    print(f"{model.num_parameters():,} parameters")
    history = train(corpus, puma, model, args)
    export(model, puma, history, args)


if __name__ == "__main__":
    main()
