"""Class folders to modify, small shards of photographs, and servers of HTTP, S3 and GCS that fail on request."""

import fcntl
import gc
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from dataio.manifest import Manifest, load_manifest
from dataio.pack.packer import PackOptions, pack
from dataio.remote.options import CacheOptions
from dataio.remote.prefetch import RemoteShards


class TinyShards(PackOptions):
    """Pack options with shards of 30 kB; the command's are of 1 MiB and more."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shard_mib", 40 / 1024)


@pytest.fixture(scope="session")
def few_photographs(photos, tmp_path_factory) -> Path:
    """24 of `photos` in three shards: 60×48 pixels, JPEG, PNG and WebP."""
    root = tmp_path_factory.mktemp("few_photographs")
    for name in ("cat", "coffee", "rocket"):
        (root / "source" / name).mkdir(parents=True)
        for number in range(8):
            ending = {3: "png", 4: "webp"}.get(number, "jpg")
            with Image.open(photos / name / f"{number + 3:02d}.jpg") as photograph:
                photograph.crop((0, 0, 60, 48)).save(root / "source" / name / f"{number}.{ending}")
    pack(root / "source", root / "packed", TinyShards())
    return root / "packed"


@pytest.fixture
def source(photos, tmp_path) -> Path:
    """Copy of `photos` as hard links: files may be added, renamed and removed, but not written to."""
    return shutil.copytree(photos, tmp_path / "source", copy_function=os.link)


@pytest.fixture
def overwrite() -> Callable[..., None]:
    """Function: overwrites bytes of a shard, `offset` bytes after the start of a sample's encoded image."""

    def write(manifest: Manifest, sample: int, content: bytes, offset: int = 0) -> None:
        row = manifest.samples[sample]
        with open(manifest.folder / manifest.shards[row["shard"]].name, "r+b") as shard:
            shard.seek(int(row["offset"]) + offset)
            shard.write(content)

    return write


@pytest.fixture
def truncate(overwrite) -> Callable[[Manifest, int], None]:
    """Function: overwrites the second half of a sample's image with bytes that no decoder accepts."""

    def write(manifest: Manifest, sample: int) -> None:
        size = int(manifest.samples["bytes"][sample])
        overwrite(manifest, sample, (size - size // 2) * b"\xff", size // 2)

    return write


class Handler(SimpleHTTPRequestHandler):
    """Serves files, after the faults listed in `server.faults[name]`, one for each request."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.requests.append(name)
        self.server.times.append(time.monotonic())
        self.server.credentials.add(self.headers["Authorization"])
        fault = self.server.faults[name].pop(0) if self.server.faults.get(name) else None
        if fault is None:
            super().do_GET()
        elif fault.isdecimal():
            self.send_error(int(fault))
        else:
            self.close_connection = True
            self.send_fault(fault, Path(self.translate_path(self.path)).read_bytes())

    def send_fault(self, fault: str, content: bytes) -> None:
        if fault == "reset":  # the connection breaks off without a word
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        if fault == "silent":
            self.server.stopping.wait()
            return
        self.send_response(200)
        if fault in ("half", "wrong", "drip"):  # else its end is where the connection closes
            self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.end_headers()
        if fault.startswith("half"):
            self.wfile.write(content[: len(content) // 2])
        elif fault == "whole unsaid":
            self.wfile.write(content)
        elif fault == "wrong":
            self.wfile.write(content[::-1])
        elif fault == "drip":  # never silent for long, and never done
            for byte in content:
                self.wfile.write(bytes([byte]))
                if self.server.stopping.wait(0.1):
                    return

    def log_message(self, *arguments: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """HTTP server on a free port. `requests` are the names of the requested files, `times` when they were requested.

    credentials: the values of the requests' Authorization header.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), lambda *arguments: Handler(*arguments, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.faults: dict[str, list[str]] = {}
        self.requests: list[str] = []
        self.times: list[float] = []
        self.credentials: set[str | None] = set()
        self.stopping = threading.Event()
        self.connections: list[socket.socket] = []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def process_request(self, request: socket.socket, client_address: object) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, *arguments: object) -> None:
        """The client hung up."""

    def stop(self) -> None:
        if not self.stopping.is_set():
            self.stopping.set()
            self.shutdown()
            self.server_close()
            for connection in self.connections:  # those kept alive would still be answered
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def http_server() -> Iterator[Callable[..., Server]]:
    """Function: starts a server for a folder."""
    servers = []

    def start(*arguments: object) -> Server:
        servers.append(Server(*arguments))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def free_port() -> Iterator[int]:
    """A port that no other program gets, and that a server may bind."""
    with socket.socket() as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(("127.0.0.1", 0))
        yield place.getsockname()[1]


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """URL of an S3 server."""
    from moto.server import ThreadedMotoServer  # here, so that all other tests run where moto is not installed

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_url(s3_endpoint, monkeypatch, tmp_path) -> Callable[[Path], str]:
    """Function: copies a folder's files to a new bucket; returns its URL."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    import boto3

    client = boto3.client("s3")

    def upload(folder: Path) -> str:
        bucket = f"bucket-{abs(hash(str(tmp_path)))}"
        client.create_bucket(Bucket=bucket)
        for path in folder.iterdir():
            client.upload_file(str(path), bucket, f"set/{path.name}")
        return f"s3://{bucket}/set"

    return upload


@pytest.fixture(scope="session")
def gs_endpoint() -> Iterator[str]:
    """URL of a server with the API of Google Cloud Storage."""
    from gcp_storage_emulator.server import RequestHandler
    from gcp_storage_emulator.storage import Storage

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(RequestHandler, Storage(use_memory_fs=True))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def gs_url(gs_endpoint, monkeypatch, tmp_path) -> Callable[[Path], str]:
    """Function: copies a folder's files to a new bucket; returns its URL."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gs_endpoint)
    from google.auth.credentials import AnonymousCredentials
    from google.cloud.storage import Client

    client = Client(project="test", credentials=AnonymousCredentials())

    def upload(folder: Path) -> str:
        bucket = client.create_bucket(f"bucket-{abs(hash(str(tmp_path)))}")
        for path in folder.iterdir():
            bucket.blob(f"set/{path.name}").upload_from_filename(path)
        return f"gs://{bucket.name}/set"

    return upload


# Remote shards and the cache between


@pytest.fixture(scope="session")
def local(many_shards) -> Manifest:
    return load_manifest(many_shards)


@pytest.fixture
def served(many_shards, tmp_path) -> Path:
    """Copy of `many_shards` for a server."""
    return shutil.copytree(many_shards, tmp_path / "served")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """Folder on a disk of its own, of 600 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # threads may be closing what is open there


def shard_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("shards-")]


@pytest.fixture
def await_shard_threads() -> Callable[[], None]:
    """Function: waits until no thread fetches shards any more."""

    def wait() -> None:
        while shard_threads():
            time.sleep(0.01)

    return wait


@pytest.fixture
def no_shard_thread_left(request, await_shard_threads) -> Iterator[None]:
    """Check that all threads end without the garbage collector. A test that fails may leave some."""
    failed = request.session.testsfailed
    gc.disable()
    yield
    try:
        if request.session.testsfailed == failed:  # else nothing would end the wait: pytest-timeout has, by then
            await_shard_threads()
    finally:
        gc.enable()


@pytest.fixture
def cached() -> Callable[[CacheOptions], dict[str, int]]:
    """Function: sizes of the files in a cache, by name."""

    def look(cache: CacheOptions) -> dict[str, int]:
        with open(cache.folder / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # nothing is evicted or begun while they are counted
            sizes = {}
            for path in cache.folder.glob("*/*"):
                with suppress(FileNotFoundError):  # given up at this moment
                    sizes[path.name] = path.stat().st_size
            return sizes

    return look


@pytest.fixture
def prefetch_and_read() -> Callable[[RemoteShards, Manifest, list[int]], None]:
    """Function: prefetches these shards and reads from each."""

    def wait(shards: RemoteShards, manifest: Manifest, wanted: list[int]) -> None:
        shards.prefetch(wanted)
        for shard in wanted:
            shards.read(sum(manifest.shard_samples[:shard]))

    return wait
