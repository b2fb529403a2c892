"""From directories, tars and OCI layers to RAFS trees and blobs."""
