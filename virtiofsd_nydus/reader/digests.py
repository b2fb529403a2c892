"""The digests of a RAFS v5 tree (docs/rafs-format.md 2.7): a file's is made of its chunks', a directory's of its
children's.

They cover content and names' order, no attributes; a chunk's own digest is what reading it is checked against.
"""

import os
import stat
from collections.abc import Iterator

from virtiofsd_nydus.rafs.digest import DigestFunction, digest_function
from virtiofsd_nydus.rafs.layout import Digester, SuperFlag
from virtiofsd_nydus.reader.bootstrap import Bootstrap


def list_wrong_digests(image: Bootstrap) -> Iterator[str]:
    """One line for each inode whose digest is not what its content makes, leaves first. The structure must be sound.
    Nothing of an image without such digests (its root's is zero)."""
    if image.digest(image.root_ino) in (None, bytes(32)):
        return
    sha256 = image.info.flags & SuperFlag.HASH_SHA256 and not image.info.flags & SuperFlag.HASH_BLAKE3
    digest = digest_function(Digester.SHA256 if sha256 else Digester.BLAKE3)
    directories = [("/", image.root_ino)]
    directories += [(entry.path, entry.attr.ino) for entry in image.walk()
                    if stat.S_ISDIR(entry.attr.mode) and entry.path != "/"]  # fmt: skip
    made: dict[int, bytes] = {}  # of directories
    for path, directory in reversed(directories):
        joined = bytearray()
        for entry in image.listdir(directory):
            found = made.pop(entry.ino, None)
            if found is None:
                found = _digest_leaf(image, entry.ino, digest)
                if found != image.digest(entry.ino):
                    yield f"{path.rstrip('/')}/{entry.name}: its digest is not that of its content"
            joined += found
        made[directory] = digest(bytes(joined))
        if made[directory] != image.digest(directory):
            yield f"{path}: its digest is not that of its entries"


def _digest_leaf(image: Bootstrap, ino: int, digest: DigestFunction) -> bytes:
    mode = image.getattr(ino).mode
    if stat.S_ISREG(mode):
        return digest(b"".join(chunk.digest or bytes(32) for chunk in image.chunks(ino)))
    return digest(os.fsencode(image.readlink(ino)) if stat.S_ISLNK(mode) else b"")
