"""The daemon: configuration, mounts, HTTP API, fetch threads, logging."""
