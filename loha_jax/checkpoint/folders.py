"""The folders of a run's checkpoints on disk, finished and unfinished."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from loha_jax.runtime.processes import of_first_process

if TYPE_CHECKING:
    from etils.epath import Path as EPath


def steps_on_disk(folder: EPath) -> list[int]:
    """Return the steps of the finished checkpoints, as the first process sees them."""
    import orbax.checkpoint as ocp

    return of_first_process([x.step for x in ocp.path.step.standard_name_format().find_all(folder)])


def unfinished(folder: EPath) -> list[str]:
    """Return the names of folders that an interrupted save has left. No save may be going on."""
    import orbax.checkpoint as ocp

    names = [path.name for path in folder.iterdir()]
    return sorted(
        n for n in names if ocp.utils.TMP_DIR_SUFFIX in n and n.partition(".")[0].isdigit()
    )


def remove(folder: EPath) -> None:
    """Remove an unfinished folder; writes of a save that just failed may go on for a moment."""
    for _ in range(50):
        try:
            folder.rmtree()
        except OSError:
            time.sleep(0.1)
        if not folder.exists():
            return
    folder.rmtree()
