"""OCI: references, registries, layouts, manifests."""
