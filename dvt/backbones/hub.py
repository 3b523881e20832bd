"""Reach the Hugging Face hub, or do without it: where it does not answer within seconds, its cache alone is used."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub
from huggingface_hub import constants

#: Seconds to wait for the hub's first answer; its own client retries for most of a minute.
PATIENCE = 4.0


@contextmanager
def hub_or_cache() -> Iterator[str | None]:
    """Keep the hub's client to its cache in this block if the hub does not answer; yield why, or None if it does.

    Whatever the hub answers, also a refusal, is left to its client.
    """
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _unreachable()
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, why is not None
    try:
        yield why
    finally:
        constants.HF_HUB_OFFLINE = before


def _unreachable() -> str | None:
    """Ask the hub for anything, and say why there is no answer; None if there is one."""
    found: list[str | None] = [f"no answer within {PATIENCE:.0f} seconds"]

    def ask() -> None:
        try:
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=PATIENCE)
            found[0] = None
        except Exception as error:  # each release of the client raises its own kinds
            found[0] = str(error).splitlines()[0][:120] if str(error) else type(error).__name__

    asking = threading.Thread(target=ask, daemon=True)  # looking up a name has no time limit of its own
    asking.start()
    asking.join(PATIENCE + 0.5)
    return found[0]


def without_hub(what: str, why: str, repository: str | None, file: str, option: str) -> str:
    """Word the one message for something that is neither in the hub's cache nor to be had from the hub.

    Args:
        what: what was asked for, such as "the weights of 'vit_base'".
        why: why the hub cannot be asked.
        repository: where the hub has it, if that is known.
        file: the file to copy from there.
        option: the option that takes the file.
    """
    source = f"{constants.ENDPOINT}/{repository}" if repository else "where they are published"
    return (
        f"cannot get {what}: they are not in the cache of the Hugging Face hub ({constants.HF_HUB_CACHE}), and the hub "
        f"cannot be asked ({why}). What helps:\n"
        f"- a copied file: {file} from {source}, given by {option}\n"
        "- a mirror of the hub: its address in the environment variable HF_ENDPOINT\n"
        "- a copied cache: its folder in HF_HOME, and HF_HUB_OFFLINE=1 to ask no network\n"
        "- for a trial: --weights demo (a small trained ViT that comes with dvt) or --weights random; `dvt demo`"
    )
