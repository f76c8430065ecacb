"""Models from Hugging Face and back: the same logits, the same bits, and mistakes that are told.

`tests/support/plain_bert.py` computes what Hugging Face's classes compute, and transformers
itself does where it is installed.
"""

from __future__ import annotations

import importlib.util
import json
import pickle
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from geneformer_mcore.checkpoint import weights_reader
from geneformer_mcore.convert import convert, converted_run, hf_keys
from geneformer_mcore.errors import GeneformerError
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from tests.distributed import toy
from tests.distributed.inference import conversions
from tests.distributed.inference.conversions import V1_SPECIALS, V2_SPECIALS
from tests.distributed.ranks import in_turn, run_ranks
from tests.support import plain_bert
from tests.support.final_state import read_whole
from tests.support.small_cells import vocabulary_of

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
CELLS = (400, 57, 1)
GENES = 120
SMALL: dict[str, Any] = {"layers": 2, "hidden": 32, "ffn": 48, "positions": 40}
V1_SHAPE = {"layers": 2, "hidden": 64, "ffn": 128, "positions": 2048}
V2_SHAPE = {"layers": 2, "hidden": 96, "ffn": 384, "positions": 4096}
"""With the positions of the published ones, and few and narrow layers."""
TRAINED: dict[str, tuple[str, ...]] = {
    "pre": ("model.norm=pre", "model.activation=gelu"),
    "post": ("model.norm=post",),
    "bf16": ("model.norm=post", "train.precision=bf16"),
    "two": ("model.head_activation=gelu",),
}
"""Our runs -> settings."""


Exported = tuple[Path, Path, list[str]]
"""One of our runs, the Hugging Face folder made of it, and what was said of that."""


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    runs = {name: tmp_path_factory.mktemp("ours") / name for name in TRAINED}
    run_ranks(in_turn, 1, *((conversions.train, (runs[n], *more)) for n, more in TRAINED.items()))
    return runs


@pytest.fixture(scope="module")
def exported(
    ours: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Exported]:
    place = tmp_path_factory.mktemp("exported")
    return {
        name: (ours[name], place / name, convert.to_hf(ours[name], place / name))
        for name in ("pre", "post", "bf16")
    }


class Theirs(NamedTuple):
    """A model of theirs, its run folder, and int64 our_id [their tokens]."""

    folder: Path
    run: Path
    weights: dict[str, torch.Tensor]
    heads: int
    activation: str
    our_id: torch.Tensor


def made(
    place: Path,
    vocabulary: Vocabulary,
    specials: tuple[str, ...],
    shape: dict,
    heads: int,
    activation: str = "relu",
) -> Theirs:
    names = [*specials, *vocabulary.feature_ids]
    weights = plain_bert.random_weights(**shape, tokens=len(names))
    folder, run, file = place / "hf", place / "run", place / "vocabulary.json"
    conversions.write_hf(folder, weights, heads, hidden_act=activation)
    vocabulary.save(file)
    run_ranks(conversions.convert_all, 1, convert.from_hf, [(folder, run, file)])
    ours = vocabulary.token_ids | {"<cls>": 0, "<mask>": 1, "<pad>": 2, "<eos>": 3}
    our_id = torch.tensor([ours[name] for name in names])
    return Theirs(folder, run, weights, heads, activation, our_id)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Theirs]:
    return {
        specials: made(tmp_path_factory.mktemp("small"), vocabulary_of(GENES), specials, SMALL, 4)
        for specials in (V1_SPECIALS, V2_SPECIALS)
    }


def transformers_model(folder: Path) -> Any:
    """What transformers makes of a folder; fails if it misses or does not know a tensor."""
    with warnings.catch_warnings(action="ignore"):
        from transformers import AutoModelForMaskedLM

        model, told = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not told[kind], (kind, told[kind])
    return model.eval()


def transformers_logits(
    folder: Path, cells: list[np.ndarray], pad: int
) -> list[list[torch.Tensor]]:
    """Of cells (their ids) padded into one batch; nothing where transformers is not installed."""
    if not HAS_TRANSFORMERS:
        return []
    rows = [torch.from_numpy(cell).long() for cell in cells]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    with torch.no_grad():
        found = transformers_model(folder)(input_ids=padded, attention_mask=mask).logits
    return [[row[: len(cell)] for row, cell in zip(found, cells, strict=True)]]


def drawn_cells(tokens: int, first_gene: int, start: int | None, seed: int = 3) -> list[np.ndarray]:
    """Cells of different genes, with a token `start` in front if there is one; some are masked."""
    rng = np.random.default_rng(seed)
    cells = []
    for length in CELLS:
        cell = first_gene + rng.permutation(tokens - first_gene)[:length]
        cell[rng.random(len(cell)) < 0.1] = 1  # <mask> of both versions
        cells.append(np.concatenate([[start] if start is not None else [], cell]).astype(np.int32))
    return cells


def check_logits(
    theirs: Theirs, cells: list[np.ndarray], pad: int = 0, spread: float = 0.5
) -> None:
    """cells: their ids. Within 1e-5 of plain PyTorch in fp64, and of transformers."""
    ids = [torch.from_numpy(cell).long() for cell in cells]
    function = getattr(F, theirs.activation)
    wanted = [plain_bert.logits(theirs.weights, theirs.heads, cell, function) for cell in ids]
    assert min(float(each.std()) for each in wanted) > spread, "too alike to mean anything"
    ours = [theirs.our_id[cell].int().numpy() for cell in ids]
    (found,) = run_ranks(conversions.all_logits, 1, [theirs.run], ours)
    assert len(found) == 2, "padded and packed"
    for truth in (wanted, *transformers_logits(theirs.folder, cells, pad)):
        for each in found:
            for mine, their in zip(each, truth, strict=True):
                mine = torch.from_numpy(mine)[:, theirs.our_id].double()
                assert mine.shape == their.shape, "rows that pad the vocabulary are cut off"
                assert (mine - their).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("specials", "genes", "shape", "heads", "activation", "start"),
    [
        pytest.param(V1_SPECIALS, 2_500, V1_SHAPE, 4, "relu", None, id="v1"),
        pytest.param(V2_SPECIALS, 1_500, V2_SHAPE, 6, "relu", 2, id="v2"),
        pytest.param(V2_SPECIALS, 300, SMALL | {"positions": 512}, 4, "gelu", 2, id="gelu"),
    ],
)
def test_logits_are_those_of_hugging_face(
    specials: tuple, genes: int, shape: dict, heads: int, activation: str, start: int | None,
    tmp_path: Path,
) -> None:  # fmt: skip
    theirs = made(tmp_path, vocabulary_of(genes), specials, shape, heads, activation)
    if specials == V1_SPECIALS:
        assert torch.equal(theirs.our_id[2:], torch.arange(2, genes + 2) + 3)
    check_logits(theirs, drawn_cells(len(theirs.our_id), len(specials), start))


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return weights_reader.read_weights(weights_reader.step_of(run))


def test_new_tokens_take_no_probability(small: dict[tuple[str, ...], Theirs]) -> None:
    run, new = small[V1_SPECIALS].run, [0, 3, 4]  # [CLS], [SEP], [UKW]
    assert not weights_of(run)[hf_keys.WORDS][new].any()
    cells = [np.array([5, 1, 9], np.int32)]
    (((logits,),),) = run_ranks(conversions.all_logits, 1, [run], cells, (False,))
    probabilities = torch.from_numpy(logits).softmax(-1)
    assert (probabilities[:, new] == 0).all()
    assert (probabilities[:, [1, 2, *range(5, GENES + 5)]] > 0).all()


@pytest.mark.parametrize("specials", [V1_SPECIALS, V2_SPECIALS], ids=["v1", "v2"])
def test_hugging_face_to_us_and_back_is_bitwise(
    specials: tuple, small: dict[tuple[str, ...], Theirs], tmp_path: Path
) -> None:
    theirs, back = small[specials], tmp_path / "back"
    convert.to_hf(theirs.run, back, tokens_path=theirs.run / converted_run.TOKENS)
    before, after = dict(theirs.weights), load_file(back / "model.safetensors")
    types, positions = (f"bert.embeddings.{kind}_embeddings.weight" for kind in
                        ("token_type", "position"))  # fmt: skip
    before[positions] = before[positions] + before[types][0]
    before[types] = torch.zeros(1, 32)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    given, written = (
        json.loads((folder / "config.json").read_text()) for folder in (theirs.folder, back)
    )
    assert {**given, "type_vocab_size": 1} == {name: written[name] for name in given}
    whole = read_whole(weights_reader.step_of(theirs.run))
    moments = [whole[key] for key in whole if ".exp_avg" in key]
    assert moments
    assert not any(each.any() for each in moments)


def assert_same_weights(one: Path, other: Path) -> None:
    """Of two runs, bit for bit, but for rows that pad the vocabulary."""
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        last = toy.VOCABULARY if name in (hf_keys.WORDS, hf_keys.OUTPUT_BIAS) else None
        assert torch.equal(tensor[:last], second[name][:last]), name


def test_to_hugging_face_and_back(exported: dict[str, Exported], tmp_path: Path) -> None:
    calls = [(folder, tmp_path / name) for name, (_, folder, _) in exported.items()]
    run_ranks(conversions.convert_all, 1, convert.from_hf, calls)
    for name, (run, *_) in exported.items():
        assert_same_weights(run, tmp_path / name)
        exact = weights_of(run)["encoder.layers.0.mlp.linear_fc1.weight"]
        assert (exact.bfloat16().float() != exact).any(), "fp32 weights, whatever they were used in"


def test_exports_compute_the_same(exported: dict[str, Exported]) -> None:
    cells = [np.array([0, 17, 1, 33, 699, 8], np.int32), np.array([0, 44], np.int32)]
    for name, activation in (("pre", "gelu"), ("post", "relu")):
        run, folder, told = exported[name]
        assert "step 3" in told[0]
        weights = load_file(folder / "model.safetensors")
        same_id = torch.arange(toy.VOCABULARY)
        check_logits(Theirs(folder, run, weights, 4, activation, same_id), cells, 2, spread=0)
        card = (folder / "README.md").read_text()
        for fact in ("steps made | 3 ", "cells seen | 48 ", "6.2500", "c0ffee", "700"):
            assert fact in card, fact


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="transformers is not installed")
@pytest.mark.parametrize(
    ("norm", "name"), [("pre", "MegatronBertForMaskedLM"), ("post", "BertForMaskedLM")]
)
def test_transformers_loads_it(norm: str, name: str, exported: dict[str, Exported]) -> None:
    folder = exported[norm][1]
    model = transformers_model(folder)
    assert type(model).__name__ == name
    assert type(model).__module__.startswith("transformers."), "no code of the folder's was run"
    with warnings.catch_warnings(action="ignore"):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
    genes = Vocabulary.load(folder / "vocabulary.json").feature_ids
    cell = tokenizer(f"{genes[7]} [MASK] {genes[0]} strange")
    assert cell["input_ids"] == [0, 12, 1, 5, 4]
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (2, 1)


BIONEMO_1 = (
    (r"^(embedding|encoder)\.", r"model.language_model.\1."),
    (r"^lm_head\.layer_norm", "model.lm_head.layernorm"),
    (r"^lm_head\.", "model.lm_head."),
    (r"^output_layer\.bias", "model.lm_head.bias"),
    (r"linear_qkv", "query_key_value"),
    (r"linear_proj", "dense"),
    (r"linear_fc1", "dense_h_to_4h"),
    (r"linear_fc2", "dense_4h_to_h"),
    (r"pre_mlp_layernorm", "post_attention_layernorm"),
)
BIONEMO_2 = (
    (r"input_layernorm\.", "self_attention.linear_qkv.layer_norm_"),
    (r"pre_mlp_layernorm\.", "mlp.linear_fc1.layer_norm_"),
    (r"^", "module."),
)
"""What our names become in theirs."""


def bionemo(path: Path, run: Path, kind: str) -> None:
    """Our trained weights as BioNeMo would have saved them, with padding to 704 rows."""
    ours = weights_of(run)
    ours = {name: each[:704] if "word" in name or "output" in name else each
            for name, each in ours.items()}  # fmt: skip
    theirs: dict[str, Any] = {}
    for name, tensor in ours.items():
        for pattern, replacement in BIONEMO_1 if kind == "bionemo 1" else BIONEMO_2:
            name = re.sub(pattern, replacement, name)
        theirs[name] = tensor
    if kind == "stacked":
        names = {re.sub(r"layers\.\d+\.", "layers.", name) for name in theirs if ".layers." in name}
        for name in names:
            parts = [theirs.pop(name.replace("layers.", f"layers.{n}.")) for n in range(4)]
            theirs[name] = torch.stack(parts)
    theirs["module.encoder.layers.0.mlp.linear_fc1._extra_state"] = torch.zeros(0)
    theirs["module.output_layer.weight"] = ours[hf_keys.WORDS].clone()
    torch.save({"state_dict": theirs}, path)


def test_bionemos_layouts_are_ours(ours: dict[str, Path], tmp_path: Path) -> None:
    run, kinds, calls = ours["pre"], ("bionemo 1", "bionemo 2", "stacked"), []
    for kind in kinds:
        bionemo(tmp_path / f"{kind}.pt", run, kind)
        more = (run / "vocabulary.json", convert.Activation.gelu, 4)
        calls.append((tmp_path / f"{kind}.pt", tmp_path / kind, *more))
    run_ranks(conversions.convert_all, 1, convert.from_bionemo, calls)
    cells = [np.array([0, 17, 1, 33, 8], np.int32)]
    runs = [run, *(tmp_path / kind for kind in kinds)]
    (found,) = run_ranks(conversions.all_logits, 1, runs, cells, (False,))
    for other, (logits,) in zip(runs[1:], found[1:], strict=True):
        assert_same_weights(run, other)
        assert np.array_equal(found[0][0], logits), other


QUERY = "bert.encoder.layer.1.attention.self.query.weight"
THIRD, DECODER = "bert.encoder.layer.2.output.dense.bias", "cls.predictions.decoder.weight"
WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "missing": ({QUERY: None}, ["1 missing", QUERY, "Remedy"]),
    "unexpected": ({THIRD: torch.zeros(32)}, ["1 unexpected", THIRD, "Remedy"]),
    "misshapen": ({QUERY: torch.zeros(32, 31)}, ["is [32, 31] and must be [32, 32]", "Remedy"]),
    "not finite": (
        {QUERY: torch.full((32, 32), torch.inf)},
        [f"tensors hold NaN or infinite ones: {QUERY}.", "Remedy"],
    ),
    "untied": ({DECODER: torch.zeros(GENES + 2, 32)}, [f"{DECODER} must be", "tied"]),
    "eps": ({"layer_norm_eps": 1e-5}, ["layer_norm_eps must be 1e-12, and is 1e-05"]),
    "rows": ({"vocab_size": GENES + 3}, ["123 tokens", "120 genes", "V1: 122", "Remedy"]),
    "activation": ({"hidden_act": "silu"}, ["hidden_act must be relu or gelu", "'silu'"]),
}
"""Name -> (tensors or settings that are changed, parts of the message)."""


def small_hf(place: Path, tokens: int, **changes: Any) -> dict[str, torch.Tensor]:
    """The weights of a small model of theirs in the folder "hf"; changes: of tensors, None for one
    that is left out, and of settings."""
    weights = plain_bert.random_weights(**SMALL, tokens=tokens)
    described = {name: changes.pop(name) for name in [*changes] if "." not in name}
    weights = {name: each for name, each in (weights | changes).items() if each is not None}
    conversions.write_hf(place / "hf", weights, 4, **described)
    vocabulary_of(GENES).save(place / "vocabulary.json")
    return weights


@pytest.mark.parametrize("change", WRONG)
def test_what_does_not_fit_is_told(change: str, tmp_path: Path) -> None:
    changes, told = WRONG[change]
    small_hf(tmp_path, GENES + 2, **changes)
    with pytest.raises(GeneformerError) as refusal:
        convert.from_hf(tmp_path / "hf", tmp_path / "run", tmp_path / "vocabulary.json")
    for part in told:
        assert part in str(refusal.value)
    assert not list(tmp_path.glob("*run*")), "nothing is left behind"


def test_bionemos_weights_must_be_finite(ours: dict[str, Path], tmp_path: Path) -> None:
    bionemo(tmp_path / "b.pt", ours["pre"], "bionemo 1")
    content = torch.load(tmp_path / "b.pt", weights_only=True)
    content["state_dict"]["model.lm_head.dense.bias"][3] = torch.nan
    torch.save(content, tmp_path / "b.pt")
    vocabulary = ours["pre"] / "vocabulary.json"
    with pytest.raises(GeneformerError, match=r"infinite ones: lm_head\.dense\.bias\."):
        convert.from_bionemo(
            tmp_path / "b.pt", tmp_path / "run", vocabulary, convert.Activation.gelu, 4
        )
    assert not (tmp_path / "run").exists()


class RunsCode:
    def __reduce__(self) -> tuple:
        return print, ("ran",)


def test_weights_that_would_run_code_are_refused(tmp_path: Path) -> None:
    small_hf(tmp_path, GENES + 2)
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save({"a": RunsCode()}, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(GeneformerError, match="plain state dict"):
        convert.from_hf(tmp_path / "hf", tmp_path / "run", tmp_path / "vocabulary.json")


def test_pickled_weights_and_published_dictionaries_are_read(tmp_path: Path) -> None:
    folder, run = tmp_path / "hf", tmp_path / "run"
    weights = small_hf(tmp_path, GENES + 4)
    (folder / "model.safetensors").unlink()
    words = weights[DECODER] = weights["bert.embeddings.word_embeddings.weight"]
    weights["cls.predictions.decoder.bias"] = weights.pop("cls.predictions.bias")
    weights["bert.embeddings.position_ids"] = torch.arange(40)
    torch.save(weights, folder / "pytorch_model.bin")
    genes = vocabulary_of(GENES).feature_ids
    # In an order of their own, which rows follow.
    names = ["<pad>", "<mask>", *genes[60:], "<cls>", "<eos>", *genes[:60]]
    tokens = {name: number for number, name in enumerate(names)}
    medians = dict.fromkeys((*genes, "ENSG99999999999"), 2.5)
    files = tmp_path / "tokens.pkl", tmp_path / "medians.pkl"
    for file, dictionary in zip(files, (tokens, medians), strict=True):
        file.write_bytes(pickle.dumps(dictionary))
    run_ranks(conversions.convert_all, 1, convert.from_hf, [(folder, run, None, *files)])
    ours = weights_of(run)[hf_keys.WORDS]
    assert torch.equal(ours[:4], words[[tokens[n] for n in ("<cls>", "<mask>", "<pad>", "<eos>")]])
    assert torch.equal(ours[5 + 60], words[2])
    assert Vocabulary.load(run / "vocabulary.json").feature_ids == genes


def test_what_cannot_be_exported(ours: dict[str, Path], tmp_path: Path) -> None:
    there, other = tmp_path / "there", tmp_path / "other.json"
    there.mkdir()
    vocabulary_of(9).save(other)
    for message, function, arguments in (
        ("exists already", convert.from_hf, (tmp_path, there, tmp_path)),
        ("has a checkpoint", convert.to_hf, (tmp_path, tmp_path / "new")),
        (r"relu, model\.head_activation=gelu", convert.to_hf, (ours["two"], tmp_path / "hf")),
        ("checksum", convert.to_hf, (ours["pre"], tmp_path / "hf", other)),
    ):
        with pytest.raises(GeneformerError, match=message):
            function(*arguments)
