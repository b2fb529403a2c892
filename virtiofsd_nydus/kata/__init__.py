"""A Kata sandbox without a cluster: QEMU's words as Kata forms them, and a pod's files. No part of the daemon."""
