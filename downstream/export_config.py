"""Options of the export of surrogates. Light to import."""

from dataclasses import dataclass
from pathlib import Path


@dataclass
class ExportConfig:
    """Write mined surrogates as label shards."""

    run: Path = Path("runs/cifar10-step1-seed0")
    """Run folder of the first step whose surrogates were mined; of an image task that reads shards."""
    output: Path = Path("data/labels")
    """Folder for label sets; this one gets its own in it, named for the hash of the surrogates' manifest."""
