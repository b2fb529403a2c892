"""The RAFS writer. Reading is the C engine's alone."""
