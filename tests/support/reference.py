"""The truth for every layout and kernel: Geneformer in plain PyTorch, as short as it can be.

Written from the architecture (BERT, pre-LN or post-LN, tied head), not from the code it checks:
full [B, S, V] logits, an explicit softmax over real tokens only, no Megatron. Works in the dtype of
its weights, fp64 for a sharp comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

EPSILON = 1e-12


class Reference(torch.nn.Module):
    """weights: name -> tensor, with the names of a one-rank Geneformer's state_dict. Weights with a
    norm after the embedding are those of a post-LN model; corrections of low rank are multiplied by
    `lora_scale`."""

    def __init__(
        self,
        weights: dict[str, torch.Tensor],
        num_heads: int,
        vocabulary_size: int,
        activation: Callable[[torch.Tensor], torch.Tensor] = F.relu,
        head_activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
        dtype: torch.dtype = torch.float64,
        lora_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.w = {
            name: tensor.detach().to(dtype).requires_grad_()
            for name, tensor in weights.items()
            if isinstance(tensor, torch.Tensor)
        }
        self.num_heads = num_heads
        self.lora_scale = lora_scale
        self.vocabulary_size = vocabulary_size
        self.activation = activation
        self.head_activation = head_activation or activation
        self.is_post = "embedding.layer_norm.weight" in self.w
        self.num_layers = 1 + max(int(n.split(".")[2]) for n in self.w if ".layers." in n)

    def hidden(self, tokens_BS: torch.Tensor, lengths_N: torch.Tensor) -> torch.Tensor:
        """[B, S, H], normalised."""
        states_BSH = self.states(tokens_BS, lengths_N, self.num_layers)
        return states_BSH if self.is_post else self._norm(states_BSH, "encoder.final_layernorm")

    def states(
        self, tokens_BS: torch.Tensor, lengths_N: torch.Tensor, num_layers: int
    ) -> torch.Tensor:
        """[B, S, H], the residual stream behind so many layers; of a post-LN model their output."""
        num_positions = tokens_BS.shape[1]
        x = self.w["embedding.word_embeddings.weight"][tokens_BS]
        x = x + self.w["embedding.position_embeddings.weight"][:num_positions]
        real_BS = torch.arange(num_positions) < lengths_N[:, None]
        if self.is_post:
            return self._post_layers(self._norm(x, "embedding.layer_norm"), real_BS, num_layers)
        for layer in range(num_layers):
            name = f"encoder.layers.{layer}"
            x = x + self._attention(self._norm(x, f"{name}.input_layernorm"), real_BS, name)
            x = x + self._mlp(self._norm(x, f"{name}.pre_mlp_layernorm"), f"{name}.mlp")
        return x

    def _post_layers(self, x: torch.Tensor, real_BS: torch.Tensor, num_layers: int) -> torch.Tensor:
        for layer in range(num_layers):
            name = f"encoder.layers.{layer}"
            x = self._norm(
                x + self._attention(x, real_BS, name), f"{name}.post_attention_layernorm"
            )
            x = self._norm(x + self._mlp(x, f"{name}.mlp"), f"{name}.post_mlp_layernorm")
        return x

    def logits(self, tokens_BS: torch.Tensor, lengths_N: torch.Tensor) -> torch.Tensor:
        """[B, S, vocabulary_size]: real tokens only, padding rows of the embedding left out."""
        x = self._linear(self.hidden(tokens_BS, lengths_N), "lm_head.dense")
        x = self._norm(self.head_activation(x), "lm_head.layer_norm")
        embedding = self.w["embedding.word_embeddings.weight"][: self.vocabulary_size]
        return x @ embedding.T + self.w["output_layer.bias"][: self.vocabulary_size]

    def loss_sum(
        self,
        tokens_BS: torch.Tensor,
        lengths_N: torch.Tensor,
        selected_M: torch.Tensor,
        labels_M: torch.Tensor,
    ) -> torch.Tensor:
        """Nats, summed over the selected positions."""
        logits_MV = self.logits(tokens_BS, lengths_N).flatten(0, 1)[selected_M]
        return F.cross_entropy(logits_MV, labels_M, reduction="sum")

    def class_logits(
        self, tokens_BS: torch.Tensor, lengths_N: torch.Tensor, by_cls: bool = False
    ) -> torch.Tensor:
        """[B, C]: of the mean over a cell's genes, or of its [CLS]."""
        states_BSH = self.hidden(tokens_BS, lengths_N)
        rows = [
            states[0] if by_cls else states[1:length].mean(dim=0)
            for states, length in zip(states_BSH, lengths_N.tolist(), strict=True)
        ]
        return self._linear(torch.stack(rows), "class_head")

    def _attention(self, x: torch.Tensor, real_BS: torch.Tensor, name: str) -> torch.Tensor:
        name = f"{name}.self_attention"
        cells, positions, width = x.shape
        # Megatron keeps query, key and value of a head together: [heads, 3, width per head].
        mixed = self._linear(x, f"{name}.linear_qkv")
        mixed = mixed.view(cells, positions, self.num_heads, 3, width // self.num_heads)
        query, key, value = mixed.permute(3, 0, 2, 1, 4)
        scores = query @ key.transpose(-1, -2) / math.sqrt(width // self.num_heads)
        scores = scores.masked_fill(~real_BS[:, None, None, :], float("-inf"))
        context = (scores.softmax(-1) @ value).transpose(1, 2).reshape(cells, positions, width)
        return self._linear(context, f"{name}.linear_proj")

    def _mlp(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self._linear(
            self.activation(self._linear(x, f"{name}.linear_fc1")), f"{name}.linear_fc2"
        )

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        y = x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]
        correction = name.replace("linear_", "lora_")
        if f"{correction}.up" not in self.w:
            return y
        down, up = self.w[f"{correction}.down"], self.w[f"{correction}.up"]
        return y + self.lora_scale * (x @ down.T @ up.T)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPSILON)
        return centred * scale * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]
