"""What the tests of conversions do in processes of their own: convert, load, compute logits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from geneformer_mcore.checkpoint import state, weights_reader
from geneformer_mcore.config import Config, load
from geneformer_mcore.convert import convert, converted_run
from geneformer_mcore.data.collate import pieces
from geneformer_mcore.distributed import groups
from geneformer_mcore.model import geneformer, megatron_config
from geneformer_mcore.model.init import sharded_parameters, slice_of
from geneformer_mcore.optim import optimizer as optim
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import PAD, Batch
from tests.distributed import toy

V1_SPECIALS = ("<pad>", "<mask>")
V2_SPECIALS = ("<pad>", "<mask>", "<cls>", "<eos>")


def vocabulary_of(genes: int) -> Vocabulary:
    """So many made-up genes."""
    return Vocabulary.from_medians({f"ENSG{number:011d}": 1.0 + number for number in range(genes)})


def write_hf(folder: Path, weights: dict[str, torch.Tensor], heads: int, **changes: object) -> None:
    """A folder of a BertForMaskedLM as others write it."""
    tokens, hidden = weights["bert.embeddings.word_embeddings.weight"].shape
    layers = sum(name.endswith("self.query.weight") for name in weights)
    config = {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "vocab_size": tokens,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": len(weights["bert.encoder.layer.0.intermediate.dense.weight"]),
        "hidden_act": "relu",
        "hidden_dropout_prob": 0.02,
        "attention_probs_dropout_prob": 0.02,
        "max_position_embeddings": len(weights["bert.embeddings.position_embeddings.weight"]),
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        **changes,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")


def write_tokens(path: Path, specials: tuple[str, ...], vocabulary: Vocabulary) -> dict[str, int]:
    """A published token dictionary."""
    tokens = {name: number for number, name in enumerate([*specials, *vocabulary.feature_ids])}
    path.write_text(json.dumps(tokens))
    return tokens


def lone() -> None:
    """Leaves the group that run_ranks made: a conversion makes its own."""
    if dist.is_initialized():
        dist.destroy_process_group()


def from_hf(folder: str, out: str, vocabulary: str, tokens: str = "") -> list[str]:
    """The conversion, in a process that is alone."""
    lone()
    return convert.from_hf(
        Path(folder),
        Path(out),
        Path(vocabulary) if vocabulary else None,
        Path(tokens) if tokens else None,
    )


def all_from_hf(calls: list[tuple[str, ...]]) -> None:
    """Several of them."""
    for arguments in calls:
        from_hf(*arguments)


def all_from_bionemo(calls: list[tuple[str, str, str]], heads: int) -> None:
    """The same of BioNeMo state dicts."""
    for arguments in calls:
        from_bionemo(*arguments, heads)


def from_bionemo(path: str, out: str, vocabulary: str, heads: int) -> list[str]:
    """The same of a BioNeMo state dict."""
    lone()
    activation = convert.Activation.gelu
    return convert.from_bionemo(Path(path), Path(out), Path(vocabulary), activation, heads)


def loaded(run: str, *overrides: str) -> tuple[Config, optim.Trainable]:
    """A run's newest checkpoint as training loads it, under the layout of `overrides`."""
    config, _ = load(Path(run) / converted_run.CONFIG, [*overrides, "model.attention_dropout=0"])
    topology = groups.build_groups(config.parallel)
    groups.seed_dropout(config.train.seed, topology)
    core = megatron_config.transformer_config(
        config.model, config.parallel, config.train.precision, toy.CPU
    )
    size = Vocabulary.load(Path(run) / converted_run.VOCABULARY).size
    stages = geneformer.build(config.model, core, toy.CPU, size, config.data.seq_length)
    trainable = optim.wrap(stages, config.optim, config.parallel)
    state.load(trainable, weights_reader.step_of(Path(run)), None)
    return config, trainable


def logits(run: str, cells: list[np.ndarray], packed: bool) -> list[np.ndarray]:
    """fp32 [n, tokens] of every position of every cell (our ids), padded or packed."""
    config, trainable = loaded(run, f"data.packing={str(packed).lower()}")
    (stage,) = trainable.stages
    stage.eval()
    batch, rows = (_packed if packed else _padded)(cells)
    size = Vocabulary.load(Path(run) / converted_run.VOCABULARY).size
    with torch.no_grad():
        found = stage.logits(stage.encode(batch), batch.selected_M)[:, :size]
    assert config.data.packing == packed
    return [part.numpy() for part in found.split(rows)]


def all_logits(
    runs: list[str], cells: list[np.ndarray], packed: tuple[bool, ...] = (False, True)
) -> list[list[np.ndarray]]:
    """Of each run: padded, then packed."""
    found = []
    for run in runs:
        for each in packed:
            found.append(logits(run, cells, each))
            groups.stop(stay=True)
    return found


def _padded(cells: list[np.ndarray]) -> tuple[Batch, list[int]]:
    lengths = [len(cell) for cell in cells]
    width = max(lengths) + 3
    tokens_BS = torch.full((len(cells), width), PAD, dtype=torch.int32)
    for row, cell in enumerate(cells):
        tokens_BS[row, : len(cell)] = torch.from_numpy(cell)
    places = [row * width + torch.arange(length) for row, length in enumerate(lengths)]
    return _batch(tokens_BS, lengths, torch.cat(places)), lengths


def _packed(cells: list[np.ndarray]) -> tuple[Batch, list[int]]:
    lengths = [len(cell) for cell in cells]
    used = sum(lengths)
    tokens_BS = torch.full((1, used + 5), PAD, dtype=torch.int32)
    tokens_BS[0, :used] = torch.from_numpy(np.concatenate(cells))
    bounds, longest = pieces(np.array(lengths), used + 5)
    batch = _batch(tokens_BS, lengths, torch.arange(used), torch.from_numpy(bounds), longest)
    return batch, lengths


def _batch(
    tokens_BS: torch.Tensor,
    lengths: list[int],
    selected_M: torch.Tensor,
    bounds: torch.Tensor | None = None,
    longest: int = 0,
) -> Batch:
    keys_N = np.arange(len(lengths), dtype=np.uint64)
    labels_M = torch.zeros_like(selected_M)
    lengths_N = torch.tensor(lengths)
    return Batch(tokens_BS, lengths_N, selected_M, labels_M, keys_N, bounds, longest)


def slices_that_differ_in(run: str, layouts: list[tuple[str, ...]]) -> list[list[str]]:
    """The same in several layouts of the ranks that are here."""
    wrong = []
    for overrides in layouts:
        wrong.append(slices_that_differ(run, *overrides))
        groups.stop(stay=True)
    return wrong


def slices_that_differ(run: str, *overrides: str) -> list[str]:
    """Names of parameters that are not what the checkpoint holds, and of moments that are not 0."""
    _, trainable = loaded(run, *overrides)
    weights = weights_reader.read_weights(weights_reader.step_of(Path(run)))
    seen, wrong = 0, []
    for stage in trainable.stages:
        for entry in sharded_parameters(stage):
            seen += 1
            wanted = slice_of(entry, weights[entry.key])
            if not torch.equal(entry.data.float(), wanted.to(entry.data.dtype).float()):
                wrong.append(entry.key)
    assert seen > 4
    moments = [
        moment
        for adam in optim._torch_adams(trainable.optimizer)
        for states in adam.state.values()
        for name, moment in states.items()
        if name.startswith("exp_avg") and moment.any()
    ]
    return wrong + ["a moment"] * len(moments)


def all_trained(runs: dict[str, tuple[str, ...]]) -> None:
    """{folder: settings}: several of the next."""
    for run, overrides in runs.items():
        trained(run, *overrides)
        groups.stop(stay=True)


def trained(run: str, *overrides: str) -> None:
    """A run folder of a toy run that has made three steps."""
    toy_run = toy.make(*overrides)
    toy_run.steps(3)
    vocabulary = vocabulary_of(toy.VOCABULARY - 5)
    root = Path(run) / "checkpoints"
    staging = converted_run.checkpoints.make_staging(root, 3)
    text = converted_run.dump(toy_run.config)
    state.save(toy_run.trainable, staging, 0)
    convert.Record(
        step=3,
        cells_seen=48,
        meters={},
        identity=converted_run.Identity(text, {}, vocabulary.checksum, "c0ffee"),
        layout={},
        versions={"torch": "2"},
        guard={},
        val_loss=6.25,
    ).save(staging)
    converted_run.checkpoints.commit(staging, root, 3)
    vocabulary.save(Path(run) / converted_run.VOCABULARY)
    (Path(run) / converted_run.CONFIG).write_text(text)
