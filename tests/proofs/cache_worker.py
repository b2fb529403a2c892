"""A process of its own that reads the sample through engine and cache: fill (slowly, until it is killed) or check (all
of it, then prints what was wrong). Used by power_cut.py:

    python -m tests.proofs.cache_worker MODE SAMPLE WORK_DIR SEED
"""

import hashlib
import json
import sys
import time
from pathlib import Path
from random import Random

from tests.proofs.sample import load_sample
from virtiofsd_nydus.engine import Engine, Store
from virtiofsd_nydus.reader.bootstrap import Bootstrap
from virtiofsd_nydus.storage.localfs import LocalfsBackend
from virtiofsd_nydus.storage.pump import FetchPump

SYNC_INTERVAL_MS = 100
# A fill comes in bursts. In the pauses the file system commits what it knows of the files (mounted with commit=1), but
# has no reason yet to write their data: that is when a missing sync shows.
BURST_FILES = 8
PAUSE_S = 1.7
STEP_MAX_S = 0.03


def main(mode: str, sample_dir: str, work_dir: str, seed: str) -> None:
    sample = load_sample(Path(sample_dir))
    engine = Engine(sync_interval_ms=SYNC_INTERVAL_MS)
    pump = FetchPump(engine)
    store = Store(engine, work_dir)
    image = Bootstrap(sample.bootstrap, engine=engine, store=store)
    for blob in image.blobs:
        pump.add_backend(blob.key, LocalfsBackend(str(sample.blob_dir)))
    pump.start()
    random = Random(seed)
    names = sorted(sample.files)
    random.shuffle(names)
    if mode == "fill":
        print("ready", flush=True)
    wrong = []
    for number, name in enumerate(names):
        data = image.read(image.lookup(image.root_ino, name))
        if hashlib.sha256(data).hexdigest() != sample.files[name]:
            wrong.append(name)
        if mode == "fill":
            time.sleep(PAUSE_S if number % BURST_FILES == BURST_FILES - 1 else random.random() * STEP_MAX_S)
    if mode == "fill":
        time.sleep(3600)  # killed here at the latest
    stats = engine.stats()
    print(
        json.dumps(
            {
                "wrong": wrong,
                "hits": stats["hits"],
                "verified": stats["verified_chunks"],
                "fetched": stats["fetched_chunks"],
                "trusted": image.image.ready_chunks(0)[0] - stats["verified_chunks"] - stats["fetched_chunks"],
            }
        ),
        flush=True,
    )
    engine.shutdown()
    pump.join(10)


if __name__ == "__main__":
    main(*sys.argv[1:])
