"""Folder in Hugging Face's format: its files, read and written.

config.json                             the model
model.safetensors | pytorch_model.bin   its weights
token_dictionary.json, vocabulary.json  its tokens, where there are any
tokenizer.json, tokenizer_config.json, README.md   written, never read
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from geneformer_mcore.config.sections import Activation, ModelConfig, Norm
from geneformer_mcore.errors import CheckpointError, ConfigError
from geneformer_mcore.io import schema
from geneformer_mcore.model.megatron_config import INIT_STD, LAYERNORM_EPSILON
from geneformer_mcore.types import SPECIAL_TOKENS

CONFIG, WEIGHTS, PICKLED = "config.json", "model.safetensors", "pytorch_model.bin"
TOKENS, VOCABULARY = "token_dictionary.json", "vocabulary.json"

_CLASSES = {
    "bert": (Norm.post, "BertForMaskedLM"),
    "megatron-bert": (Norm.pre, "MegatronBertForMaskedLM"),
}
"""model_type -> (position of its norms, its class). The second is BERT with pre-LN like ours."""
_TYPE_OF = {norm: (name, of) for name, (norm, of) in _CLASSES.items()}
_ACTIVATIONS = {
    "relu": Activation.relu,
    "gelu": Activation.gelu,
    "gelu_pytorch_tanh": Activation.gelu_tanh,
    "gelu_new": Activation.gelu_tanh,
}
_THEIR_ACTIVATION = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
_SIZES = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "ffn_hidden_size",
}
"""Their name -> the field of ModelConfig."""
_MOST = 1 << 20
"""Of any size: larger ones are slips, and would fill the memory."""
_DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
"""Their default is that of transformers."""


@dataclass(frozen=True)
class Described:
    """Content of a config.json."""

    model: ModelConfig
    num_tokens: int
    num_positions: int


def read_config(folder: Path) -> Described:
    """The model in `folder`. Raises CheckpointError for one that has no counterpart here."""
    path = folder / CONFIG
    content = read_json(path)
    names = ("vocab_size", *_SIZES, "max_position_embeddings")
    problems = [
        f"{name} must be a whole number from 1 to {_MOST:,}, and is {content.get(name)!r:.80}"
        for name in names
        if not _is_number(content.get(name), int, 1, _MOST)
    ]
    problems += [
        f"{name} must be a number from 0 to 1, and is {content[name]!r:.80}"
        for name in _DROPOUT
        if name in content and not _is_number(content[name], int | float, 0, 1)
    ]
    problems += _unlike_ours(content)
    if not problems and content["hidden_size"] % content["num_attention_heads"]:
        problems.append(
            "hidden_size must be a multiple of num_attention_heads, and is {} of {}".format(
                content["hidden_size"], content["num_attention_heads"]
            )
        )
    if problems:
        raise CheckpointError(
            f"{path} describes no model that can be converted:\n  "
            + "\n  ".join(problems)
            + "\nRemedy: give the folder of a BertForMaskedLM, such as Geneformer V1 or V2."
        )
    dropout = _DROPOUT | {name: content[name] for name in _DROPOUT if name in content}
    model = ModelConfig(
        **{ours: content[theirs] for theirs, ours in _SIZES.items()},
        hidden_dropout=float(dropout["hidden_dropout_prob"]),
        attention_dropout=float(dropout["attention_probs_dropout_prob"]),
        activation=_ACTIVATIONS[content.get("hidden_act", "gelu")],
        norm=_CLASSES[content["model_type"]][0],
    )
    return Described(model, content["vocab_size"], content["max_position_embeddings"])


def _is_number(found: Any, kind: Any, low: int, high: int) -> bool:
    return isinstance(found, kind) and not isinstance(found, bool) and low <= found <= high


def _unlike_ours(content: dict[str, Any]) -> list[str]:
    """Settings in a config.json without a counterpart here. Defaults are those of transformers."""
    wanted: dict[str, tuple[Any, tuple]] = {
        "model_type": (None, tuple(_CLASSES)),
        "hidden_act": ("gelu", tuple(_ACTIVATIONS)),
        "layer_norm_eps": (LAYERNORM_EPSILON, (LAYERNORM_EPSILON,)),
        "position_embedding_type": ("absolute", ("absolute", None)),
        "tie_word_embeddings": (True, (True,)),
        "is_decoder": (False, (False,)),
        "add_cross_attention": (False, (False,)),
    }
    problems = []
    for name, (default, allowed) in wanted.items():
        value = content.get(name, default)
        if value not in allowed:
            shown = " or ".join(str(each) for each in allowed if each is not None)
            problems.append(f"{name} must be {shown}, and is {value!r}")
    return problems


def config_json(
    model: ModelConfig, num_tokens: int, num_positions: int, tokens: dict[str, int]
) -> dict[str, Any]:
    """The content of a config.json. tokens: {name: row}.

    Raises ConfigError for a model that none of their classes computes.
    """
    head = model.head_activation or model.activation
    if head is not model.activation:
        raise ConfigError(
            f"Hugging Face's classes have one activation, and this model has two: "
            f"model.activation={model.activation.value}, model.head_activation={head.value}. "
            "There is no class that computes it."
        )
    model_type, class_name = _TYPE_OF[model.norm]
    return {
        "architectures": [class_name],
        "model_type": model_type,
        "vocab_size": num_tokens,
        **{theirs: getattr(model, ours) for theirs, ours in _SIZES.items()},
        "hidden_act": _THEIR_ACTIVATION[model.activation],
        "hidden_dropout_prob": model.hidden_dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
        "max_position_embeddings": num_positions,
        "type_vocab_size": 1,
        "layer_norm_eps": LAYERNORM_EPSILON,
        "initializer_range": INIT_STD,
        "pad_token_id": tokens.get(_roles(tokens).get("pad_token", "")),
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def _roles(tokens: dict[str, int]) -> dict[str, str]:
    """{role of a tokenizer_config.json: name of the token}, of those in `tokens`."""
    roles = {
        "cls_token": ("[CLS]", "<cls>"),
        "mask_token": ("[MASK]", "<mask>"),
        "pad_token": ("[PAD]", "<pad>"),
        "sep_token": ("[SEP]", "<eos>"),
        "unk_token": ("[UKW]", "<unk>"),
    }
    found = {role: [name for name in names if name in tokens] for role, names in roles.items()}
    return {role: names[0] for role, names in found.items() if names}


def tokenizer_json(tokens: dict[str, int]) -> dict[str, Any]:
    """A tokenizer of gene ids with blanks between, which puts [CLS] first if there is one. It does
    not rank genes: that takes counts and medians."""
    specials = [name for name in SPECIAL_TOKENS if name in tokens]
    specials += [name for name in tokens if name.startswith("<")]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    roles = _roles(tokens)
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": tokens[name], "content": name, **flags, "special": True} for name in specials
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": tokens,
            "unk_token": roles.get("unk_token", "<unknown>"),
        },
    }
    if "cls_token" in roles:
        first = roles["cls_token"]
        start = {"SpecialToken": {"id": first, "type_id": 0}}
        cell, pair = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [start, cell],
            "pair": [start, cell, pair],
            "special_tokens": {first: {"id": first, "ids": [tokens[first]], "tokens": [first]}},
        }
    return content


def tokenizer_config(tokens: dict[str, int], num_positions: int) -> dict[str, Any]:
    """The content of a tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": num_positions,
        **_roles(tokens),
    }


def weights_file(folder: Path) -> Path:
    """The file of weights in a folder. Raises CheckpointError where there is none."""
    for path in (folder / WEIGHTS, folder / PICKLED):
        if path.is_file():
            return path
    parts = sorted(path.name for path in folder.glob("*.index.json"))
    if parts:
        raise CheckpointError(
            f"{folder}: its weights are cut into several files ({parts[0]}), and one is read. "
            "Remedy: load it with transformers and write one file, by "
            'model.save_pretrained(OUT, max_shard_size="1TB").'
        )
    raise CheckpointError(
        f"{folder} must hold {WEIGHTS} or {PICKLED}, and holds neither. Remedy: give the folder "
        "of a model."
    )


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """{their name: tensor} of a folder. Raises CheckpointError where they cannot be read."""
    path = weights_file(folder)
    if path.name == PICKLED:
        return read_state_dict(path)
    try:
        # Read, not mapped: a failing disk is then an error, not a SIGBUS.
        return load_file(path, backend="pread")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: not a safetensors file as its format says: {error}. Remedy: fetch it again, "
            "whole."
        ) from error


def read_state_dict(path: Path) -> dict[str, Any]:
    """{name: tensor} of a file by torch.save, or of its "state_dict" or "model". Raises
    CheckpointError for anything but tensors and plain containers."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: must be a plain state dict, {{name: tensor}}, written by torch.save, and is "
            f"not: {why} Remedy: save `model.state_dict()` alone."
        ) from error
    for inner in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(inner), dict):
            content = content[inner]
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(
            f"{path}: must be a plain state dict, {{name: tensor}}, and is a "
            f"{type(content).__name__}. Remedy: save `model.state_dict()` alone."
        )
    tensors = {name: each for name, each in content.items() if isinstance(each, torch.Tensor)}
    for name, each in tensors.items():
        if each.layout != torch.strided or each.is_meta or each.is_quantized or each.is_complex():
            raise CheckpointError(
                f"{path}: {name} must be a plain tensor of real numbers, and is one of "
                f"{each.dtype}, {each.layout}, on {each.device}. Remedy: save the model dense, "
                "on a CPU, in float32."
            )
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError if there is none."""
    content = schema.read_json(path, "fetch it again, whole", CheckpointError)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold an object, and holds {type(content).__name__}.")
    return content
