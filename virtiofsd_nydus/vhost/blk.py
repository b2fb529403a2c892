"""What a front-end is told of a disk: virtio-blk's configuration space (virtio 1.2, 5.2.4), as vhost-user's GET_CONFIG
gives it. Light: loaded before the daemon answers RUNNING.
"""

import struct

SECTOR_BYTES = 512
BLOCK_BYTES = 4096  # of EROFS
# A request's segments: a ring of 1,024 entries and an indirect table of as many hold them; Linux makes no larger ones.
SEGMENTS_MAX = 254
CONFIG_BYTES_MAX = 256  # VHOST_USER_MAX_CONFIG_SIZE
# capacity (sectors), size_max, seg_max, cylinders, heads, sectors, blk_size; physical_block_exp, alignment_offset,
# min_io_size, opt_io_size; writeback, unused, num_queues. What follows is of features that are not offered: zeroes.
_CONFIG = struct.Struct("<QIIHBBIBBHIBBH")


def pack_config(disk_bytes: int, queue_count: int) -> bytes:
    exponent = (BLOCK_BYTES // SECTOR_BYTES).bit_length() - 1
    return _CONFIG.pack(
        disk_bytes // SECTOR_BYTES, 0, SEGMENTS_MAX, 0, 0, 0, SECTOR_BYTES, exponent, 0, 1, 0, 0, 0, queue_count
    ).ljust(CONFIG_BYTES_MAX, b"\0")
