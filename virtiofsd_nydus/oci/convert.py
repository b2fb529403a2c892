"""From an OCI image to a Nydus image: one blob of each layer, one bootstrap of all, the manifest pushed last.

Every layer streams: pulled, read as a tar, cut into chunks and spooled as a blob in the work directory (its digest, and
so its name, is known at the end only), then pushed. Two layers are under way at a time, so that one's transfer fills
the other's waits; the result does not depend on it.
"""

import errno
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from virtiofsd_nydus.builder.image import BuildOptions, Layer, LayerSource, MergedImage, build_layer, merge_layers
from virtiofsd_nydus.errors import Cause, Failure, UsageFailure
from virtiofsd_nydus.oci.manifest import (
    ANNOTATION_BOOTSTRAP,
    ANNOTATION_FS_VERSION,
    LAYER_TYPES,
    MEDIA_CONFIG,
    MEDIA_INDEX,
    MEDIA_LAYER_GZIP,
    MEDIA_MANIFEST,
    MEDIA_NYDUS_BLOB,
    NYDUS_ARTIFACT_TYPE,
    Descriptor,
    Manifest,
    Platform,
    digest_of,
    get_host_platform,
    load_json,
    parse_index,
)
from virtiofsd_nydus.oci.nydus_image import (
    describe_blob,
    describe_file,
    make_config,
    make_index,
    make_manifest,
    write_bootstrap_layer,
)
from virtiofsd_nydus.oci.reference import ARCHIVES, DOCKER, Reference
from virtiofsd_nydus.oci.signatures import sign_manifest
from virtiofsd_nydus.oci.store import ImageStore, VerifiedReader, find_manifest, read_document
from virtiofsd_nydus.oci.workfolder import make_work_folder
from virtiofsd_nydus.rafs.blob import META_BYTES_MAX

if TYPE_CHECKING:
    from virtiofsd_nydus.builder.dictionary import ChunkDictionary

LAYERS_AT_A_TIME = 2
# How long layers under way are waited for when the run fails or is interrupted.
LEAVE_S = 3.0
Item = TypeVar("Item")
Result = TypeVar("Result")


class Progress(Protocol):
    """Told how far things are. Called from several threads."""

    def start(self, phase: str, digest: str, total_bytes: int) -> None:
        """phase: "convert" (bytes of the source layer) or "push" (bytes of the blob)."""
        ...

    def advance(self, phase: str, digest: str, count_bytes: int) -> None:
        """count_bytes may be negative: an upload began anew."""
        ...


@dataclass
class LayerResult:
    """What became of a layer. Sizes in bytes; blob_* are empty for a layer without file data."""

    source_digest: str
    source_bytes: int
    blob_digest: str
    blob_bytes: int
    files: int
    file_bytes: int
    chunks: int
    unique_bytes: int  # of file_bytes, what is in the layer's own chunks
    stored_bytes: int  # what those take in the blob
    deduplicated_bytes: int  # what is not stored again, the dictionary's chunks among it
    dictionary_bytes: int
    pushed: bool  # False: the destination had it
    seconds: float


@dataclass
class ConvertResult:
    source: str
    target: str
    source_digest: str
    manifest_digest: str
    platform: str
    bootstrap_bytes: int
    source_bytes: int  # of all layers, as pulled
    target_bytes: int  # of all blobs and the bootstrap layer, as pushed
    seconds: float
    unused_blobs: list[str] = field(default_factory=list)  # made, but nothing of the image is in them
    layers: list[LayerResult] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Stopped(Exception):
    """Another layer failed."""


class _Silent:
    def start(self, phase: str, digest: str, total_bytes: int) -> None:
        pass

    def advance(self, phase: str, digest: str, count_bytes: int) -> None:
        pass


@dataclass(frozen=True)
class Place:
    """An image's source or destination: a store, and which image of it."""

    store: ImageStore
    reference: Reference


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """build: of the image. platform: of an index's images the one to convert (default: this host's). merge_platform:
    the tag is an index of the Nydus image and the OCI image, which is copied, so that each client finds what it knows;
    an image that refers to the OCI layers (build.oci_ref) always is, for it needs them. work_dir: where blobs are
    spooled and tables go (default: TMPDIR), about the size of the two largest layers. dictionary: chunks of an image
    whose blobs are at the target. sign_key: private key that signs what the tag names. publish: False leaves the
    image under its digest, for an index that will name it."""

    build: BuildOptions
    platform: Platform | None = None
    merge_platform: bool = False
    work_dir: Path | None = None
    dictionary: "ChunkDictionary | None" = None
    sign_key: Path | None = None
    publish: bool = True


def convert_image(
    source_place: Place, target_place: Place, wanted: ConvertOptions, progress: Progress | None = None
) -> ConvertResult:
    """Converts an image and makes it visible as the destination's tag.

    Nothing is visible at the target until all of it is there. A run that was interrupted is simply run again: the same
    layer makes the same blob (unless encrypted), and what the target has is not pushed again. What a killed run left in
    its work folder goes with the next run there. Raises Failure."""
    source, source_ref = source_place.store, source_place.reference
    target, target_ref = target_place.store, target_place.reference
    options, work_dir = wanted.build, wanted.work_dir
    merge_platform = wanted.merge_platform or options.oci_ref
    began = time.monotonic()
    options = replace(options, diff_id=True, spill_dir=str(work_dir) if work_dir is not None else options.spill_dir)
    if target_ref.transport in ARCHIVES:
        raise Failure(f"{target_ref}: an archive can be a source only", Cause.FORMAT)
    if target_ref.digest:
        raise Failure(f"{target_ref}: a destination has a tag, its digest is not known before", Cause.FORMAT)
    manifest, config, of_platform = read_source(source, source_ref, wanted.platform)
    if wanted.publish and is_same_place(source_ref, target_ref):
        refuse_overwriting(source, source_ref, target_ref, manifest, keeps_source=merge_platform)
    try:
        with make_work_folder(work_dir) as folder:
            run = _Conversion(source, target, options, folder, progress or _Silent(), wanted.dictionary)
            run.require_dictionary()
            built = run.convert_layers(manifest.layers, list_diff_ids(config, manifest, str(source_ref)))
            merged = merge_layers(
                [layer for layer, _ in built], options=options, dictionary=wanted.dictionary, keep_trees=False
            )
            bootstrap, diff_id = run.push_bootstrap(merged)
            blobs = [describe_blob(info) for info in merged.blobs]
            ids = [describe_blob(layer.blob_info).hex if layer.blob_info else layer.blob_id for layer, _ in built]
            new_config = make_config(config, ids, blobs, diff_id)
            config_descriptor = run.push_bytes(new_config, MEDIA_CONFIG, "config")
            data = make_manifest(config_descriptor, [*blobs, bootstrap], manifest.annotations)
            if merge_platform:
                run.copy_image(manifest)
                target.put_manifest(data, MEDIA_MANIFEST, None)
                data, media_type = make_index(manifest, data, of_platform), MEDIA_INDEX
            else:
                media_type = MEDIA_MANIFEST
            publish(target_place, data, media_type, wanted)
    except OSError as error:
        raise Failure(
            f"cannot work in {work_dir or tempfile.gettempdir()}: {error.strerror or error} (--work-dir)",
            Cause.SPACE if error.errno in (errno.ENOSPC, errno.EDQUOT) else Cause.IO,
        ) from error
    used = {info.blob_id for info in merged.blobs}
    return ConvertResult(
        str(source_ref),
        str(target_ref),
        manifest.descriptor.digest,
        digest_of(data),
        str(of_platform),
        len(merged.bootstrap),
        sum(layer.size for layer in manifest.layers),
        sum(blob.size for blob in blobs) + bootstrap.size,
        time.monotonic() - began,
        sorted({layer.blob_id for layer, _ in built} - used),
        [result for _, result in built],
    )


def publish(place: Place, data: bytes, media_type: str, wanted: ConvertOptions) -> None:
    """Has the tag name a manifest or an index. It is signed before, so that no reader finds it unsigned."""
    if wanted.sign_key is not None or not wanted.publish:
        place.store.put_manifest(data, media_type, None)
    if wanted.sign_key is not None:
        described = Descriptor(media_type, digest_of(data), len(data))
        sign_manifest(place.store, described, place.reference.name, wanted.sign_key)
    if wanted.publish:
        place.store.put_manifest(data, media_type, place.reference.tag)


def convert_platforms(
    source_place: Place, target_place: Place, wanted: ConvertOptions, progress: Progress | None = None
) -> list[ConvertResult]:
    """Converts the image of every platform of an index, one after the other, and has the destination's tag name an
    index of them all (merge_platform: with the OCI images beside them). Raises Failure."""
    source, source_ref = source_place.store, source_place.reference
    target, target_ref = target_place.store, target_place.reference
    data, _ = source.get_manifest(source_ref.version)
    found = load_json(data, str(source_ref))
    if not isinstance(found.get("manifests"), list):
        raise Failure(f"{source_ref} is the image of one platform, not an index of several", Cause.FORMAT)
    # Attestations have the platform unknown/unknown.
    wanted_entries = [
        entry
        for entry in parse_index(data, str(source_ref))
        if not entry.is_nydus and entry.platform is not None and entry.platform.os != "unknown"
    ]
    if not wanted_entries:
        raise Failure(f"{source_ref}: its index names no image with a platform", Cause.FORMAT)
    keeps = wanted.merge_platform or wanted.build.oci_ref
    if is_same_place(source_ref, target_ref) and not keeps:
        there = _digest_of_tag(target, target_ref.tag)
        if there == digest_of(data):
            raise UsageFailure(
                f"{target_ref} is the image to convert, which nothing would name any more: give the Nydus image "
                "another tag, or both one by --merge-platform"
            )
    results: list[ConvertResult] = []
    entries: list[Any] = []
    for entry in wanted_entries:
        of_entry = Place(source, replace(source_ref, tag="", digest=entry.descriptor.digest))
        one = replace(wanted, platform=entry.platform, publish=False, sign_key=None)
        result = convert_image(of_entry, target_place, one, progress)
        results.append(result)
        made, _ = target.get_manifest(result.manifest_digest)
        document = load_json(made, str(target_ref))
        assert entry.platform is not None
        entries += document.get("manifests") or [
            {
                **Descriptor(MEDIA_MANIFEST, result.manifest_digest, len(made)).to_json(),
                "artifactType": NYDUS_ARTIFACT_TYPE,
                "platform": entry.platform.to_json(),
            }
        ]
    index = {"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": entries}
    publish(target_place, json.dumps(index, separators=(",", ":")).encode(), MEDIA_INDEX, wanted)
    return results


def _digest_of_tag(store: ImageStore, tag: str) -> str:
    try:
        return digest_of(store.get_manifest(tag)[0])
    except Failure as failure:
        if failure.cause is Cause.MISSING:
            return ""
        raise


def is_same_place(source: Reference, target: Reference) -> bool:
    """Whether both are in one repository or one layout."""
    if source.transport != target.transport:
        return False
    if source.transport == DOCKER:
        return (source.api_host, source.repo) == (target.api_host, target.repo)
    return source.path.resolve() == target.path.resolve()


def refuse_overwriting(
    source: ImageStore, source_ref: Reference, target_ref: Reference, manifest: Manifest, *, keeps_source: bool
) -> None:
    """Raises UsageFailure where the target's tag is the one that the source is found by: the OCI image would be lost.
    An index of both keeps it, unless the source is an index, whose other platforms that would drop."""
    found = digest_of(source.get_manifest(source_ref.version)[0])
    try:
        there = digest_of(source.get_manifest(target_ref.tag)[0])
    except Failure as failure:
        if failure.cause is Cause.MISSING:
            return
        raise
    if there == found and not (keeps_source and found == manifest.descriptor.digest):
        raise UsageFailure(
            f"{target_ref} is the image to convert, which nothing would name any more: give the Nydus image another tag"
            + ("" if keeps_source else ", or both one by --merge-platform")
        )


def list_diff_ids(config: dict[str, Any], manifest: Manifest, what: str) -> list[str]:
    """The digests of the layers' decoded tars, as the image's configuration has them; empty where it has none."""
    rootfs = config.get("rootfs")
    found = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not found:
        return []
    if not isinstance(found, list) or len(found) != len(manifest.layers):
        raise Failure(
            f"{what}: the configuration tells of other layers than the manifest: the image was put together wrong",
            Cause.FORMAT,
        )
    return [str(one) for one in found]


def read_source(
    source: ImageStore, reference: Reference, platform: Platform | None
) -> tuple[Manifest, dict[str, Any], Platform]:
    """The manifest to convert, its configuration and platform, checked to be one that can be converted."""
    manifest = find_manifest(source, reference.version, platform or get_host_platform(), nydus=False)
    if manifest.bootstrap_layer is not None:
        raise Failure(f"{reference} is a Nydus image already", Cause.FORMAT)
    if not manifest.layers:
        raise Failure(f"{reference} has no layers: there is nothing to convert", Cause.FORMAT)
    for layer in manifest.layers:
        if layer.media_type not in LAYER_TYPES:
            raise Failure(
                f"{reference}: layer {layer.digest} is of type {layer.media_type!r}, not a tar that can be converted",
                Cause.FORMAT,
            )
    config = load_json(read_document(source, manifest.config, f"{reference}: configuration"), str(reference))
    found = Platform(str(config.get("os", "")), str(config.get("architecture", "")), str(config.get("variant") or ""))
    if platform is not None and (found.os, found.architecture) != (platform.os, platform.architecture):
        raise Failure(f"{reference}: is for {found}, not for {platform} (--platform)", Cause.MISSING)
    return manifest, config, found


class _Conversion:
    """One run: the layers under way, and what stops them all when one fails."""

    def __init__(
        self,
        source: ImageStore,
        target: ImageStore,
        options: BuildOptions,
        folder: Path,
        progress: Progress,
        dictionary: "ChunkDictionary | None" = None,
    ) -> None:
        self._source = source
        self._target = target
        self._options = options
        self._folder = folder
        self._progress = progress
        self._dictionary = dictionary
        self._stop = threading.Event()

    def require_dictionary(self) -> None:
        """The dictionary's blobs must be at the target, for the image will refer to them."""
        for info in self._dictionary.blobs if self._dictionary is not None else ():
            if len(info.table) and not self._target.has_blob(describe_blob(info)):
                raise Failure(
                    f"{self._target.name}: blob {info.blob_id[:12]} of the chunk dictionary is not there: "
                    "push the dictionary's image to it first",
                    Cause.MISSING,
                )

    def convert_layers(
        self, layers: tuple[Descriptor, ...], diff_ids: Sequence[str] = ()
    ) -> list[tuple[Layer, LayerResult]]:
        """Converts the layers; results are in the image's order. A layer that occurs twice is converted once."""
        unique = {layer.digest: layer for layer in layers}
        for layer in unique.values():
            self._progress.start("convert", layer.digest, layer.size)
        # The largest first: the last to end is then a short one.
        order = sorted(unique.values(), key=lambda layer: -layer.size)
        results = run_at_a_time(self._convert_layer, order, LAYERS_AT_A_TIME, self._stop)
        done = {layer.digest: result for layer, result in zip(order, results, strict=True)}
        for layer, diff_id in zip(layers, diff_ids, strict=bool(diff_ids)):
            if diff_id.startswith("sha256:") and done[layer.digest][0].diff_id != diff_id:
                raise Failure(
                    f"{self._source.name}: layer {layer.digest[7:19]} does not have the content that the image's "
                    f"configuration says (diff_id {diff_id[:19]}): the image was put together wrong",
                    Cause.DIGEST,
                )
        return [done[layer.digest] for layer in layers]

    def push_bootstrap(self, merged: MergedImage) -> tuple[Descriptor, str]:
        """The bootstrap layer's descriptor, and the digest of its tar (diff id)."""
        path = self._folder / "bootstrap.tar.gz"
        metas = [
            (info.blob_id, info.meta)
            for info in merged.blobs
            if info.meta is not None and len(info.meta.packed) <= META_BYTES_MAX
        ]
        diff_id = write_bootstrap_layer(path, merged.bootstrap, metas)
        descriptor = describe_file(
            path, MEDIA_LAYER_GZIP, {ANNOTATION_BOOTSTRAP: "true", ANNOTATION_FS_VERSION: str(self._options.fs_version)}
        )
        self._push(descriptor, path)
        return descriptor, diff_id

    def copy_image(self, manifest: Manifest) -> None:
        """The OCI image itself, under its digest."""
        for blob in {one.digest: one for one in (*manifest.layers, manifest.config)}.values():
            if self._target.has_blob(blob):
                continue
            path = self._folder / blob.hex
            what = f"{self._source.name}: {blob.digest[7:19]}"
            reader = VerifiedReader(self._source.read_blob(blob), blob, what)
            with path.open("wb") as out:
                shutil.copyfileobj(reader, out, 1 << 20)
            self._push(blob, path)
            path.unlink()
        data, media_type = self._source.get_manifest(manifest.descriptor.digest)
        if digest_of(data) != manifest.descriptor.digest:
            raise Failure(f"{self._source.name}: the manifest has changed meanwhile: try again", Cause.DIGEST)
        # A layout tells the type beside the digest only, where the manifest itself does not (umoci's).
        self._target.put_manifest(data, media_type or manifest.descriptor.media_type or MEDIA_MANIFEST, None)

    def push_bytes(self, data: bytes, media_type: str, name: str) -> Descriptor:
        path = self._folder / name
        path.write_bytes(data)
        descriptor = Descriptor(media_type, digest_of(data), len(data))
        if not self._target.has_blob(descriptor):
            self._target.put_blob(descriptor, path)
        return descriptor

    def _convert_layer(self, layer: Descriptor) -> tuple[Layer, LayerResult]:
        began = time.monotonic()
        spool = self._folder / layer.hex
        what = f"{self._source.name}: layer {layer.digest[7:19]}"
        reader = VerifiedReader(self._source.read_blob(layer), layer, what, self._count("convert", layer.digest))
        try:
            built = build_layer(
                LayerSource(reader, "tar", what), options=self._options, out_blob=spool, dictionary=self._dictionary
            )
        except Failure as failure:
            if failure.cause is Cause.FORMAT and not self._stop.is_set():
                # A tar that cannot be read may be one that arrived damaged: then that is what to say.
                reader.finish()
            raise
        reader.finish()
        pushed = False
        descriptor = Descriptor(MEDIA_NYDUS_BLOB, f"sha256:{built.blob_id}", built.blob_size)
        if built.blob_info is not None:
            descriptor = describe_blob(built.blob_info)
            pushed = self._push(descriptor, spool)
        spool.unlink()
        has_data = built.blob_info is not None
        return built, LayerResult(
            layer.digest,
            layer.size,
            descriptor.digest if has_data else "",
            built.blob_size if has_data else 0,
            built.stats.files,
            built.stats.file_bytes,
            built.stats.chunks,
            built.stats.unique_bytes,
            built.stats.stored_bytes,
            built.stats.deduplicated_bytes,
            built.stats.dictionary_bytes,
            pushed,
            round(time.monotonic() - began, 3),
        )

    def _push(self, descriptor: Descriptor, path: Path) -> bool:
        """Whether it had to be sent."""
        if self._target.has_blob(descriptor):
            return False
        self._progress.start("push", descriptor.digest, descriptor.size)
        self._target.put_blob(descriptor, path, self._count("push", descriptor.digest))
        return True

    def _count(self, phase: str, digest: str) -> Callable[[int], None]:
        def count(size: int) -> None:
            if self._stop.is_set():
                raise _Stopped
            self._progress.advance(phase, digest, size)

        return count


def run_at_a_time(
    work: Callable[[Item], Result], items: Sequence[Item], count: int, stop: threading.Event
) -> list[Result]:
    """work of each item, `count` at a time, results in the items' order.

    The first failure sets stop, which work is to heed, and is raised. Not an executor: its threads cannot be left, and
    a registry that is slow to answer would hold up an interrupted run for minutes. These are waited for a little."""
    waiting = list(enumerate(items))[::-1]
    results: dict[int, Result] = {}
    ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def run() -> None:
        try:
            while not stop.is_set():
                try:
                    index, item = waiting.pop()  # atomic, as the assignment below is
                except IndexError:
                    break
                results[index] = work(item)
            ended.put(None)
        except BaseException as error:
            ended.put(error)
            stop.set()

    threads = [threading.Thread(target=run, daemon=True, name=f"convert-{index}") for index in range(count)]
    for thread in threads:
        thread.start()
    try:
        for _ in threads:
            error = ended.get()
            if error is not None:
                raise error
    except BaseException:
        stop.set()
        limit = time.monotonic() + LEAVE_S
        for thread in threads:
            thread.join(max(0.0, limit - time.monotonic()))
        raise
    return [results[index] for index in range(len(items))]
