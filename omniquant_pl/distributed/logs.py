"""Log lines that say which process they are from."""

from __future__ import annotations

import logging

from omniquant_pl.distributed.mesh import Mesh

__all__ = ["mark_logs"]


def mark_logs(mesh: Mesh) -> None:
    """Let the project's log lines begin with the process, and drop those that others with the same block repeat."""
    world = mesh.world
    if world.size == 1:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"[process {world.rank} of {world.size}] %(message)s"))
    logger = logging.getLogger(__name__.partition(".")[0])
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if mesh.data.is_first else logging.ERROR)
