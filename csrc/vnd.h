/* vnd.h -- the seam: everything Python may call in the C engine.
 *
 * The engine build (virtiofsd_nydus/engine_build.py) gives this file to cffi, so it holds plain
 * declarations only: no macros but integer constants, no inline code. Every call releases the GIL. C never
 * calls back. Errors are negative errno values unless stated; a function that takes (err, err_len) fills err
 * with one line (what, where, what to do) when it fails.
 *
 * Threads: "control" is any Python thread; "fetch" a thread that serves jobs. Handles are not locked against
 * their own *_free.
 */
#ifndef VND_H
#define VND_H
#include <stdint.h>
#include <stddef.h>

#define VND_ID_MAX 64      /* longest blob id, without the NUL (docs/rafs-format.md 3.8) */
#define VND_ERR_MAX 512    /* size of an error line buffer */
#define VND_QUEUE_MAX 16   /* virtqueues a device has at most, queue 0 (hiprio) included */
#define VND_RING_MAX 1024  /* entries of a virtqueue at most (QEMU's own limit) */
#define VND_REGION_MAX 509 /* guest memory regions (what QEMU's MAX_MEM_SLOTS is answered with) */

/* Why something failed; each is told apart in logs, errors and metrics. */
enum vnd_cause {
    VND_CAUSE_NONE = 0,
    VND_CAUSE_AUTH = 1,     /* the server refused our credentials */
    VND_CAUSE_SCHEME = 2,   /* TLS spoken to a plain server or the reverse; bad certificate */
    VND_CAUSE_NETWORK = 3,  /* unreachable, reset, timeout, 5xx */
    VND_CAUSE_DIGEST = 4,   /* bytes arrived and are not the image's bytes */
    VND_CAUSE_FORMAT = 5,   /* malformed image, metadata or message */
    VND_CAUSE_SPACE = 6,    /* disk full or read-only */
    VND_CAUSE_MISSING = 7,  /* the server does not have the blob */
    VND_CAUSE_DEADLINE = 8, /* not there in time */
    VND_CAUSE_GUEST = 9,    /* the guest broke the protocol */
    VND_CAUSE_IO = 10       /* local input or output error */
};

/* How much a line matters: the numbers of Python's logging. */
enum vnd_level { VND_LEVEL_DEBUG = 10, VND_LEVEL_INFO = 20, VND_LEVEL_WARNING = 30, VND_LEVEL_ERROR = 40 };

/* ---------------------------------------------------------------- engine */
typedef struct vnd_engine vnd_engine;

/* What becomes of a thread's system call that its kind does not need (docs/operations.md has the lists). */
enum vnd_seccomp {
    VND_SECCOMP_NONE = 0, /* no filter */
    VND_SECCOMP_LOG = 1,  /* the kernel's log names it, and it goes on */
    VND_SECCOMP_TRAP = 2, /* a line on standard error names it, and the process ends with status 159 */
    VND_SECCOMP_KILL = 3  /* the process is killed (SIGSYS); the kernel's log names it */
};
enum vnd_thread_kind {
    VND_THREAD_QUEUE = 0, /* serves guests, of images alone */
    VND_THREAD_SHARE = 1  /* serves guests, of host directories too; a host directory's own threads */
};

typedef struct {
    uint32_t read_deadline_ms; /* a guest read that misses fails with EIO after this; 0 = 30000 */
    uint32_t pool_threads;     /* threads for page-cache misses and compressed hits; 0 = 2 */
    uint32_t sync_interval_ms; /* how often written data is made durable; 0 = 30000 */
    uint32_t poll_us;          /* a queue's thread looks for requests that long before it sleeps, at most; 0 = never */
    uint8_t allow_unverified;  /* serve images that carry no chunk digests */
    uint8_t seccomp;           /* enum vnd_seccomp: of the engine's own threads that serve guests */
} vnd_engine_cfg;

/* A line for the log. text is NUL-terminated, one line, without secrets. */
typedef struct {
    uint64_t time_us;  /* CLOCK_REALTIME */
    int32_t level;     /* enum vnd_level */
    int32_t cause;     /* enum vnd_cause */
    uint32_t repeated; /* how often the same line was suppressed since it was last given */
    char text[VND_ERR_MAX];
} vnd_event;

vnd_engine *vnd_engine_new(const vnd_engine_cfg *cfg);
/* Wakes every job_next and event_next with -ESHUTDOWN, stops the engine's own threads. Devices must be freed
 * first. Idempotent. */
void vnd_engine_shutdown(vnd_engine *e);
void vnd_engine_free(vnd_engine *e);
/* Blocks up to timeout_ms; 0 = *ev filled, -ETIMEDOUT, -ESHUTDOWN. One consumer. */
int vnd_event_next(vnd_engine *e, vnd_event *ev, int timeout_ms);

typedef struct {              /* monotonic counters since engine start, all bytes uncompressed unless named */
    uint64_t fuse_requests;   /* requests answered */
    uint64_t fuse_errors;     /* of them with an error other than ENOENT/ENODATA/ENOSYS */
    uint64_t read_bytes;      /* file bytes given to readers */
    uint64_t hits;            /* reads served without parking */
    uint64_t parked;          /* reads that had to wait at least once */
    uint64_t expired;         /* reads that ended by deadline */
    uint64_t pool_reads;      /* ready data that was not in the page cache */
    uint64_t fetch_jobs;      /* range jobs given to fetch threads */
    uint64_t fetched_bytes;   /* compressed bytes fed */
    uint64_t fetched_chunks;  /* chunks made ready by a fetch */
    uint64_t verified_chunks; /* chunks made ready by verifying what was in the cache */
    uint64_t digest_failures; /* chunks refused */
    uint64_t prefetch_bytes;  /* part of fetched_bytes that prefetch asked for */
    uint64_t ring_errors;     /* queues lost to protocol violations */
    uint64_t oldest_wait_us;  /* age of the oldest parked read now, 0 if none */
} vnd_stats;
void vnd_engine_stats(vnd_engine *e, vnd_stats *out);

/* File operations counted, in nydusd's order: getattr readlink open release read statfs getxattr listxattr opendir
 * lookup readdir readdirplus access forget batch_forget. Replies to READ by size: below 1K 4K 16K 64K 128K 512K 1M,
 * more. */
#define VND_FOPS 15
#define VND_READ_SIZES 8
typedef struct {
    uint64_t hits[VND_FOPS];   /* answered, be it with ENOENT, ENODATA or ENOSYS */
    uint64_t errors[VND_FOPS]; /* answered with another error */
    uint64_t read_sizes[VND_READ_SIZES];
} vnd_fop_stats;

/* One request that waits for data. vnd_engine_waiting copies at most max of them, of all transports, and returns their
 * number. */
typedef struct {
    uint64_t nodeid, unique, wait_us;
    uint32_t opcode;
} vnd_waiting;
int vnd_engine_waiting(vnd_engine *e, vnd_waiting *out, int max);

/* ---------------------------------------------------------------- store: one cache directory */
typedef struct vnd_store vnd_store;
typedef struct vnd_blob vnd_blob;

/* Opens work_dir (must exist) and its .virtiofsd-nydus/ side directory. NULL on failure. compressed: chunks are kept
 * as the blob stores them (ID.blob.raw), where that is possible. One per directory, compressed and engine: a second
 * open of the same returns the same store with one more reference. */
vnd_store *vnd_store_open(vnd_engine *e, const char *work_dir, int compressed, char *err, size_t err_len);
void vnd_store_free(vnd_store *s);

/* ---------------------------------------------------------------- rafs: an opened bootstrap */
typedef struct vnd_rafs vnd_rafs;

typedef struct { /* one entry of the image's blob table */
    char id[VND_ID_MAX + 1];
    uint32_t index;
    uint32_t chunk_size_bytes;
    uint32_t chunk_count;
    uint32_t compressor; /* 0 none, 1 lz4_block, 2 gzip, 3 zstd */
    uint32_t digester;   /* 0 blake3, 1 sha256 */
    uint32_t features;
    uint64_t compressed_size_bytes;
    uint64_t uncompressed_size_bytes;
    uint64_t ci_offset, ci_csize_bytes, ci_usize_bytes;
    uint32_t ci_compressor;
    uint32_t cipher; /* 0 none, 1 AES-128-XTS */
    uint8_t cipher_key[32], cipher_iv[16];
    char meta_id[VND_ID_MAX + 1]; /* the blob that holds the chunk table; "" = this one */
    uint64_t prefetch_end;        /* v5: the blob's bytes up to here are to be fetched at mount; 0 = none */
} vnd_blob_info;

typedef struct {
    uint32_t fs_version; /* 5 or 6 */
    uint32_t chunk_size_bytes;
    uint64_t flags; /* superblock flags, docs/rafs-format.md 2.2 */
    uint64_t inode_count;
    uint32_t blob_count;
    uint32_t prefetch_count;
    uint64_t root_ino;
    uint32_t block_size_bytes;
    uint32_t meta_blkaddr; /* v6 */
    uint64_t chunk_table_offset, chunk_table_size_bytes;
    uint64_t blob_table_offset, blob_table_size_bytes;
    uint64_t prefetch_table_offset, prefetch_table_size_bytes;
} vnd_rafs_info;

/* Maps the bootstrap read-only and checks superblock and tables (not the tree). blob_id is the real id of a single
 * inlined blob or NULL. store may be NULL: then metadata is readable and data is not. *cause gets a vnd_cause. */
vnd_rafs *vnd_rafs_open(vnd_engine *e, const char *bootstrap, const char *blob_id, vnd_store *store, int *cause,
                        char *err, size_t err_len);
void vnd_rafs_info_get(vnd_rafs *r, vnd_rafs_info *out);
int vnd_rafs_blob_info(vnd_rafs *r, uint32_t index, vnd_blob_info *out);
/* The store's blob of that index, borrowed; NULL without a store. Python keys its backends by it. */
vnd_blob *vnd_rafs_blob(vnd_rafs *r, uint32_t index);
/* What guests did with this image since it was opened. Only reads that gave bytes count, but in fops every one does. */
#define VND_LATENCIES 8
typedef struct {
    vnd_fop_stats fops;                     /* forgets, which name many inodes at once, are the engine's alone */
    uint64_t read_latencies[VND_LATENCIES]; /* reads by time: up to 200 us, 1 20 50 500 ms, 1 2 s, more */
    uint64_t read_latency_us;               /* sum over all reads */
    uint64_t read_bytes;
    uint64_t reads_at_once, reads_waited;
} vnd_mount_stats;
void vnd_rafs_stats(vnd_rafs *r, vnd_mount_stats *out);
/* on 1: from now on each inode is counted, too; 0: no longer. */
void vnd_rafs_count_files(vnd_rafs *r, int on);
typedef struct { /* of an inode that an operation succeeded on; one inode may have several of these */
    uint64_t ino, data_read, reads, first_read_s; /* CLOCK_REALTIME */
    uint32_t first_read_ns;
    uint32_t hits[VND_FOPS], errors[VND_FOPS], read_sizes[VND_READ_SIZES];
} vnd_file_stats;
/* Copies at most max of them; returns how many there are. */
uint64_t vnd_rafs_file_stats(vnd_rafs *r, vnd_file_stats *out, uint64_t max);
/* Gives each inode that was read since this last gave it, at most max of them; returns their number. Call it until it
 * returns 0. An inode may come twice. */
uint64_t vnd_rafs_latest_read(vnd_rafs *r, uint64_t *inos, uint64_t max);
/* SHA-256 (32 bytes) of the bootstrap as it is mapped. 0 or -EIO. */
int vnd_rafs_bootstrap_digest(vnd_rafs *r, uint8_t *out);
/* The image must not be mounted any more. */
void vnd_rafs_free(vnd_rafs *r);

/* The same reader for tools. Strings are copied out. */
typedef struct {
    uint64_t ino, size_bytes, blocks, mtime_s;
    uint32_t mtime_nsec, mode, nlink, uid, gid, rdev;
    /* Set by file systems that change; zero in an image, where mtime is the only time. */
    uint64_t generation, atime_s, ctime_s;
    uint32_t atime_nsec, ctime_nsec;
    uint32_t blksize_bytes; /* non-zero: atime and ctime are given too */
} vnd_attr;
typedef struct {            /* one directory entry */
    uint64_t ino, next_off; /* next_off: pass as off to go on after this entry */
    uint32_t type;          /* DT_* */
    char name[256];
} vnd_dirent;
typedef struct { /* one chunk of a file */
    uint64_t file_off, coff, uoff;
    uint32_t blob_index, chunk_index, csize_bytes, usize_bytes, flags;
    uint8_t digest[32];
    uint8_t digest_known;
} vnd_chunk_info;
int vnd_rafs_getattr(vnd_rafs *r, uint64_t ino, vnd_attr *out);
int vnd_rafs_lookup(vnd_rafs *r, uint64_t dir_ino, const char *name, uint64_t *ino);
/* Reads at most max entries from off on (0 = start; "." and ".." included). Returns their number, 0 at the end, or
 * -errno. */
int vnd_rafs_readdir(vnd_rafs *r, uint64_t dir_ino, uint64_t off, vnd_dirent *out, int max);
/* Each copies its text and returns its length, or -errno; with buf_len 0 it returns the length needed. */
int64_t vnd_rafs_readlink(vnd_rafs *r, uint64_t ino, char *buf, size_t buf_len);
int64_t vnd_rafs_listxattr(vnd_rafs *r, uint64_t ino, char *buf, size_t buf_len);
int64_t vnd_rafs_getxattr(vnd_rafs *r, uint64_t ino, const char *name, char *buf, size_t buf_len);
/* Gives at most max chunks of a regular file from number first on. Returns their number, 0 at the end, or -errno. */
int vnd_rafs_chunks(vnd_rafs *r, uint64_t ino, uint64_t first, vnd_chunk_info *out, int max);
/* Walks the whole image and writes one line per fault into out, '\n'-separated; stops at max_faults. Returns the number
 * of faults, or -errno. */
int vnd_rafs_check(vnd_rafs *r, int max_faults, char *out, size_t out_len);
/* The digest (32 bytes) that RAFS v5 stores of an inode: 0, -ENODATA in other images, -EIO. */
int vnd_rafs_digest(vnd_rafs *r, uint64_t ino, uint8_t *out);
/* Copies at most max inodes of the prefetch table; returns their number. */
int vnd_rafs_prefetch(vnd_rafs *r, uint64_t *inos, int max);

/* ---------------------------------------------------------------- blobs, jobs */
enum vnd_job_kind {
    VND_JOB_FETCH = 1,  /* get [coff, coff+clen) of the blob and feed it in order */
    VND_JOB_VERIFY = 2, /* nothing to get: hash the chunks of job_chunks, commit */
    VND_JOB_META = 3    /* get [coff, coff+clen): the blob's stored chunk table and its header */
};
typedef struct {
    uint64_t id;
    vnd_blob *blob;
    char blob_id[VND_ID_MAX + 1]; /* the blob to read; a META job may name another than blob's own (meta_id) */
    uint64_t coff, clen;          /* compressed range, bytes */
    uint32_t kind;                /* enum vnd_job_kind */
    uint32_t chunk_count;         /* chunks that lie in the range */
    uint32_t prefetch;            /* 1: prefetch; 0: a reader waits, or is expected because it reads in order */
    uint32_t digester;            /* 0 blake3: hash the views of job_chunks; 1 sha256: C does it */
    int64_t deadline_us;          /* CLOCK_MONOTONIC, of the most urgent reader; 0 = none */
} vnd_job;
typedef struct { /* a decoded chunk; valid until the next feed, commit or end of its job */
    uint32_t chunk_index;
    uint32_t usize_bytes;
    const uint8_t *data;
} vnd_chunk_view;

/* Blocks up to timeout_ms for work: 0, -ETIMEDOUT, -ESHUTDOWN. take_prefetch 0: demand jobs only. */
int vnd_job_next(vnd_engine *e, vnd_job *out, int take_prefetch, int timeout_ms);
/* Takes the next len bytes of the range, borrowed for the call. Decodes what is complete. >= 0: number of chunks now
 * waiting for commit; -ECANCELED: the rest is no longer wanted (call job_end); -EBADMSG: the bytes do not decode;
 * -EINVAL: too many bytes. Feed at most 1 MiB at a time, so that the head of a range is fast. */
int vnd_job_feed(vnd_engine *e, uint64_t job_id, const uint8_t *buf, size_t len);
/* Gives views of the chunks that are decoded and not committed; returns their number. When all are committed it decodes
 * more of the bytes that were fed: call it and commit until it returns 0. */
int vnd_job_chunks(vnd_engine *e, uint64_t job_id, vnd_chunk_view *out, int max);
/* digests: n x 32 bytes for the chunks as job_chunks gave them (ignored, may be NULL, where digester is sha256).
 * C compares, writes, sets the maps and wakes. Returns the number of chunks made ready; -EBADMSG if any digest
 * was wrong (chunks with right ones are kept), -ENOSPC when they are kept in memory only. */
int vnd_job_commit(vnd_engine *e, uint64_t job_id, const uint8_t *digests, int n);
/* Ends the job whatever its state. error 0 or a positive errno with its cause and one line for the log. Readers of
 * chunks that are not ready fail (error != 0), or the chunks are asked for again (error == 0). Returns the bytes
 * that were fed for nothing: of chunks that were ready already or had a wrong digest. */
uint64_t vnd_job_end(vnd_engine *e, uint64_t job_id, int error, int cause, const char *text);
/* Ends a job that failed in a way that another attempt may mend. What was committed stays. What readers want of the rest
 * is asked for again, not before not_before_us (CLOCK_MONOTONIC), until their deadlines; so is prefetch.
 * source_not_before_us: nothing at all is asked of the job's source before, and then one job at a time until one brings
 * bytes; 0: the failure is this job's alone. Nothing is logged: a reader whose deadline passes is told of the last cause
 * and text. Returns as vnd_job_end. */
uint64_t vnd_job_retry(vnd_engine *e, uint64_t job_id, int64_t not_before_us, int64_t source_not_before_us, int cause,
                       const char *text);
/* Names the server that the blob's backend fetches from; 0 unless called. Blobs of one source share its fetch slots, and
 * a server that hangs holds no others. Before the first read. */
void vnd_blob_set_source(vnd_blob *b, uint32_t source);

/* How many compressed bytes a fetch for a miss of this image takes along behind the wanted chunk; 0: none; a value
 * below 128 KiB acts as 128 KiB; 1 MiB unless called. A reader in order gets more where the link is worth it. */
void vnd_blob_set_amplify(vnd_blob *b, uint32_t bytes);
/* Asks for chunks [first, first+n) of a blob, n 0 = to its end, behind all demand. tag names the request for the two
 * functions below. */
int vnd_prefetch(vnd_blob *b, uint32_t first, uint32_t n, uint64_t tag);
void vnd_prefetch_cancel(vnd_engine *e, uint64_t tag);
/* 1: something of that tag is still queued or being fetched; 0: nothing is. */
int vnd_prefetch_pending(vnd_engine *e, uint64_t tag);
/* Returns how many of the chunks that the image names of the blob are ready; *total gets how many it names (0 while its
 * chunk table is not loaded). */
uint64_t vnd_blob_ready(vnd_blob *b, uint64_t *total);
/* The same for chunks [first, first+n). */
uint64_t vnd_blob_ready_range(vnd_blob *b, uint32_t first, uint32_t n, uint64_t *total);
/* Which chunks are ready: chunk i is bit i % 8 of byte i / 8 of bits (zeroed here). Returns how many chunks the blob
 * has, of which the first 8 * bytes are told; 0 while its chunk table is not loaded. */
uint32_t vnd_blob_ready_map(vnd_blob *b, uint8_t *bits, size_t bytes);
/* Returns n so that chunks [0, n) are all that begin before byte end of the blob as it is stored; 0 while its chunk
 * table is not loaded. */
uint32_t vnd_blob_chunks_before(vnd_blob *b, uint64_t end);
/* A descriptor of its own for the file that holds the blob's bytes as files have them, whatever its name is; -ENOENT: there is
 * none (yet), or it holds stored chunks. The caller closes it. */
int vnd_blob_data_file(vnd_blob *b);

/* ---------------------------------------------------------------- vfs and file systems */
typedef struct vnd_vfs vnd_vfs;
enum vnd_session_kind { VND_SESSION_RAFS = 0, VND_SESSION_MIXED = 1 };
vnd_vfs *vnd_vfs_new(vnd_engine *e, int session_kind);
void vnd_vfs_free(vnd_vfs *v); /* unmounts all; no device may use it */
/* path is absolute; missing parents appear as pseudo directories. -EEXIST if mounted there already. */
int vnd_vfs_mount_rafs(vnd_vfs *v, const char *path, vnd_rafs *r);
/* The serial that the next mount gets; inode numbers contain it. A successor that takes over a live session sets it
 * before each of its mounts (1 to 65535; only upwards), so that the inode numbers the kernel holds stay valid. 0 or
 * -EINVAL. */
uint32_t vnd_vfs_next_serial(vnd_vfs *v);
int vnd_vfs_set_next_serial(vnd_vfs *v, uint32_t serial);
/* The directories that only lead to mounts, ascending by inode number: entry index, or -ENOENT past the last. */
typedef struct {
    uint64_t ino, parent; /* of the root: 1 */
    char name[256];
} vnd_directory;
int vnd_vfs_directory(vnd_vfs *v, uint32_t index, vnd_directory *out);
/* For a successor or another host, before its mounts and while nothing is mounted: numbers begin anew... */
int vnd_vfs_restart(vnd_vfs *v); /* 0 or -EBUSY */
/* ...and a directory gets the number that it had. In ascending order. 0, -EINVAL, -EEXIST, -ENOMEM. */
int vnd_vfs_add_directory(vnd_vfs *v, const vnd_directory *directory);
/* Returns once no request is inside the file system: the caller may then free it. -ENOENT. */
int vnd_vfs_umount(vnd_vfs *v, const char *path);

/* ---------------------------------------------------------------- disk: an image as the kernel's EROFS has it */
typedef struct vnd_disk vnd_disk;
/* One flat disk, and a file for each device: the bootstrap, then the blobs' uncompressed bytes where its device slots say.
 * NULL with a line for what EROFS cannot read so (v5, other blocks than 4 KiB, no places). The image must outlive it. */
vnd_disk *vnd_disk_new(vnd_rafs *r, char *err, size_t err_len);
uint64_t vnd_disk_bytes(const vnd_disk *d); /* of the flat disk */
/* Shows it as a directory: "disk", "bootstrap", and each blob by its id. As vnd_vfs_mount_rafs. */
int vnd_vfs_mount_disk(vnd_vfs *v, const char *path, vnd_disk *d);
void vnd_disk_free(vnd_disk *d); /* mounted nowhere, and no device has it */

/* ---------------------------------------------------------------- passthrough: a host directory, read-write */
typedef struct vnd_passthrough vnd_passthrough;
/* A flag: nothing is made, renamed or removed in the source itself nor in its "passthrough", where Kata's runtime-rs
 * binds what a guest may write. */
#define VND_PASSTHROUGH_KEEP_TOP 1
typedef struct {
    uint64_t inodes;     /* known to the guest */
    uint64_t files;      /* open */
    uint64_t cached_fds; /* held for speed alone: closed when idle for a second and by drop_idle */
} vnd_passthrough_stats;
/* source must be a directory. NULL on failure. */
vnd_passthrough *vnd_passthrough_new(vnd_engine *e, const char *source, uint32_t flags, char *err, size_t err_len);
/* A memfd for what a process that goes on with the directory must find again. The caller owns it. Or -errno. */
int vnd_ledger_create(void);
/* Before it is mounted: keeps nodes, open files and what sessions hold of them in that memory (fd stays the caller's), and goes
 * on with what another process left there. owners: numbers of the front-ends that are there still; what others held is dropped.
 * How many open files could not be opened again, or -errno with a line. */
int vnd_passthrough_keep(vnd_passthrough *p, int fd, const uint32_t *owners, uint32_t n_owners, char *err,
                         size_t err_len);
int vnd_vfs_mount_passthrough(vnd_vfs *v, const char *path, vnd_passthrough *p);
/* Closes every descriptor that no open file needs, so that the host can unmount what lies below the directory. */
void vnd_passthrough_drop_idle(vnd_passthrough *p);
void vnd_passthrough_stats_get(vnd_passthrough *p, vnd_passthrough_stats *out);
/* The directory must not be mounted any more. Waits for host calls under way. */
void vnd_passthrough_free(vnd_passthrough *p);

/* Reads for tools and tests by the same path as a guest's read: blocks the caller until the bytes are there.
 * Returns the bytes read, or -errno. */
int64_t vnd_rafs_read(vnd_rafs *r, uint64_t ino, uint64_t off, uint8_t *buf, size_t len);

/* ---------------------------------------------------------------- vhost-user device */
typedef struct vnd_device vnd_device;

typedef struct {
    uint64_t gpa, size_bytes, user_addr, mmap_offset;
    int32_t fd;
} vnd_region;
typedef struct {                                         /* one ring as the front-end has set it */
    uint32_t num;                                        /* entries, 0 = not configured */
    uint32_t flags;                                      /* bit 0: log used ring writes */
    uint64_t desc_addr, used_addr, avail_addr, log_addr; /* front-end user addresses */
    uint16_t base;   /* next avail index; apply writes back where a stopped ring stood */
    uint8_t started; /* a kick (fd or not) was given since the ring was last stopped */
    uint8_t enabled;
    int32_t kick_fd, call_fd, err_fd; /* -1 = none; a changed number means a changed fd */
} vnd_ring_state;
/* All that the front-end has set. It is a value: apply's result does not depend on the order of messages.
 * The caller owns all fds; apply dups those that it keeps. It sees a new fd by a generation number, which the
 * caller raises whenever it stores one. */
typedef struct {
    uint64_t features; /* virtio features acked */
    uint32_t region_count;
    uint32_t region_gen; /* raised on every memory change */
    vnd_region regions[VND_REGION_MAX];
    uint32_t ring_count;
    uint32_t kick_gen[VND_QUEUE_MAX], call_gen[VND_QUEUE_MAX], err_gen[VND_QUEUE_MAX];
    vnd_ring_state rings[VND_QUEUE_MAX];
    int32_t inflight_fd; /* -1: the engine keeps its own */
    uint64_t inflight_offset, inflight_size_bytes;
    uint32_t inflight_gen;
    uint16_t inflight_queues, inflight_queue_size; /* rings and entries per ring that the region was made for */
    /* Of a region that another process has used. goes_on: bits of rings that ran with it until now: they go on where it
     * says, whatever their base is. Another ring does so where its base agrees with it, and begins anew where not. died: that
     * process died; a request that was in flight at two deaths in a row is answered EIO. */
    uint32_t inflight_goes_on;
    uint8_t inflight_died;
    int32_t log_fd; /* dirty log, -1 = none */
    uint64_t log_offset, log_size_bytes;
    uint32_t log_gen;
    uint8_t carries_inflight; /* the front-end takes our state along (DEVICE_STATE): a ring that stops while it logs
                               * leaves requests that wait for data in flight, for vnd_device_inflight */
} vnd_device_state;

enum vnd_device_kind { VND_DEVICE_FS = 0, VND_DEVICE_BLK = 1 };
#define VND_BLK_ID_BYTES 20 /* of GET_ID (virtio 1.2, 5.2.6) */
typedef struct {
    vnd_engine *engine;
    vnd_vfs *vfs;         /* of kind fs what it serves; of both where its threads are known */
    vnd_disk *disk;       /* of kind blk; it and its image must outlive the device */
    const char *blk_id;   /* of kind blk: how the guest knows the disk; as much of it as VND_BLK_ID_BYTES */
    uint32_t kind;        /* enum vnd_device_kind */
    uint32_t queue_count; /* each a thread; of kind fs the first is the high priority queue */
} vnd_device_cfg;
vnd_device *vnd_device_new(const vnd_device_cfg *cfg, char *err, size_t err_len);
/* How log lines name the device's front-end. Before the first apply; 0 until then. */
void vnd_device_set_number(vnd_device *d, uint32_t number);
uint64_t vnd_device_features(int kind); /* virtio feature bits that the engine implements */
/* Brings the device into that state (maps, starts, swaps, enables, stops) and returns when it is. A ring that stops
 * drains for at most drain_ms; its base is written into st. 0, or -errno with a line (bad address, overlap, no
 * memory...). */
int vnd_device_apply(vnd_device *d, vnd_device_state *st, int drain_ms, char *err, size_t err_len);
/* A zeroed, sealed memfd that holds in-flight state for nq rings of qsize entries (libvhost-user's layout), and behind it
 * what a FUSE session must not lose; the caller owns the fd. */
int vnd_inflight_create(uint32_t nq, uint32_t qsize, uint64_t *size_bytes);
/* Of a stopped ring: the heads that were fetched and not answered, oldest first, of which there are at most
 * VND_RING_MAX = max. Their number or -errno. */
int vnd_device_inflight(vnd_device *d, uint32_t ring, uint16_t *heads, int max);
/* Before the ring is started, after an apply with the in-flight region that it is to have: it serves these heads first.
 * They count where the base that it is started with agrees. 0 or -EINVAL. */
int vnd_device_set_inflight(vnd_device *d, uint32_t ring, const uint16_t *heads, int n);

typedef struct { /* what INIT was answered */
    uint64_t flags;
    uint32_t minor, max_write;
    uint16_t max_pages;
} vnd_init_result;
/* 1: *out is filled; 0: no INIT is in force. */
int vnd_device_init_get(vnd_device *d, vnd_init_result *out);
/* Goes on with a session that another process negotiated: no INIT will come. 0, or -EOPNOTSUPP: this engine, with this
 * mount table, would not have answered so. */
int vnd_device_resume(vnd_device *d, const vnd_init_result *init);

/* Drops the FUSE session (RESET_DEVICE, connection loss) but not the memory. */
void vnd_device_reset(vnd_device *d);
void vnd_device_free(vnd_device *d); /* stops everything; the guest's memory is not written any more */

/* ---------------------------------------------------------------- /dev/fuse: the host's own mounts */
typedef struct vnd_fusedev vnd_fusedev;
enum vnd_fusedev_flag {
    VND_FUSEDEV_SHARED = 1, /* all threads read fd itself, so that a successor can take over; else each a clone */
    VND_FUSEDEV_RESUME = 2, /* another process has answered INIT */
    VND_FUSEDEV_RESEND = 4, /* have the kernel send again the requests that it left unanswered */
    VND_FUSEDEV_BACKING = 8 /* have the kernel read files by itself that are wholly in the cache. Not with SHARED: a
                                   * successor would not know which files are open how */
};
/* Serves a descriptor of /dev/fuse that is mounted (it is dupped). NULL on failure. */
vnd_fusedev *vnd_fusedev_new(vnd_engine *e, vnd_vfs *v, int fd, uint32_t threads, uint32_t flags, char *err,
                             size_t err_len);
int vnd_fusedev_ready(vnd_fusedev *d); /* 1: INIT was answered */
/* After the mount table changed: the kernel keeps the attributes of the root until it is told (a supervisor looks at
 * the mount point of a dead server, and must not wait for the one it is to start). 0 or -errno. */
int vnd_fusedev_root_changed(vnd_fusedev *d);
/* 0: the mount is gone (or stop was called); -ETIMEDOUT. */
int vnd_fusedev_wait(vnd_fusedev *d, int timeout_ms);
/* Ends all threads. Requests that are parked stay unanswered: the next server answers them, or the kernel ends them
 * with the last descriptor. Idempotent. */
void vnd_fusedev_stop(vnd_fusedev *d);
void vnd_fusedev_free(vnd_fusedev *d);
/* mount(2) and umount2(2) as they are: 0 or -errno. */
int vnd_mount(const char *source, const char *target, const char *type, uint64_t flags, const char *data);
int vnd_umount(const char *target, int flags);

/* Where the process runs as root: gives up, for good, what serving does not need. Kept are the capabilities CHOWN,
 * DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETUID, SETGID, MKNOD, SETFCAP and SYS_ADMIN, as far as they are
 * held; no supplementary groups, and no_new_privs. Threads and children inherit it: to be called before there are
 * any, and after RLIMIT_NOFILE is raised. Goes on past what it may not do: 0, or the last -errno with its line. */
int vnd_privilege_reduce(char *err, size_t err_len);

/* Confines the calling thread, and those that it starts, to the system calls of its kind; for good. 0 or -errno. */
int vnd_seccomp_confine(int mode, int kind);

/* ---------------------------------------------------------------- pre-content events: the kernel reads our cache
 * files */
typedef struct vnd_precontent vnd_precontent;
/* A fanotify group; fds below are the caller's. fd or -errno: -EPERM without CAP_SYS_ADMIN, -EINVAL: no such class. */
int vnd_precontent_group(void);
/* A private clone of the mount that a file lies on, with that file as its root; opened again by /proc/self/fd/N. */
int vnd_precontent_clone(const char *path);
/* reads 1: reads, opens and closes through the clone raise events; 0: reads no more. 0, -EINVAL: the kernel is older
 * than 6.14; -EOPNOTSUPP: the file system has no such events. */
int vnd_precontent_mark(int group_fd, int clone_fd, int reads);
/* A memfd with what the processes that hold a group share. */
int vnd_precontent_state(void);
/* First of all in a process that goes on for a dead one: takes the descriptor numbers of events that it left
 * unanswered. How many, or -errno. */
int vnd_precontent_reserve(int state_fd);
/* e NULL: this one can only refuse. Both fds are borrowed. */
vnd_precontent *vnd_precontent_new(vnd_engine *e, int group_fd, int state_fd, char *err, size_t err_len);
/* Before start, every blob of the image in its order, in each process. Blocks until the chunk table is here. fd: the
 * file that the kernel reads (dupped), -1: the cache's present one. */
int vnd_precontent_add(vnd_precontent *p, vnd_blob *b, int fd, char *err, size_t err_len);
/* That file, borrowed. Its name may lead to another file by now. */
int vnd_precontent_fd(vnd_precontent *p, uint32_t index);
/* 1: all that the image names of the blob is in that file. */
int vnd_precontent_complete(vnd_precontent *p, uint32_t index);
int vnd_precontent_start(vnd_precontent *p);
/* Readable once the file system has closed its devices: it is gone. */
int vnd_precontent_ended_fd(vnd_precontent *p);
int vnd_precontent_ended(vnd_precontent *p);
void vnd_precontent_set_ended(vnd_precontent *p);
/* Fails every reader that waits with EIO; returns their number. Never while it is started, here or in another
 * process. */
int vnd_precontent_refuse(vnd_precontent *p);
/* Unanswered events stay unanswered. Call it before the images of its blobs are freed and before the engine is shut
 * down. */
void vnd_precontent_free(vnd_precontent *p);
/* The number of the mount at path, which no other mount has or will have until the next boot; or -errno. */
int64_t vnd_mount_id(const char *path);

/* ---------------------------------------------------------------- for those who write images */
/* CRC-32C (Castagnoli) of len bytes: what chunk records hold beside the digest. */
uint32_t vnd_crc32c(const uint8_t *buf, size_t len);
/* AES-128-XTS, one data unit of len >= 16 bytes. 0 or -errno. */
int vnd_xts_encrypt(const uint8_t key[32], const uint8_t iv[16], const uint8_t *src, size_t len, uint8_t *dst);

/* A gzip stream (any number of members) decoded from front to end, and where its chunks can be decoded alone. */
typedef struct vnd_zran vnd_zran;
vnd_zran *vnd_zran_new(uint32_t chunk_size_bytes);
void vnd_zran_free(vnd_zran *z);
/* Decodes into out from in, of which *used bytes are taken; never beyond out_len. Bytes decoded, -EBADMSG, -ENOMEM,
 * -EINVAL (more than 4 GiB at a time). */
int64_t vnd_zran_read(vnd_zran *z, const uint8_t *in, size_t in_len, size_t *used, uint8_t *out, size_t out_len);
/* 1 while a member has begun and not ended: the input may not end here. */
int vnd_zran_in_member(const vnd_zran *z);
/* A chunk begins at the position: number of its context, *slice its offset in what that decodes to, *in_off the
 * position in the gzip stream. Or -errno. Where that context is a new one, its window is to be taken at once. */
int64_t vnd_zran_begin_chunk(vnd_zran *z, uint64_t *in_off, uint64_t *slice);
/* It ends at the position. -E2BIG: the gzip stream has no place to begin anew near enough. */
int vnd_zran_end_chunk(vnd_zran *z, uint64_t *in_off);
/* The window of the context that begin_chunk made last, 0 to 32768 bytes of *len; valid until the next call. They are
 * not kept here, for there are many of them in a large layer. */
const uint8_t *vnd_zran_window(const vnd_zran *z, uint32_t *len);
/* The contexts (40 bytes each, *count of them) as blob.meta holds them, before their windows in turn. Bytes needed;
 * nothing is written if out_len is less. */
uint64_t vnd_zran_table(const vnd_zran *z, uint8_t *out, size_t out_len, uint32_t *count);

#endif
