"""Versions of the peers that are installed here."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

NOT_INSTALLED = "not installed"


def version_of(package: str) -> str:
    """The installed version of a distribution, or NOT_INSTALLED."""
    try:
        return version(package)
    except PackageNotFoundError:
        return NOT_INSTALLED
