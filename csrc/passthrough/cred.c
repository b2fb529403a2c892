/* passthrough/cred.c -- under which ids a new object is made. Linux keeps fsuid, capabilities and groups for each thread;
 * the raw system calls change this thread alone, where glibc's wrappers would change all threads.
 */
#include <errno.h>
#include <sched.h>
#include <sys/fsuid.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "passthrough/internal.h"
#include "base/privilege.h"

/* Gives the thread a file system context of its own, no supplementary groups, and that umask. */
static void prepare_thread(mode_t mask)
{
    /* The one fact that belongs to a thread and not to an engine: whether its context is its own, and the umask there. */
    static _Thread_local mode_t now = (mode_t)-1;

    if (now == mask)
        return;
    if (now == (mode_t)-1) {
        syscall(SYS_setgroups, 0, NULL);
        if (unshare(CLONE_FS))
            return;
    }
    umask(mask);
    now = mask;
}

void pt_cred_back(struct pt_cred *saved)
{
    if (saved->changed) {
        setfsuid(geteuid()); /* with 0 the kernel gives the file system capabilities back too */
        setfsgid(getegid());
        saved->changed = false;
    }
}

int pt_cred_take(const struct fs_caller *who, struct pt_cred *saved)
{
    struct __user_cap_data_struct cap[2];
    uid_t uid = geteuid();

    prepare_thread(who->umask & 0777);
    saved->changed = false;
    if (who->uid == uid && who->gid == getegid())
        return 0;
    if (who->uid == (uint32_t)-1 || who->gid == (uint32_t)-1)
        return -EINVAL;
    saved->changed = true;
    setfsgid(who->gid);
    setfsuid(who->uid);
    if ((gid_t)setfsgid((gid_t)-1) != who->gid || (uid_t)setfsuid((uid_t)-1) != who->uid) {
        pt_cred_back(saved);
        return -EPERM;
    }
    /* Not allowed to write the directory by the ids alone: a group that the request does not tell may have allowed
     * it in the guest. mknod was allowed there as well. */
    if (who->uid && uid == 0 && privilege_get(cap) == 0) {
        cap[0].effective |= cap[0].permitted & (1u << CAP_DAC_OVERRIDE | 1u << CAP_MKNOD);
        privilege_set(cap);
    }
    return 0;
}

bool pt_fsetid_drop(void)
{
    struct __user_cap_data_struct cap[2];

    if (privilege_get(cap) || !(cap[0].effective & 1u << CAP_FSETID))
        return false;
    cap[0].effective &= ~(1u << CAP_FSETID);
    return privilege_set(cap) == 0;
}

void pt_fsetid_back(bool dropped)
{
    struct __user_cap_data_struct cap[2];

    if (dropped && privilege_get(cap) == 0) {
        cap[0].effective |= cap[0].permitted & 1u << CAP_FSETID;
        privilege_set(cap);
    }
}
