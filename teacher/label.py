"""Label an image set with a teacher: `python teacher/label.py --config configs/teacher/<labels>.yaml`.

One label shard for each image shard. Any number of these programs may work on one set at the same time; what is there
is skipped, and whoever finds all shards written seals the set. Resubmitting the same line completes it.
"""

from engine.program import run_program
from teacher.label_config import DEFAULT_LABELS, LabelConfig


def main(config: LabelConfig) -> None:
    """Write the label shards of this task's range and, when all are there, the manifest."""
    # torch and timm are imported after the options are read, so that --help answers at once
    from teacher.labeller import label

    label(config)


def check(config: LabelConfig) -> list[str]:
    """What `--check` prints: teacher, images and range; nothing is written."""
    from teacher.labeller import check

    return check(config)


if __name__ == "__main__":
    run_program(
        main,
        LabelConfig,
        description="Predict where people look in every image of a set and store the maps as label shards.",
        default_config=DEFAULT_LABELS,
        check=check,
    )
