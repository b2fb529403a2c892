"""HTTP to registries and object stores: connections, login, proxies, health. Knows no image and no chunk."""
