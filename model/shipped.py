"""Where the trained weights lie that come with this package; what they are, model/weights/README.md says."""

from pathlib import Path

SHIPPED_WEIGHTS = Path(__file__).resolve().parent / "weights" / "imcnet-resnet18.safetensors"
