"""Is a checkpoint whole?"""

from __future__ import annotations

import errno
import zipfile
import zlib
from pathlib import Path


def is_archive(path: Path) -> bool:
    """Whether a file is one of torch.save, perhaps a damaged one."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # its end is found, and makes no sense
        return True


def damage(path: Path) -> str | None:
    """What is wrong with a file of torch.save, by the CRCs in it, which torch.load does not look at; None: nothing.

    Raises OSError if it cannot be read just now.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        return str(error)
    except OSError as error:
        if error.errno != errno.EINVAL:  # that is of an impossible place in the file
            raise
        return str(error)
