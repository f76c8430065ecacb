"""Names of weights, ours and Hugging Face's: pure renaming, bit for bit.

    model.norm=post  <->  BertForMaskedLM
    model.norm=pre   <->  MegatronBertForMaskedLM, the class transformers has for pre-LN BERT

    linear_qkv [heads x 3 x width, H]  <->  query, key, value [H, H] each
    all others                         <->  the same tensor under another name

Weights are {name: whole tensor}, without padding rows of the vocabulary.
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
_TIED = {
    "cls.predictions.decoder.weight": _THEIR_WORDS,
    "cls.predictions.decoder.bias": _THEIR_BIAS,
}
"""Tied tensors that some files hold a second time."""
_NOT_OURS = ("bert.pooler.", "cls.seq_relationship.", "bert.embeddings.position_ids")
"""Of BERT's parts that Geneformer does not have: next-sentence prediction, a constant."""
_MOST_NAMED = 6
_OLD_NORM = ("LayerNorm.gamma", "LayerNorm.beta")


@dataclass(frozen=True)
class Entry:
    """One tensor of ours, the one or three (query, key, value) of theirs, and the shape of each of
    theirs."""

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def our_shape(self) -> tuple[int, ...]:
        """The shape of our tensor."""
        return (len(self.theirs) * self.shape[0], *self.shape[1:])


def table(model: ModelConfig, num_tokens: int, num_positions: int) -> list[Entry]:
    """Every tensor of a model but token types."""
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

    Raises CheckpointError that names missing, unexpected and misshapen tensors.
    """
    check_layers(model.num_layers, theirs)
    entries = table(model, num_tokens, num_positions)
    theirs = {name: each for name, each in theirs.items() if not name.startswith(_NOT_OURS)}
    drop_tied(theirs, _TIED)
    check_shapes(theirs, {name: entry.shape for entry in entries for name in entry.theirs})
    ours = {}
    for entry in entries:
        parts = [theirs[name].float() for name in entry.theirs]
        ours[entry.ours] = parts[0] if len(parts) == 1 else fused(parts, model.num_attention_heads)
    if _TOKEN_TYPES in theirs:
        ours[POSITIONS] = ours[POSITIONS] + _type_0(theirs[_TOKEN_TYPES], model.hidden_size)
    return ours


def to_hf(ours: Weights, model: ModelConfig) -> dict[str, torch.Tensor]:
    """Our weights under their names, with one token type of zeros."""
    entries = table(model, len(ours[WORDS]), len(ours[POSITIONS]))
    theirs = {_TOKEN_TYPES: torch.zeros(1, model.hidden_size)}
    for entry in entries:
        whole = ours[entry.ours]
        assert tuple(whole.shape) == entry.our_shape, entry.ours
        parts = [whole] if len(entry.theirs) == 1 else split(whole, model.num_attention_heads)
        theirs |= dict(zip(entry.theirs, parts, strict=True))
    return theirs


def fused(parts: list[torch.Tensor], heads: int) -> torch.Tensor:
    """Query, key and value, each [H, ...], in Megatron's order: head by head, [3 H, ...]."""
    by_head = [part.reshape(heads, 1, -1, *part.shape[1:]) for part in parts]
    return torch.cat(by_head, dim=1).flatten(0, 2)


def split(whole: torch.Tensor, heads: int) -> list[torch.Tensor]:
    """The reverse of `fused`."""
    by_head = whole.reshape(heads, 3, -1, *whole.shape[1:])
    return [part.flatten(0, 1) for part in by_head.unbind(1)]


def _layer(model: ModelConfig, ours: str, theirs: str) -> Iterator[Entry]:
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    if model.norm is Norm.post:
        norms = {
            "post_attention_layernorm": "attention.output.LayerNorm",
            "post_mlp_layernorm": "output.LayerNorm",
        }
    else:
        norms = {"input_layernorm": "attention.ln", "pre_mlp_layernorm": "ln"}
    for our_norm, their_norm in norms.items():
        yield from _norm(f"{ours}.{our_norm}", f"{theirs}.{their_norm}", hidden)
    for parameter, shape in (("weight", (hidden, hidden)), ("bias", (hidden,))):
        qkv = (f"{theirs}.attention.self.{part}" for part in ("query", "key", "value"))
        names = tuple(f"{module}.{parameter}" for module in qkv)
        yield Entry(f"{ours}.self_attention.linear_qkv.{parameter}", names, shape)
    for our_linear, their_linear, matrix in (
        ("self_attention.linear_proj", "attention.output.dense", (hidden, hidden)),
        ("mlp.linear_fc1", "intermediate.dense", (ffn, hidden)),
        ("mlp.linear_fc2", "output.dense", (hidden, ffn)),
    ):
        yield from _linear(f"{ours}.{our_linear}", f"{theirs}.{their_linear}", matrix)


def _linear(ours: str, theirs: str, shape: tuple[int, int]) -> Iterator[Entry]:
    yield Entry(f"{ours}.weight", (f"{theirs}.weight",), shape)
    yield Entry(f"{ours}.bias", (f"{theirs}.bias",), shape[:1])


def _norm(ours: str, theirs: str, hidden: int) -> Iterator[Entry]:
    for each in ("weight", "bias"):
        yield Entry(f"{ours}.{each}", (f"{theirs}.{each}",), (hidden,))


def drop_tied(weights: dict[str, torch.Tensor], tied: Mapping[str, str]) -> None:
    """Remove second copies ({copy: name}) of tied tensors. Raises CheckpointError where one differs
    from the tensor of that name."""
    for copy, name in tied.items():
        again = weights.pop(copy, None)
        if again is not None and not torch.equal(weights.setdefault(name, again), again):
            raise CheckpointError(
                f"{copy} must be {name}, as the output layer is tied to the embedding, and differs "
                "from it. Models whose output layer is not tied have no counterpart here."
            )


def _type_0(types: torch.Tensor, hidden: int) -> torch.Tensor:
    if types.dim() != 2 or len(types) < 1 or types.shape[1] != hidden:
        raise CheckpointError(
            f"{_TOKEN_TYPES} must be [types, {hidden}], and is {list(types.shape)}. Remedy: take "
            "weights and config.json of one model."
        )
    return types[0].float()


def check_layers(num_layers: int, found: Weights) -> None:
    """Raise CheckpointError for more layers than tensors, before all are named."""
    if num_layers > len(found):
        raise CheckpointError(
            f"a model of {num_layers:,} layers has more tensors than the {len(found):,} that were "
            "found. Remedy: take weights and settings of one model."
        )


def check_shapes(found: Weights, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless `found` holds just the expected tensors."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected and name != _TOKEN_TYPES]
    misshapen = [
        f"{name} is {list(found[name].shape)} and must be {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != tuple(shape)
    ]
    numbers = [
        f"{name} ({found[name].dtype})"
        for name in expected
        if name in found and not found[name].is_floating_point()
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:_MOST_NAMED])}"
        + (", ..." if len(names) > _MOST_NAMED else "")
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshapen", misshapen),
            ("not of floating point", numbers),
        )
        if names
    ]
    if problems:
        remedy = "take weights and settings of one model, of a kind that this command converts."
        if any(name.endswith(_OLD_NORM) for name in unexpected):
            remedy = "load it with transformers and save it: gamma and beta are its old names."
        raise CheckpointError(
            f"the weights must be the {len(expected)} tensors of such a model, and {len(found)} "
            "tensors were found:\n  " + "\n  ".join(problems) + f"\nRemedy: {remedy}"
        )
