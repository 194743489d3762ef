"""One checkpoint of four shards up to a bucket and down again: push and pull beside what people use today.

One server on this machine serves all of them, so server and clients share its processors: SeaweedFS, which takes much of
them, and then Ceph, all of it in memory, which takes little. The peers are installed by `./run bench` into environments of
their own (.venv-peers, .venv-s3fs); who is not there is skipped, and so is Ceph.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DataSet, measure_command, parse_size, record

from ckptstore import native

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from tests import other_servers, servers  # noqa: E402

SHARDS = 4
EXPORT = "default/epoch0epochstep0globalstep0"
PARTS = "16"  # MiB; and as many at once as each tool does by itself
PEERS, S3FS = HERE.parent / ".venv-peers" / "bin", HERE.parent / ".venv-s3fs" / "bin"

BOTO3_UP = """
import boto3, os, sys
s3 = boto3.client("s3")
for name in sorted(os.listdir("{source}")):
    s3.upload_file("{source}/" + name, "{bucket}", "{key}/" + name)
"""
BOTO3_DOWN = """
import boto3, os
s3 = boto3.client("s3")
os.makedirs("{target}")
for item in s3.list_objects_v2(Bucket="{bucket}", Prefix="{key}/")["Contents"]:
    s3.download_file("{bucket}", item["Key"], "{target}/" + item["Key"].rpartition("/")[2])
"""
S3FS_UP = """
import s3fs
s3fs.S3FileSystem().put("{source}/", "{bucket}/{key}/", recursive=True)
"""
S3FS_DOWN = """
import s3fs
s3fs.S3FileSystem().get("{bucket}/{key}/", "{target}/", recursive=True)
"""

WAYS = {  # name: (program, command up, command down)
    "ckptstore": (
        sys.executable,
        "{python} -m ckptstore.recover push 0 --run {run} --to s3://{bucket}/{place}",
        "{python} -m ckptstore.recover pull 0 --from s3://{bucket}/{place} --to {target_run}",
    ),
    "s5cmd": (
        PEERS / "s5cmd",
        "{program} cp '{source}/*' s3://{bucket}/{key}/",
        "{program} cp 's3://{bucket}/{key}/*' {target}/",
    ),
    "rclone": (
        PEERS / "rclone",
        "{program} copy {source} :s3,env_auth,provider=Other:{bucket}/{key}",
        "{program} copy :s3,env_auth,provider=Other:{bucket}/{key} {target}",
    ),
    "aws s3 cp": (
        PEERS / "aws",
        "{program} s3 cp --recursive {source} s3://{bucket}/{key}/",
        "{program} s3 cp --recursive s3://{bucket}/{key}/ {target}",
    ),
    "boto3": (PEERS / "python", BOTO3_UP, BOTO3_DOWN),
    "s3fs": (S3FS / "python", S3FS_UP, S3FS_DOWN),
}


@pytest.fixture(scope="module", params=["SeaweedFS", "Ceph"])
def server(request, place):
    """Return (what it is called, a function that empties its bucket)."""
    folder = place / "server"
    folder.mkdir()
    if request.param == "Ceph":
        started = other_servers.start_ceph(folder, 3 * parse_size(request.config.getoption("--size")))
        empty = other_servers.empty_ceph
    else:
        started, empty = servers.start_seaweed(folder), servers.empty_bucket
    names = servers.environment(started.port) | {
        "AWS_DEFAULT_REGION": "us-east-1",
        "RCLONE_S3_ENDPOINT": f"http://127.0.0.1:{started.port}",
    }
    names["S3_ENDPOINT_URL"] = names["FSSPEC_S3_ENDPOINT_URL"] = f"http://127.0.0.1:{started.port}"
    before = dict(os.environ)
    os.environ.update(names)
    os.environ.pop("AWS_CA_BUNDLE", None)  # rclone refuses to run with it
    yield request.param, lambda: empty(started)
    os.environ.clear()
    os.environ.update(before)
    started.stop()


@pytest.fixture(scope="module")
def run(request, place):
    """A run with one checkpoint, sealed: (its folder, its export as a data set)."""
    folder = place / "run"
    export = folder / EXPORT
    export.mkdir(parents=True)
    size = parse_size(request.config.getoption("--size")) // SHARDS
    weights = {}
    for number in range(SHARDS):
        name = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        tensor = f"layers.{number}.weight"
        header = json.dumps({tensor: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        with (export / name).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for start in range(0, size, 1 << 24):
                file.write(os.urandom(min(1 << 24, size - start)))
        weights[tensor] = name
    (export / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights, "metadata": {}}))
    (export / "config.json").write_text('{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}')
    specs = [native.FileSpec(path.name, path.stat().st_size) for path in sorted(export.iterdir())]
    digests = native.digest_files(export, specs)
    specs = [native.FileSpec(s.name, s.size_bytes, expected=digests[s.name].chunks) for s in specs]
    data = DataSet(export, specs, sum(spec.size_bytes for spec in specs))
    subprocess.run(
        [sys.executable, "-m", "ckptstore.recover", "seal", "--all", "--run", folder], check=True, capture_output=True
    )
    return folder, data


def command_of(template, program, **words):
    text = template.format(program=program, python=sys.executable, **words)
    return f"{program} - <<'END'\n{text}\nEND" if text.startswith("\n") else text


@pytest.mark.parametrize("name", WAYS)
def test_up_and_down(benchmark, place, server, run, name, turn):
    program, *templates = WAYS[name]
    kind, empty = server
    if not Path(program).exists():
        pytest.skip(f"not installed: {program}")
    folder, data = run
    where = f"{kind}-turn-{turn}-{name.replace(' ', '-')}"
    words = {
        "bucket": servers.BUCKET,
        "place": where,
        "key": f"{where}/{EXPORT}",
        "run": folder,
        "source": data.root,
        "target_run": place / f"down-{where}",
        "target": place / f"down-{where}" / EXPORT,
    }
    up, down = (command_of(template, program, **words) for template in templates)
    words["target"].parent.mkdir(parents=True)
    data.warm()
    os.sync()
    time.sleep(0.3)
    sent = measure_command(up)

    def settle():
        os.sync()
        time.sleep(0.3)

    ours = name == "ckptstore"
    facts = {"contender": name, "ours": ours, "digested": ours, "turn": turn, "moved_bytes": data.size_bytes}
    record(
        benchmark,
        lambda: measure_command(down),
        prepare=settle,
        **facts,
        group="from a bucket" + ("" if kind == "SeaweedFS" else f", {kind}"),
        durable=ours,
        up={"seconds": sent.seconds, "cpu_s": sent.cpu_s, "peak_bytes": sent.peak_bytes},
    )
    data.check(words["target"])  # so what went up is right as well
    shutil.rmtree(words["target_run"])
    empty()  # the disk holds a few turns only
