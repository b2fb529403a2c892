/* blob/meta.h -- the chunk table that a v6 blob carries at its end (docs/rafs-format.md 4): needed where a
 * bootstrap's own records do not say where a chunk lies, that is for batches and for images without records.
 * Everything in it is checked.
 */
#ifndef VND_BLOBMETA_H
#define VND_BLOBMETA_H
#include "blob/table.h"

#define BLOBMETA_HEADER 4096u
/* Blob features, docs/rafs-format.md 4.1 */
#define BLOBMETA_CHUNK_INFO_V2 0x004u
#define BLOBMETA_ZRAN 0x008u
#define BLOBMETA_BATCH 0x080u

/* Whether the sizes that the blob table states can be a chunk table's. */
bool blobmeta_possible(const vnd_blob_info *info);
/* Parses a decoded table (info->ci_usize_bytes bytes) under its header. 0, -EINVAL with a line, -ENOMEM. The table
 * has no digests. */
int blobmeta_parse(struct blobtable **out, const vnd_blob_info *info, const uint8_t *table, const uint8_t *header,
                   struct failure *f);
/* Decrypts what an encrypted blob holds at ci_offset, table and header, in place. 0, -EBADMSG with a line. */
int blobmeta_decrypt(const vnd_blob_info *info, uint8_t *stored, size_t len, struct failure *f);
/* Decodes what the blob holds at ci_offset: ci_csize_bytes of table, then the header. *plain gets malloc'ed
 * ci_usize_bytes. 0, -EBADMSG with a line, -ENOMEM. */
int blobmeta_decode(uint8_t **plain, const vnd_blob_info *info, const uint8_t *stored, size_t len, struct failure *f);
/* Puts the places of meta into the records' table (in place). -EINVAL with a line: the two contradict each other. */
int blobmeta_place(struct blobtable *records, const struct blobtable *meta, const vnd_blob_info *info,
                   struct failure *f);
/* ID.blob.meta in the work directory (docs/rafs-format.md 6.4). read: malloc'ed table and header copied, or -errno. */
int blobmeta_file_read(int dir_fd, const vnd_blob_info *info, uint8_t **plain, uint8_t header[BLOBMETA_HEADER]);
int blobmeta_file_write(int dir_fd, const vnd_blob_info *info, const uint8_t *plain, const uint8_t *header);
/* It led to wrong bytes: the next load fetches the table anew. */
void blobmeta_file_remove(int dir_fd, const vnd_blob_info *info);

#endif
