"""Layers in a few words: lines such as "d etc", "f etc/a text", "l b -> etc/a", "h c = etc/a", "w etc/a", "o etc"."""

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

TIME = 1_500_000_000


def make_layer(text: str, number: int = 0) -> bytes:
    """A layer's tar. d directory, f file with content, l symbolic link, h hard link, w whiteout, o opaque, c device,
    p FIFO. Modes, owners and times differ from layer to layer, so that whose attributes win shows."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for at, line in enumerate(text.strip().splitlines()):
            kind, _, rest = line.strip().partition(" ")
            name, _, value = rest.partition(" ")
            info = tarfile.TarInfo(name)
            info.uid, info.gid, info.mtime = 100 * number + 1, 100 * number + 2, TIME + 1000 * number + at
            info.mode = 0o755 - number if kind == "d" else 0o644 - number
            data = b""
            if kind == "d":
                info.type = tarfile.DIRTYPE
                if value:
                    info.pax_headers["SCHILY.xattr.user.mark"] = value
            elif kind == "f":
                data = value.encode()
            elif kind in "lh":
                info.type = tarfile.SYMTYPE if kind == "l" else tarfile.LNKTYPE
                info.linkname, info.mode = value[3:] if kind == "l" else value[2:], 0o777 if kind == "l" else info.mode
            elif kind == "w":
                parent, _, base = name.rpartition("/")
                info.name = f"{parent}/.wh.{base}".lstrip("/")
            elif kind == "o":
                info.name = f"{name}/.wh..wh..opq".lstrip("/")
            elif kind == "c":
                info.type, info.devmajor, info.devminor = tarfile.CHRTYPE, 1, 5
            elif kind == "p":
                info.type = tarfile.FIFOTYPE
            else:
                raise ValueError(line)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def write_layout(folder: Path, layers: list[bytes]) -> None:
    """An OCI image layout of gzip layers, tag "test"."""
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    packed = [put(gzip.compress(data, 1, mtime=0), "application/vnd.oci.image.layer.v1.tar+gzip") for data in layers]
    config = {
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(data).hexdigest()}" for data in layers]},
    }  # fmt: skip
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": put(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": packed,
    }
    entry = put(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
    index = {"schemaVersion": 2, "manifests": [{**entry, "annotations": {"org.opencontainers.image.ref.name": "test"}}]}
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
