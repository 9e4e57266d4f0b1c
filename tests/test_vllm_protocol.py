"""What needs no server: the export and its checks, what is said about failures, and shared memory that is not left."""

import asyncio
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from vllm_stub import stub_python

from jaxrl.config import from_dict
from jaxrl.models.config import ModelConfig
from jaxrl.models.decoder import init_params
from jaxrl.rollout.engine import Sampling
from jaxrl.rollout.protocol import PIECE, Manifest, Refused, check_export, read_layout
from jaxrl.rollout.vllm_adapter import UPLOAD, Gate, ServerSpec, _digest, command, environment, explain, untried
from jaxrl.rollout.vllm_process import ServerProcess
from jaxrl.rollout.vllm_server import shared_memory, unlink
from jaxrl.weights.export import hf_tensors
from jaxrl.weights.folder import load_hf_config
from jaxrl.weights.safetensors_writer import dtype_named
from jaxrl.weights.sync import Export, FileSink, SharedFolder, adapter_export, model_export, model_shapes

ROOT = Path(__file__).parents[1]
MODEL = Path(__file__).parent / "data" / "hf_torch" / "llama32-tied"


@pytest.fixture(scope="module")
def model() -> tuple[ModelConfig, dict]:
    """A model with adapters that change what it computes."""
    config = dataclasses.replace(
        ModelConfig.from_hf(load_hf_config(MODEL)), lora_rank=2, lora_targets=("q_proj", "o_proj")
    )
    variables = init_params(config, "lm", jax.random.key(0))
    return config, {**variables, "lora": jax.tree.map(lambda x: x + 0.1, variables["lora"])}


@pytest.fixture
def export(model, tmp_path) -> tuple[Path, Manifest, dict]:
    """An export on disk, what announces it, and the layout of the model that it is for."""
    config, variables = model
    export = model_export("run", 3, variables, config, "float32")
    sink = FileSink(tmp_path / "v3" / "model.safetensors")
    export.send([sink])
    assert not sink.path.exists()  # until it is whole
    sink.close()
    return sink.path, export.manifest, {name: list(shape) for name, shape in model_shapes(config).items()}


def test_an_export_is_the_model_with_its_adapters_merged_under_hugging_face_names(export, model):
    path, manifest, layout = export
    check_export(path, manifest, layout)
    config, variables = model
    expected = dict(hf_tensors(variables["params"], config, lora=variables["lora"]))
    found = load_file(path)
    assert found.keys() == expected.keys() == layout.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor)
    assert manifest == Manifest.from_json(json.loads(json.dumps(manifest.to_json())))


def test_only_the_dtype_that_is_served_travels(model, tmp_path):
    config, variables = model
    export = model_export("run", 0, variables, config, "bfloat16")
    pieces = []
    export.send([SimpleNamespace(write=lambda piece: pieces.append(bytes(piece)))])
    half = model_export("run", 0, variables, config, "float32").manifest.nbytes // 2
    assert sum(map(len, pieces[1:])) == export.manifest.nbytes == half


def test_a_stream_that_a_sink_breaks_off_is_run_through_to_its_end(model):
    """Other hosts gather every tensor: whoever stopped half-way would leave them waiting."""
    config, variables = model
    export = model_export("run", 0, variables, config, "float32")

    def full(piece):
        raise OSError("No space left on device")

    with pytest.raises(OSError):
        export.send([SimpleNamespace(write=full)])
    assert not any(tensor.checksum for tensor in export.manifest.tensors)
    export.finish()
    assert [tensor.checksum for tensor in export.manifest.tensors] == [
        tensor.checksum for tensor in sent(model_export("run", 0, variables, config, "float32")).manifest.tensors
    ]


def sent(export: Export) -> Export:
    export.send([])
    return export


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_export_tells_which_tensors_are_not_finite(dtype):
    numbers = np.ones((4, 70_000), np.float32).astype(dtype_named(dtype))  # more than is looked at at once
    tensors = {"fine": numbers, "largest": np.full(3, jnp.finfo(dtype).max, numbers.dtype)}
    for name, wrong in (("nan", np.nan), ("inf", np.inf), ("minus", -np.inf)):
        tensors[name] = numbers.copy()
        tensors[name][-1, -1] = wrong
    export = sent(
        Export("run", 0, {name: x.shape for name, x in tensors.items()}, dtype, lambda: iter(tensors.items()))
    )
    assert export.not_finite == ["nan", "inf", "minus"]
    assert [t.checksum for t in export.manifest.tensors] == [zlib.crc32(x.tobytes()) for x in tensors.values()]


def test_adapters_alone_are_an_export_under_peft_names(model, tmp_path):
    config, variables = model
    export = adapter_export("run", 0, variables, config)
    export.send([])
    names = [tensor.name for tensor in export.manifest.tensors]
    assert names[0] == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert len(names) == 2 * 2 * config.num_layers


def replaced(manifest: Manifest, i: int, **changes) -> Manifest:
    tensors = list(manifest.tensors)
    tensors[i] = dataclasses.replace(tensors[i], **changes)
    return dataclasses.replace(manifest, tensors=tuple(tensors))


def test_what_is_not_the_announced_export_is_refused_in_words(export):
    path, manifest, layout = export
    data = path.read_bytes()
    first = manifest.tensors[0].name

    def refused(words: str, content: bytes = data, manifest: Manifest = manifest, layout: dict = layout) -> None:
        path.write_bytes(content)
        with pytest.raises(Refused, match=words):
            check_export(path, manifest, layout)

    refused("truncated: it has .* bytes of", data[:-4])
    refused("its header cannot be read", data[:100])
    refused("its header cannot be read", b"")
    refused("it holds version 3 of run run, and the run is other", manifest=dataclasses.replace(manifest, run="other"))
    refused("it holds version 3 of run", manifest=dataclasses.replace(manifest, version=4))
    refused(f"tensor {first} is F32 .*not F32", manifest=replaced(manifest, 0, shape=(32, 80)))
    refused(
        "lacks 1 tensors of the model that is served, the first is lm_head",
        layout=layout | {"lm_head.weight": [80, 32]},
    )
    refused(f"no tensor {first}", layout={name: shape for name, shape in layout.items() if name != first})
    refused(f"{first} has shape .* and the model that is served", layout=layout | {first: [81, 32]})
    refused("the bytes of model.norm.weight are not those that were sent", data[:-1] + bytes([data[-1] ^ 1]))
    path.unlink()
    with pytest.raises(Refused, match="cannot be read on the server's host: No such file"):
        check_export(path, manifest, layout)


def test_the_layout_of_a_folder_is_read_from_its_weights_where_no_file_says_it():
    layout = read_layout(MODEL)
    config = ModelConfig.from_hf(load_hf_config(MODEL))
    assert layout == {name: list(shape) for name, shape in model_shapes(config).items()}


def test_equal_weights_have_equal_digests_and_other_labels(model):
    config, variables = model
    exports = [model_export("run", version, variables, config, "float32") for version in (1, 2)]
    for export in exports:
        export.send([])
    a, b = (export.manifest for export in exports)
    assert a.digest == b.digest and a.label == "run:1" and b.label == "run:2"


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("ModuleNotFoundError: No module named 'vllm'", "setup_vllm.sh"),
        ("ValueError: Model architectures ['FooForCausalLM'] are not supported for now.", "['FooForCausalLM']"),
        ("OSError: [Errno 98] Address already in use", "port is in use"),
        ("ValueError: No available memory for the cache blocks.", "too little memory"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "too little memory"),
        ("ValueError: Free memory on device (1/80 GiB) is less than desired GPU memory utilization", "too little free"),
        ("api_server.py: error: unrecognized arguments: --foo", "--foo"),
    ],
)  # fmt: skip
def test_a_log_of_a_start_that_failed_is_said_in_a_sentence(line, sentence):
    assert sentence in str(explain(f"INFO\n{line}\nmore"))


def test_a_version_of_vllm_that_was_not_tried_is_told():
    assert untried("0.32.0") is None
    assert "vLLM 0.24.0 was never tried with this jaxrl, which was tried with 0.32.0" in str(untried("0.24.0"))


def test_the_command_line_has_the_users_arguments_last(tmp_path):
    spec = ServerSpec(
        str(tmp_path), "127.0.0.1", 1, "log", args={"tensor_parallel_size": 2, "enforce_eager": False, "seed": 3}
    )
    line = " ".join(command("python", spec, "cuda"))
    assert "--tensor-parallel-size 2" in line and "--no-enforce-eager" in line and "--seed 3" in line
    assert "--load-format dummy" in line and "--dtype bfloat16" in line and "--skip-tokenizer-init" in line


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_server_reads_the_weights_that_its_model_has(tmp_path, name):
    (tmp_path / name).touch()
    assert "--load-format auto" in " ".join(command("python", ServerSpec(str(tmp_path), "127.0.0.1", 1, "log"), "cpu"))


def test_a_server_on_the_trainers_cores_does_not_spin(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    spec = ServerSpec("model", "127.0.0.1", 1, "log")
    assert environment(spec, "cpu")["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "OMP_WAIT_POLICY" not in environment(spec, "cuda")
    own = dataclasses.replace(spec, env={"OMP_WAIT_POLICY": "ACTIVE"})
    assert environment(own, "cpu")["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"max_tokens_each": (3, 9)}, "max_tokens_each"),
        ({"guided": {"regex": "a", "choice": ["b"]}}, "one grammar at a time"),
    ],
)
def test_sampling_refuses_what_cannot_be(settings, words):
    with pytest.raises(ValueError, match=words):
        Sampling(max_tokens=8, **settings)


def test_an_engine_refuses_by_name_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"stop \('x',\): the jax engine cannot do that, set rollout.engine to vllm"):
        Sampling(max_tokens=8, stop=("x",)).refuse(("stop", "bad_words"), "jax")


def started(python: str, folder: Path, **changes) -> ServerProcess:
    spec = ServerSpec(str(MODEL), "127.0.0.1", 0, str(folder))
    server = ServerProcess(python, dataclasses.replace(spec, **changes), "key")
    server.start()
    return server


def ended(server: ServerProcess, timeout_s: float = 60.0) -> str:
    deadline = time.monotonic() + timeout_s
    while (reason := server.ended()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    server.end()
    return reason


def test_a_python_that_is_not_there_or_has_no_vllm_is_said(tmp_path):
    with pytest.raises(
        ValueError, match="rollout.vllm.python /nowhere/python is not there: `scripts/setup_vllm.sh DIR`"
    ):
        started("/nowhere/python", tmp_path)
    with pytest.raises(ValueError, match=f"rollout.vllm.python {tmp_path} is no program"):
        started(str(tmp_path), tmp_path)
    reason = ended(started(sys.executable, tmp_path))
    assert reason.startswith("its Python has no vLLM: make an environment with scripts/setup_vllm.sh")
    assert str(tmp_path / "server.log") in reason


def test_shared_memory_goes_when_its_holder_is_killed():
    code = "from jaxrl.weights.sync import SharedFolder; print(SharedFolder().path, flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    folder = Path(holder.stdout.readline().strip())
    (folder / "file").write_text("x")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    deadline = time.monotonic() + 10.0
    while folder.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_shared_memory_of_a_dead_server_is_its_own_and_not_the_export_that_it_had_open():
    # A server maps an export while it loads it; the one that is started in its place loads the same file.
    exports = SharedFolder()
    try:
        export, own = exports.path / "model.safetensors", exports.path.with_name(exports.path.name + "-own")
        for path in (export, own):
            path.write_bytes(b"x" * 4096)
        code = (
            "import mmap, sys; files = [open(p, 'r+b') for p in sys.argv[1:]]; "
            "maps = [mmap.mmap(f.fileno(), 0) for f in files]; print(1, flush=True); input()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code, str(export), str(own)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True,
        ) as server:  # fmt: skip
            assert server.stdout is not None and server.stdout.readline()
            found = shared_memory(server.pid)
            server.kill()
        assert found == {str(own)}
        unlink(found)
        assert export.exists() and not own.exists()
    finally:
        exports.close()


@pytest.mark.parametrize(
    "vllm, words",
    [
        ({}, "either rollout.vllm.python, .* or rollout.vllm.urls"),
        ({"python": "p", "urls": ["http://h:1"]}, "either rollout.vllm.python, .* or rollout.vllm.urls"),
        ({"python": "p", "devices": ["0", "1"]}, "names the devices of 2 servers, and rollout.vllm.num_servers is 1"),
        ({"python": "p", "transport": "file"}, "transport file and rollout.vllm.file_dir belong together"),
        ({"python": "p", "publish": "adapter"}, "publish adapter needs adapters: set model.lora_rank"),
        ({"python": "p", "gpu_memory_utilization": 1.5}, "gpu_memory_utilization 1.5 is a share"),
        ({"python": "p", "stall_timeout_s": 0}, "stall_timeout_s is 0.0 and must be above 0"),
        (
            {"urls": ["http://h:80OO"]},
            "rollout.vllm.urls has 'http://h:80OO', which is no address of a server: write http://",
        ),
        ({"urls": ["h:8000"]}, "rollout.vllm.urls has 'h:8000', which is no address"),
        ({"python": "p", "args": {"port": 8000}}, "rollout.vllm.args sets port, which the trainer sets itself"),
        ({"python": "p", "dtype": "fp8"}, "rollout.vllm.dtype is 'fp8' and must be one of auto"),
    ],
)
def test_settings_of_the_sidecar_that_do_not_fit_together_are_refused(vllm, words):
    tree = {
        "model": {"path": "m"}, "data": {"train_files": "task:arithmetic"}, "trainer": {"experiment_name": "x"},
        "reward": {"functions": [{"name": "exact_number"}]}, "rollout": {"engine": "vllm", "vllm": vllm},
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        from_dict(tree)


def test_setup_refuses_a_folder_that_it_did_not_make_and_leaves_it_as_it_is(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    command = ["bash", str(ROOT / "scripts" / "setup_vllm.sh"), "--cpu", str(tmp_path)]
    # An interpreter that makes nothing: were the folder not refused, the test would not install vLLM.
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": "true"})
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1, run.stderr
    assert f"{tmp_path} holds something that this script did not make" in run.stderr
    assert (tmp_path / "thesis.tex").exists()


def put(gate: Gate, name: str, *body: bytes, base: str = "", breaks: bool = False) -> int | None:
    """The status of an upload that comes in the parts `body`; None where there was no answer."""
    events = [{"type": "http.request", "body": part, "more_body": True} for part in body]
    events.append({"type": "http.disconnect"} if breaks else {"type": "http.request"})
    sent = []

    async def receive():
        return events.pop(0)

    async def send(event):
        sent.append(event)

    scope = {"type": "http", "method": "PUT", "path": UPLOAD + name, "query_string": base.encode()}
    asyncio.run(gate(scope | {"headers": [(b"authorization", b"Bearer key")]}, receive, send))
    return sent[0]["status"] if sent else None


def test_a_server_changes_the_pieces_that_it_is_sent_and_keeps_none_of_what_breaks_off(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "key")
    monkeypatch.setenv("JAXRL_SCRATCH", str(tmp_path))
    gate = Gate(None)

    def files() -> dict[str, bytes]:
        return {str(p.relative_to(tmp_path / "exports")): p.read_bytes() for p in tmp_path.rglob("*.*")}

    one, two, three = (f"v{i}-run/model.safetensors" for i in (1, 2, 3))
    pieces = PIECE.pack(1, 2) + b"XY" + PIECE.pack(5, 1) + b"Z"
    assert put(gate, one, b"abc", b"defg") == 200
    assert put(gate, two, pieces[:7], pieces[7:25], pieces[25:], base=one) == 200
    assert files() == {two: b"aXYdeZg"}
    # Of a version that it has not, and names outside of its folder: it goes on having what it has.
    assert put(gate, three, pieces, base=one) == 409
    assert put(gate, "../model.safetensors", b"abc") == put(gate, three, base="../x.json") == 400
    assert files() == {two: b"aXYdeZg"}
    # Half a version is neither this one nor that.
    for body, breaks in ((pieces[:-1], True), (pieces[:-1], False), (pieces[:20], False)):
        assert put(gate, two, b"abcdefg") == 200
        assert put(gate, three, body, base=two, breaks=breaks) is None
        assert files() == {}


def test_a_digest_of_live_parameters_moves_with_each_of_them_and_is_none_where_some_are_not_seen():
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(3, 5, dtype=torch.bfloat16), torch.nn.Linear(5, 2))
    found = [_digest(model)]
    assert found[0] == _digest(model)
    for parameter in model.parameters():
        parameter.data.view(-1)[-1] += 1
        found.append(_digest(model))
    assert None not in found and len(set(found)) == 5
    model[0].weight = torch.nn.Parameter(torch.empty(0))  # as where vLLM keeps a packed copy alone
    assert _digest(model) is None


def serving(python: str, folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scripts" / "serve_vllm.py"), str(MODEL), "--port", "0"]
    command += ["--python", python, "--folder", str(folder), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_server_for_other_hosts_says_under_which_name_they_find_it(tmp_path):
    with serving(stub_python(tmp_path), tmp_path / "log", "--host", "0.0.0.0") as server:
        assert server.stdout is not None
        ready = next(line for line in server.stdout if line.startswith("ready"))
        server.terminate()
    assert f"rollout.vllm.urls=[http://{socket.gethostname()}:" in ready


def test_a_server_that_does_not_start_is_waited_for_no_longer_than_was_said(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nread -r line\n")  # until its standard input ends
    python.chmod(0o755)
    with serving(str(python), tmp_path / "log", "--start-timeout-s", "1") as server:
        _, error = server.communicate(timeout=60)
    assert server.returncode == 2
    assert (
        error.startswith("error: it was waited for 1 s (--start-timeout-s) to start, and ") and error.count("\n") == 1
    )
