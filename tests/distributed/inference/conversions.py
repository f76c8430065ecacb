"""What the tests of conversions do in processes of their own: convert, load, compute logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from geneformer_mcore.checkpoint import state, weights_reader
from geneformer_mcore.config import load
from geneformer_mcore.convert import converted_run
from geneformer_mcore.data.collate import pieces
from geneformer_mcore.distributed import groups
from geneformer_mcore.model import geneformer, megatron_config
from geneformer_mcore.optim import optimizer as optim
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import NUM_SPECIALS, PAD, Batch
from tests.distributed import toy
from tests.distributed.inference import trained
from tests.support.small_cells import vocabulary_of

V1_SPECIALS = ("<pad>", "<mask>")
V2_SPECIALS = ("<pad>", "<mask>", "<cls>", "<eos>")


def write_hf(folder: Path, weights: dict[str, torch.Tensor], heads: int, **changes: object) -> None:
    """A folder of a BertForMaskedLM as others write it."""
    tokens, hidden = weights["bert.embeddings.word_embeddings.weight"].shape
    config = {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "vocab_size": tokens,
        "hidden_size": hidden,
        "num_hidden_layers": sum(name.endswith("self.query.bias") for name in weights),
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


def convert_all(convert: Callable, calls: list[tuple]) -> None:
    """Conversions, one after the other, without the group that run_ranks made: they make their
    own."""
    dist.destroy_process_group()
    for arguments in calls:
        convert(*arguments)


def loaded(run: Path, *overrides: str) -> optim.Trainable:
    """A run's newest checkpoint as training loads it, under the layout of `overrides`."""
    groups.stop(stay=True)
    config, _ = load(run / converted_run.CONFIG, [*overrides, "model.attention_dropout=0"])
    topology = groups.build_groups(config.parallel)
    groups.seed_dropout(config.train.seed, topology)
    core = megatron_config.transformer_config(
        config.model, config.parallel, config.train.precision, toy.CPU
    )
    size = Vocabulary.load(run / converted_run.VOCABULARY).size
    stages = geneformer.build(config.model, core, toy.CPU, size, config.data.seq_length)
    trainable = optim.wrap(stages, config.optim, config.parallel)
    state.load(trainable, weights_reader.step_of(run), None)
    return trainable


def all_logits(
    runs: list[Path], cells: list[np.ndarray], packed: tuple[bool, ...] = (False, True)
) -> list[list[np.ndarray]]:
    """fp32 [n, tokens] of all positions of every cell (our ids), of each run: padded, packed."""
    return [_logits(run, cells, each) for run in runs for each in packed]


def _logits(run: Path, cells: list[np.ndarray], packed: bool) -> list[np.ndarray]:
    (stage,) = loaded(run, f"data.packing={str(packed).lower()}").stages
    stage.eval()
    batch = batch_of(cells, packed)
    size = Vocabulary.load(run / converted_run.VOCABULARY).size
    with torch.no_grad():
        found = stage.logits(stage.encode(batch), batch.selected_M)[:, :size]
    return [part.numpy() for part in found.split([len(cell) for cell in cells])]


def batch_of(cells: list[np.ndarray], packed: bool) -> Batch:
    """All of them, with some padding, and every position selected."""
    lengths_N = np.array([len(cell) for cell in cells])
    rows = [np.concatenate(cells)] if packed else cells
    width = max(len(row) for row in rows) + 3
    padded = [np.pad(row, (0, width - len(row)), constant_values=PAD) for row in rows]
    tokens_BS = torch.from_numpy(np.stack(padded).astype(np.int32))
    selected_M = (tokens_BS.flatten() != PAD).nonzero().flatten()
    bounds, longest = pieces(lengths_N, width) if packed else (None, 0)
    return Batch(
        tokens_BS,
        torch.from_numpy(lengths_N),
        selected_M,
        torch.zeros_like(selected_M),
        np.arange(len(cells), dtype=np.uint64),
        torch.from_numpy(bounds) if packed else None,
        longest,
    )


def train(run: Path, *overrides: str) -> None:
    made = toy.make(*overrides)
    made.steps(3)
    run.mkdir()
    text = converted_run.dump(made.config)
    (run / converted_run.CONFIG).write_text(text)
    trained.commit(made, run, text, vocabulary_of(toy.VOCABULARY - NUM_SPECIALS), 3, val_loss=6.25)
