"""Caption a folder of images: `python downstream/captioning/caption.py --run RUN --images FOLDER --output FOLDER`."""

from downstream.captioning.folder_config import FolderConfig
from engine.program import run_program


def main(config: FolderConfig) -> None:
    """Write captions.json and index.html, with a map for every word."""
    # imported after the options are read, so that --help answers at once
    from downstream.captioning.folder import caption_folder

    caption_folder(config)


if __name__ == "__main__":
    run_program(main, FolderConfig, description="Caption a folder of images with a trained run.")
