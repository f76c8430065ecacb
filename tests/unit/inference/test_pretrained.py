"""A trained model finds what its run named, wherever it is read and whatever has moved since."""

from __future__ import annotations

from pathlib import Path

import pytest

from geneformer_mcore.config import Config
from geneformer_mcore.config.sections import Source
from geneformer_mcore.inference.pretrained import located


@pytest.mark.parametrize(
    ("run_dir", "store"),
    [
        ("runs/a", "stores/x"),  # as earlier versions wrote them
        ("{was}/runs/a", "stores/x"),
        ("{was}/runs/a", "{was}/stores/x"),
        ("{now}/runs/a", "{now}/stores/x"),
    ],
)
def test_paths_of_a_record_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_dir: str, store: str
) -> None:
    was, now, elsewhere = tmp_path / "was", tmp_path / "now", tmp_path / "elsewhere"
    step = now / "runs" / "a" / "checkpoints" / "step_0000000002"
    for folder in (step, now / "stores" / "x", elsewhere):
        folder.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    config = Config()
    config.run.dir = run_dir.format(was=was, now=now)
    config.data.store = store.format(was=was, now=now)
    config.data.vocabulary = "nowhere.json"
    located(config, step)
    assert config.data.store == str(now / "stores" / "x")
    assert config.data.vocabulary == "nowhere.json", "what is not there keeps its name for messages"


def test_several_inputs_are_found_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "a.h5ad").touch()
    config = Config()
    config.data.source, config.data.store = Source.counts, "a.h5ad, s3://b/c"
    located(config, tmp_path / "run" / "checkpoints" / "step_0000000001")
    assert config.data.store == f"{tmp_path}/a.h5ad,s3://b/c"
