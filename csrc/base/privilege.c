/* base/privilege.c -- what the process may do, reduced at start to what serving needs; see privilege.h. */
#include "base/privilege.h"

#include <errno.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/error.h"

#define BIT(cap) (1ull << (cap))

/* A guest's files: CHOWN to SETFCAP, and DAC_READ_SEARCH for file handles. SYS_ADMIN: trusted.* and security.* xattrs,
 * mounts on this host, pre-content events. */
#define KEPT                                                                                                 \
    (BIT(CAP_CHOWN) | BIT(CAP_DAC_OVERRIDE) | BIT(CAP_DAC_READ_SEARCH) | BIT(CAP_FOWNER) | BIT(CAP_FSETID) | \
     BIT(CAP_SETUID) | BIT(CAP_SETGID) | BIT(CAP_MKNOD) | BIT(CAP_SETFCAP) | BIT(CAP_SYS_ADMIN))

int privilege_get(struct __user_cap_data_struct cap[2])
{
    struct __user_cap_header_struct head = { .version = _LINUX_CAPABILITY_VERSION_3 };

    return syscall(SYS_capget, &head, cap) ? -errno : 0;
}

int privilege_set(struct __user_cap_data_struct cap[2])
{
    struct __user_cap_header_struct head = { .version = _LINUX_CAPABILITY_VERSION_3 };

    return syscall(SYS_capset, &head, cap) ? -errno : 0;
}

/* While CAP_SETPCAP is there still. */
static int drop_bounding(void)
{
    int rc = 0;

    for (unsigned int cap = 0; cap < 64; cap++) {
        int held = prctl(PR_CAPBSET_READ, cap, 0, 0, 0);

        if (held < 0) /* the kernel has no more */
            break;
        if (held && !(KEPT & BIT(cap)) && prctl(PR_CAPBSET_DROP, cap, 0, 0, 0))
            rc = -errno;
    }
    return rc;
}

/* The ambient set shrinks with the others. */
static int drop_held(void)
{
    struct __user_cap_data_struct cap[2];
    int rc = privilege_get(cap);

    for (int i = 0; !rc && i < 2; i++) {
        uint32_t kept = (uint32_t)(KEPT >> (32 * i));

        cap[i].effective &= kept;
        cap[i].permitted &= kept;
        cap[i].inheritable &= kept;
    }
    return rc ? rc : privilege_set(cap);
}

int vnd_privilege_reduce(char *err, size_t err_len)
{
    int rc, failed = 0;

    if (geteuid() != 0)
        return 0;
    syscall(SYS_setgroups, 0, NULL); /* some user namespaces refuse it */
    rc = drop_bounding();
    if (rc)
        failed = fail_line(rc, err, err_len, "the bounding set of capabilities stays as it is: %s", strerror(-rc));
    rc = prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ? -errno : 0;
    if (rc)
        failed = fail_line(rc, err, err_len, "no_new_privs cannot be set: %s", strerror(-rc));
    rc = drop_held();
    if (rc)
        failed = fail_line(rc, err, err_len, "capabilities cannot be given up: %s", strerror(-rc));
    return failed;
}
