/* exercise.h -- one seeded sequence of file system calls whose results are told line by line, so that two runs on two
 * file systems can be compared. No line holds what may rightly differ: inode and device numbers, times as such, order
 * of directory entries, sizes of directories.
 *
 * exercise_names.c: one call on a fresh pair of directories, over kinds of targets, callers, directories, flags.
 * exercise_data.c: the bytes of few files, by every way to change them. exercise_tree.c: a tree that lives on, with open
 * and unlinked files, locks, links, ACLs.
 */
#ifndef EXERCISE_H
#define EXERCISE_H
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define OLD_S 1000000000
#define OLD_NSEC 123456789

void names_run(uint32_t cases);
void data_run(uint32_t steps);
void tree_run(uint32_t steps);

/* ---- exercise.c */
uint32_t chance(uint32_t n); /* 0 to n-1, from the seed */
bool one_in(uint32_t n);
/* Starts a line with part, number and call; end_line adds the result: a number, or the error's name. */
void say(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void say_result(long rc);
/* The effective ids of this process, capabilities with them; 0 is root again. No supplementary groups. */
void become(uid_t uid);
uid_t chance_user(void);
/* What there is at a path: type, mode, owner, size, link target, xattrs, a hash of the bytes. before: its stat then,
 * of which is told what has changed. */
void say_state(const char *path, const struct stat *before);
void make_old(const char *path); /* atime and mtime become OLD */
void remove_all(const char *path);
uint64_t hash_bytes(uint64_t hash, const void *data, size_t len);
/* An ACL of three classes and a named user 1001, as an xattr's value: its length. */
size_t make_acl(uint8_t out[64], uint32_t user_bits, uint32_t named_bits, uint32_t group_bits, uint32_t mask_bits);
/* Names of a directory, sorted, "." and ".." apart. */
void say_names(const char *path);

#endif
