/* rafs/xattr.c -- inline extended attributes of an EROFS inode (docs/rafs-format.md 3.7).
 *
 * The body is u32 name filter, u8 count of shared attributes (RAFS has none), 7 reserved bytes; then entries of u8
 * name_len, u8 name_index, u16 value_size, the name without its prefix, the value, and padding to 4 bytes.
 */
#include <errno.h>

#include "rafs/internal.h"

#define XATTR_HEADER 12
#define XATTR_ENTRY 4

static const char *const prefixes[] = {
    [1] = "user.",     [2] = "system.posix_acl_access", [3] = "system.posix_acl_default", [4] = "trusted.",
    [6] = "security.",
};

struct xattr {
    const char *prefix, *name;
    const uint8_t *value;
    uint32_t prefix_len, name_len, value_len;
};

/* Gives the entry at *off and moves *off behind it: 1, 0 at the end, -EIO. */
static int xattr_next(const uint8_t *body, uint32_t body_len, uint32_t *off, struct xattr *x)
{
    uint32_t at = *off, index;

    if (at == 0) {
        if (!body_len)
            return 0;
        if (body_len < XATTR_HEADER || body[4] != 0)
            return -EIO;
        at = XATTR_HEADER;
    }
    if (at >= body_len)
        return 0;
    if (body_len - at < XATTR_ENTRY)
        return -EIO;
    x->name_len = body[at];
    index = body[at + 1];
    x->value_len = rafs_le16(body + at + 2);
    at += XATTR_ENTRY;
    if (x->name_len + x->value_len > body_len - at || index >= sizeof(prefixes) / sizeof(prefixes[0]) ||
        !prefixes[index]) {
        return -EIO;
    }
    x->prefix = prefixes[index];
    x->prefix_len = (uint32_t)strlen(x->prefix);
    x->name = (const char *)body + at;
    x->value = body + at + x->name_len;
    /* The prefixes of the two ACLs are whole names; all other names go on behind their prefix. */
    if ((x->name_len == 0) != (index == 2 || index == 3) || x->prefix_len + x->name_len > RAFS_NAME_MAX ||
        memchr(x->name, 0, x->name_len)) {
        return -EIO;
    }
    *off = at + ((x->name_len + x->value_len + 3) & ~3u);
    return 1;
}

int rafs_xattr_list(const uint8_t *body, uint32_t body_len, struct fs_buf *out)
{
    struct xattr x;
    uint32_t off = 0;
    size_t used = 0;
    int rc;

    while ((rc = xattr_next(body, body_len, &off, &x)) > 0) {
        size_t len = x.prefix_len + x.name_len + 1u;

        if (used + len <= out->cap) {
            memcpy(out->at + used, x.prefix, x.prefix_len);
            memcpy(out->at + used + x.prefix_len, x.name, x.name_len);
            out->at[used + len - 1] = 0;
        }
        used += len;
    }
    out->need = used;
    return rc ? rc : out->cap && used > out->cap ? -ERANGE : 0;
}

int rafs_xattr_give(const uint8_t *value, uint32_t len, struct fs_buf *out)
{
    out->need = len;
    if (out->cap && len > out->cap)
        return -ERANGE;
    if (out->cap)
        memcpy(out->at, value, len);
    return 0;
}

int rafs_xattr_get(const uint8_t *body, uint32_t body_len, const char *name, size_t len, struct fs_buf *out)
{
    struct xattr x;
    uint32_t off = 0;
    int rc;

    while ((rc = xattr_next(body, body_len, &off, &x)) > 0) {
        if (len != x.prefix_len + x.name_len || memcmp(name, x.prefix, x.prefix_len) != 0 ||
            memcmp(name + x.prefix_len, x.name, x.name_len) != 0) {
            continue;
        }
        return rafs_xattr_give(x.value, x.value_len, out);
    }
    return rc ? rc : -ENODATA;
}
