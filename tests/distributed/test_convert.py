"""Models from Hugging Face and back: the same logits, the same bits, and mistakes that are told.

What Hugging Face's classes compute is tests/plain_bert.py's word, and transformers' own where it
is installed.
"""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from geneformer_mcore.checkpoint import weights_reader
from geneformer_mcore.convert import convert, converted_run, hf_keys
from geneformer_mcore.errors import GeneformerError
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from tests import plain_bert
from tests.distributed import conversions, toy
from tests.distributed.conversions import V1_SPECIALS, V2_SPECIALS
from tests.distributed.ranks import run_ranks
from tests.small_cells import plain_tokens

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
needs_transformers = pytest.mark.skipif(
    not HAS_TRANSFORMERS, reason="transformers is not installed"
)
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


@dataclass(frozen=True)
class Exported:
    """One of our runs, the Hugging Face folder made of it, and what was said of that."""

    run: Path
    folder: Path
    told: list[str]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run folder of each of TRAINED."""
    place = tmp_path_factory.mktemp("ours")
    runs = {name: place / name for name in TRAINED}
    run_ranks(conversions.all_trained, 1, {str(runs[n]): TRAINED[n] for n in TRAINED})
    return runs


@pytest.fixture(scope="module")
def exported(
    ours: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Exported]:
    """Those that can be."""
    place = tmp_path_factory.mktemp("exported")
    return {
        name: Exported(ours[name], place / name, convert.to_hf(ours[name], place / name))
        for name in ("pre", "post", "bf16")
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Path]:
    """{specials: a folder with a small model of theirs, "hf", and what became of it, "run"}."""
    places, calls = {}, []
    for specials in (V1_SPECIALS, V2_SPECIALS):
        place = places[specials] = tmp_path_factory.mktemp("small")
        weights = plain_bert.random_weights(**SMALL, tokens=GENES + len(specials))
        conversions.write_hf(place / "hf", weights, 4)
        conversions.vocabulary_of(GENES).save(place / "vocabulary.json")
        calls.append(tuple(str(place / name) for name in ("hf", "run", "vocabulary.json")))
    run_ranks(conversions.all_from_hf, 1, calls)
    return places


def transformers_model(folder: Path) -> Any:
    """What transformers makes of a folder; fails if it misses or does not know a tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForMaskedLM

        model, told = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not told[kind], (kind, told[kind])
    return model.eval()


def transformers_logits(folder: Path, cells: list[np.ndarray], pad: int) -> list[torch.Tensor]:
    """Of cells (their ids) padded into one batch."""
    rows = [torch.from_numpy(cell).long() for cell in cells]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    with torch.no_grad():
        found = transformers_model(folder)(input_ids=padded, attention_mask=mask).logits
    return [row[: len(cell)] for row, cell in zip(found, cells, strict=True)]


def drawn_cells(tokens: int, first_gene: int, start: int | None, seed: int = 3) -> list[np.ndarray]:
    """Cells of different genes, with a token `start` in front if there is one; some are masked."""
    rng = np.random.default_rng(seed)
    cells = []
    for length in CELLS:
        cell = first_gene + rng.permutation(tokens - first_gene)[:length]
        cell[rng.random(len(cell)) < 0.1] = 1  # <mask> of both versions
        cells.append(np.concatenate([[start] if start is not None else [], cell]).astype(np.int32))
    return cells


@dataclass(frozen=True)
class Theirs:
    """A made-up model of theirs, and the run folder that it was converted to."""

    folder: Path
    run: Path
    weights: dict[str, torch.Tensor]
    heads: int
    activation: str
    our_id: torch.Tensor
    """int64 [their tokens]."""


def made(
    place: Path,
    vocabulary: Vocabulary,
    specials: tuple[str, ...],
    shape: dict,
    heads: int,
    activation: str = "relu",
) -> Theirs:
    num_tokens = len(specials) + len(vocabulary.feature_ids)
    weights = plain_bert.random_weights(**shape, tokens=num_tokens)
    folder, run = place / "hf", place / "run"
    conversions.write_hf(folder, weights, heads, hidden_act=activation)
    vocabulary.save(place / "vocabulary.json")
    run_ranks(conversions.from_hf, 1, str(folder), str(run), str(place / "vocabulary.json"))
    names = [*specials, *vocabulary.feature_ids]
    ours = vocabulary.token_ids | {"<cls>": 0, "<mask>": 1, "<pad>": 2, "<eos>": 3}
    our_id = torch.tensor([ours[name] for name in names])
    return Theirs(folder, run, weights, heads, activation, our_id)


def check_logits(theirs: Theirs, cells: list[np.ndarray]) -> None:
    """cells: their ids. Within 1e-5 of plain PyTorch in fp64, and of transformers."""
    ours = [theirs.our_id[torch.from_numpy(cell).long()].int().numpy() for cell in cells]
    function = F.relu if theirs.activation == "relu" else F.gelu
    wanted = [
        plain_bert.logits(theirs.weights, theirs.heads, torch.from_numpy(cell).long(), function)
        for cell in cells
    ]
    assert min(float(each.std()) for each in wanted) > 0.5, "too alike to mean anything"
    ((padded, packed),) = run_ranks(conversions.all_logits, 1, [str(theirs.run)], ours)
    for found in (padded, packed):
        assert largest_difference(found, wanted, theirs.our_id) <= 1e-5
    if HAS_TRANSFORMERS:
        wanted = transformers_logits(theirs.folder, cells, 0)
        for found in (padded, packed):
            assert largest_difference(found, wanted, theirs.our_id) <= 1e-5


def largest_difference(
    found: list[np.ndarray], wanted: list[torch.Tensor], our_id: torch.Tensor
) -> float:
    return max(
        float((torch.from_numpy(mine)[:, our_id].double() - their).abs().max())
        for mine, their in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize(
    ("specials", "genes", "shape", "heads", "activation", "start"),
    [
        pytest.param(V1_SPECIALS, 2_500, V1_SHAPE, 4, "relu", None, id="v1"),
        pytest.param(V2_SPECIALS, 1_500, V2_SHAPE, 6, "relu", 2, id="v2"),
        pytest.param(V2_SPECIALS, 300, SMALL | {"positions": 512}, 4, "gelu", 2, id="gelu"),
    ],
)
def test_logits_are_those_of_hugging_face(
    specials: tuple,
    genes: int,
    shape: dict,
    heads: int,
    activation: str,
    start: int | None,
    tmp_path: Path,
) -> None:
    vocabulary = conversions.vocabulary_of(genes)
    theirs = made(tmp_path, vocabulary, specials, shape, heads, activation)
    if specials == V1_SPECIALS:
        assert torch.equal(theirs.our_id[2:], torch.arange(2, genes + 2) + 3)
    check_logits(theirs, drawn_cells(len(theirs.our_id), len(specials), start))


def test_real_cells(shared_data: Path, tmp_path: Path) -> None:
    """Heart cells, in the genes of Geneformer's first corpus, as many as its second has."""
    medians = json.loads((shared_data / "dicts" / "gc30m_gene_medians.json").read_text())
    genes = sorted(medians)[:20_271]
    vocabulary = Vocabulary.from_medians({gene: medians[gene] for gene in genes})
    theirs = made(tmp_path, vocabulary, V2_SPECIALS, V2_SHAPE, 6)
    their_id = torch.empty(vocabulary.size, dtype=torch.int64)
    their_id[theirs.our_id] = torch.arange(len(theirs.our_id))
    heart = anndata.read_h5ad(shared_data / "heart_san_1k.h5ad")
    columns = [i for i, gene in enumerate(heart.var_names) if gene in vocabulary.token_ids]
    tokens = np.array([vocabulary.token_ids[heart.var_names[i]] for i in columns])
    cells = []
    for counts in heart.X[:3, columns].toarray().astype(np.float64):
        genes_T = plain_tokens(counts, tokens, vocabulary, 600)[1:]
        cell = their_id[torch.from_numpy(genes_T)].tolist()
        cells.append(np.array([2, *cell, 3], np.int32))
    assert min(len(cell) for cell in cells) > 100
    check_logits(theirs, cells)


def test_new_tokens_take_no_probability(small: dict[tuple[str, ...], Path]) -> None:
    run = small[V1_SPECIALS] / "run"
    weights = weights_reader.read_weights(weights_reader.step_of(run))
    new = [0, 3, 4]  # [CLS], [SEP], [UKW]
    assert not weights[hf_keys.WORDS][new].any()
    cells = [np.array([5, 1, 9], np.int32)]
    (((logits,),),) = run_ranks(conversions.all_logits, 1, [str(run)], cells, (False,))
    probabilities = torch.from_numpy(logits).softmax(-1)
    assert (probabilities[:, new] == 0).all()
    assert (probabilities[:, [1, 2, *range(5, GENES + 5)]] > 0).all()


@pytest.mark.parametrize("specials", [V1_SPECIALS, V2_SPECIALS])
def test_hugging_face_to_us_and_back_is_bitwise(
    specials: tuple, small: dict[tuple[str, ...], Path], tmp_path: Path
) -> None:
    run, folder = small[specials] / "run", small[specials] / "hf"
    convert.to_hf(run, tmp_path / "back", tokens_path=run / converted_run.TOKENS)
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    types, positions = (f"bert.embeddings.{kind}_embeddings.weight" for kind in
                        ("token_type", "position"))  # fmt: skip
    before[positions] = before[positions] + before[types][0]
    before[types] = torch.zeros(1, 32)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    given = json.loads((folder / "config.json").read_text())
    assert {**given, "type_vocab_size": 1} == {name: written[name] for name in given}


def assert_same_weights(one: Path, other: Path) -> None:
    """Of two runs, bit for bit, but for rows that pad the vocabulary."""
    first, second = (
        weights_reader.read_weights(weights_reader.step_of(path)) for path in (one, other)
    )
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        rows = (
            slice(toy.VOCABULARY) if name in (hf_keys.WORDS, hf_keys.OUTPUT_BIAS) else slice(None)
        )
        assert torch.equal(tensor[rows], second[name][rows]), name


def test_us_to_hugging_face_and_back_is_bitwise(
    exported: dict[str, Exported], tmp_path: Path
) -> None:
    calls = [(str(each.folder), str(tmp_path / name), "") for name, each in exported.items()]
    run_ranks(conversions.all_from_hf, 1, calls)
    for name, each in exported.items():
        assert_same_weights(each.run, tmp_path / name)
        weights = weights_reader.read_weights(weights_reader.step_of(each.run))
        exact = weights["encoder.layers.0.mlp.linear_fc1.weight"]
        assert (exact.bfloat16().float() != exact).any(), "fp32 weights, whatever they were used in"


def test_exports_compute_the_same(exported: dict[str, Exported]) -> None:
    cells = [np.array([0, 17, 1, 33, 699, 8], np.int32), np.array([0, 44], np.int32)]
    functions = {"pre": F.gelu, "post": F.relu}
    runs = [str(exported[name].run) for name in functions]
    (found,) = run_ranks(conversions.all_logits, 1, runs, cells)
    for number, (name, function) in enumerate(functions.items()):
        assert "step 3" in exported[name].told[0]
        folder = exported[name].folder
        weights = load_file(folder / "model.safetensors")
        wanted = [plain_bert.logits(weights, 4, torch.from_numpy(cell).long(), function)
                  for cell in cells]  # fmt: skip
        theirs = transformers_logits(folder, cells, 2) if HAS_TRANSFORMERS else wanted
        for logits in found[2 * number : 2 * number + 2]:  # padded, packed
            for mine, plain, their in zip(logits, wanted, theirs, strict=True):
                assert mine.shape == plain.shape, "rows that pad the vocabulary are cut off"
                assert (torch.from_numpy(mine).double() - plain).abs().max() <= 1e-5
                assert (torch.from_numpy(mine) - their).abs().max() <= 1e-5
        card = (folder / "README.md").read_text()
        for fact in ("steps made | 3 ", "cells seen | 48 ", "6.2500", "c0ffee", "700"):
            assert fact in card, fact


@needs_transformers
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_transformers_loads_model_and_tokenizer(norm: str, exported: dict[str, Exported]) -> None:
    folder = exported[norm].folder
    model = transformers_model(folder)
    name = {"pre": "MegatronBertForMaskedLM", "post": "BertForMaskedLM"}[norm]
    assert type(model).__name__ == name
    assert type(model).__module__.startswith("transformers."), "no code of the folder's was run"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
    genes = Vocabulary.load(folder / "vocabulary.json").feature_ids
    cell = tokenizer(f"{genes[7]} [MASK] {genes[0]} strange")
    assert cell["input_ids"] == [0, 12, 1, 5, 4]
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (2, 1)


def test_every_layout_loads_it_with_moments_of_zero(small: dict[tuple[str, ...], Path]) -> None:
    layouts = [
        (),
        ("parallel.pipeline=2",),
        ("parallel.tensor=2", "parallel.sequence=true"),
        ("train.precision=bf16",),
    ]
    run = str(small[V1_SPECIALS] / "run")
    for wrong in run_ranks(conversions.slices_that_differ_in, 2, run, layouts):
        assert wrong == [[]] * len(layouts)


def bionemo(path: Path, run: Path, kind: str) -> None:
    """Our trained weights as BioNeMo would have saved them, with padding to 704 rows."""
    ours = weights_reader.read_weights(weights_reader.step_of(run))
    ours = {name: each[:704] if "word" in name or "output" in name else each
            for name, each in ours.items()}  # fmt: skip
    if kind == "bionemo 1":
        changes = (
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
    else:
        changes = (
            (r"input_layernorm\.", "self_attention.linear_qkv.layer_norm_"),
            (r"pre_mlp_layernorm\.", "mlp.linear_fc1.layer_norm_"),
            (r"^", "module."),
        )
    theirs: dict[str, Any] = {}
    for name, tensor in ours.items():
        for pattern, replacement in changes:
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
        calls.append((f"{tmp_path / kind}.pt", str(tmp_path / kind), str(run / "vocabulary.json")))
    run_ranks(conversions.all_from_bionemo, 1, calls, 4)
    cells = [np.array([0, 17, 1, 33, 8], np.int32)]
    runs = [run, *(tmp_path / kind for kind in kinds)]
    (found,) = run_ranks(conversions.all_logits, 1, list(map(str, runs)), cells, (False,))
    for other, (logits,) in zip(runs[1:], found[1:], strict=True):
        assert_same_weights(run, other)
        assert np.array_equal(found[0][0], logits), other


def changed(tmp_path: Path, change: str) -> None:
    """Makes one thing of the small folder "hf" wrong."""
    folder = tmp_path / "hf"
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    query = "bert.encoder.layer.1.attention.self.query.weight"
    if change == "missing":
        del weights[query]
    elif change == "unexpected":
        weights["bert.encoder.layer.2.output.dense.bias"] = torch.zeros(32)
    elif change == "misshapen":
        weights[query] = torch.zeros(32, 31)
    elif change == "untied":
        weights["cls.predictions.decoder.weight"] = torch.zeros(GENES + 2, 32)
    elif change == "eps":
        config["layer_norm_eps"] = 1e-5
    elif change == "rows":
        config["vocab_size"] += 1
    elif change == "activation":
        config["hidden_act"] = "silu"
    else:
        raise AssertionError(change)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("missing", ["1 missing", "bert.encoder.layer.1.attention.self.query.weight", "Remedy"]),
        ("unexpected", ["1 unexpected", "bert.encoder.layer.2.output.dense.bias", "Remedy"]),
        ("misshapen", ["query.weight is [32, 31] and must be [32, 32]", "Remedy"]),
        ("untied", ["cls.predictions.decoder.weight must be", "tied"]),
        ("eps", ["layer_norm_eps must be 1e-12, and is 1e-05"]),
        ("rows", ["123 tokens", "120 genes", "Geneformer V1: 122", "Remedy"]),
        ("activation", ["hidden_act must be relu or gelu", "'silu'"]),
    ],
)
def test_what_does_not_fit_is_told(change: str, told: list[str], tmp_path: Path) -> None:
    weights = plain_bert.random_weights(**SMALL, tokens=GENES + 2)
    conversions.write_hf(tmp_path / "hf", weights, 4)
    vocabulary = tmp_path / "vocabulary.json"
    conversions.vocabulary_of(GENES).save(vocabulary)
    changed(tmp_path, change)
    with pytest.raises(GeneformerError) as refusal:
        convert.from_hf(tmp_path / "hf", tmp_path / "run", vocabulary)
    for part in told:
        assert part in str(refusal.value)
    assert not list(tmp_path.glob("*run*")), "nothing is left behind"


class RunsCode:
    def __reduce__(self) -> tuple:
        return print, ("ran",)


def test_weights_that_would_run_code_are_refused(tmp_path: Path) -> None:
    weights = plain_bert.random_weights(**SMALL, tokens=GENES + 2)
    conversions.write_hf(tmp_path / "hf", weights, 4)
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save({"a": RunsCode()}, tmp_path / "hf" / "pytorch_model.bin")
    conversions.vocabulary_of(GENES).save(tmp_path / "vocabulary.json")
    with pytest.raises(GeneformerError, match="plain state dict"):
        convert.from_hf(tmp_path / "hf", tmp_path / "run", tmp_path / "vocabulary.json")


def test_pickled_weights_and_published_dictionaries_are_read(tmp_path: Path) -> None:
    import pickle

    folder, run = tmp_path / "hf", tmp_path / "run"
    weights = plain_bert.random_weights(**SMALL, tokens=GENES + 4)
    conversions.write_hf(folder, weights, 4)
    (folder / "model.safetensors").unlink()
    weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"]
    weights["cls.predictions.decoder.bias"] = weights.pop("cls.predictions.bias")
    weights["bert.embeddings.position_ids"] = torch.arange(40)
    torch.save(weights, folder / "pytorch_model.bin")
    genes = conversions.vocabulary_of(GENES).feature_ids
    # In an order of their own, which rows follow.
    names = ["<pad>", "<mask>", *genes[60:], "<cls>", "<eos>", *genes[:60]]
    tokens = {name: number for number, name in enumerate(names)}
    (tmp_path / "tokens.pkl").write_bytes(pickle.dumps(tokens))
    medians = dict.fromkeys((*genes, "ENSG99999999999"), 2.5)
    (tmp_path / "medians.pkl").write_bytes(pickle.dumps(medians))
    run_ranks(
        from_dictionaries,
        1,
        *(str(path) for path in (folder, run, tmp_path / "tokens.pkl", tmp_path / "medians.pkl")),
    )
    ours = weights_reader.read_weights(weights_reader.step_of(run))
    theirs = weights["bert.embeddings.word_embeddings.weight"]
    wanted = [tokens[name] for name in ("<cls>", "<mask>", "<pad>", "<eos>")]
    assert torch.equal(ours[hf_keys.WORDS][:4], theirs[wanted])
    assert torch.equal(ours[hf_keys.WORDS][5 + 60], theirs[2])
    assert Vocabulary.load(run / "vocabulary.json").feature_ids == genes


def from_dictionaries(folder: str, out: str, tokens: str, medians: str) -> None:
    conversions.lone()
    convert.from_hf(Path(folder), Path(out), None, Path(tokens), Path(medians))


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for attempt in (
        lambda: convert.to_hf(tmp_path, tmp_path / "there"),
        lambda: convert.from_hf(tmp_path, tmp_path / "there", tmp_path),
    ):
        with pytest.raises(GeneformerError, match="exists already"):
            attempt()
    with pytest.raises(GeneformerError, match="has a checkpoint"):
        convert.to_hf(tmp_path, tmp_path / "new")


def test_two_activations_cannot_be_exported(ours: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(GeneformerError, match=r"activation=relu, model\.head_activation=gelu"):
        convert.to_hf(ours["two"], tmp_path / "hf")


def test_another_vocabulary_is_refused(ours: dict[str, Path], tmp_path: Path) -> None:
    conversions.vocabulary_of(9).save(tmp_path / "other.json")
    with pytest.raises(GeneformerError, match="checksum"):
        convert.to_hf(ours["pre"], tmp_path / "hf", tmp_path / "other.json")
