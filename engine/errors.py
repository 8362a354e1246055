"""The two ways a program ends early on purpose, and the exit codes that schedulers read."""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: saved, run the same command again


class InputError(ValueError):
    """The user's mistake: one line that says what is wrong, where, and what to do.

    Programs print the line and exit with code 2; nothing half-written is left behind.
    """


class Fault(Exception):
    """Something outside the user's options ended the run, and the message says all there is to say: exit code 1.

    A final checkpoint that could not be written, a rank that died: no traceback would tell more.
    """


class Requeue(Exception):
    """Training stopped on request after saving; programs exit with code 75."""
