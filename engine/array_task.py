"""Which part of a job array this process is."""

import os

from engine.errors import InputError


def array_task(task: int | None, num_tasks: int | None) -> tuple[int, int]:
    """Number of this task, from 0, and number of tasks.

    Args:
        task, num_tasks: what the user gave; None takes Slurm's array, whose indices may begin and step anywhere, or
            the only task where there is none.

    Raises:
        InputError: the number lies outside the tasks.
    """

    def slurm(name: str, default: int) -> int:
        return int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))

    count = num_tasks or slurm("COUNT", 1)
    if task is None:
        # with num_tasks given, the array may be a part of the tasks: its indices are their numbers
        first = 0 if num_tasks is not None else slurm("MIN", 0)
        step = 1 if num_tasks is not None else slurm("STEP", 1)
        task = (slurm("ID", first) - first) // step
    if not 0 <= task < count:
        raise InputError(f"task {task} of num_tasks {count}: tasks count from 0, so give at most {count - 1}")
    return task, count
