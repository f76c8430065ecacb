"""Model card: README.md of an exported model, from its checkpoint."""

from __future__ import annotations

from typing import Any

from geneformer_mcore.checkpoint.record import Record, settings_in
from geneformer_mcore.tokenizer.vocabulary import Vocabulary

_TRAINING = (
    ("learning rate", "optim", "lr"),
    ("global batch, cells", "train", "global_batch_size"),
    ("precision", "train", "precision"),
    ("mask probability", "data", "mask_probability"),
    ("shown as [MASK], random, unchanged", "data", "mask_fractions"),
    ("seed", "train", "seed"),
)


def text(
    record: Record,
    config: dict[str, Any],
    vocabulary: Vocabulary,
    num_parameters: int,
    origin: dict[str, Any] | None,
) -> str:
    """The card. config: content of config.json; origin: of the weights that the run started with,
    if any."""
    genes = [
        ("tokens", f"{config['vocab_size']:,}"),
        ("genes", f"{len(vocabulary.feature_ids):,}"),
        ("checksum", f"`{vocabulary.checksum}`"),
    ]
    tables = {
        "model": _model(config, num_parameters),
        "training": _training(record, origin),
        "vocabulary": genes,
    }
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: fill-mask",
        "tags: [single-cell, genomics, geneformer]",
        "---",
        "",
        f"# Geneformer, {config['num_hidden_layers']} layers x {config['hidden_size']}",
        "",
        "A BERT over the genes of a cell, ranked by expression, written by geneformer_mcore.",
        "",
    ]
    for title, rows in tables.items():
        lines += [f"| {title} |  |", "| --- | --- |"]
        lines += [*(f"| {name} | {value} |" for name, value in rows), ""]
    return "\n".join([*lines, _USAGE, *([] if config["model_type"] == "bert" else [_PRE_NORM])])


def _model(config: dict[str, Any], num_parameters: int) -> list[tuple[str, Any]]:
    norm = "post-LN" if config["model_type"] == "bert" else "pre-LN, final norm, none on embeddings"
    return [
        ("class", config["architectures"][0]),
        ("layers x width, heads", f"{config['num_hidden_layers']} x {config['hidden_size']}, "
                                  f"{config['num_attention_heads']}"),
        ("feed-forward width", config["intermediate_size"]),
        ("activation", config["hidden_act"]),
        ("normalisation", norm),
        ("longest cell, tokens", f"{config['max_position_embeddings']:,}"),
        ("parameters", f"{num_parameters:,}"),
    ]  # fmt: skip


def _training(record: Record, origin: dict[str, Any] | None) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    if origin is not None:
        rows.append(("began with", f"{origin.get('from')}: {origin.get('name')}"))
        rows.append(("sha256 of its weights", f"`{origin.get('sha256')}`"))
        if origin.get("new_tokens"):
            rows.append(("tokens that it did not have", ", ".join(map(str, origin["new_tokens"]))))
    rows += [("steps made", f"{record.step:,}"), ("cells seen", f"{record.cells_seen:,}")]
    if record.is_converted:
        return rows
    loss = "not measured at this step" if record.val_loss is None else f"{record.val_loss:.4f}"
    rows.append(("validation loss, nats per masked gene", loss))
    settings = settings_in(record.identity.config)
    rows += [(title, settings.get(section, {}).get(key, "?")) for title, section, key in _TRAINING]
    rows.append(("content hash of its cells", f"`{record.identity.content}`"))
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return [*rows, ("written with", versions)]


_USAGE = """\
```python
from transformers import AutoModelForMaskedLM, AutoTokenizer
model = AutoModelForMaskedLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
logits = model(**tokenizer("ENSG... ENSG...", return_tensors="pt")).logits
```

The tokenizer takes gene ids with blanks between, in the order that the model is to see:
highest first by counts / total x 10,000 / median of the gene, ties by token id.
`vocabulary.json` holds genes and medians, `token_dictionary.json` the ids.
Padding is masked by `attention_mask`.
"""
_PRE_NORM = """\
It normalises before each block, which `BertForMaskedLM` does not: the class for that
is `MegatronBertForMaskedLM`, part of transformers, so no code of this folder is run.
"""
