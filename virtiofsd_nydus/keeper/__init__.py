"""The process that never dies under a guest: it owns sockets and descriptors, and starts workers (docs/keeper.md)."""
