/* passthrough/passthrough.h -- a directory of the host as a read-write file system (fs_ops and fs_rw_ops of fs/fs.h).
 *
 * Threads: any may call, at the same time. Serving threads call the operations; control threads make, mount, free and
 * ask for numbers (vnd_passthrough_* of vnd.h); up to PT_THREADS threads of this folder's own serve what may take long,
 * and one of them closes idle descriptors once a second. Locks: an open directory's dir_lock, then `lock` (all tables),
 * which is held for table work alone; what asks the host runs outside it. The threads' own lock is taken alone.
 * Ownership: the file system owns its nodes, mounts, open files and descriptors; nodes, mounts and files are counted.
 * Uses base/, store/store.h (struct store_wait) and fs/. Errors are -errno; descriptors that are used up are -ENFILE.
 *
 * Reach. A guest names one component at a time, below a directory it was given. That name is opened O_PATH|O_NOFOLLOW, so
 * neither "..", a path nor a symlink leads anywhere else. Paths are never put together. ".." leads only to a directory
 * that the guest was given before, hence inside the source. Only regular files and directories are opened for real.
 *
 * Descriptors. A node keeps the file handle (name_to_handle_at) and its mount. Each use opens the node anew
 * (open_by_handle_at, about a microsecond); up to PT_CACHE_MAX directories and files that were used recently keep an
 * O_PATH descriptor. A handle holds the inode's generation: a file that was deleted, and whose number another file took,
 * is ESTALE and not the other file. Where a file system has no handles (overlayfs, some FUSE) a node keeps an O_PATH
 * descriptor, up to a quarter of RLIMIT_NOFILE in all host directories together. After that the longest unused lose theirs
 * and are found again by their place: their directory and their name there (places.c). What is found is the node only if
 * number and time of birth are the same (where the host tells no birth, the time of the last change that was seen); else the
 * answer is ESTALE, and the guest's kernel looks the name up anew.
 *
 * Mounts. A mount below the source is known by its mount id. Handles are opened on a descriptor of the very same mount,
 * so that a read-only bind stays read-only. Cached descriptors and those of mounts keep the mount busy on the host: they
 * are closed after PT_IDLE_MS without use and at drop_idle (the API's DELETE). They are found again by the mount point's
 * parent and name, where the mount id must agree. Open files keep their mount busy, as on any host.
 *
 * Identity. A file of the host is its mount, its device and its inode number: one mount may show several devices with the
 * same numbers (overlayfs over two file systems, btrfs subvolumes). The guest sees one device, so its inode number says
 * all three: top bit 0, then 7 bits of the number that mount and device have here, then 40 bits of the host's number.
 * Where either does not fit, a counter under the top bit. So a number stays the same while the guest knows the node,
 * differs between files, and is mostly the same later. If the host replaces a node under the same number, the new node takes the inode
 * number over with a higher generation.
 *
 * Credentials. The guest's kernel has checked permissions; what remains is who owns a new object. It is made under the
 * caller's fsuid and fsgid, with CAP_DAC_OVERRIDE kept, CAP_FSETID gone (so that set-group-id directories behave) and no
 * supplementary groups, which a request does not tell. The umask is the guest's, because it must not count in a directory
 * with a default ACL; so each thread has a file system context of its own.
 *
 * Waiting. Almost all calls end in the host's caches within microseconds and run on the serving thread. Calls that can
 * take long are served by this folder's threads (fuse/detach.c), so that a slow disk below the share delays neither a warm
 * read of an image nor the image's pool: fsync, syncfs, fallocate, copy_file_range and large truncations always; every
 * call on a mount that a network or another process answers for (NFS, FUSE), known by its type; and every call of a guest
 * for a while after one of its own was slow, as when a disk is so busy that writes are held back. A read that misses the page
 * cache is read there once, and then again on the serving thread, which spares a copy.
 */
#ifndef VND_PASSTHROUGH_H
#define VND_PASSTHROUGH_H
#include "fs/fs.h"
#include "vnd.h"

/* Mounts the file system at path: vnd_vfs_mount_passthrough of vnd.h. There is no other entry: the rest of the engine
 * knows it as a struct fs. */

#endif
