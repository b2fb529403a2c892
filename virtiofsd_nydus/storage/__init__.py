"""Backends: where the bytes of a blob are had from."""
