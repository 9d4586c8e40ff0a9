"""PUMA's model: an item becomes a prompt, and the prompt's last hidden state is its embedding.

    from puma import PUMA
    model = PUMA.from_pretrained("toy/tiny-qwen2-vl", keep_layers=4)  # or Qwen/Qwen2-VL-2B-Instruct
    vectors = model.encode(["latin small letter a", {"image": "a.png", "text": "make it capital"}])
    vectors @ vectors.T                                               # (2, 2) cosine similarities

One item is `[image or video] [instruction + text] [alignment prompt] [RET]` in the model's own chat
template (PUMA, arXiv 2507.08064):

    <|im_start|>user
    <|vision_start|><|image_pad|>...<|vision_end|>make it capital
    Summarize above image and sentence in one word: <|im_end|>
    <|im_start|>assistant
    [RET]

Attention is causal, so `[RET]` must come last to see everything. The one-word question makes the
model prepare there the distribution over the words that would sum the item up: a text-like state,
whatever the modality. That is why images and texts can be compared at all. Vision tower and
embedding table are frozen, as in the paper; the `[RET]` row is trained (official code: frozen).
Shapes: B items, L tokens, D width, V visual tokens and P patches of the whole batch.
"""

import contextlib
import re
from pathlib import Path

import support  # noqa: F401  before torch: it says how threads wait
import torch
import torch.nn.functional as F
from torch import nn
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.utils import logging

from support.files import check_option, new_folder
from support.items import as_item, image_size, load_frames, regular
from support.run import choose_attention, prepared

RET = "[RET]"
PROMPT = "\nSummarize above {} in one word: "


class PUMA(nn.Module):
    """A (pruned) Qwen2-VL or Qwen2.5-VL that embeds items; build it with `from_pretrained`."""

    def __init__(self, backbone, tokenizer, image_processor, max_text_tokens=450, max_frames=8):
        super().__init__()
        if RET not in tokenizer.get_vocab():
            raise ValueError(f"the tokenizer has no {RET} token; PUMA.from_pretrained adds it")
        self.backbone, self.tokenizer, self.image_processor = backbone, tokenizer, image_processor
        self.max_text_tokens, self.max_frames, self.workers = max_text_tokens, max_frames, 0
        self.remembered = {}  # path of an image or video -> visual tokens (V, D), grid (3,)
        self.ret_id = tokenizer.convert_tokens_to_ids(RET)
        table = backbone.get_input_embeddings().weight.requires_grad_(False)
        self.ret_embedding = nn.Parameter(table[self.ret_id].detach().float().clone())  # (D,)
        backbone.visual.requires_grad_(False)

        # The chat template is rendered once: what stands before and after an item never changes.
        turn = [{"role": "user", "content": "<item>"}]
        rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        self.before_ids, self.after_ids = self.tokenize(rendered.split("<item>"), special=True)
        kinds = ("image", "video", "sentence", "image and sentence", "video and sentence")
        self.prompt_ids = dict(zip(kinds, self.tokenize([PROMPT.format(kind) for kind in kinds])))

    @classmethod
    def from_pretrained(cls, name_or_path, keep_layers=None, *, max_visual_tokens=None,
                        max_text_tokens=None, max_frames=None, dtype=None, device="cpu"):
        """Load a checkpoint folder or hub id, only its first `keep_layers` decoder layers.

        `max_visual_tokens` caps the size of images (a token is 28 x 28 pixels), `max_text_tokens`
        cuts instruction + text, a video is read at `max_frames` (even); by default as in training,
        or the paper's 300 and 450, and 8. `dtype`: float32 on a CPU, bfloat16 on a GPU.
        Raises ValueError on a bad depth, an incomplete folder, other weights.
        """
        config = load_config(name_or_path)
        # Limits, in rising priority: the paper's, those of a saved PUMA, the arguments.
        names = ("max_visual_tokens", "max_text_tokens", "max_frames")
        with loading(name_or_path):
            limits = dict(zip(names, (300, 450, 8))) | getattr(config, "puma", {})
        given = zip(names, (max_visual_tokens, max_text_tokens, max_frames))
        limits |= {name: limit for name, limit in given if limit is not None}
        for name, limit in limits.items():
            check_option(name, limit, int, 1)
        config.puma = limits  # saved with the model: it is evaluated as it was trained
        gpu = torch.device(device).type != "cpu"
        dtype = dtype or (torch.bfloat16 if gpu else torch.float32)
        with loading(name_or_path):
            text_config = config.get_text_config()
            depth = text_config.num_hidden_layers
            check_option("keep_layers", keep_layers, int | None, 1, depth)
            text_config.num_hidden_layers = keep_layers or depth  # the rest of the file is not read
            text_config.layer_types = text_config.layer_types[:keep_layers]
            backbone, report = AutoModel.from_pretrained(
                name_or_path, config=config, dtype=dtype, output_loading_info=True,
                use_safetensors=True, trust_remote_code=False,
                attn_implementation="sdpa" if gpu else "float32")
            _check_weights(report, len(backbone.language_model.layers))
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
            processor = AutoImageProcessor.from_pretrained(  # "pil": torchvision rounds otherwise
                name_or_path, backend="pil", trust_remote_code=False)
            side = processor.patch_size * processor.merge_size  # pixels of a visual token
            pixels = limits["max_visual_tokens"] * side**2
            # "shortest_edge", "longest_edge" are the least and the most pixels of an image, oddly.
            processor.size = {edge: min(n, pixels) for edge, n in dict(processor.size).items() if n}
            _add_ret_token(tokenizer, backbone)
            if max(tokenizer.get_vocab().values()) >= len(backbone.get_input_embeddings().weight):
                raise ValueError("its tokenizer has ids that its embedding table has not")
            model = cls(backbone, tokenizer, processor, *map(limits.get, names[1:])).to(device)
            # Whatever else is wrong in the folder, template or processor, shows in a first item.
            trial = model.encode({"text": "a", "image": Image.new("RGB", (56, 56))},
                                 show_progress=False)
            if not trial.isfinite().all():
                raise ValueError("its embeddings are not finite")
        return model

    def save_pretrained(self, folder):
        """Write an ordinary transformers checkpoint; the stock classes load it without this file.

        Weights (safetensors), config with the true number of layers and the limits, tokenizer with
        `[RET]`, image processor, model card. Written beside `folder` and renamed when whole: a
        kill leaves no half folder. Raises FileExistsError if `folder` exists.
        """
        with torch.no_grad():  # the trained row goes back into the table
            self.backbone.get_input_embeddings().weight[self.ret_id] = self.ret_embedding
        with new_folder(folder) as temporary:
            for part in (self.backbone, self.tokenizer, self.image_processor):
                part.save_pretrained(temporary)
            (temporary / "README.md").write_text(self._card(), encoding="utf-8")

    def _card(self):
        layers, size = len(self.backbone.language_model.layers), self.backbone.num_parameters()
        return (f"# PUMA retrieval model\n\n{layers} decoder layers, {size:,} parameters. An item's"
                f" embedding is the normalised last hidden state at `{RET}`, the last token of\n\n"
                f"    [image] [instruction, text]{PROMPT.format('image and sentence')}\n\n"
                "in the chat template. Method: PUMA, arXiv 2507.08064.\n")

    @property
    def device(self):
        return self.ret_embedding.device

    def tokenize(self, texts, special=False):
        """Token ids of each text, as lists; `special`: those of a template, not of a user."""
        # A user's text never turns into special tokens: a `[RET]` in a caption stays five
        # characters, so that nobody can move the embedding's position.
        options = {"add_special_tokens": False, "split_special_tokens": not special}
        return self.tokenizer(texts, **options)["input_ids"]

    def patches(self, items):
        """Items with an image or a video -> patches (P, 3 * 2 * 14 * 14), grids (items, 3).

        A grid (T, H, W) counts patches; 2 x 2 of them become one visual token. A patch spans two
        frames: the image processor repeats a still, a video puts its next frame there.
        """
        visuals = [load_frames(item, self.max_frames) for item in items]
        out = self.image_processor(images=sum(visuals, []), return_tensors="pt")
        pixels, grids = out["pixel_values"], out["image_grid_thw"]  # (P, 1176), (frames, 3)
        if len(grids) == len(visuals):  # no video
            return pixels, grids
        parts = pixels.split(grids.prod(-1).tolist())  # one a frame, (H * W, 1176)
        merged, sizes, start = [], [], 0
        for visual in visuals:
            own = parts[start : start + len(visual)]
            if len(visual) > 1:
                # A row of 1176 is (3 colours, 2 frames, 14 * 14 pixels): swap in the second frame.
                own = torch.stack(own).unflatten(-1, (3, 2, -1))
                own[::2, ..., 1, :] = own[1::2, ..., 0, :]
                own = own[::2].flatten(2)  # (T, H * W, 1176)
            merged += own
            sizes.append([len(own), *grids[start, 1:].tolist()])
            start += len(visual)
        return torch.cat(merged), torch.tensor(sizes)

    def collate(self, items, tails=None):
        """Items -> batch on the CPU: `input_ids`, `attention_mask` (B, L), `position_ids` (3, B, L)
        and, where there are visuals, `pixel_values` (P, 1176) and `grid_thw` (visuals, 3).
        `tails` (for pre-training): other ids instead of `summary_tail`."""
        items, config = [as_item(item) for item in items], self.backbone.config
        visuals = [item for item in items if visual_kind(item)]
        texts = ["\n".join(filter(None, (i.get("instruction"), i.get("text")))) for i in items]
        kinds = [visual_kind(item) for item in items]
        batch, sizes = {}, {}
        # A batch whose pictures are all remembered brings their tokens along, and no pixels.
        known = [self.remembered.get(str(visual_of(item))) for item in visuals]
        if visuals:
            if all(known):
                tokens, grids = zip(*known)
                grids, batch = torch.stack(grids), {"visual": torch.cat(tokens)}
            else:
                pixels, grids = self.patches(visuals)
                batch = {"pixel_values": pixels}
            batch["grid_thw"] = grids  # time, height, width, in patches
            videos = torch.tensor([kind == "video" for kind in kinds if kind])
            sizes = {"image_grid_thw": grids[~videos], "video_grid_thw": grids[videos]}
        # A visual has as many placeholders as the tower gives tokens; `forward` fills them in.
        counts = iter(grids.prod(-1).tolist() if batch else ())
        rows, tails = [], tails or [self.summary_tail(item) for item in items]
        for kind, text_ids, tail in zip(kinds, self.tokenize(texts), tails):
            visual_ids = []
            if kind:
                pad = config.image_token_id if kind == "image" else config.video_token_id
                pads = [pad] * (next(counts) // self.image_processor.merge_size**2)
                visual_ids = [config.vision_start_token_id, *pads, config.vision_end_token_id]
            # Only the text is cut: without the tail there would be no [RET].
            text_ids = text_ids[: self.max_text_tokens]
            rows.append([*self.before_ids, *visual_ids, *text_ids, *tail])

        # Padding is on the left, so that [RET] is the last column of every row.
        width, pad = max(map(len, rows)), self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        # M-RoPE: a visual token counts time, row and column on three axes, a text token the same
        # on all. These are the stock positions (official code: 1-D ones, over images too).
        types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        positions, _ = self.backbone.get_rope_index(ids, types, attention_mask=mask, **sizes)
        return {**batch, "input_ids": ids, "attention_mask": mask, "position_ids": positions}

    def summary_tail(self, item):
        """Token ids that end an item's row: alignment prompt, end of the user's turn, `[RET]`."""
        sentence = "sentence" if item.get("text") or item.get("instruction") else None
        kind = " and ".join(filter(None, (visual_kind(item), sentence)))
        return [*self.prompt_ids[kind], *self.after_ids, self.ret_id]

    def length(self, item):
        """Roughly how many tokens an item takes, to sort by."""
        item = as_item(item)
        letters = len(item.get("text") or "") + len(item.get("instruction") or "")
        patches = 10_000 if item.get("video") else 0  # not opened: counts as the longest
        if item.get("image"):  # 2 x 2 patches make a token, and so do about four letters
            width, height = image_size(item["image"])
            patches = self.image_processor.get_number_of_image_patches(height, width)
        return (letters + patches) / 4

    @torch.no_grad()
    def visual_tokens(self, batch):
        """The frozen tower's output (V, D) for all visuals of a batch, or None; no gradient."""
        if "pixel_values" not in batch:
            return batch.get("visual")  # remembered, or there is none
        tower, pixels = self.backbone.visual, batch["pixel_values"]
        choose_attention(tower)
        return tower(pixels.to(tower.dtype), grid_thw=batch["grid_thw"]).pooler_output

    def remember(self, items, budget, workers=0, chunk=256):
        """Put the visual tokens of these items' files into memory; `collate` then opens none of
        them. `workers` processes read them. None is kept if they take more than `budget` bytes."""
        # The tower is frozen, so a picture's tokens are the same in every epoch. Chunks are the
        # same in every run, too, so that a run that is continued has the same roundings.
        files, least = {}, 2 * self.ret_embedding.nbytes  # a small picture's: 4 tokens of bfloat16
        for looked, item in enumerate(map(as_item, items)):
            if isinstance(visual_of(item), str):
                files.setdefault(visual_of(item), item)
            if len(files) * least > budget or looked > 200_000:  # to look takes time as well
                return
        names, found, size = list(files), {}, 0
        parts = [[files[name] for name in names[start : start + chunk]]
                 for start in range(0, len(names), chunk)]
        for pixels, grids in prepared(self.patches, parts, workers):
            batch = {"pixel_values": pixels, "grid_thw": grids}
            tokens = self.visual_tokens(to_device(batch, self.device)).cpu()
            # Tokens stand one picture after the other: cut them apart.
            counts = (grids.prod(-1) // self.image_processor.merge_size**2).tolist()
            found |= zip(names[len(found) :], zip(tokens.split(counts), grids))
            size += tokens.nbytes
            if size > budget:
                return
        self.remembered = found

    def forward(self, batch, visual=None):
        """A batch of `collate`, on this device -> (B, D) un-normalised, normed `[RET]` states.

        `visual`: the batch's `visual_tokens`, where they are known: teacher and student share them.
        ValueError if a row does not end in `[RET]` (official code: position 0 is read silently).
        """
        ids, config = batch["input_ids"], self.backbone.config
        if not (ids[:, -1] == self.ret_id).all():
            raise ValueError(f"every row must end in {RET}: pad on the left, never cut the end")
        embeds = self.backbone.get_input_embeddings()(ids)  # (B, L, D)
        visual = self.visual_tokens(batch) if visual is None else visual
        if visual is not None:  # row by row, the i-th visual token goes to the i-th placeholder
            slots = (ids == config.image_token_id) | (ids == config.video_token_id)
            embeds = embeds.masked_scatter(slots[..., None], visual.to(embeds.dtype))
        # The table is frozen, so [RET]'s trained row stands apart from it.
        ret = (ids == self.ret_id)[..., None]
        embeds = torch.where(ret, self.ret_embedding.to(embeds.dtype), embeds)
        decoder = self.backbone.language_model
        with _last_token_only(decoder.layers[-1]):
            states = decoder(inputs_embeds=embeds, attention_mask=batch["attention_mask"],
                             position_ids=batch["position_ids"], use_cache=False).last_hidden_state
        return states[:, -1].clone()  # a view would keep the states of all positions alive

    @torch.inference_mode()
    def encode(self, items, batch_size=64, normalize=True, show_progress=True, forward=None):
        """Items (str, PIL image, Path or dict, mixed) -> (N, D) float32 embeddings on the CPU, in
        this order. One item instead of a sequence -> (D,).

        `self.workers` processes read ahead: on a GPU, set one a core. `forward` replaces the model
        as the function of a batch; if it returns (B, ..., D), the states of several depths, say, so
        does this. Raises ValueError on a bad item."""
        if isinstance(items, str | Path | dict | Image.Image):  # a str has letters
            return self.encode([items], batch_size, normalize, show_progress, forward)[0]
        items = list(items)
        # By length, so that no batch is mostly padding; what does not fit into memory fails first.
        order = torch.tensor([*map(self.length, items)]).argsort(descending=True, stable=True)
        training = self.training
        self.eval()  # no dropout
        parts = [] if items else [torch.empty(0, self.ret_embedding.numel())]  # cat needs one
        bar = {"leave": False} if show_progress else {"disable": True}  # or TQDM_DISABLE
        groups = [[items[i] for i in part] for part in order.split(batch_size) if items]
        batches = prepared(self.collate, groups, min(self.workers, max(len(groups) - 1, 0)))
        for batch in tqdm(batches, "encode", len(groups), **bar):
            parts.append((forward or self)(to_device(batch, self.device)).float().cpu())
        self.train(training)
        out = torch.cat(parts)[order.argsort()]  # input order
        return F.normalize(out, dim=-1) if normalize else out


def visual_of(item):
    return item.get("image") or item.get("video")


def visual_kind(item):
    return "image" if item.get("image") else "video" if item.get("video") else None


@contextlib.contextmanager
def _last_token_only(layer):
    """Inside, a decoder layer computes output projection and MLP for the last position alone."""
    # Only [RET] is read after the last layer: it needs the others' keys and values, but not their
    # outputs. The layer's residual additions then broadcast the one position over all: right at
    # the last position, meaningless elsewhere. Saves most of one layer in k (not in the paper).
    with contextlib.ExitStack() as hooks:
        for part in (layer.self_attn.o_proj, layer.post_attention_layernorm):
            hook = part.register_forward_pre_hook(lambda _module, inputs: (inputs[0][:, -1:],))
            hooks.callback(hook.remove)
        yield


def to_device(batch, device):
    return {key: value.to(device) for key, value in batch.items()}


def load_config(name_or_path):
    """The transformers config of a folder or hub id like "Qwen/Qwen2-VL". ValueError if the folder
    lacks a part, or holds something else than files, or another kind of model."""
    folder = Path(name_or_path)
    if not folder.exists() and (len(folder.parts) != 2 or folder.parent.exists()):
        raise ValueError(f"model folder {name_or_path} does not exist")
    for file in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        if folder.exists() and not (folder / file).is_file():
            hint = f"; did you mean {folder / 'model'}?" if (folder / "model").is_dir() else ""
            raise ValueError(f"{folder} is no complete model: expected {folder / file}{hint}")
    for path in folder.iterdir() if folder.exists() else ():
        path.is_dir() or regular(path)
    with loading(name_or_path):
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        if config.model_type not in ("qwen2_vl", "qwen2_5_vl"):
            raise ValueError(f"it is a {config.model_type}, not Qwen2-VL or Qwen2.5-VL")
    return config


def _check_weights(report, depth):
    """ValueError unless the file held the model's weights; dropped layers and LM head apart."""
    wrong = [*report["missing_keys"], *map(str, report["mismatched_keys"])]
    for key in report["unexpected_keys"]:
        layer = re.search(r"\blayers\.(\d+)\.", key)
        if not key.startswith("lm_head.") and not (layer and int(layer[1]) >= depth):
            wrong.append(key)
    if wrong:
        wrong = f"{len(wrong)} missing, unexpected or of another shape, first {min(wrong)}"
        raise ValueError(f"its weights are not those of its config.json: {wrong}")


def _add_ret_token(tokenizer, backbone):
    """`[RET]` takes a spare row of the embedding table, or a new one; it starts as the mean row."""
    if RET in tokenizer.get_vocab():
        return
    mean = backbone.get_input_embeddings().weight[: len(tokenizer)].float().mean(0)
    tokenizer.add_special_tokens({"additional_special_tokens": [RET]})
    if len(tokenizer) > backbone.get_input_embeddings().num_embeddings:
        backbone.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        backbone.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(RET)] = mean


@contextlib.contextmanager
def loading(name):
    """Inside, transformers is quiet, and whatever goes wrong is one line."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list every weight of a dropped layer
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # noqa: BLE001  broken folders raise errors of every kind
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        text = (str(error).splitlines() or [""])[0]
        raise ValueError(f"cannot load {name}: {kind}{text}") from error
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
