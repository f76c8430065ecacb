"""Hugging Face's BERT for masked tokens in plain PyTorch, by its own tensor names: the truth for
conversions where transformers is not installed.

post-LN: BertForMaskedLM; pre-LN: MegatronBertForMaskedLM, known by its final norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F


def random_weights(
    layers: int, hidden: int, ffn: int, tokens: int, positions: int, seed: int = 0, std: float = 0.1
) -> dict[str, torch.Tensor]:
    """Made-up weights of a BertForMaskedLM, large enough for mistakes to show; token types too."""
    draw = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw) * std

    def linear(name: str, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": matrix(outputs, inputs), f"{name}.bias": matrix(outputs)}

    def norm(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 1 + matrix(hidden), f"{name}.bias": matrix(hidden)}

    embeddings, head = "bert.embeddings", "cls.predictions"
    weights = {
        f"{embeddings}.word_embeddings.weight": matrix(tokens, hidden),
        f"{embeddings}.position_embeddings.weight": matrix(positions, hidden),
        f"{embeddings}.token_type_embeddings.weight": matrix(2, hidden),
        **norm(f"{embeddings}.LayerNorm"),
        f"{head}.bias": matrix(tokens),
        **linear(f"{head}.transform.dense", hidden, hidden),
        **norm(f"{head}.transform.LayerNorm"),
    }
    for number in range(layers):
        layer = f"bert.encoder.layer.{number}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            weights |= linear(f"{layer}.attention.{part}", hidden, hidden)
        weights |= norm(f"{layer}.attention.output.LayerNorm")
        weights |= linear(f"{layer}.intermediate.dense", ffn, hidden)
        weights |= linear(f"{layer}.output.dense", hidden, ffn)
        weights |= norm(f"{layer}.output.LayerNorm")
    return weights


def logits(
    weights: dict[str, torch.Tensor],
    heads: int,
    tokens_S: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor] = F.relu,
) -> torch.Tensor:
    """fp64 [S, tokens] of one cell without padding."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    is_pre = "bert.encoder.ln.weight" in w

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    def attention(x: torch.Tensor, name: str) -> torch.Tensor:
        width = x.shape[1] // heads
        query, key, value = (
            linear(x, f"{name}.self.{part}").view(len(x), heads, width).transpose(0, 1)
            for part in ("query", "key", "value")
        )
        scores = (query @ key.transpose(1, 2) / math.sqrt(width)).softmax(-1)
        return linear((scores @ value).transpose(0, 1).flatten(1), f"{name}.output.dense")

    def feed_forward(x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(activation(linear(x, f"{name}.intermediate.dense")), f"{name}.output.dense")

    words = w["bert.embeddings.word_embeddings.weight"]
    x = words[tokens_S] + w["bert.embeddings.position_embeddings.weight"][: len(tokens_S)]
    x = x + w["bert.embeddings.token_type_embeddings.weight"][0]
    if not is_pre:
        x = norm(x, "bert.embeddings.LayerNorm")
    for number in range(sum(name.endswith("self.query.weight") for name in w)):
        layer = f"bert.encoder.layer.{number}"
        if is_pre:
            x = x + attention(norm(x, f"{layer}.attention.ln"), f"{layer}.attention")
            x = x + feed_forward(norm(x, f"{layer}.ln"), layer)
        else:
            attended = x + attention(x, f"{layer}.attention")
            x = norm(attended, f"{layer}.attention.output.LayerNorm")
            x = norm(x + feed_forward(x, layer), f"{layer}.output.LayerNorm")
    if is_pre:
        x = norm(x, "bert.encoder.ln")
    x = norm(
        activation(linear(x, "cls.predictions.transform.dense")),
        "cls.predictions.transform.LayerNorm",
    )
    return x @ words.T + w["cls.predictions.bias"]
