"""FLOPs and parameters of the model: closed formulas.

    per cell of n tokens, m of them predicted, vocabulary V, 2 FLOPs per multiply-add:

    linear      L (8 n h^2 + 4 n h f)     query, key, value, projection; both feed-forward matrices
    attention   4 L h n^2                 QK^T and the weighted sum of values, bidirectional
    head        2 m h^2                   the dense layer before the vocabulary
    vocabulary  2 m h V                   the tied output projection

    training = 3 x forward (the backward pass multiplies twice per forward multiplication)

- padded-equivalent: as if each cell had seq_length tokens, all predicted. A unit of throughput,
  comparable with published figures of Geneformer; it may exceed the chip's peak.
- executed: real tokens, real lengths in the square, predicted positions only. The one for MFU.

Not counted: softmax, norms, activations, dropout, embedding, optimizer, recomputation. V is the
vocabulary without padding rows. Python ints, so exact.
"""

from __future__ import annotations

from dataclasses import dataclass

from geneformer_mcore.config.sections import ModelConfig

TRAIN_OVER_FORWARD = 3


@dataclass(frozen=True)
class ModelShape:
    """L, h, f, V of the formulas; V with special tokens."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    vocabulary_size: int

    @classmethod
    def of(cls, model: ModelConfig, vocabulary_size: int) -> ModelShape:
        """The sizes of settings."""
        return cls(model.num_layers, model.hidden_size, model.ffn_hidden_size, vocabulary_size)


@dataclass(frozen=True)
class Workload:
    """Sums of n ([CLS] included), n^2 and m over some cells."""

    tokens: int
    sum_squared_lengths: int
    num_predicted: int


def padded_workload(seq_length: int, cells: int = 1) -> Workload:
    """`cells` cells of `seq_length` tokens each, all positions predicted."""
    return Workload(cells * seq_length, cells * seq_length**2, cells * seq_length)


@dataclass(frozen=True)
class FlopBreakdown:
    """FLOPs by where they are spent."""

    linear: int
    attention: int
    head: int
    vocabulary: int

    @property
    def total(self) -> int:
        return self.linear + self.attention + self.head + self.vocabulary


def forward_breakdown(shape: ModelShape, work: Workload) -> FlopBreakdown:
    """FLOPs of one forward pass over `work`, by part."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    return FlopBreakdown(
        linear=shape.num_layers * (8 * hidden**2 + 4 * hidden * ffn) * work.tokens,
        attention=shape.num_layers * 4 * hidden * work.sum_squared_lengths,
        head=2 * hidden**2 * work.num_predicted,
        vocabulary=2 * hidden * shape.vocabulary_size * work.num_predicted,
    )


def forward_flops(shape: ModelShape, work: Workload) -> int:
    return forward_breakdown(shape, work).total


def train_flops(shape: ModelShape, work: Workload) -> int:
    """FLOPs of one forward and backward pass over `work`: 3 x forward."""
    return TRAIN_OVER_FORWARD * forward_flops(shape, work)


def padded_equivalent_flops(shape: ModelShape, seq_length: int, cells: int = 1) -> int:
    """Training FLOPs of `cells` cells, as if each were full and all predicted."""
    return train_flops(shape, padded_workload(seq_length, cells))


def executed_flops(shape: ModelShape, work: Workload) -> int:
    """Training FLOPs of `work`, the numerator of MFU."""
    return train_flops(shape, work)


def num_parameters(shape: ModelShape, seq_length: int) -> int:
    """Parameters of the whole model with learned positions up to `seq_length`. The tied output
    projection counts once; the norm outside the layers follows the last one or the embedding."""
    hidden, vocabulary = shape.hidden_size, shape.vocabulary_size
    norm = 2 * hidden
    embedding = (vocabulary + seq_length) * hidden
    head = _dense(hidden, hidden) + norm + vocabulary
    return embedding + shape.num_layers * _layer_parameters(shape) + norm + head


def _layer_parameters(shape: ModelShape) -> int:
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    attention = _dense(hidden, 3 * hidden) + _dense(hidden, hidden)
    feed_forward = _dense(hidden, ffn) + _dense(ffn, hidden)
    return attention + feed_forward + 2 * (2 * hidden)


def _dense(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs
