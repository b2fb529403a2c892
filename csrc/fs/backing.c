/* fs/backing.c -- which files the kernel reads by itself; see backing.h. */
#include "fs/backing.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* linux/fuse.h of 6.9; older headers lack them. */
struct fuse_backing_map {
    int32_t fd;
    uint32_t flags;
    uint64_t padding;
};
#define FUSE_DEV_IOC_BACKING_OPEN _IOW(229, 1, struct fuse_backing_map)
#define FUSE_DEV_IOC_BACKING_CLOSE _IOW(229, 2, uint32_t)

#define SHARDS 16
#define BUCKETS 64

struct open_file {
    struct open_file *next;
    uint64_t nodeid, opens;
    int32_t id; /* 0: through the page cache */
};

struct shard {
    pthread_mutex_t lock;
    struct open_file *buckets[BUCKETS];
} __attribute__((aligned(64)));

struct backing {
    int fuse_fd;
    struct shard shards[SHARDS];
};

static uint64_t hash_of(uint64_t nodeid)
{
    return (nodeid * 0x9e3779b97f4a7c15ull) >> 32;
}

static struct open_file **find(struct shard *s, uint64_t nodeid)
{
    struct open_file **at = &s->buckets[hash_of(nodeid) / SHARDS % BUCKETS];

    while (*at && (*at)->nodeid != nodeid)
        at = &(*at)->next;
    return at;
}

static int32_t register_file(const struct backing *b, struct fs *fs, uint64_t ino)
{
    int fd = fs->ops->backing_fd ? fs->ops->backing_fd(fs, ino) : -1;
    struct fuse_backing_map map = { .fd = fd };
    int id;

    if (fd < 0)
        return 0;
    id = ioctl(b->fuse_fd, FUSE_DEV_IOC_BACKING_OPEN, &map);
    close(fd);
    return id > 0 ? id : 0;
}

struct backing *backing_new(int fuse_fd)
{
    struct backing *b = aligned_alloc(64, sizeof(*b));

    if (b) {
        *b = (struct backing){ .fuse_fd = fuse_fd };
        for (int i = 0; i < SHARDS; i++)
            pthread_mutex_init(&b->shards[i].lock, NULL);
    }
    return b;
}

void backing_free(struct backing *b)
{
    if (!b)
        return;
    for (int i = 0; i < SHARDS; i++) {
        for (int k = 0; k < BUCKETS; k++) {
            for (struct open_file *f = b->shards[i].buckets[k], *next; f; f = next) {
                next = f->next;
                free(f);
            }
        }
        pthread_mutex_destroy(&b->shards[i].lock);
    }
    free(b);
}

int32_t backing_open(struct backing *b, uint64_t nodeid, struct fs *fs, uint64_t ino)
{
    struct shard *s = &b->shards[hash_of(nodeid) % SHARDS];
    struct open_file **at, *f;
    int32_t id = 0;

    pthread_mutex_lock(&s->lock);
    at = find(s, nodeid);
    f = *at;
    if (!f) {
        f = malloc(sizeof(*f));
        if (f) {
            *f = (struct open_file){ .nodeid = nodeid, .id = register_file(b, fs, ino) };
            *at = f;
        }
    }
    /* Without memory the open is not counted: another open meanwhile may choose otherwise and fail with EIO. */
    if (f) {
        f->opens++;
        id = f->id;
    }
    pthread_mutex_unlock(&s->lock);
    return id;
}

void backing_release(struct backing *b, uint64_t nodeid)
{
    struct shard *s = &b->shards[hash_of(nodeid) % SHARDS];
    struct open_file **at, *f;

    pthread_mutex_lock(&s->lock);
    at = find(s, nodeid);
    f = *at;
    if (f && --f->opens == 0) {
        uint32_t id = (uint32_t)f->id;

        *at = f->next;
        if (id)
            ioctl(b->fuse_fd, FUSE_DEV_IOC_BACKING_CLOSE, &id);
        free(f);
    }
    pthread_mutex_unlock(&s->lock);
}
