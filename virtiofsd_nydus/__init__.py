"""vhost-user virtio-fs server for Nydus images. Nothing is imported here: start-up of the daemon is on the clock."""

__version__ = "0.1.0"
