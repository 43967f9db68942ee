"""The files that a model is read from: what tells that it is loaded already without loading it."""

from __future__ import annotations

from pathlib import Path

from rlaif.errors import RlaifError
from rlaif.models import ModelRef

Files = tuple[tuple[str, ...] | tuple[str, int, int, int], ...]
"""The folder, and path, size, time and inode of each file in it."""


def files_of(model: str) -> Files | None:
    """The files of a reward model as they are now: equal as long as nobody writes, replaces or removes one.

    None where a folder does not hold all of the model: adapters to another one, a composite, a name of the hub.
    """
    try:
        folder = Path(ModelRef.parse(model).pretrained_path()).resolve()
        if not (folder / "config.json").is_file() or (folder / "adapter_config.json").exists():
            return None
        found = []
        for file in sorted(folder.rglob("*")):
            stat = file.stat()
            found.append((str(file.relative_to(folder)), stat.st_size, stat.st_mtime_ns, stat.st_ino))
    except (RlaifError, OSError):  # loading it will say what is wrong
        return None
    return ((str(folder),), *found)
