"""Path of the trained weights that come with this package; their card is model/weights/README.md."""

from pathlib import Path

SHIPPED_WEIGHTS = Path(__file__).resolve().parent / "weights" / "imcnet-efficientnet_lite0.safetensors"
"""The default weights."""
