"""The vhost-user session: messages, their order, and the device state they add up to."""
