"""Rows of another model's vocabulary, as tokens of ours.

    {name: their id} + our genes  ->  their row of each of our tokens, -1: they have none
                                  ->  tables of theirs in our order, and ours in theirs

Hugging Face's Geneformer V1 has <pad> 0, <mask> 1 and its genes from 2 on, so our id is theirs + 3;
V2 has <pad> 0, <mask> 1, <cls> 2, <eos> 3 and its genes from 4 on. Ours has five specials.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from geneformer_mcore.errors import DataError
from geneformer_mcore.types import CLS, MASK, NUM_SPECIALS, PAD, SEP, SPECIAL_TOKENS, UKW

NEVER = -10_000.0
"""Output bias of a token that the other model does not have: its probability is exactly 0 in fp32,
so that losses stay theirs."""

_OUR_ID = {
    **{name: number for number, name in enumerate(SPECIAL_TOKENS)},
    "<pad>": PAD,
    "<mask>": MASK,
    "<cls>": CLS,
    "<eos>": SEP,
    "<sep>": SEP,
    "<unk>": UKW,
}
"""Our ids of the special tokens in published dictionaries. V2 ends cells with <eos>, ours do
not."""

LAYOUTS: dict[str, tuple[str, ...]] = {
    "Geneformer V1": ("<pad>", "<mask>"),
    "Geneformer V2": ("<pad>", "<mask>", "<cls>", "<eos>"),
    "ours": SPECIAL_TOKENS,
}
"""Special tokens before the sorted genes in vocabularies without a dictionary."""


def dictionary_by_size(num_tokens: int, genes: Sequence[str]) -> dict[str, int]:
    """{name: their id} of the layout with `num_tokens` tokens, genes included. Raises DataError
    where there is none."""
    for specials in LAYOUTS.values():
        if len(specials) + len(genes) == num_tokens:
            return {name: number for number, name in enumerate([*specials, *genes])}
    known = ", ".join(
        f"{name}: {len(specials) + len(genes):,}" for name, specials in LAYOUTS.items()
    )
    raise DataError(
        f"the model has {num_tokens:,} tokens, and with the vocabulary's {len(genes):,} genes it "
        f"should have ({known}). Remedy: give the vocabulary that the model was trained with, or "
        "its own dictionaries by `tokens=` and `medians=`."
    )


def their_rows(tokens: Mapping[str, int], genes: Sequence[str], num_tokens: int) -> torch.Tensor:
    """int64 [our tokens]: the row of each, -1 for specials that they do not have.

    tokens: {name: their id};  genes: ours, in our order;  num_tokens: number of their rows
    Raises DataError unless `tokens` names every row once and has the same genes.
    """
    ids = list(tokens.values())
    are_numbers = len(ids) == num_tokens and all(type(each) is int for each in ids)
    if not are_numbers or sorted(ids) != list(range(num_tokens)):
        raise DataError(
            f"the token dictionary must give each of the {num_tokens:,} rows of the model one "
            f"name, and has {len(ids):,} names. Remedy: give the dictionary of the very model."
        )
    rows = torch.full((NUM_SPECIALS + len(genes),), -1, dtype=torch.int64)
    for name in filter(_OUR_ID.__contains__, tokens):
        if rows[_OUR_ID[name]] >= 0:
            raise DataError(
                f"the token dictionary has two names for our {SPECIAL_TOKENS[_OUR_ID[name]]}, one "
                f"of them {name}. Remedy: leave one of them out of both dictionary and weights."
            )
        rows[_OUR_ID[name]] = tokens[name]
    theirs = set(genes_of(tokens))
    missing, strange = sorted(set(genes) - theirs), sorted(theirs - set(genes))
    if missing or strange:
        example = (missing or strange)[0]
        raise DataError(
            f"dictionary and vocabulary must have the same genes: the dictionary lacks "
            f"{len(missing):,} of the vocabulary's {len(genes):,} and has {len(strange):,} others, "
            f"{example} for instance. Remedy: give dictionaries of the very model."
        )
    rows[NUM_SPECIALS:] = torch.tensor([tokens[gene] for gene in genes])
    return rows


def genes_of(tokens: Mapping[str, int]) -> list[str]:
    """Names in a token dictionary but special tokens."""
    return [name for name in tokens if name not in _OUR_ID]


def to_ours(theirs: torch.Tensor, rows: torch.Tensor, new: float = 0.0) -> torch.Tensor:
    """[our tokens, ...] of [their tokens, ...]; missing rows are filled with `new`."""
    ours = theirs[rows.clamp(min=0)]
    ours[rows < 0] = new
    return ours


def to_theirs(ours: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[their tokens, ...] of [our tokens or more, ...], without padding and tokens that they do not
    have."""
    known = (rows >= 0).nonzero().squeeze(1)
    return ours[known[rows[known].argsort()]]
