"""Reads RAFS images with the engine's own reader, for `check`, `inspect`, `unpack`, the converter and tests."""
