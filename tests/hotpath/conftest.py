from tests.fakeguest.fixtures import daemon, daemon_keeper, guest, image

__all__ = ["daemon", "daemon_keeper", "guest", "image"]
