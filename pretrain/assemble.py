"""The student as it is trained: from its config, with the options that change how it computes."""

import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm

from engine.attempts import describe
from engine.average import check_average
from engine.errors import InputError
from engine.launch import uses_deepspeed
from pretrain.config import Config
from pretrain.model import Student
from pretrain.objective import memory_format


def assemble_student(config: Config, *, num_classes: int, accelerator: Accelerator) -> Student:
    """The student with its memory format, synchronised batch norm and compilation, before the launcher gets it.

    Raises:
        InputError: see `Student` and `check_average`; a backbone that gives no feature maps of such images; or an
            option that the device does not have.
    """
    if config.sync_batch_norm and accelerator.device.type != "cuda":
        raise InputError(
            f"sync_batch_norm needs GPUs, and this runs on {accelerator.device.type}: set it to false; each rank's "
            f"batch norm then sees its own batch"
        )
    check_average(config.ema, accelerator=accelerator)
    student = Student(config, num_classes=num_classes)
    _try(student, config)
    if not uses_deepspeed(accelerator):  # it flattens the weights, and fails on those that are channels-last
        student = student.to(memory_format=memory_format(config))  # type: ignore[call-overload]
    if config.sync_batch_norm:
        student = convert_sync_batchnorm(student)
    if config.compile:
        student.compile()  # in place: the weights keep their names
    return student


def _try(student: Student, config: Config) -> None:
    """Pass one image through the student: many a backbone is built for one size and finds out in its forward only."""
    name, size = config.model.backbone, config.data.image_size
    try:
        with torch.no_grad():
            student.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        raise InputError(
            f"model.backbone '{name}' gives no feature maps of images of {size} px ({describe(error)}): set "
            f"data.image_size to a size that it takes, or take another backbone"
        ) from error
    student.train()
