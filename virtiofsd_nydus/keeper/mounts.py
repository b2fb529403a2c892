"""What the keeper remembers of the mount table."""

from virtiofsd_nydus.vhost.messages import close_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from virtiofsd_nydus.keeper.protocol import Body, Message


class Mounts:
    """The worker's mount table as bytes and descriptors."""

    def __init__(self) -> None:
        self.gen = 0  # raised by every change
        self.table: Body = {}
        self.records: dict[str, tuple[Body, list[int]]] = {}

    def take(self, message: "Message") -> None:
        """RECORD."""
        self.gen += 1
        table, put, drop = (message.body.get(name) for name in ("table", "put", "drop"))
        if type(table) is dict:
            self.table.update(table)
        if type(drop) is str:
            close_all(self.records.pop(drop, ({}, []))[1])
        if type(put) is dict:
            path = str(put.get("path"))
            close_all(self.records.pop(path, ({}, []))[1])
            self.records[path] = put, message.fds
            message.fds = []
