"""Options of captioning a folder. Light to import."""

from dataclasses import dataclass
from pathlib import Path

from jsonargparse.typing import PositiveInt


@dataclass
class FolderConfig:
    """Caption a folder of images with a trained run."""

    run: Path = Path("runs/caption_flickr8k-ica-seed0")
    """Run folder of a finished captioner."""
    images: Path = Path("images")
    """Folder of images (.jpg, .png, ...), searched with its subfolders."""
    output: Path = Path("captioned")
    """Folder that captions.json and index.html are written into."""
    beam: PositiveInt | None = None
    """Beam width; null takes the run's own."""
    batch_size: PositiveInt = 32
    """Images at once."""
    max_shown: PositiveInt = 50
    """Images on the page; captions.json holds all."""
