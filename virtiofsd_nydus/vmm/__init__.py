"""Guests: QEMU and what runs in it."""
