"""What a user must see while a model is sampled, when no node of ours is running."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("fusedid")


NAMED = "fusedid_named"
"""An attribute of errors whose message already says which node they are about."""


@contextmanager
def named_in_errors(label: str) -> Iterator[None]:
    """Inside, messages about users' mistakes get the name of the node that they are about."""
    try:
        yield
    except ValueError as error:
        if getattr(error, NAMED, False):
            raise
        raise named_error(f"{label}: {error}") from error


def named_error(message: str) -> ValueError:
    """A user's mistake, with a message that names the node. The host shows the type, so it is a plain one."""
    error = ValueError(message)
    setattr(error, NAMED, True)
    return error


def show_on_running_node(text: str) -> None:
    """Writes a text under the node that is running, in whatever frontend is connected, and into the log."""
    log.warning("FusedID: %s", text)
    from comfy_execution.utils import get_executing_context
    from server import PromptServer

    running, server = get_executing_context(), getattr(PromptServer, "instance", None)
    if running is None or not hasattr(server, "send_progress_text"):
        return
    server.send_progress_text(f"FusedID: {text}", running.node_id)
