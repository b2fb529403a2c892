"""A vhost-user front-end with rings of its own, for tests and benchmarks. No part of the daemon."""
