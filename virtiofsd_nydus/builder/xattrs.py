"""Which extended attributes of a source go into an image."""

from virtiofsd_nydus.rafs.bootstrap import is_storable_xattr

# Attributes by which overlayfs marks the files of its own layers. Those of the host that made the image mean nothing,
# or mischief, in a guest that stacks it again.
OVERLAYFS_PREFIXES = (b"trusted.overlay.", b"user.overlay.")


def is_kept_xattr(name: bytes, value: bytes) -> bool:
    """Whether the format can hold the attribute, and it is the image's own."""
    return is_storable_xattr(name, value) and not name.startswith(OVERLAYFS_PREFIXES)
