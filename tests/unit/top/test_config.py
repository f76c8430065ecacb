"""Settings: merging, mistakes named all at once, and the plan that follows from them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from geneformer_mcore.config import (
    Config,
    argument,
    from_anywhere,
    load,
    parse,
    plain_yaml,
    plan,
    run_dir,
)
from geneformer_mcore.config.sections import Activation
from geneformer_mcore.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
SEQUENCES = "parallel.sequence=true parallel.tensor=2"
CHUNKS = "parallel.pipeline=2 parallel.virtual_pipeline=3"


def config(*overrides: str) -> Config:
    return load(None, overrides)[0]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "some.yaml"


def test_arguments_win_over_the_file_and_the_file_over_the_defaults(file: Path) -> None:
    file.write_text("model: {num_layers: 3, activation: gelu}\ntrain: {seed: 5}\n")
    merged, text = load(file, ["train.seed=6", "optim.lr=1e-4"])
    assert (merged.model.num_layers, merged.model.activation) == (3, Activation.gelu)
    assert (merged.train.seed, merged.optim.lr) == (6, 1e-4)
    assert yaml.safe_load(text)["model"]["activation"] == "gelu"


@pytest.mark.parametrize(
    "errors",
    [
        {
            "train.stepss=3": "Did you mean `train.steps`?",
            "optim.lr=fast": "optim.lr takes a number, and got 'fast'",
            "nonsense": "`nonsense`",
            "model.activation=tanh": "takes one of relu, gelu, gelu_tanh, and got 'tanh'",
        },
        {
            "optim.lr=-1": "optim.lr must be within 0..10, and is -1.0",
            "train.steps=0": "train.steps must be at least 1, and is 0",
            "data.mask_fractions=[0.5,0.5,0.5]": "sum to 1",
        },
    ],
    ids=["types", "ranges"],
)
def test_all_mistakes_are_named_at_once(errors: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(config(*errors), 1)
    for error in errors.values():
        assert error in str(caught.value)


@pytest.mark.parametrize(
    "override",
    ["optim.lr=.nan", "data.mask_fractions=[.nan,0.5,0.5]", "run.dir=", "data.store=' '"],
)
def test_no_number_and_no_name_are_out_of_range(override: str) -> None:
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        plan(config(override), 1)


@pytest.mark.parametrize(
    ("overrides", "world_size", "numbers"),
    [
        ("parallel.tensor=3", 3, "model.num_attention_heads (4)"),
        ("parallel.pipeline=4", 4, "4 x 1 = 4"),
        ("parallel.tensor=2", 3, "number of ranks (3)"),
        ("train.global_batch_size=100", 1, "32 x 1 = 32"),
        ("parallel.sequence=true", 1, "parallel.tensor > 1"),
        (f"{SEQUENCES} data.seq_length=99", 2, "data.seq_length (99)"),
        ("parallel.virtual_pipeline=2", 1, "parallel.pipeline > 1"),
        (f"{CHUNKS} train.global_batch_size=32", 2, "micro batches per step (1"),
        ("data.tokens_per_micro_batch=4096", 1, "tokens_per_micro_batch (4096)"),
        ("data.packing=true data.tokens_per_micro_batch=2047", 1, "(2047)"),
        (f"{SEQUENCES} data.packing=true data.tokens_per_micro_batch=2049", 2, "(2049)"),
        ("train.precision=fp8 data.seq_length=2040", 1, "data.seq_length (2040)"),
        ("train.precision=fp8 data.pad_multiple=8", 1, "data.pad_multiple (8)"),
        ("train.precision=fp8 model.ffn_hidden_size=520", 1, "(520) must be a multiple"),
    ],
)
def test_impossible_layouts_are_refused_with_their_factors(
    overrides: str, world_size: int, numbers: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(numbers)):
        plan(config(*overrides.split()), world_size)


def test_the_plans_of_the_cards() -> None:
    made = plan(load(CONFIGS / "geneformer_106m.yaml", ["data.packing=false"])[0], 128)
    assert (made.data_parallel, made.micro_batches) == (128, 1)
    assert (made.warmup_steps, made.hold_steps) == (1154, 5772)
    packed = plan(load(CONFIGS / "geneformer_106m.yaml")[0], 128)
    assert (packed.micro_batches, packed.tokens_per_micro_batch) == (0, 32_768)
    card, _ = load(CONFIGS / "geneformer_10m.yaml")
    default = Config()
    assert (card.model, card.optim, card.train) == (default.model, default.optim, default.train)


def test_secrets_are_not_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/secret/place")
    merged, text = load(None, ["run.dir=${oc.env:PLACE}/run"])
    assert merged.run.dir == "/secret/place/run"
    assert "/secret/place" not in text
    assert "${oc.env:PLACE}/run" in text


@pytest.mark.parametrize(
    "content",
    [
        "[1, 2]", "a: [", "!!python/object/apply:os.system ['true']", "\x00", "trian: {}",
        "trian:", "train: {steps: 3, steps: 4}", "train: 5", "train: {steps: }",
        "data: {mask_fractions: 0.5}",
    ],
)  # fmt: skip
def test_a_file_that_is_no_plain_mapping_is_refused(file: Path, content: str) -> None:
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"some\.yaml"):
        load(file)
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        load("nowhere.yaml")


def test_values_may_be_written_as_people_write_them(file: Path) -> None:
    merged = config("train.steps=1e3", "optim.lr=1e-3", "train.max_minutes=5")
    assert (merged.train.steps, merged.optim.lr, merged.train.max_minutes) == (1000, 1e-3, 5.0)
    # Not octal, and every digit of a large one.
    merged = config("train.steps=0100", f"train.seed={2**63 - 1}")
    assert (merged.train.steps, merged.train.seed) == (100, 2**63 - 1)
    for wrong in (
        "train.steps=1.5",
        "train.steps=null",
        "parallel.sequence=3x",
        "train.steps=1:30",
    ):
        with pytest.raises(ConfigError, match="takes"):
            config(wrong)
    file.write_text("train:\nmodel: {head_activation: null}\n")
    assert load(file)[0] == Config(), "an empty section and an optional null are fine"


def test_paths_may_begin_with_the_home(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell expands it in a file, or behind a `=`."""
    monkeypatch.setenv("HOME", "/users/me")
    file.write_text("run: {dir: ~/runs/a}\ndata: {vocabulary: ~/v.json, cache_dir: a/~/b}\n")
    merged, text = load(file, ["data.store=~/a.h5ad, ~/b.h5ad", "finetune.label=~/x"])
    assert merged.run.dir == run_dir(file, []) == "/users/me/runs/a"
    assert (merged.data.vocabulary, merged.data.cache_dir) == ("/users/me/v.json", "a/~/b")
    assert merged.data.store == "/users/me/a.h5ad, /users/me/b.h5ad"
    assert merged.finetune.label == "~/x"
    assert yaml.safe_load(text)["run"]["dir"] == "/users/me/runs/a"


def test_the_run_folder_is_known_even_of_refused_settings(file: Path) -> None:
    file.write_text("run: {dir: from_file}\ntrain: {stepss: 3}\n")
    assert run_dir(file, ["optim.lr=x"]) == "from_file"
    assert run_dir(file, ["run.dir=typed", "nonsense"]) == "typed"
    assert run_dir(file.with_name("nowhere.yaml"), []) == Config().run.dir


@pytest.mark.parametrize(
    "text",
    ["2024_01_31", "2024-01-31", "1.10", "0012", "0x1f", "12:30", "1e3", "on", "no", "true", ".nan",
     "=", "a b", "größe"],
)  # fmt: skip
def test_text_is_what_was_written(file: Path, text: str) -> None:
    """On the command line, in a file, and in what a run keeps of both."""
    file.write_text(f"run: {{dir: {text}}}\nfinetune:\n  label: {text}\n", encoding="utf-8")
    typed = load(None, [f"run.dir={text}", f"finetune.label={text}"])
    for merged, kept in (load(file), typed):
        assert (merged.run.dir, merged.finetune.label) == (text, text)
        assert parse(kept, "kept") == merged


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ("run #3", "run #3"), ("a: b", "a: b"), ("[a]", "[a]"), ("{a: 1}", "{a: 1}"),
        ("*a", "*a"), ("!!int 5", "!!int 5"), ("'a", "'a"), ("-", "-"), ("<<", "<<"),
        (" x ", " x "), ("'1.10'", "1.10"),
        ('"null"', "null"), ("\\${a}", "${a}"), ("", ""),
    ],
)  # fmt: skip
def test_an_argument_needs_no_quotes_and_may_have_them(given: str, means: str) -> None:
    assert config(f"finetune.label={given}").finetune.label == means


@pytest.mark.parametrize(
    "text", ["'x'", '"', "null", "a${b}", "\\${x", "a\\b", " ", "1e3", "\U0001f9ec", "???a"]
)
def test_an_option_becomes_a_setting_of_just_that_text(text: str) -> None:
    assert config(argument("finetune.label", text)).finetune.label == text


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("null", "a name is put in quotes"),
        ("???", "cannot be ???"),
        ("${", "write `\\${`"),
        ("a\0b", "without control characters"),
        ("a\nb", "one line"),
        ("\udcff", "Unicode"),
    ],
)
def test_text_that_no_folder_can_be_meant_by_is_refused(text: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.dir") as caught:
        config(f"run.dir={text}")
    assert remedy in str(caught.value)


@pytest.mark.parametrize("value", ["", "null", "[a]", "{a: {b: 1}}", "!!binary aGVsbG8="])
def test_what_is_no_text_in_a_file_is_refused(file: Path, value: str) -> None:
    file.write_text(f"run:\n  dir: {value}\n")
    with pytest.raises(ConfigError, match=r"some\.yaml: "):
        load(file)


@pytest.mark.parametrize(
    ("content", "limit"),
    [
        # Three times ten values: harmless, and more than the file may have in this test.
        ("a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]\nb: [*a, *a, *a]", "behind aliases"),
        ("a: &a {b: 1, c: 2, d: 3}\ne: {<<: [*a, *a, *a, *a, *a, *a]}", "behind aliases"),
        ("a: &a [*a]", "inside of itself"),
        ("[" * 20 + "]" * 20, "16 levels"),
        ("a: [" + "1, " * 40 + "]", "30 values"),
        ("a: " + "x" * 70_000, "65,536 characters"),
    ],
)
def test_yaml_is_read_within_limits(
    file: Path, content: str, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_yaml, "MOST_NODES", 30)
    file.write_text(content)
    with pytest.raises(ConfigError, match=limit):
        load(file)
    with pytest.raises(ConfigError, match=limit):
        config(f"data.mask_fractions={content}")


def test_a_device_without_an_end_is_no_file_of_settings() -> None:
    with pytest.raises(ConfigError, match="65,536 characters"):
        load("/dev/zero")


def test_what_a_run_keeps_names_paths_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PART", "one")
    monkeypatch.setenv("STORES", "/stores")
    given = ["run.dir=runs/a", "data.vocabulary=../v.json", "data.split=/s.json", "data.cache_dir="]
    kept = from_anywhere(*reversed(load(None, [*given, "data.store=stores/${oc.env:PART}"])))
    found = parse(kept, "kept")
    assert (found.run.dir, found.data.store) == (f"{tmp_path}/runs/a", f"{tmp_path}/stores/one")
    assert (found.data.vocabulary, found.data.split) == (f"{tmp_path}/../v.json", "/s.json")
    assert found.data.cache_dir == ""
    assert "stores/${oc.env:PART}" in kept
    counts = ["data.source=counts", "data.store=a.h5ad, s3://b/c, /d.h5ad"]
    kept = from_anywhere(*reversed(load(None, counts)))
    assert parse(kept, "kept").data.store == f"{tmp_path}/a.h5ad,s3://b/c,/d.h5ad"
    outside = ["data.store=${oc.env:STORES}/x", "run.dir=runs"]
    assert "${oc.env:STORES}/x\n" in from_anywhere(*reversed(load(None, outside)))
