from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from densepure_rt.smoothing.classifier import SmoothedClassifier as SmoothedClassifier
    from densepure_rt.smoothing.classifier import load as load
    from densepure_rt.smoothing.settings import Settings as Settings

__all__ = ["Settings", "SmoothedClassifier", "load"]


def __getattr__(name: str) -> Any:
    """Import on first use, as `densepure_rt` does."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from densepure_rt.smoothing import classifier

    return getattr(classifier, name)
