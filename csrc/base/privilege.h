/* base/privilege.h -- capabilities of threads, by the raw calls: libcap is not needed, and glibc's wrappers of some would
 * change every thread.
 */
#ifndef VND_PRIVILEGE_H
#define VND_PRIVILEGE_H
#include <linux/capability.h>

/* Read and set the capabilities of the calling thread, in two words of 32 bits. 0 or -errno. */
int privilege_get(struct __user_cap_data_struct cap[2]);
int privilege_set(struct __user_cap_data_struct cap[2]);

#endif
