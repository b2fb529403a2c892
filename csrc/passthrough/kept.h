/* passthrough/kept.h -- records of what a host directory must not lose with its process, in a ledger (base/ledger.h). Written by
 * kept.c, read by restore.c of the next process, which checks each. In host byte order; name and handle follow their record.
 * mount: the place of the mount's record, 0: the source's own.
 */
#ifndef VND_PASSTHROUGH_KEPT_H
#define VND_PASSTHROUGH_KEPT_H
#include <stdint.h>

enum kept_kind { KEPT_MOUNT = 1, KEPT_NODE, KEPT_FILE, KEPT_HELD };

struct kept_mount {
    uint64_t above; /* node of the directory that holds the mount point */
    uint32_t remote, no_fd;
};
struct kept_node {
    uint64_t ino, generation, host_ino, dev;
    uint32_t mount, device, type, handle_bytes;
    int32_t handle_type;
    uint32_t has_place, born, name_len;
    uint64_t place_dir;
    int64_t birth_s;
    uint32_t birth_nsec, padding;
};
struct kept_file {
    uint64_t fh, ino;
    uint32_t flags, padding;
};
struct kept_held {
    uint64_t n; /* first: written in place */
    uint64_t id;
    uint32_t owner, file;
};

#endif
