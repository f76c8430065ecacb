"""The models that are measured: those of the card, by the names that commands take."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

CONFIGS = {name: ROOT / "configs" / f"geneformer_{name}.yaml" for name in ("10m", "106m")}

VOCABULARY = 25_429
"""Tokens of the card's models, specials included."""
