"""The arms of a table that a config names."""

from collections.abc import Sequence

from downstream.config import DownstreamConfig
from engine.errors import InputError


def named_arms(config: DownstreamConfig, known: Sequence[str]) -> list[str]:
    """What `config.arm` says: one arm, several with commas, or all of `config.arms`.

    Raises:
        InputError: none, or one that is not `known`; those that are stand in the message.
    """
    chosen = config.arms if config.arm == "all" else [name.strip() for name in config.arm.split(",")]
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        raise InputError(f"arm '{config.arm}': {unknown or 'none'} not known; take from all, {', '.join(known)}")
    return chosen
