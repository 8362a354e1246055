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

    A server that does not answer, a final checkpoint that could not be written: no traceback would tell more, and a
    scheduler may try again.
    """


class SaveFault(Fault):
    """A checkpoint that must not be missing could not be written. All ranks raise it, and the first speaks for them."""


class Requeue(Exception):
    """Training stopped on request after saving; programs exit with code 75."""
