"""Our weights under Hugging Face's names, and theirs under ours: pure renaming, bit for bit.

    model.norm=post  <->  BertForMaskedLM
    model.norm=pre   <->  MegatronBertForMaskedLM, the class transformers has for pre-LN BERT

    linear_qkv [heads x 3 x width, H]  <->  query, key, value [H, H] each
    all else                           <->  the same tensor under another name

Weights are {name: whole tensor}; rows of the vocabulary are in any order, all of them real tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from geneformer_mcore.config.sections import ModelConfig, Norm
from geneformer_mcore.errors import CheckpointError

Weights = Mapping[str, torch.Tensor]

WORDS = "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
OUTPUT_BIAS = "output_layer.bias"

_TOKEN_TYPES = "bert.embeddings.token_type_embeddings.weight"
_THEIR_WORDS = "bert.embeddings.word_embeddings.weight"
_THEIR_POSITIONS = "bert.embeddings.position_embeddings.weight"
_THEIR_BIAS = "cls.predictions.bias"
_TWICE = {
    "cls.predictions.decoder.weight": _THEIR_WORDS,
    "cls.predictions.decoder.bias": _THEIR_BIAS,
}
"""Tensors that some files hold a second time, as the tied ones they are."""
_NOT_OURS = ("bert.pooler.", "cls.seq_relationship.", "bert.embeddings.position_ids")
"""Of BERT's parts that Geneformer does not have: next-sentence prediction, a constant."""


@dataclass(frozen=True)
class Entry:
    """One tensor of ours, and the one or three (query, key, value) of theirs; shape: of each of
    theirs."""

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def our_shape(self) -> tuple[int, ...]:
        """The shape of the tensor of ours."""
        return (len(self.theirs) * self.shape[0], *self.shape[1:])


def table(model: ModelConfig, num_tokens: int, num_positions: int) -> list[Entry]:
    """Every tensor of a model, token types left out."""
    hidden, is_post = model.hidden_size, model.norm is Norm.post
    entries = [
        Entry(WORDS, (_THEIR_WORDS,), (num_tokens, hidden)),
        Entry(POSITIONS, (_THEIR_POSITIONS,), (num_positions, hidden)),
        Entry(OUTPUT_BIAS, (_THEIR_BIAS,), (num_tokens,)),
        *_linear("lm_head.dense", "cls.predictions.transform.dense", (hidden, hidden)),
        *_norm("lm_head.layer_norm", "cls.predictions.transform.LayerNorm", hidden),
    ]
    if is_post:
        entries += _norm("embedding.layer_norm", "bert.embeddings.LayerNorm", hidden)
    else:
        entries += _norm("encoder.final_layernorm", "bert.encoder.ln", hidden)
    for layer in range(model.num_layers):
        entries += _layer(model, f"encoder.layers.{layer}", f"bert.encoder.layer.{layer}")
    return entries


def from_hf(theirs: Weights, model: ModelConfig, num_tokens: int, num_positions: int) -> Weights:
    """Their weights under our names, fp32. The embedding of token type 0, which every gene has, is
    added to all positions.

    Raises CheckpointError that names what is missing, unexpected, or of another shape.
    """
    entries = table(model, num_tokens, num_positions)
    theirs = _once(theirs)
    _check(theirs, {name: entry.shape for entry in entries for name in entry.theirs})
    ours = {}
    for entry in entries:
        parts = [theirs[name].float() for name in entry.theirs]
        ours[entry.ours] = parts[0] if len(parts) == 1 else fused(parts, model.num_attention_heads)
    if _TOKEN_TYPES in theirs:
        ours[POSITIONS] = ours[POSITIONS] + _type_0(theirs[_TOKEN_TYPES], model.hidden_size)
    return ours


def to_hf(ours: Weights, model: ModelConfig) -> dict[str, torch.Tensor]:
    """Our weights under their names, with the one token type as zeros."""
    entries = table(model, len(ours[WORDS]), len(ours[POSITIONS]))
    theirs = {_TOKEN_TYPES: torch.zeros(1, model.hidden_size)}
    for entry in entries:
        whole = ours[entry.ours]
        assert tuple(whole.shape) == entry.our_shape, entry.ours
        parts = [whole] if len(entry.theirs) == 1 else split(whole, model.num_attention_heads)
        theirs |= dict(zip(entry.theirs, parts, strict=True))
    return theirs


def fused(parts: list[torch.Tensor], heads: int) -> torch.Tensor:
    """Query, key and value, each [H, ...], as Megatron keeps them: head by head, [3 H, ...]."""
    by_head = [part.reshape(heads, 1, -1, *part.shape[1:]) for part in parts]
    return torch.cat(by_head, dim=1).flatten(0, 2)


def split(whole: torch.Tensor, heads: int) -> list[torch.Tensor]:
    """The reverse of `fused`."""
    by_head = whole.reshape(heads, 3, -1, *whole.shape[1:])
    return [part.flatten(0, 1) for part in by_head.unbind(1)]


def check_shapes(found: Weights, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError unless `found` holds just the tensors that are expected."""
    _check(found, expected)


def _layer(model: ModelConfig, ours: str, theirs: str) -> list[Entry]:
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    qkv = tuple(f"{theirs}.attention.self.{part}" for part in ("query", "key", "value"))
    if model.norm is Norm.post:
        norms = [
            *_norm(
                f"{ours}.post_attention_layernorm", f"{theirs}.attention.output.LayerNorm", hidden
            ),
            *_norm(f"{ours}.post_mlp_layernorm", f"{theirs}.output.LayerNorm", hidden),
        ]
    else:
        norms = [
            *_norm(f"{ours}.input_layernorm", f"{theirs}.attention.ln", hidden),
            *_norm(f"{ours}.pre_mlp_layernorm", f"{theirs}.ln", hidden),
        ]
    attention, mlp = f"{ours}.self_attention", f"{ours}.mlp"
    return [
        *norms,
        Entry(f"{attention}.linear_qkv.weight", _named(qkv, "weight"), (hidden, hidden)),
        Entry(f"{attention}.linear_qkv.bias", _named(qkv, "bias"), (hidden,)),
        *_linear(f"{attention}.linear_proj", f"{theirs}.attention.output.dense", (hidden, hidden)),
        *_linear(f"{mlp}.linear_fc1", f"{theirs}.intermediate.dense", (ffn, hidden)),
        *_linear(f"{mlp}.linear_fc2", f"{theirs}.output.dense", (hidden, ffn)),
    ]


def _named(modules: tuple[str, ...], parameter: str) -> tuple[str, ...]:
    return tuple(f"{module}.{parameter}" for module in modules)


def _linear(ours: str, theirs: str, shape: tuple[int, int]) -> Iterator[Entry]:
    yield Entry(f"{ours}.weight", (f"{theirs}.weight",), shape)
    yield Entry(f"{ours}.bias", (f"{theirs}.bias",), shape[:1])


def _norm(ours: str, theirs: str, hidden: int) -> list[Entry]:
    parameters = ("weight", "bias")
    return [Entry(f"{ours}.{each}", (f"{theirs}.{each}",), (hidden,)) for each in parameters]


def _once(theirs: Weights) -> dict[str, torch.Tensor]:
    """Their weights without what is there twice, and without what Geneformer does not have.

    Raises CheckpointError for a decoder of its own: ours is tied to the embedding.
    """
    kept = {name: each for name, each in theirs.items() if not name.startswith(_NOT_OURS)}
    for copy, name in _TWICE.items():
        if copy not in kept:
            continue
        again = kept.pop(copy)
        if not torch.equal(kept.setdefault(name, again), again):
            raise CheckpointError(
                f"{copy} must be {name}, as the output layer is tied to the embedding, and differs "
                "from it. Models whose output layer is not tied have no counterpart here."
            )
    return kept


def _type_0(types: torch.Tensor, hidden: int) -> torch.Tensor:
    if types.dim() != 2 or len(types) < 1 or types.shape[1] != hidden:
        raise CheckpointError(
            f"{_TOKEN_TYPES} must be [types, {hidden}], and is {list(types.shape)}. Remedy: take "
            "weights and config.json of one model."
        )
    return types[0].float()


_MOST_NAMED = 6


def _check(found: Weights, expected: Mapping[str, tuple[int, ...]]) -> None:
    missing = [name for name in expected if name not in found]
    strange = [name for name in found if name not in expected and name != _TOKEN_TYPES]
    other = [
        f"{name} is {list(found[name].shape)} and must be {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != tuple(shape)
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:_MOST_NAMED])}"
        + (", ..." if len(names) > _MOST_NAMED else "")
        for what, names in (("missing", missing), ("unexpected", strange), ("misshapen", other))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the weights must be the {len(expected)} tensors of such a model, and {len(found)} "
            "tensors were found:\n  " + "\n  ".join(problems) + "\nRemedy: take weights and "
            "settings of one model, and of the kind that this command converts."
        )
