"""The one TileDB context of a process, and what is opened with it to be read.

address  ->  on this machine | in S3  ->  the process' context: few threads, bounded buffers
         ->  an Experiment, or the human one of a Census
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import tiledbsoma

from geneformer_mcore.cells.outside import raise_if_outside
from geneformer_mcore.errors import DataError

_THREADS = 2
_MIB = 1 << 20
_SETTINGS = {
    # TileDB starts one thread per core for each of these unless told otherwise.
    "sm.compute_concurrency_level": str(_THREADS),
    "sm.io_concurrency_level": str(_THREADS),
    "soma.compute_concurrency_level": str(_THREADS),
    "soma.init_buffer_bytes": str(32 * _MIB),
    # Consolidation takes its buffers out of this; the default of 10 GiB makes it slow and greedy.
    "sm.mem.total_budget": str(512 * _MIB),
    # No parallel merge of tiles before a read: in TileDB 2.30 its threads at times give back memory
    # to an allocator that is gone (MergeUnit's destructor), and the process ends with SIGSEGV.
    # Without it reads are as fast.
    "sm.query.sparse_global_order.preprocess_tile_merge": "0",
}
_PUBLIC_S3 = {
    # Where the Census lies, open to all.
    "vfs.s3.region": "us-west-2",
    "vfs.s3.no_sign_request": "true",
    # Reading from afar waits more than it works.
    "sm.io_concurrency_level": "16",
}

HUMAN = "census_data/homo_sapiens"
"""Where the human Experiment lies in a Census."""

FAILURES = (tiledbsoma.SOMAError, RuntimeError, KeyError, TypeError, ValueError, OSError)
"""What reading a damaged or missing SOMA object raises."""

_contexts: dict[bool, tuple[int, tiledbsoma.SOMATileDBContext]] = {}


def soma_context(address: str = "") -> tiledbsoma.SOMATileDBContext:
    """This process' context for what lies at `address` (a path or URI).

    s3:// is read unsigned in the Census' region, unless the environment names a user of AWS: then
    TileDB's own rules hold. DataError in a child forked after TileDB was used: it would hang.
    """
    is_public = address.startswith("s3://") and not _has_aws_user()
    if is_public not in _contexts:
        settings = _SETTINGS | (_PUBLIC_S3 if is_public else {})
        context = tiledbsoma.SOMATileDBContext(tiledb_config=settings)
        _contexts[is_public] = (os.getpid(), context)
    if any(owner != os.getpid() for owner, _ in _contexts.values()):
        raise DataError(
            "a store cannot be used in a process forked after TileDB was used in its parent: it "
            "would hang. Remedy: start the process with the method `spawn`, or use a thread."
        )
    return _contexts[is_public][1]


def _has_aws_user() -> bool:
    return any(name in os.environ for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE"))


def open_experiment(address: str) -> Any:
    """The Experiment at `address`, or the human one of the Census there, open for reading.

    DataError if there is neither.
    """
    try:
        found = tiledbsoma.open(address, context=soma_context(address))
        for part in HUMAN.split("/"):
            if found.soma_type == "SOMACollection" and part in found:
                found = found[part]
        is_experiment = found.soma_type == "SOMAExperiment" and "obs" in found
    except FAILURES as error:
        raise unreadable(address, "cannot be opened as a SOMA Experiment", error) from error
    if not is_experiment:
        kind = found.soma_type
        found.close()
        raise DataError(
            f"{address}: a {kind}, and a SOMAExperiment with obs is needed. Remedy: name the "
            f"Experiment, or a Census, which holds one as {HUMAN}."
        )
    return found


def unreadable(name: str, what: str, error: Exception) -> DataError:
    """The error for a SOMA object that fails when it is read. Raises another one at once if that is
    no fault of the object's (see outside)."""
    raise_if_outside(name, error)
    reason = str(error).split("\n")[0]
    return DataError(
        f"{name}: {what}: {reason}. Remedy: check the address and the filter; get a damaged copy "
        "again."
    )


def last_write_ms(address: str) -> int:
    """When the array at `address` was last written, in ms since 1970, by its fragments' names.

    0 for one that does not lie on this machine: to list it would cost a request.
    """
    url = urlparse(address)
    if url.scheme not in ("", "file"):
        return 0
    names = (path.name for path in Path(unquote(url.path), "__fragments").glob("__*"))
    return max((int(name.split("_")[3]) for name in names), default=0)
