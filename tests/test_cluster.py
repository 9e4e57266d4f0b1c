"""A process finds its place: the flags, and what SLURM, Kubernetes and TPU pods say, as JAX itself reads them."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from jax._src.clusters.cloud_tpu_cluster import GkeTpuCluster
from jax._src.clusters.slurm_cluster import SlurmCluster

from jaxrl.cluster import Place, find, first_host

SLURM = {
    "SLURM_JOB_ID": "5007", "SLURM_PROCID": "3", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[003,007-009],login", "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}  # fmt: skip


def test_flags_name_the_place_and_come_before_the_environment():
    place = Place("10.0.0.1:1234", 4, 3)
    assert find("10.0.0.1:1234", 4, 3, {}) == place
    environ = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "1"}
    assert find(None, None, None, environ) == Place("10.0.0.1:1234", 4, 1)
    assert find(None, None, 3, environ) == place
    assert find("10.0.0.1:1234", 4, 3, SLURM) == place
    assert find(None, 1, None, SLURM) is None
    assert find(None, None, None, {}) is None


def test_a_slurm_step_is_found_as_jax_finds_it(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    place = find(environ=SLURM)
    assert place is not None and SlurmCluster.is_env_present()
    assert place.host == SlurmCluster.get_coordinator_address(None, None).rpartition(":")[0] == "gpu003"
    assert (place.num_processes, place.process_id) == (SlurmCluster.get_process_count(), SlurmCluster.get_process_id())


def test_one_task_a_node_takes_all_devices_of_the_node_and_several_share_them():
    assert find(environ=SLURM).local_device_ids is None
    shared = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1"}
    assert find(environ=shared).local_device_ids == (1,)


def test_a_slurm_step_of_one_task_is_a_run_of_one_process():
    alone = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert find(environ=alone) is None
    assert find(environ=alone | {"JAX_COORDINATOR_ADDRESS": "node001:60001"}) is None  # as slurm.sbatch sets it


def test_the_batch_script_may_name_the_coordinator():
    place = find(environ=SLURM | {"JAX_COORDINATOR_ADDRESS": "10.1.1.1:99"})
    assert place == Place("10.1.1.1:99", 4, 3)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node001", "node001"), ("node001,host2", "node001"), ("node[001-015],host2", "node001"),
     ("node[001,007-015],host2", "node001"), ("rack1-gpu[7-9]-ib", "rack1-gpu7-ib")],
)  # fmt: skip
def test_the_first_host_of_a_slurm_node_list(nodes, first):
    assert first_host(nodes) == first


def test_a_pod_of_an_indexed_job_takes_its_number_from_kubernetes():
    environ = {
        "JOB_COMPLETION_INDEX": "2",
        "JAX_COORDINATOR_ADDRESS": "run-workers-0-0.run:8476",
        "JAX_NUM_PROCESSES": "4",
    }
    assert find(environ=environ) == Place("run-workers-0-0.run:8476", 4, 2)
    with pytest.raises(ValueError, match="pod of an indexed Job.*JAX_NUM_PROCESSES"):
        find(environ={"JOB_COMPLETION_INDEX": "2"})
    assert find(num_processes=1, environ={"JOB_COMPLETION_INDEX": "2"}) is None


def test_a_tpu_slice_on_gke_is_found_as_jax_finds_it(monkeypatch):
    environ = {
        "TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a-0.a,a-1.a", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "first.a:8080", "JOB_COMPLETION_INDEX": "1",
    }  # fmt: skip
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert find(environ=environ) == Place("first.a:8476", 4, 3)
    assert (GkeTpuCluster.get_process_count(), GkeTpuCluster.get_process_id()) == (4, 3)
    assert find(environ={"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}) is None


def test_a_cloud_tpu_vm_is_asked_for_its_pod():
    answers = {
        "worker-network-endpoints": "unknown:unknown:10.0.0.7,unknown:unknown:10.0.0.8", "agent-worker-number": "1",
        "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-8'\nMEGASCALE_NUM_SLICES: '1'\n",
    }  # fmt: skip

    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers[self.path.rpartition("/")[2]].encode())

        def log_message(self, *args): ...

    with HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"127.0.0.1:{server.server_port}"
        assert find("tpu", environ={"GCE_METADATA_IP": where}) == Place("10.0.0.7:8476", 2, 1)
        server.shutdown()
    with pytest.raises(ValueError, match="--coordinator tpu asks the metadata server .* gave no answer"):
        find("tpu", environ={"GCE_METADATA_IP": where})


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("10.0.0.1:1234", None, None), "also needs --num-processes and --process-id"),
        ((None, 2, 0), "also needs --coordinator"),
        (("10.0.0.1", 2, 0), "must be host:port"),
        (("10.0.0.1:1234", 2, 2), "process id 2 must lie between 0 and 1"),
        (("10.0.0.1:1234", 0, 0), "number of processes is 0"),
    ],
)
def test_half_a_place_is_refused(flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        find(*flags, environ={})


def test_a_variable_that_is_no_number_is_refused_by_name():
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES is 'two'"):
        find(environ={"JAX_NUM_PROCESSES": "two"})
