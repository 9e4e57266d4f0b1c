"""Checkpoints: bit-exact, on another mesh, and never half of one."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jaxrl.checkpoint import LATEST_FILE, Checkpoints
from jaxrl.optimizer import make_optimizer


def some_state(seed: int = 0) -> dict:
    """Parameters and optimizer state as a trainer has them, with values that only bit-exact storage keeps."""
    rng = np.random.default_rng(seed)
    params = {"w": jnp.asarray(rng.normal(size=(8, 6)), jnp.float32), "b": jnp.asarray([0.1, -0.0, 1e-42], jnp.float32)}
    optimizer = make_optimizer(moments_dtype="bfloat16")
    params, opt_state, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params, 0.1)
    return {"actor": {"params": params, "opt_state": opt_state}, "lora": {}}


def abstract_of(state) -> dict:
    here = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)


def bits(tree) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def test_restore_gives_back_every_bit_and_the_meta(tmp_path):
    state = some_state()
    meta = {"step": 3, "kl_coef": 0.1 + 0.2, "data": {"epoch": 1, "order": [2, 0, 1]}, "note": None}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, meta)
    checkpoints.wait()
    restored, restored_meta = Checkpoints(tmp_path).restore(3, abstract_of(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)
    assert restored_meta == meta


def test_the_folder_may_be_relative_as_that_of_a_run_is_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints("runs/quickstart/checkpoints")
    checkpoints.save(1, some_state(), {})
    checkpoints.wait()
    assert Checkpoints(tmp_path / "runs/quickstart/checkpoints").steps() == [1]
    assert bits(checkpoints.restore(1, abstract_of(some_state()))[0]) == bits(some_state())


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    state = {"w": jax.random.normal(jax.random.key(0), (1000, 1000))}
    before = bits(state)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 7, tree), donate_argnums=0)
    overwrite({"w": jnp.ones((1000, 1000))})  # compiled, so that below it runs while the save does
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    abstract = abstract_of(overwrite(state))
    restored, _ = checkpoints.restore(1, abstract)
    assert bits(restored) == before


def test_old_checkpoints_go_once_the_new_one_is_complete(tmp_path):
    checkpoints = Checkpoints(tmp_path, max_to_keep=2)
    assert checkpoints.latest() is None
    for step in (5, 10, 15):
        checkpoints.save(step, {"w": jnp.full(3, step)}, {})
        checkpoints.wait()
        assert (tmp_path / LATEST_FILE).read_text() == str(step)
    assert checkpoints.steps() == [10, 15]
    assert checkpoints.latest() == 15
    assert sorted(os.listdir(tmp_path)) == ["global_step_10", "global_step_15", LATEST_FILE]


def test_a_run_that_went_back_leaves_its_abandoned_course(tmp_path):
    checkpoints = Checkpoints(tmp_path, max_to_keep=3)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, {"w": jnp.full(3, step)}, {})
    checkpoints.wait()
    again = Checkpoints(tmp_path, max_to_keep=3)
    again.save(3, {"w": jnp.full(3, 33)}, {"again": True})  # restored step 2, and saves the third step anew
    again.wait()
    assert again.steps() == [2, 3]
    state, meta = again.restore(3, abstract_of({"w": jnp.full(3, 3)}))
    np.testing.assert_array_equal(state["w"], 33)
    assert meta == {"again": True}


def test_what_does_not_fit_is_named(tmp_path):
    state = {"actor": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    with pytest.raises(ValueError, match=r"actor\.w is float32\[2, 3\] in the checkpoint and float32\[2, 4\] here"):
        checkpoints.restore(1, abstract_of({"actor": {"w": jnp.ones((2, 4)), "b": jnp.ones(3)}}))
    with pytest.raises(ValueError, match=r"actor\.b is float32\[3\] in the checkpoint and bfloat16\[3\] here"):
        checkpoints.restore(1, abstract_of({"actor": {"w": jnp.ones((2, 3)), "b": jnp.ones(3, jnp.bfloat16)}}))
    with pytest.raises(ValueError, match=r"critic\.w is missing in the checkpoint and float32\[1\] here"):
        checkpoints.restore(1, abstract_of({**state, "critic": {"w": jnp.ones(1)}}))
    with pytest.raises(ValueError, match=r"actor\.b is float32\[3\] in the checkpoint and not used here"):
        checkpoints.restore(1, abstract_of({"actor": {"w": jnp.ones((2, 3))}}))
    with pytest.raises(ValueError, match=r"no checkpoint of step 2 in .*: there are \[1\]"):
        checkpoints.restore(2, abstract_of(state))
    with pytest.raises(ValueError, match="max_to_keep 0"):
        Checkpoints(tmp_path, max_to_keep=0)


@pytest.mark.parametrize("cut", ["d/*", "_METADATA"])  # where the numbers are, and where their names are
def test_a_damaged_checkpoint_is_named_with_the_fix_in_one_line(tmp_path, cut):
    state = {"w": jax.random.normal(jax.random.key(0), (256, 256))}
    sentence = r"cannot be read .*\. Where it is damaged, .* remove"
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    largest = max((tmp_path / "global_step_1").rglob(cut), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:20])
    with pytest.raises(ValueError, match=f"global_step_1 {sentence} that folder") as caught:
        Checkpoints(tmp_path).restore(1, abstract_of(state))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_an_error_in_the_background_is_raised_by_wait(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"w": jnp.ones(3)}, {})
    (tmp_path / "global_step_1").write_text("in the way")
    with pytest.raises(OSError):
        checkpoints.wait()


def test_an_error_in_the_background_is_news_before_the_next_save(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.check()
    checkpoints.save(1, {"w": jnp.ones(3)}, {})
    (tmp_path / "global_step_1").write_text("in the way")
    with pytest.raises(OSError):
        for _ in range(1000):
            checkpoints.check()
            time.sleep(0.01)


def test_a_run_that_ends_with_an_error_waits_for_its_save_and_logs_what_went_wrong_with_it(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"w": jnp.ones(3)}, {})
    checkpoints.close()
    assert checkpoints.steps() == [1] and not caplog.text
    checkpoints.save(2, {"w": jnp.ones(3)}, {})
    (tmp_path / "global_step_2").write_text("in the way")
    checkpoints.close()
    assert "the checkpoint that was being saved is lost" in caplog.text


ANOTHER_MESH = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxrl.checkpoint import Checkpoints
from jaxrl.parallel import make_mesh

values = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
checkpoints = Checkpoints(sys.argv[1])
for step, (data, fsdp, tensor) in enumerate([(1, 8, 1), (2, 2, 2), (1, 1, 1)]):
    sharding = NamedSharding(make_mesh(data, fsdp, tensor), PartitionSpec("fsdp", "tensor"))
    if step:
        restored, _ = checkpoints.restore(step - 1, {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=sharding)})
        assert restored["w"].sharding == sharding
        assert np.asarray(restored["w"]).tobytes() == values.tobytes()
    checkpoints.save(step, {"w": jax.device_put(values, sharding)}, {})
checkpoints.wait()
"""

SAVE_WITHOUT_END = """
import sys
import jax, jax.numpy as jnp
from jaxrl.checkpoint import Checkpoints

checkpoints = Checkpoints(sys.argv[1], max_to_keep=2)
for step in range((checkpoints.latest() or 0) + 1, 10**6):
    state = {f"w{i}": jnp.full((300, 1000), step + i, jnp.float32) for i in range(5)}
    checkpoints.save(step, state, {"step": step})
    print(step, flush=True)
"""


def start(program: str, folder: Path, **env: str) -> subprocess.Popen:
    root = str(Path(__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu", **env}
    return subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True, env=env)


def test_a_checkpoint_of_one_mesh_restores_on_another(tmp_path):
    assert start(ANOTHER_MESH, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=8").wait(120) == 0
    assert Checkpoints(tmp_path).steps() == [0, 1, 2]


def test_killed_at_any_moment_the_last_complete_checkpoint_restores(tmp_path):
    moments = random.Random(0)
    abstract = abstract_of({f"w{i}": jnp.zeros((300, 1000)) for i in range(5)})
    checkpoints = Checkpoints(tmp_path, max_to_keep=2)
    for _ in range(4):
        process = start(SAVE_WITHOUT_END, tmp_path)
        assert process.stdout is not None
        first = int(process.stdout.readline())
        process.stdout.readline()  # `first` is complete: the next save has started
        time.sleep(moments.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        latest = checkpoints.latest()
        assert latest is not None and latest >= first
        state, meta = checkpoints.restore(latest, abstract)
        assert meta == {"step": latest}
        for i in range(5):
            np.testing.assert_array_equal(state[f"w{i}"], latest + i)
    checkpoints.save(10**6, {"w": jnp.ones(1)}, {})  # a next save tidies up what the kills left
    checkpoints.wait()
    assert sorted(os.listdir(tmp_path)) == sorted([f"global_step_{n}" for n in checkpoints.steps()] + [LATEST_FILE])
