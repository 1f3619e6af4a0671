"""Bytes in and out: where every path of the project is opened, and where every file is written.

Local paths today. `b2://bucket/key` and `gs://bucket/key` are refused with a sentence until streaming is built; it goes
into `local`, and nothing outside this file has to change.
"""

import errno
import hashlib
import os
import uuid


def local(path):
    """Path or URL -> path of a local file or folder with that content. It need not exist."""
    path = os.path.expanduser(str(path))
    if "://" in path:
        raise ValueError(f"{path}: {path.split('://')[0]}:// is not built yet; name a local path in its place (for paths.data and "
                         "paths.checkpoint_path, of a copy on this machine)")
    return path


def join(root, relative):
    """Path of the data set's file `relative` (leading slash or not) below root. ValueError when it would leave root."""
    parts = [part for part in relative.replace("\\", "/").split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ValueError(f"'{relative}' points outside the data folder")
    if not parts:
        raise ValueError("a row names no file")
    return os.path.join(root, *parts)


def sha256(path):
    """sha256 of a file's content, as hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write(path, data):
    """Write bytes or text to path: to a temporary name first, then moved, so that a reader sees all of it or nothing."""
    path = str(path)
    temporary = f"{path}.{uuid.uuid4().hex}.part"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)
    except OSError as error:
        reason = "no space left on the disk" if error.errno == errno.ENOSPC else error.strerror
        raise OSError(error.errno, f"not written: {reason}", path) from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
