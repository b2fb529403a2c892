"""Writes RAFS: bootstraps, blobs, blob.meta. Images are read by the C engine (csrc/rafs), for tools through reader/."""
