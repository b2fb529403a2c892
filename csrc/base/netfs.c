/* base/netfs.c -- see base/netfs.h. */
#include "base/netfs.h"

#include <linux/magic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/vfs.h>

/* linux/magic.h lacks these; each is in its file system's own sources. */
#define CIFS_MAGIC 0xff534d42u
#define GPFS_MAGIC 0x47504653u
#define LUSTRE_MAGIC 0x0bd00bd0u

bool netfs_holds(int fd)
{
    static const uint32_t types[] = {
        NFS_SUPER_MAGIC,   SMB_SUPER_MAGIC,  SMB2_SUPER_MAGIC, CIFS_MAGIC,   FUSE_SUPER_MAGIC,
        V9FS_MAGIC,        CEPH_SUPER_MAGIC, AFS_SUPER_MAGIC,  AFS_FS_MAGIC, CODA_SUPER_MAGIC,
        OCFS2_SUPER_MAGIC, GPFS_MAGIC,       LUSTRE_MAGIC,
    };
    struct statfs st;

    if (fstatfs(fd, &st))
        return true;
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if ((uint32_t)st.f_type == types[i])
            return true;
    return false;
}
