import sys
from pathlib import Path

# rafs_writer's decoder and trees serve the builder's tests too.
sys.path.insert(0, str(Path(__file__).parents[1]))
