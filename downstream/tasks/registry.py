"""Tasks by name."""

from downstream.config import DownstreamConfig
from downstream.protocol import Task
from engine.errors import InputError


def open_task(config: DownstreamConfig) -> Task:
    """The task that `config` names, with its data read.

    Raises:
        InputError: missing or damaged data.
    """
    # imported where needed: one task's dependencies must not keep another from running
    if config.task == "trec6":
        from downstream.tasks.trec import Trec

        return Trec(config.data.path, config.text, seed=config.data.held_out_seed)
    if config.task == "cifar10":
        from downstream.tasks.images import ImageTask

        return ImageTask(config)
    if config.task == "easy_vqa":
        from downstream.tasks.easy_vqa import open_easy_vqa

        return open_easy_vqa(config)
    if config.task == "vqa":
        from downstream.tasks.vqa import open_vqa

        return open_vqa(config)
    raise InputError(f"task '{config.task}' is not known")
