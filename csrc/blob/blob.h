/* blob/blob.h -- what is known of a blob's chunks, and how they are stored.
 *
 * chunk.h   a chunk as an image's record has it; an extent of a read; blob ids
 * table.h   all chunks of a blob in one table, checked
 * meta.h    the table that a blob carries at its end, and its file ID.blob.meta
 * codec.h   decoding one chunk; SHA-256        cipher.h  AES-128-XTS
 * zran.h    gzip layers that are entered in the middle
 *
 * Threads: any; nothing here has state but what the caller holds. Locks: none.
 * Ownership: tables and contexts are immutable once built; tables have one owner, contexts are counted.
 * Input is hostile: each function checks what it is given, and says -EINVAL or -EBADMSG with a struct failure.
 * May use: base. No file is opened here, but ID.blob.meta by meta.h's two calls.
 */
#ifndef VND_BLOB_CONTRACT_H
#define VND_BLOB_CONTRACT_H
#include "blob/chunk.h"
#include "blob/cipher.h"
#include "blob/codec.h"
#include "blob/meta.h"
#include "blob/table.h"
#include "blob/zran.h"

#endif
