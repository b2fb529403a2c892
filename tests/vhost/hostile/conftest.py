from tests.fakeguest.fixtures import daemon, daemon_keeper, guest, image
from tests.vhost.hostile.fixtures import bench, bystander, front

__all__ = ["bench", "bystander", "daemon", "daemon_keeper", "front", "guest", "image"]
