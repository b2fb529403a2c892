"""`mount --kernel`: the kernel's own EROFS over the bootstrap, with the blobs' cache files as its devices.

Complete, nothing of ours stays. Lazy, two processes hold a fanotify group whose events make the kernel's reads wait for
our fetch (csrc/precontent/internal.h): the worker answers them, the guard starts another worker when it dies, and the
worker another guard. launch: what the verbs call; settings: what is passed from process to process.
"""
