"""Write the objects of an image set as labels: `python teacher/detect.py --shards IMAGES --output LABELS`.

A detector finds them, or a file of results has them already (`--results`). One label shard for each image shard; array
tasks share the shards out, what is there is skipped, and whoever finds all shards written seals the set.
"""

from engine.program import run_program
from teacher.detect_config import DetectConfig


def main(config: DetectConfig) -> None:
    """Write the label shards of this task's range and, when all are there, the manifest."""
    # torch and torchvision are imported after the options are read, so that --help answers at once
    from teacher.detecting import detect

    detect(config)


def check(config: DetectConfig) -> list[str]:
    """What `--check` prints: detector or results, images and range; nothing is written."""
    from teacher.detecting import check

    return check(config)


if __name__ == "__main__":
    run_program(
        main,
        DetectConfig,
        description="Find the objects in every image of a set and store their masks as label shards.",
        check=check,
    )
