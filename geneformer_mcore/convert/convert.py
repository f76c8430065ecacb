"""Conversion of models: Hugging Face and BioNeMo to a run, a run to Hugging Face.

    HF folder     -> names (hf_keys), rows (token_rows)  ->  run directory, step 0
    state dict    -> names (bionemo_keys)                ->  run directory, step 0
    run or step   -> whole weights -> rows, names        ->  HF folder + model card

Tensors are renamed, sliced, stacked and, for token types, added: no number is rounded.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from geneformer_mcore.checkpoint import weights_reader
from geneformer_mcore.checkpoint.record import ORIGIN, Record, settings_in
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
from geneformer_mcore.convert.hf_keys import OUTPUT_BIAS, WORDS
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
    """Write the run directory `out` of the model in `folder`. Returns the lines to print.

    The vocabulary is the given one, or made from the model's dictionaries, or in the folder.
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
    weights_reader.check_finite(theirs, hf_folder.weights_file(folder))
    ours[WORDS] = token_rows.to_ours(ours[WORDS], rows)
    ours[OUTPUT_BIAS] = token_rows.to_ours(ours[OUTPUT_BIAS], rows, token_rows.NEVER)
    new = [SPECIAL_TOKENS[number] for number in (rows < 0).nonzero().flatten().tolist()]
    origin = {
        "from": "Hugging Face",
        "name": folder.resolve().name,
        "sha256": file_digest(hf_folder.weights_file(folder)),
        "new_tokens": new,
    }
    config = _config(described.model, described.num_positions)
    files: dict[str, dict] = {ORIGIN: origin, converted_run.TOKENS: dict(tokens)}
    converted_run.write(out, config, vocabulary, ours, files)
    return [*_summary(out, config, vocabulary), *_about_new_tokens(new)]


def from_bionemo(
    path: Path, out: Path, vocabulary_path: Path, activation: Activation, heads: int = 0
) -> list[str]:
    """Write the run directory `out` of a BioNeMo state dict. heads: 0 takes one per 64 of the
    width. Returns the lines to print."""
    check_free(out)
    vocabulary = Vocabulary.load(vocabulary_path)
    theirs = hf_folder.read_state_dict(path)
    ours, model = bionemo_keys.from_bionemo(theirs, vocabulary.size, activation, heads)
    weights_reader.check_finite(ours, path)
    config = _config(model, len(ours[hf_keys.POSITIONS]))
    origin = {"from": "BioNeMo", "name": path.name, "sha256": file_digest(path)}
    converted_run.write(out, config, vocabulary, ours, {ORIGIN: origin})
    return [
        *_summary(out, config, vocabulary),
        f"the weights do not say it: {model.num_attention_heads} heads, activation "
        f"{activation.value} (--heads, --activation)",
    ]


def to_hf(
    path: Path, out: Path, vocabulary_path: Path | None = None, tokens_path: Path | None = None
) -> list[str]:
    """Write the folder `out` for Hugging Face's transformers, of the step folder `path` or the
    latest checkpoint of the run `path`. Returns the lines to print.

    tokens_path: {name: id} that orders the rows, such as Geneformer's own dictionary
    Raises CheckpointError or DataError where checkpoint or vocabulary is missing or damaged.
    """
    check_free(out)
    step = weights_reader.step_of(path)
    record = Record.load(step)
    config = pretrained.located(_recorded(record), step)
    vocabulary = pretrained.find_vocabulary(record, config, step, vocabulary_path)
    weights = lora.folded(weights_reader.read_weights(step), config.finetune)
    genes = vocabulary.feature_ids
    tokens = token_rows.dictionary_by_size(vocabulary.size, genes)
    if tokens_path is not None:
        tokens = read_dictionary(tokens_path)
    rows = token_rows.their_rows(tokens, genes, len(tokens))
    for name in (WORDS, OUTPUT_BIAS):
        weights[name] = token_rows.to_theirs(weights[name], rows)
    num_positions = len(weights[hf_keys.POSITIONS])
    described = hf_folder.config_json(config.model, len(tokens), num_positions, tokens)
    theirs = hf_keys.to_hf(weights, config.model)
    origin_path = step.parent.parent / ORIGIN
    origin = hf_folder.read_json(origin_path) if origin_path.is_file() else None
    num_parameters = sum(each.numel() for each in theirs.values())
    with whole_folder(out) as partial:
        packed = {name: tensor.contiguous() for name, tensor in theirs.items()}
        save_file(packed, partial / hf_folder.WEIGHTS, metadata={"format": "pt"})
        for name, content in {
            hf_folder.CONFIG: described,
            hf_folder.TOKENS: tokens,
            "tokenizer.json": hf_folder.tokenizer_json(tokens),
            "tokenizer_config.json": hf_folder.tokenizer_config(tokens, num_positions),
        }.items():
            (partial / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        vocabulary.save(partial / hf_folder.VOCABULARY)
        card = model_card.text(record, described, vocabulary, num_parameters, origin)
        (partial / "README.md").write_text(card, encoding="utf-8")
    lines = [
        f"{out}: {described['architectures'][0]} of step {record.step}, {len(tokens):,} tokens, "
        f"{num_positions:,} positions"
    ]
    if record.identity.task:
        lines.append(
            "it was fine-tuned: its encoder is there as it became, corrections of low rank added "
            "to the matrices, and its classifier is left out; the head for genes was not trained, "
            "but its matrix is the word embedding as that became"
        )
    return lines


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
            f"{hf_folder.VOCABULARY} next to them. Remedy: give the model's dictionaries by "
            "`tokens=` and `medians=`, or a vocabulary of ours by `vocabulary=`."
        )
    vocabulary = Vocabulary.load(path)
    own_tokens = folder / hf_folder.TOKENS
    if tokens_path is not None or own_tokens.is_file():
        return vocabulary, read_dictionary(tokens_path or own_tokens)
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
    """Settings of a checkpoint that its weights depend on; the others are defaults."""
    sections = settings_in(record.identity.config)
    data, run = sections.get("data", {}), sections.get("run", {})
    settings = {"data.seq_length": data.get("seq_length")}
    for section in ("model", "finetune"):
        settings |= {f"{section}.{key}": each for key, each in sections.get(section, {}).items()}
    config, _ = load(None, [f"{k}={json.dumps(each, default=str)}" for k, each in settings.items()])
    config.run.dir, config.data.store = str(run.get("dir") or ""), str(data.get("store") or "")
    config.data.vocabulary = str(data.get("vocabulary") or "")
    return config


def _config(model: ModelConfig, num_positions: int) -> Config:
    config = Config(model=model)
    config.data.seq_length = num_positions
    config.train.precision = Precision.fp32
    return config


def _summary(out: Path, config: Config, vocabulary: Vocabulary) -> list[str]:
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


def _about_new_tokens(new: list[str]) -> list[str]:
    cls = (
        ". Our cells begin with [CLS], which takes the first position: the model has never seen it "
        "there, so train on before judging it by our cells"
    )
    line = (
        f"tokens that the model did not have: {', '.join(new)}. Their embeddings are 0, and their "
        f"probability is 0{cls if '[CLS]' in new else ''}"
    )
    return [line] if new else []
