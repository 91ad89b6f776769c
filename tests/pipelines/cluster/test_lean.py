"""A local cluster has the processes that one command needs, and no others."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

_COMMAND = """
import json
import psutil
from pipelines.cluster import connection, lean
connection.prepare_environment()
connection.connect(connection.ClusterConfig(num_cpus=2))
import ray
numbers = ray.data.range(8, override_num_blocks=4).map(lambda row: {"id": 2 * row["id"]}).take_all()
processes = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
found = {"numbers": sorted(row["id"] for row in numbers), "processes": processes}
found["actors"] = ray.util.list_named_actors(all_namespaces=True)
lean.with_data_actors()  # as before a connection to another cluster
ray.data.range(2).take_all()
found["actors after"] = ray.util.list_named_actors(all_namespaces=True)
print(json.dumps(found))
"""


@pytest.mark.faults
def test_a_job_of_a_local_cluster_has_its_workers_and_no_helper() -> None:
    done = subprocess.run([sys.executable, "-c", _COMMAND], capture_output=True, text=True, timeout=200, check=True)
    found = json.loads(done.stdout)
    assert found["numbers"] == [*range(0, 16, 2)] and found["actors"] == []
    expected = ("gcs_server", "raylet", "reaper.py", "ray::")
    assert all(any(name in process for name in expected) for process in found["processes"]), found["processes"]
    assert not any("Actor" in process for process in found["processes"]), found["processes"]
    assert sum("/gcs_server" in process for process in found["processes"]) == 1
    assert len(found["actors after"]) == 2
