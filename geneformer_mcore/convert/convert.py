"""Models of others as runs of ours, and runs of ours as models of others.

    HF folder     -> names (model.hf_keys), rows (model.token_rows)  ->  run folder, step 0
    state dict    -> names (model.bionemo_keys)                      ->  run folder, step 0
    run or step   -> whole weights -> rows, names                    ->  HF folder + model card

Every number stays the one it was: tensors are renamed, cut, stacked and, for token types, added.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml
from safetensors.torch import save_file

from geneformer_mcore.checkpoint import weights_reader
from geneformer_mcore.checkpoint.record import ORIGIN, Record
from geneformer_mcore.config import Config, load
from geneformer_mcore.config.sections import Activation, ModelConfig, Precision
from geneformer_mcore.convert import (
    bionemo_keys,
    converted_run,
    hf_folder,
    hf_keys,
    model_card,
    token_rows,
)
from geneformer_mcore.convert.hf_keys import OUTPUT_BIAS, WORDS, Weights
from geneformer_mcore.errors import DataError
from geneformer_mcore.inference import pretrained
from geneformer_mcore.io.files import check_free, file_digest, whole_folder
from geneformer_mcore.model import lora
from geneformer_mcore.tokenizer.dictionary import import_dictionary, read_dictionary
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import SPECIAL_TOKENS


def from_hf(
    folder: Path,
    out: Path,
    vocabulary_path: Path | None = None,
    tokens_path: Path | None = None,
    medians_path: Path | None = None,
) -> list[str]:
    """Writes the run folder `out` of the model in `folder`. Gives lines to tell the user.

    The vocabulary is that of the file, or made of the model's dictionaries, or lies in the folder.
    """
    check_free(out)
    described = hf_folder.read_config(folder)
    vocabulary, tokens = _vocabulary(
        folder, described.num_tokens, vocabulary_path, tokens_path, medians_path
    )
    rows = token_rows.their_rows(tokens, vocabulary.feature_ids, described.num_tokens)
    theirs = hf_folder.read_weights(folder)
    ours = dict(
        hf_keys.from_hf(theirs, described.model, described.num_tokens, described.num_positions)
    )
    ours[WORDS] = token_rows.to_ours(ours[WORDS], rows)
    ours[OUTPUT_BIAS] = token_rows.to_ours(ours[OUTPUT_BIAS], rows, token_rows.NEVER)
    new = [SPECIAL_TOKENS[number] for number in (rows < 0).nonzero().flatten().tolist()]
    origin = {
        "from": "Hugging Face",
        "name": folder.resolve().name,
        "sha256": file_digest(
            next(
                folder / f for f in (hf_folder.WEIGHTS, hf_folder.PICKLED) if (folder / f).exists()
            )
        ),
        "new_tokens": new,
    }
    config = _config(described.model, described.num_positions)
    files: dict[str, dict] = {ORIGIN: origin, converted_run.TOKENS: dict(tokens)}
    converted_run.write(out, config, vocabulary, ours, files)
    return [*_told(out, config, vocabulary), *_of_new_tokens(new)]


def from_bionemo(
    path: Path, out: Path, vocabulary_path: Path, activation: Activation, heads: int = 0
) -> list[str]:
    """Writes the run folder `out` of a BioNeMo state dict. heads: 0 takes one per 64 of the width.
    Gives lines to tell the user."""
    check_free(out)
    vocabulary = Vocabulary.load(vocabulary_path)
    theirs = hf_folder.read_state_dict(path)
    ours, model = bionemo_keys.from_bionemo(theirs, vocabulary.size, activation, heads)
    config = _config(model, len(ours[hf_keys.POSITIONS]))
    origin = {"from": "BioNeMo", "name": path.name, "sha256": file_digest(path)}
    converted_run.write(out, config, vocabulary, ours, {ORIGIN: origin})
    return [
        *_told(out, config, vocabulary),
        f"the weights do not say it: {model.num_attention_heads} heads, activation "
        f"{activation.value} (--heads, --activation)",
    ]


@dataclass(frozen=True)
class SourceModel:
    """A checkpoint of ours. weights: vocabulary rows without padding."""

    step: Path
    record: Record
    model: ModelConfig
    vocabulary: Vocabulary
    weights: Weights


def open_source(path: Path, vocabulary_path: Path | None = None) -> SourceModel:
    """The step folder `path`, or the newest one of the run `path`, with its vocabulary.

    Raises CheckpointError or DataError where one of the two is not there, damaged, or another's.
    """
    step = weights_reader.step_of(path)
    record = Record.load(step)
    config = _recorded(record)
    vocabulary = pretrained.find_vocabulary(record, config, step, vocabulary_path)
    weights = lora.folded(weights_reader.read_weights(step), config.finetune)
    for name in (WORDS, OUTPUT_BIAS):
        weights[name] = weights[name][: vocabulary.size]
    return SourceModel(step, record, config.model, vocabulary, weights)


def to_hf(
    path: Path, out: Path, vocabulary_path: Path | None = None, tokens_path: Path | None = None
) -> list[str]:
    """Writes the folder `out` for Hugging Face's transformers. Gives lines to tell the user.

    tokens_path: {name: id} by which rows are to be ordered, such as Geneformer's own dictionary.
    """
    check_free(out)
    source = open_source(path, vocabulary_path)
    genes = source.vocabulary.feature_ids
    tokens = token_rows.dictionary_by_size(source.vocabulary.size, genes)
    if tokens_path is not None:
        tokens = read_dictionary(tokens_path)
    rows = token_rows.their_rows(tokens, genes, len(tokens))
    weights = dict(source.weights)
    for name in (WORDS, OUTPUT_BIAS):
        weights[name] = token_rows.to_theirs(weights[name], rows)
    num_positions = len(weights[hf_keys.POSITIONS])
    described = hf_folder.config_json(source.model, len(tokens), num_positions, tokens)
    theirs = hf_keys.to_hf(weights, source.model)
    with whole_folder(out) as partial:
        packed = {name: tensor.contiguous() for name, tensor in theirs.items()}
        save_file(packed, partial / hf_folder.WEIGHTS, metadata={"format": "pt"})
        for name, content in {
            hf_folder.CONFIG: described,
            hf_folder.TOKENS: tokens,
            "tokenizer.json": hf_folder.tokenizer_json(tokens),
            "tokenizer_config.json": hf_folder.tokenizer_config(tokens, num_positions),
        }.items():
            (partial / name).write_text(json.dumps(content, indent=1) + "\n")
        source.vocabulary.save(partial / hf_folder.VOCABULARY)
        (partial / "README.md").write_text(_card(source, described, theirs))
    return [
        f"{out}: {described['architectures'][0]} of step {source.record.step}, "
        f"{len(tokens):,} tokens, {num_positions:,} positions",
        *_of_a_classifier(source.record),
    ]


def _of_a_classifier(record: Record) -> list[str]:
    if not record.identity.task:
        return []
    return [
        "it was fine-tuned: its encoder is there as it became, corrections of low rank added to "
        "the matrices, and its classifier is left out; the head for genes was not trained, but "
        "its matrix is the word embedding as that became"
    ]


def _card(source: SourceModel, described: dict, theirs: Weights) -> str:
    run = source.step.parent.parent
    origin_path = run / ORIGIN
    return model_card.text(
        source.record,
        described,
        source.vocabulary,
        sum(each.numel() for each in theirs.values()),
        hf_folder.read_json(origin_path) if origin_path.is_file() else None,
    )


def _vocabulary(
    folder: Path,
    num_tokens: int,
    vocabulary_path: Path | None,
    tokens_path: Path | None,
    medians_path: Path | None,
) -> tuple[Vocabulary, dict[str, int]]:
    """(our vocabulary, their {name: id})."""
    if tokens_path is not None and medians_path is not None:
        tokens = read_dictionary(tokens_path)
        return _from_dictionaries(tokens, tokens_path, medians_path), tokens
    path = vocabulary_path or folder / hf_folder.VOCABULARY
    if vocabulary_path is None and not path.is_file():
        raise DataError(
            f"{folder}: weights do not say which gene a row is, and there is no "
            f"{hf_folder.VOCABULARY} beside them. Remedy: give the model's dictionaries by "
            "`tokens=` and `medians=`, or a vocabulary of ours by `vocabulary=`."
        )
    vocabulary = Vocabulary.load(path)
    beside = tokens_path or folder / hf_folder.TOKENS
    if tokens_path is not None or beside.is_file():
        return vocabulary, read_dictionary(beside)
    return vocabulary, token_rows.dictionary_by_size(num_tokens, vocabulary.feature_ids)


def _from_dictionaries(tokens: dict, tokens_path: Path, medians_path: Path) -> Vocabulary:
    genes = token_rows.genes_of(tokens)
    known = import_dictionary(medians_path)
    medians = dict(zip(known.feature_ids, known.medians, strict=True))
    missing = [gene for gene in genes if gene not in medians]
    if missing:
        raise DataError(
            f"{tokens_path}: {len(missing):,} of {len(genes):,} genes have no median in "
            f"{medians_path}, the first {missing[0]}. Remedy: give two files of one release."
        )
    return Vocabulary.from_medians({gene: medians[gene] for gene in genes})


def _recorded(record: Record) -> Config:
    """The settings of a checkpoint that its weights depend on; the others are defaults."""
    text = yaml.safe_load(record.identity.config)
    settings = [
        f"{section}.{key}={json.dumps(value)}"
        for section in ("model", "finetune")
        for key, value in text.get(section, {}).items()
    ]
    config, _ = load(None, [*settings, f"data.seq_length={text['data']['seq_length']}"])
    config.data.store = str(text["data"]["store"])
    config.data.vocabulary = str(text["data"].get("vocabulary") or "")
    return config


def _config(model: ModelConfig, num_positions: int) -> Config:
    config = Config(model=model)
    config.data.seq_length = num_positions
    config.train.precision = Precision.fp32
    return config


def _told(out: Path, config: Config, vocabulary: Vocabulary) -> list[str]:
    model = config.model
    return [
        f"{out}: {model.num_layers} layers x {model.hidden_size}, {model.norm.value}-LN, "
        f"{model.activation.value}, {vocabulary.size:,} tokens, {config.data.seq_length:,} "
        "positions",
        "it is a run that has made no step, with moments of 0. To train on: a store built with "
        f"--vocabulary {out / converted_run.VOCABULARY}, then",
        f"  torchrun launch/pretrain.py --config {out / converted_run.CONFIG} run.dir={out} "
        "data.store=STORE train.steps=... optim.lr=...",
    ]


def _of_new_tokens(new: list[str]) -> list[str]:
    if not new:
        return []
    line = (
        f"tokens that the model did not have: {', '.join(new)}. Their embeddings are 0, and their "
        "probability is 0"
    )
    if "[CLS]" in new:
        line += (
            ". Our cells begin with [CLS], which takes the first position: the model has never "
            "seen it there, so train on before judging it by our cells"
        )
    return [line]
