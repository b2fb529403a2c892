"""What `virtiofsd-nydus bench` runs. No part of the daemon."""
