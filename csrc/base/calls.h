/* base/calls.h -- the system calls that each kind of thread may make: one line a call, for base/seccomp.c and for the table
 * in docs/operations.md (scripts/list-calls). Included by seccomp.c alone, several times, with CALL defined.
 *
 * CALL(kinds, name, rule, why). kinds: QUEUE, SHARE or both with |. rule: what is looked at beside the number.
 *   ANY      nothing
 *   AT_DIR   the first argument is a descriptor, not AT_FDCWD: no name from the root or from the working directory is given
 *            to it by our own code. A filter cannot read the name itself; Landlock holds what an absolute one leads to
 *   NO_EXEC  the third argument (protection) has no PROT_EXEC
 *   THREAD   clone makes a thread of this process and no namespace
 *   OWN      the first argument is this process
 *   SELF     the first argument is 0, the calling thread
 *   NAMING   prctl for the thread's name and for no_new_privs alone
 *   OWN_FS   unshare of the file system context (umask) alone
 *   TIGHTEN  seccomp without flags: a filter more, which can only take calls away
 *   NOSYS    answered with ENOSYS; the C library then uses another call
 * A name that one of the two machines lacks stands in the part for the other.
 */

/* ---- memory: malloc, stacks of new threads, the pages that stand in for guest memory that was taken away (sigbus.c) */
CALL(QUEUE | SHARE, brk, ANY, "malloc")
CALL(QUEUE | SHARE, mmap, NO_EXEC, "malloc; pages in place of guest memory that was taken away")
CALL(QUEUE | SHARE, munmap, ANY, "free; memory a guest has given up")
CALL(QUEUE | SHARE, mremap, ANY, "realloc")
CALL(QUEUE | SHARE, mprotect, NO_EXEC, "malloc's arenas; guard page of a new thread's stack")
CALL(QUEUE | SHARE, madvise, ANY, "free; a thread's stack at its end; page cache")

/* ---- threads: locks, ends, signals of the C library */
CALL(QUEUE | SHARE, futex, ANY, "mutexes, conditions, joins")
CALL(QUEUE | SHARE, rt_sigprocmask, ANY, "begin and end of a thread; abort")
CALL(QUEUE | SHARE, rt_sigreturn, ANY, "end of a signal handler")
CALL(QUEUE | SHARE, sigaltstack, ANY, "begin and end of a thread under sanitizers and Python's fault handler")
CALL(QUEUE | SHARE, sched_yield, ANY, "spinning locks")
CALL(QUEUE | SHARE, exit, ANY, "end of a thread")
CALL(QUEUE | SHARE, exit_group, ANY, "end of the process by a failed assertion")
CALL(QUEUE | SHARE, gettid, ANY, "abort; tells threads apart in locks")
CALL(QUEUE | SHARE, getpid, ANY, "abort")
CALL(QUEUE | SHARE, tgkill, OWN, "abort")
CALL(QUEUE | SHARE, set_robust_list, ANY, "begin of a thread")
CALL(QUEUE | SHARE, rseq, ANY, "begin and end of a thread")
CALL(QUEUE | SHARE, restart_syscall, ANY, "the kernel's own, after a stop in the middle of a wait")
CALL(QUEUE | SHARE, clock_gettime, ANY, "time, where the vDSO does not give it")
CALL(QUEUE | SHARE, getrusage, ANY, "whether looking for requests pays (haltpoll.c)")
CALL(QUEUE | SHARE, sched_getattr, SELF, "the thread's own time slice (slice.c)")
CALL(QUEUE | SHARE, sched_setattr, SELF, "the thread's own time slice (slice.c)")
CALL(QUEUE | SHARE, sched_getaffinity, ANY, "how many processors there are: malloc")
CALL(QUEUE | SHARE, getrandom, ANY, "malloc")
CALL(QUEUE | SHARE, membarrier, ANY, "publishing to threads that spin")

/* ---- a queue: kicks, calls, what is read for the guest */
CALL(QUEUE | SHARE, read, ANY, "kick and wake events")
CALL(QUEUE | SHARE, write, ANY, "call events; wakes another thread")
CALL(QUEUE | SHARE, close, ANY, "descriptors that a front-end replaced; files")
CALL(QUEUE | SHARE, fcntl, ANY, "locks against other processes; a second descriptor of an open file")
CALL(QUEUE | SHARE, epoll_ctl, ANY, "a kick descriptor that a front-end replaced")
CALL(QUEUE | SHARE, epoll_pwait, ANY, "waits for a kick")
CALL(QUEUE | SHARE, ppoll, ANY, "waits")
CALL(QUEUE | SHARE, pread64, ANY, "cache files")
CALL(QUEUE | SHARE, preadv, ANY, "cache files and shared files, into guest memory")
CALL(QUEUE | SHARE, preadv2, ANY, "the same, only what is in the page cache")
CALL(QUEUE | SHARE, fstat, ANY, "a cache file was replaced or cut")
CALL(QUEUE | SHARE, newfstatat, AT_DIR, "a cache file was replaced or removed")
CALL(SHARE, lseek, ANY, "holes of a cache file; a shared directory's position")

/* ---- what a shared directory is asked for (csrc/passthrough): the calls that FUSE operations stand for */
CALL(SHARE, openat, AT_DIR, "a component below a directory; cache files below their directory")
CALL(SHARE, open_by_handle_at, ANY, "a node by its handle")
CALL(SHARE, name_to_handle_at, AT_DIR, "a node's handle")
CALL(SHARE, statx, AT_DIR, "GETATTR, LOOKUP")
CALL(SHARE, fstatfs, ANY, "STATFS; whether a network answers for a mount")
CALL(SHARE, readlinkat, AT_DIR, "READLINK")
CALL(SHARE, getdents64, ANY, "READDIR")
CALL(SHARE, mkdirat, AT_DIR, "MKDIR")
CALL(SHARE, mknodat, AT_DIR, "MKNOD")
CALL(SHARE, symlinkat, ANY, "SYMLINK (its first argument is a text)")
CALL(SHARE, linkat, ANY, "LINK, by the magic link of a descriptor")
CALL(SHARE, unlinkat, AT_DIR, "UNLINK, RMDIR; a temporary file of the cache")
CALL(SHARE, renameat, AT_DIR, "a table of the cache in place of the old one")
CALL(SHARE, renameat2, AT_DIR, "RENAME, RENAME2")
CALL(SHARE, fchmodat, AT_DIR, "SETATTR, mode")
CALL(SHARE, fchownat, AT_DIR, "SETATTR, owner")
CALL(SHARE, utimensat, AT_DIR, "SETATTR, times")
CALL(SHARE, ftruncate, ANY, "SETATTR, size; a cache file's size")
CALL(SHARE, fallocate, ANY, "FALLOCATE; chunks of the cache given back")
CALL(SHARE, copy_file_range, ANY, "COPY_FILE_RANGE")
CALL(SHARE, fsync, ANY, "FSYNC")
CALL(SHARE, fdatasync, ANY, "FSYNC; a table of the cache")
CALL(SHARE, syncfs, ANY, "SYNCFS")
CALL(SHARE, pwrite64, ANY, "cache files")
CALL(SHARE, pwritev, ANY, "cache files")
CALL(SHARE, pwritev2, ANY, "WRITE")
CALL(SHARE, getxattr, ANY, "GETXATTR, by the magic link of a descriptor, as the next three")
CALL(SHARE, setxattr, ANY, "SETXATTR")
CALL(SHARE, listxattr, ANY, "LISTXATTR")
CALL(SHARE, removexattr, ANY, "REMOVEXATTR")
CALL(SHARE, umask, ANY, "the guest's umask, for what it makes")
CALL(SHARE, unshare, OWN_FS, "a umask of the thread's own")
CALL(SHARE, setgroups, ANY, "no supplementary groups")
CALL(SHARE, setfsuid, ANY, "owner of what a guest makes")
CALL(SHARE, setfsgid, ANY, "owner of what a guest makes")
CALL(SHARE, geteuid, ANY, "the ids to go back to")
CALL(SHARE, getegid, ANY, "the ids to go back to")
CALL(SHARE, capget, ANY, "set-id bits: CAP_FSETID is put down")
CALL(SHARE, capset, ANY, "set-id bits: CAP_FSETID is put down")

/* ---- threads that are started when they are needed */
CALL(SHARE, clone, THREAD, "a thread more for calls that wait")
CALL(SHARE, clone3, NOSYS, "its flags cannot be looked at: the C library then uses clone")
CALL(QUEUE | SHARE, prctl, NAMING, "the name of a thread; what mode trap says")
CALL(SHARE, seccomp, TIGHTEN, "such a thread's own filter, beside the one it inherits")

/* ---- the older calls, which x86-64's C library still uses */
#ifdef __x86_64__
CALL(QUEUE | SHARE, epoll_wait, ANY, "waits for a kick")
#endif
