"""Host mounts over /dev/fuse."""
