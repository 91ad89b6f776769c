"""Caption encoders: text in, CLIP's last hidden state and its pooled position out.

Tokenized, padded and encoded as in U-ViT for MS-COCO (CLIP ViT-L/14, 77 x 768): the tokenizer's own padding up to the model's last
position, truncation, no attention mask. Attention is causal, so padding does not affect the tokens of a caption, but the states of
the padding are conditioning tokens like the others.

Shape legend: B captions, T positions, W width, P captions in a pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float16, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from enat.files.weights import check_finite, load_strictly

CAPTIONS_PER_PASS = 8
_WEIGHTS, _WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
_PREFIX = "text_model."
_PROJECTION = "text_projection.weight"
_OTHER_PARTS = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
# Other fields of a config.json (location of code, implementation of attention, ...) are ignored.
_CONFIG_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "eos_token_id",
)
# Until transformers 4.31 CLIP's configs contained this id, which is not the tokenizer's; such models pool at the highest id.
_LEGACY_EOS_ID = 2


@dataclass(frozen=True)
class TextFeatures:
    """hidden: after the final norm.   pooled: `hidden` at the end of the caption.

    num_tokens: with start and end, without padding; 2 for the empty caption.
    """

    hidden: Float16[Tensor, "B T W"]
    pooled: Float16[Tensor, "B W"]
    num_tokens: Int64[Tensor, " B"]


class TextEncoder:
    """CLIP's text model with its tokenizer, in float32.

    `model`: transformers' CLIPTextModel.   `tokenizer`: its CLIPTokenizer. Raises ValueError if they do not match.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self._check_tokenizer()

    @property
    def num_positions(self) -> int:
        """T"""
        return self.model.config.max_position_embeddings

    @property
    def width(self) -> int:
        """W"""
        return self.model.config.hidden_size

    @property
    def device(self) -> torch.device:
        return self.model.device

    def to(self, device: str) -> TextEncoder:
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """The features of captions, on the encoder's device.

        Every pass has P = CAPTIONS_PER_PASS captions, filled up with empty ones: the rounding of a matrix product can depend on its
        shape, and the features of a caption must not depend on the number of other captions. Raises ValueError for captions that
        are not text and for features beyond the range of float16.
        """
        tokens, num_tokens = self._tokenize([*captions, ""])
        no_states = torch.empty(0, self.num_positions, self.width, dtype=torch.float16, device=self.device)
        parts = [(no_states, no_states[:, 0]), *(tuple(each.half() for each in part) for part in self._passes(tokens))]
        hidden, pooled = (torch.cat(each) for each in zip(*parts, strict=True))
        if not hidden.isfinite().all():
            raise ValueError(
                "the text encoder computed values that float16 cannot hold; its weights are not those of a trained model"
            )
        return TextFeatures(hidden, pooled, num_tokens[:-1])

    @torch.no_grad()
    def pooled(self, captions: Sequence[str]) -> Tensor:
        """The pooled features of captions before rounding, float32 (B, W). Raises ValueError for captions that are not text."""
        tokens, _ = self._tokenize([*captions, ""])
        return torch.cat([torch.empty(0, self.width, device=self.device), *(pooled for _, pooled in self._passes(tokens))])

    def _passes(self, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """int64 (B + 1, T), of which the last is the empty caption -> float32 (<= P, T, W), (<= P, W) for each pass"""
        for part in filter(len, tokens[:-1].split(CAPTIONS_PER_PASS)):
            padding = tokens[-1].expand(CAPTIONS_PER_PASS - len(part), -1)
            output = self.model(input_ids=torch.cat([part, padding]))
            yield output.last_hidden_state[: len(part)], output.pooler_output[: len(part)]

    def _tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids int64 (B, T), and the number of ids before the padding, int64 (B,)."""
        for caption in captions:
            if not isinstance(caption, str) or caption != caption.encode(errors="ignore").decode():  # half of a surrogate pair
                raise ValueError(f"a caption must be text, not {caption!r}")
        encoded = self.tokenizer(
            list(captions), padding="max_length", max_length=self.num_positions, truncation=True, return_tensors="pt"
        )
        return encoded["input_ids"].to(self.device), encoded["attention_mask"].sum(1).to(self.device)

    def _check_tokenizer(self) -> None:
        """The model pools at the id that it takes for the end token, and does not report a caption without that id."""
        ids = self.tokenizer.get_vocab().values()
        vocab_size, eos_id, end_id = self.model.config.vocab_size, self.model.config.eos_token_id, self.tokenizer.eos_token_id
        if max(ids) >= vocab_size:
            raise ValueError(f"the tokenizer has ids up to {max(ids)}, but the text model embeds {vocab_size}")
        if end_id != (max(ids) if eos_id == _LEGACY_EOS_ID else eos_id):
            raise ValueError(f"captions end with id {end_id} in the tokenizer, but the text model pools at id {eos_id}")
        tokens, num_tokens = self._tokenize([""])
        if tokens[0].tolist().index(end_id) != num_tokens.item() - 1:
            raise ValueError("the tokenizer pads captions on the left, but a CLIP text model reads them from the left")


def load_text_encoder(folder: str | Path) -> TextEncoder:
    """The text encoder of a folder with a CLIP checkpoint in the hub's format, text part or both, on the CPU.

    Needs config.json, model.safetensors (or its shards) and tokenizer.json or vocab.json with merges.txt. Weights are read here,
    not by transformers: nothing is unpickled, downloaded or executed, the image part is not read, and a missing tensor is an error,
    whereas transformers would initialise it. Raises ValueError if the folder does not contain such a checkpoint.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a directory; give the folder of a text encoder such as openai/clip-vit-large-patch14")
    model = _build_model(folder)
    load_strictly(model, _read_text_weights(folder), source=str(folder / _WEIGHTS))
    return TextEncoder(model, _load_tokenizer(folder))


def _build_model(folder: Path) -> Any:
    """A CLIPTextModel with uninitialised parameters."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CLIPTextConfig, CLIPTextModel

    fields = _text_config(folder)
    followed = {name: fields[name] for name in _CONFIG_FIELDS if name in fields}
    try:
        # The tokenizer defines start and padding; transformers rejects default ids that a small vocabulary does not have.
        config = CLIPTextConfig(**followed, bos_token_id=None, pad_token_id=None, attn_implementation="sdpa")
        with torch.device("meta"):  # without it, unused random values would be drawn from the global generator
            model = CLIPTextModel(config).to_empty(device="cpu")
    except (StrictDataclassError, KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder / 'config.json'} does not describe a known CLIP text model ({reason})") from error
    model.embeddings.position_ids = torch.arange(config.max_position_embeddings)[None]
    return model


def _text_config(folder: Path) -> dict[str, Any]:
    """The fields of the text model in config.json, which describes the text model alone or both parts of a checkpoint."""
    path = folder / "config.json"
    fields = _read_json(path)
    kind = fields.get("model_type")
    if kind == "clip":
        # text_config_dict: an old name, which has precedence if both exist.
        fields = fields.get("text_config_dict") or fields.get("text_config") or {}
    elif kind != "clip_text_model":
        raise ValueError(f"{path} describes {'a model of type ' + str(kind) if kind else 'no model'}, not CLIP")
    return dict(fields)


def load_text_projection(folder: str | Path) -> Tensor:
    """The projection of the pooled features to the embedding that images share: float32 (F, W).

    Raises ValueError for a folder without it, such as that of a CLIPTextModel alone, and for values that are not finite.
    """
    folder = Path(folder).expanduser()
    tensors = _read_weights(folder, lambda name: name == _PROJECTION)
    if _PROJECTION not in tensors or tensors[_PROJECTION].ndim != 2:
        raise ValueError(f"{folder} has no {_PROJECTION}; give the folder of a whole CLIPModel, with text and image parts")
    check_finite(tensors, str(folder))
    return tensors[_PROJECTION].float()


def _read_text_weights(folder: Path) -> dict[str, Tensor]:
    """The text part's tensors by their names in CLIPTextModel."""
    # transformers 5 saves a CLIPTextModel without the prefix. Other parts of a CLIPModel are not read.
    found = _read_weights(folder, lambda name: not name.startswith(_OTHER_PARTS))
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in found.items()}
    tensors.pop("embeddings.position_ids", None)  # 0, 1, 2, ...: stored by older versions
    return tensors


def _read_weights(folder: Path, is_wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    names = [_WEIGHTS]
    if not (folder / _WEIGHTS).is_file() and (folder / _WEIGHTS_INDEX).is_file():
        names = sorted(map(str, set(dict(_read_json(folder / _WEIGHTS_INDEX).get("weight_map", {})).values())))
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if path.parent != folder or path.suffix != ".safetensors" or not path.is_file():
            raise ValueError(f"{folder} has no {name}; weights in other formats are not opened, because reading them may run code")
        try:
            with safe_open(str(path), framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys() if is_wanted(key)}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file of weights: {error}") from error
    return tensors


def _load_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    # Checked first, because transformers replaces missing files by an empty vocabulary or empty merges.
    if not (folder / "tokenizer.json").is_file() and not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        raise ValueError(f"{folder} has no CLIP tokenizer: neither tokenizer.json nor vocab.json with merges.txt")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise ValueError(f"{folder} has no readable CLIP tokenizer ({' '.join(str(error).split())})") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} holds no text encoder: it has no {path.name}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} does not contain a JSON object")
    return fields
