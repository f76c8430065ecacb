"""What a node sees of the cells of a run, without reading any."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from geneformer_mcore.config import Config
from geneformer_mcore.config.sections import Source
from geneformer_mcore.errors import GeneformerError
from geneformer_mcore.io.files import free_bytes
from geneformer_mcore.store import local_cache
from geneformer_mcore.store.reader import TokenStore
from geneformer_mcore.tokenizer.vocabulary import Vocabulary


@dataclass(frozen=True)
class Seen:
    """What a node sees.

    problem:       why it cannot be used here; "" if it can
    hash:          equal on nodes that see the same: the store's content hash, or one of the names
                   and sizes of the files of counts and the vocabulary
    cells, tokens: 0 where only training counts them
    cache_problem: why the flat copy cannot be had here
    cache:         "", "there", or "room" for one
    """

    problem: str = ""
    hash: str = ""
    cells: int = 0
    tokens: int = 0
    vocabulary_size: int = 0
    cache_problem: str = ""
    cache: str = ""


def look(config: Config) -> Seen:
    """What this node sees of `data.store`, and whether `data.cache_dir` can be used."""
    try:
        seen = _counts(config) if config.data.source is Source.counts else _store(config)
    except (GeneformerError, OSError) as error:
        return Seen(problem=str(error))
    return seen


def _store(config: Config) -> Seen:
    data = config.data
    with TokenStore.open(data.store) as store:
        manifest, size = store.manifest, store.vocabulary.size
    problem = ""
    if data.seq_length > manifest.seq_length:
        problem = (
            f"data.seq_length ({data.seq_length}) exceeds the {manifest.seq_length} tokens to "
            "which the store cut its cells: lower it, or build the store again."
        )
    cache_problem, cache = "", ""
    if data.cache_dir:
        needed = local_cache.num_bytes(manifest.tokens, manifest.cells)
        cache_problem, cache = _cache(Path(data.cache_dir), manifest.content_hash, needed)
    return Seen(
        problem, manifest.content_hash, manifest.cells, manifest.tokens, size, cache_problem, cache
    )


def _cache(cache: Path, content_hash: str, needed: int) -> tuple[str, str]:
    """(problem, state) of the folder for the flat copy; nothing is left in it."""
    if local_cache.is_there(cache, content_hash):
        return "", "there"
    place = next(each for each in [cache.absolute(), *cache.absolute().parents] if each.exists())
    try:
        # Asking for permissions would not do: root has them all, on a read-only disk too.
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return f"{place} cannot be written: {error.strerror}", ""
    free = free_bytes(place)
    if free < needed:
        return f"the copy takes {needed:,} bytes and {free:,} are free on the disk of {place}", ""
    return "", "room"


def _counts(config: Config) -> Seen:
    """That the files are there. Their cells are counted by training: that may take minutes."""
    from geneformer_mcore.data.counts_source import find_inputs

    vocabulary = Vocabulary.load(config.data.vocabulary)
    digest = hashlib.sha256(vocabulary.checksum.encode())
    if config.data.split:
        digest.update(Path(config.data.split).read_bytes())
    for name in find_inputs(config.data.store):
        # A folder (a SOMA Experiment) has no size that says anything; a URI is looked at by whom
        # opens it.
        size = 0 if "://" in name or Path(name).is_dir() else os.stat(name).st_size
        digest.update(f"{name} {size}\n".encode())
    return Seen(hash=digest.hexdigest(), vocabulary_size=vocabulary.size)
