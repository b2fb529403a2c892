/* base/calls.h -- the system calls that each kind of thread may make: one line a call, for base/seccomp.c and for the table
 * in docs/operations.md (scripts/list-calls). Included by seccomp.c alone, several times, with CALL defined.
 *
 * CALL(kinds, name, rule, why). kinds: QUEUE, SHARE, FETCH or several with |. rule: what is looked at beside the number.
 *   ANY      nothing
 *   AT_DIR   the first argument is a descriptor, not AT_FDCWD: no name from the root or from the working directory is given
 *            to it by our own code. A filter cannot read the name itself; Landlock holds what an absolute one leads to
 *   NO_EXEC  the third argument (protection) has no PROT_EXEC
 *   THREAD   clone makes a thread of this process and no namespace
 *   OWN      the first argument is this process
 *   SELF     the first argument is 0, the calling thread
 *   NAMING   prctl for the thread's name and for no_new_privs alone
 *   NONBLOCK ioctl for a descriptor's waiting alone (FIONBIO)
 *   OWN_FS   unshare of the file system context (umask) alone
 *   TIGHTEN  seccomp without flags: a filter more, which can only take calls away
 *   NOSYS    answered with ENOSYS; the C library then uses another call
 * A name that one of the two machines lacks stands in the part for the other.
 */

/* ---- memory: malloc, stacks of new threads, the pages that stand in for guest memory that was taken away (sigbus.c) */
CALL(QUEUE | SHARE | FETCH, brk, ANY, "malloc")
CALL(QUEUE | SHARE | FETCH, mmap, NO_EXEC, "malloc; pages in place of guest memory that was taken away")
CALL(QUEUE | SHARE | FETCH, munmap, ANY, "free; memory a guest has given up")
CALL(QUEUE | SHARE | FETCH, mremap, ANY, "realloc")
CALL(QUEUE | SHARE | FETCH, mprotect, NO_EXEC, "malloc's arenas; guard page of a new thread's stack")
CALL(QUEUE | SHARE | FETCH, madvise, ANY, "free; a thread's stack at its end; page cache")

/* ---- threads: locks, ends, signals of the C library */
CALL(QUEUE | SHARE | FETCH, futex, ANY, "mutexes, conditions, joins")
CALL(QUEUE | SHARE | FETCH, rt_sigprocmask, ANY, "begin and end of a thread; abort")
CALL(QUEUE | SHARE | FETCH, rt_sigreturn, ANY, "end of a signal handler")
CALL(QUEUE | SHARE | FETCH, sigaltstack, ANY, "begin and end of a thread under sanitizers and Python's fault handler")
CALL(QUEUE | SHARE | FETCH, sched_yield, ANY, "spinning locks")
CALL(QUEUE | SHARE | FETCH, exit, ANY, "end of a thread")
CALL(QUEUE | SHARE | FETCH, exit_group, ANY, "end of the process by a failed assertion")
CALL(QUEUE | SHARE | FETCH, gettid, ANY, "abort; tells threads apart in locks")
CALL(QUEUE | SHARE | FETCH, getpid, ANY, "abort")
CALL(QUEUE | SHARE | FETCH, tgkill, OWN, "abort")
CALL(QUEUE | SHARE | FETCH, set_robust_list, ANY, "begin of a thread")
CALL(QUEUE | SHARE | FETCH, rseq, ANY, "begin and end of a thread")
CALL(QUEUE | SHARE | FETCH, restart_syscall, ANY, "the kernel's own, after a stop in the middle of a wait")
CALL(QUEUE | SHARE | FETCH, clock_gettime, ANY, "time, where the vDSO does not give it")
CALL(FETCH, clock_nanosleep, ANY, "a pause before the next attempt")
CALL(QUEUE | SHARE, getrusage, ANY, "whether looking for requests pays (haltpoll.c)")
CALL(QUEUE | SHARE, sched_getattr, SELF, "the thread's own time slice (slice.c)")
CALL(QUEUE | SHARE, sched_setattr, SELF, "the thread's own time slice (slice.c)")
CALL(QUEUE | SHARE | FETCH, sched_getaffinity, ANY, "how many processors there are: malloc")
CALL(QUEUE | SHARE | FETCH, getrandom, ANY, "malloc; temporary names; TLS")
CALL(QUEUE | SHARE | FETCH, membarrier, ANY, "publishing to threads that spin")

/* ---- a queue: kicks, calls, what is read for the guest */
CALL(QUEUE | SHARE | FETCH, read, ANY, "kick and wake events; sockets")
CALL(QUEUE | SHARE | FETCH, write, ANY, "call events; wakes another thread")
CALL(QUEUE | SHARE | FETCH, close, ANY, "descriptors that a front-end replaced; files")
CALL(QUEUE | SHARE | FETCH, fcntl, ANY, "locks against other processes; a second descriptor of an open file")
CALL(QUEUE | SHARE, epoll_ctl, ANY, "a kick descriptor that a front-end replaced")
CALL(QUEUE | SHARE, epoll_pwait, ANY, "waits for a kick")
CALL(QUEUE | SHARE | FETCH, ppoll, ANY, "waits")
CALL(QUEUE | SHARE | FETCH, pread64, ANY, "cache files")
CALL(QUEUE | SHARE | FETCH, preadv, ANY, "cache files and shared files, into guest memory")
CALL(QUEUE | SHARE | FETCH, preadv2, ANY, "the same, only what is in the page cache")
CALL(QUEUE | SHARE | FETCH, fstat, ANY, "a cache file was replaced or cut")
CALL(QUEUE | SHARE | FETCH, newfstatat, AT_DIR, "a cache file was replaced or removed")
CALL(SHARE | FETCH, lseek, ANY, "holes of a cache file; a shared directory's position")

/* ---- what a shared directory is asked for (csrc/passthrough): the calls that FUSE operations stand for */
CALL(SHARE | FETCH, openat, AT_DIR, "a component below a directory; cache files below their directory")
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
CALL(SHARE | FETCH, unlinkat, AT_DIR, "UNLINK, RMDIR; a temporary file of the cache")
CALL(SHARE | FETCH, renameat, AT_DIR, "a table of the cache in place of the old one")
CALL(SHARE, renameat2, AT_DIR, "RENAME, RENAME2")
CALL(SHARE, fchmodat, AT_DIR, "SETATTR, mode")
CALL(SHARE, fchownat, AT_DIR, "SETATTR, owner")
CALL(SHARE, utimensat, AT_DIR, "SETATTR, times")
CALL(SHARE | FETCH, ftruncate, ANY, "SETATTR, size; a cache file's size")
CALL(SHARE | FETCH, fallocate, ANY, "FALLOCATE; chunks of the cache given back")
CALL(SHARE, copy_file_range, ANY, "COPY_FILE_RANGE")
CALL(SHARE, fsync, ANY, "FSYNC")
CALL(SHARE | FETCH, fdatasync, ANY, "FSYNC; a table of the cache")
CALL(SHARE, syncfs, ANY, "SYNCFS")
CALL(SHARE | FETCH, pwrite64, ANY, "cache files")
CALL(SHARE | FETCH, pwritev, ANY, "cache files")
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
CALL(SHARE | FETCH, clone, THREAD, "a thread more for calls or fetches that wait")
CALL(SHARE | FETCH, clone3, NOSYS, "its flags cannot be looked at: the C library then uses clone")
CALL(QUEUE | SHARE | FETCH, prctl, NAMING, "the name of a thread; what mode trap says")
CALL(SHARE | FETCH, seccomp, TIGHTEN, "such a thread's own filter, beside the one it inherits")

/* ---- servers that blobs come from */
CALL(FETCH, socket, ANY, "a connection to a registry or proxy")
CALL(FETCH, connect, ANY, "the same")
CALL(FETCH, setsockopt, ANY, "no delay, keep-alive")
CALL(FETCH, getsockopt, ANY, "whether a connection came about")
CALL(FETCH, getsockname, ANY, "the kind of a socket, for Python's object")
CALL(FETCH, getpeername, ANY, "whether a socket is connected, for TLS")
CALL(FETCH, sendto, ANY, "a request")
CALL(FETCH, sendmsg, ANY, "a request")
CALL(FETCH, recvfrom, ANY, "an answer")
CALL(FETCH, recvmsg, ANY, "an answer")
CALL(FETCH, shutdown, ANY, "end of TLS")
CALL(FETCH, ioctl, NONBLOCK, "a socket's waiting")
CALL(FETCH, pselect6, ANY, "waits for an answer")

/* ---- the older calls, which x86-64's C library still uses */
#ifdef __x86_64__
CALL(QUEUE | SHARE, epoll_wait, ANY, "waits for a kick")
CALL(FETCH, poll, ANY, "waits for an answer")
CALL(FETCH, select, ANY, "waits for an answer")
#endif
