"""On-disk constants and structures of RAFS v6: an EROFS image with extensions, and the data blob beside it.

All integers are little-endian and packed. Sources: the EROFS on-disk format as Linux 6.18 and erofs-utils 1.5 accept it
(superblock, inodes, dirents, xattrs, device slots), and Nydus' RAFS v6 as nydus-image 2.2 and later write it (extended
superblock, blob table, chunk table, blob.meta, table of contents).
"""

import enum
import struct

BLOCK_BITS = 12
BLOCK_BYTES = 1 << BLOCK_BITS

# ---- EROFS superblock, 128 bytes at 1024
SUPER_OFFSET = 1024
SUPER_BYTES = 128
SUPER_MAGIC = 0xE0F5E1E2
FEATURE_COMPAT_RAFS = 0x40000000
FEATURE_INCOMPAT = 0xC  # chunk-based files | device table
DEVICE_SLOT_BYTES = 128
DEVICE_TABLE_OFFSET = 1408  # after the extended superblock; told to the kernel in units of slots
# magic, checksum, feature_compat, blkszbits, extslots, root_nid, inos, build_time, build_time_nsec, blocks,
# meta_blkaddr, xattr_blkaddr, uuid, volume_name, feature_incompat, compression union, extra_devices, devt_slotoff
SUPER = struct.Struct("<IIIBBHQQIIII16s16sIHHH38x")

# ---- RAFS extended superblock, 256 bytes at 1152
EXT_SUPER_OFFSET = SUPER_OFFSET + SUPER_BYTES
# flags, blob_table_offset, blob_table_size, chunk_size, chunk_table_offset, chunk_table_size, prefetch_table_offset,
# prefetch_table_size (bytes)
EXT_SUPER = struct.Struct("<QQIIQQQI204x")


class SuperFlag(enum.IntFlag):
    """Flags of the extended superblock."""

    COMPRESSION_NONE = 0x1
    COMPRESSION_LZ4 = 0x2
    HASH_BLAKE3 = 0x4
    HASH_SHA256 = 0x8
    EXPLICIT_UID_GID = 0x10
    HAS_XATTR = 0x20
    COMPRESSION_GZIP = 0x40
    COMPRESSION_ZSTD = 0x80
    INLINED_CHUNK_DIGEST = 0x100
    ENCRYPTION_NONE = 0x100_0000
    ENCRYPTION_AES_128_XTS = 0x200_0000


# ---- device slot: tag (blob id), blocks, mapped_blkaddr
DEVICE_SLOT = struct.Struct("<64sII56x")
MAPPED_ALIGN_BYTES = 512 << 10  # Nydus starts each blob there in the flat address space

# ---- extended inode, 64 bytes: format, xattr_icount, mode, reserved, size, i_u, ino, uid, gid, mtime, mtime_nsec,
# nlink
INODE = struct.Struct("<HHHHQIIIIQII16x")
INODE_BYTES = 64
NID_BYTES = 32
FORMAT_EXTENDED = 1
LAYOUT_PLAIN = 0 << 1
LAYOUT_INLINE = 2 << 1
LAYOUT_CHUNKED = 4 << 1
CHUNK_FORMAT_INDEXES = 0x20
CHUNK_FORMAT_BITS = 0x1F

# ---- directory entry: nid, nameoff, file type, reserved
DIRENT = struct.Struct("<QHBB")
DIRENT_BYTES = 12

# ---- chunk index of a file: low 16 bits of the chunk's index, blob index + 1 | bits 16..23 of it << 8, block address
CHUNK_INDEX = struct.Struct("<HHI")
CHUNK_INDEX_BYTES = 8

# ---- inline xattrs: a 12-byte header, then entries (name_len, name_index, value_size) padded to 4
XATTR_HEADER_BYTES = 12
XATTR_ENTRY = struct.Struct("<BBH")
# Prefixes the format can hold, longest first where one is the start of another; the ACL ones have no suffix.
XATTR_PREFIXES = (
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"user.", 1),
    (b"trusted.", 4),
    (b"security.", 6),
)
XATTR_NAME_MAX = 255
XATTR_VALUE_MAX = 0xFFFF
XATTR_BODY_MAX = XATTR_HEADER_BYTES + 4 * (0xFFFF - 1)  # i_xattr_icount is 16 bits

# ---- blob table entry, 256 bytes: blob_id, blob_index, chunk_size, chunk_count, compressor, digester, features,
# compressed_size, uncompressed_size, toc_size, ci_compressor, ci_offset, ci_csize, ci_usize, toc_digest, meta_digest,
# meta_size, cipher_iv, cipher
BLOB_ENTRY = struct.Struct("<64sIIIIIIQQIIQQQ32s32sQ8sI36x")
BLOB_ENTRY_BYTES = 256
CIPHER_AES_128_XTS = 1
PLACEHOLDER_ID = "x" * 64  # id of a blob in the bootstrap inlined in that very blob

# ---- chunk table record, 80 bytes: digest, blob_index, flags, csize, usize, coff, uoff, file_offset, index, crc32
CHUNK_RECORD = struct.Struct("<32sIIIIQQQII")


class ChunkFlag(enum.IntFlag):
    """Flags of a chunk record."""

    COMPRESSED = 0x1
    ENCRYPTED = 0x4
    HAS_CRC32C = 0x10


class BlobFeature(enum.IntFlag):
    """Feature bits of a blob: blob table and blob.meta header."""

    ALIGNED = 0x1
    INLINED_FS_META = 0x2
    CHUNK_INFO_V2 = 0x4
    ZRAN = 0x8
    SEPARATE = 0x10
    INLINED_CHUNK_DIGEST = 0x20
    BATCH = 0x80
    ENCRYPTED = 0x100
    HAS_TAR_HEADER = 0x1000_0000
    HAS_TOC = 0x2000_0000
    CAP_TAR_TOC = 0x4000_0000


class Codec(enum.IntEnum):
    """Compression ids of the blob table and of blob.meta."""

    NONE = 0
    LZ4_BLOCK = 1
    GZIP = 2
    ZSTD = 3


class Digester(enum.IntEnum):
    BLAKE3 = 0
    SHA256 = 1


CODEC_FLAG = {
    Codec.NONE: SuperFlag.COMPRESSION_NONE,
    Codec.LZ4_BLOCK: SuperFlag.COMPRESSION_LZ4,
    Codec.GZIP: SuperFlag.COMPRESSION_GZIP,
    Codec.ZSTD: SuperFlag.COMPRESSION_ZSTD,
}
DIGESTER_FLAG = {Digester.BLAKE3: SuperFlag.HASH_BLAKE3, Digester.SHA256: SuperFlag.HASH_SHA256}

# ---- blob.meta: chunk infos (v1, two words each), then a header of one block with the magic at both ends
META_MAGIC = 0xB10BB10B
META_HEADER_BYTES = 4096
# magic, features, ci_compressor, entries, ci_offset, ci_csize, ci_usize, ctx_offset, ctx_size, ctx_count, magic
META_HEADER = struct.Struct("<IIIIQQQQQI4032xI")
CHUNK_INFO_BYTES = 16


class InfoFlag(enum.IntFlag):
    """Flags of a chunk info, v2."""

    COMPRESSED = 0x1
    ZRAN = 0x2
    BATCH = 0x4
    ENCRYPTED = 0x8
    HAS_CRC32C = 0x10


# zran context: in_off, out_off, dict_off, in_len, out_len, dict_len, ctx_byte, ctx_bits
ZRAN_CONTEXT = struct.Struct("<QQQIIIBB2x")

# ---- table of contents entry, 128 bytes: flags, reserved, name, digest, coff, csize, usize
TOC_ENTRY = struct.Struct("<II16s32sQQQ48x")
TOC_FLAG = {Codec.NONE: 1, Codec.ZSTD: 2, Codec.LZ4_BLOCK: 4}
TAR_HEADER_BYTES = 512

# ---- limits: of the fields above and of Nydus' readers
CHUNK_BYTES_MIN = 4 << 10
CHUNK_BYTES_MAX = 16 << 20
BLOBS_MAX = 254  # the kernel takes a power-of-two mask of the device id, whose upper byte holds chunk index bits
TABLE_BYTES_MAX = 128 << 20  # of a chunk table, decoded: csrc/blob/meta.c's limit (held together by a test)
CHUNKS_PER_BLOB_MAX = (1 << 24) - 1
BLOB_BYTES_MAX = 1 << 40
BLOB_UNCOMPRESSED_MAX = 1 << 44
FILE_BYTES_MAX = 1 << 44
NAME_BYTES_MAX = 255
SYMLINK_BYTES_MAX = 4095
PATH_BYTES_MAX = 4095  # no unpacker could make, and no guest name, anything longer
DEPTH_MAX = 2048  # of directories, as many as fit such a path


def align_up(value: int, alignment: int) -> int:
    """value rounded up to a multiple of alignment, a power of two."""
    return (value + alignment - 1) & -alignment


for _struct, _bytes in (
    (SUPER, 128), (EXT_SUPER, 256), (DEVICE_SLOT, 128), (INODE, 64), (DIRENT, 12), (CHUNK_INDEX, 8), (BLOB_ENTRY, 256),
    (CHUNK_RECORD, 80), (ZRAN_CONTEXT, 40), (META_HEADER, 4096), (TOC_ENTRY, 128),
):  # fmt: skip
    if _struct.size != _bytes:
        raise ImportError(f"structure {_struct.format!r} is {_struct.size} bytes, not {_bytes}")
