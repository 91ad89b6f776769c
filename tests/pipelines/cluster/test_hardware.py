"""Names of hardware, and clusters in a few letters."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.cluster.capacity import Capacity
from pipelines.cluster.hardware import cpu_name, gpu_names, known_gpus, of_cluster, of_this_machine, parse_cluster, short_name


@pytest.mark.parametrize(
    ("text", "nodes", "gpu"),
    [
        ("8x8xH200", [{"CPU": 96.0, "GPU": 8.0}] * 8, "H200"),
        ("1x4xa100", [{"CPU": 48.0, "GPU": 4.0}], "A100"),
        ("2x1xL40Sx16", [{"CPU": 16.0, "GPU": 1.0}] * 2, "L40S"),
        ("4x16xCPU", [{"CPU": 16.0}] * 4, None),
    ],
)
def test_a_cluster_is_described_in_a_few_letters(text: str, nodes: list[dict[str, float]], gpu: str | None) -> None:
    machines = parse_cluster(text)
    assert [dict(node) for node in machines.capacity.nodes] == nodes and machines.gpu == gpu and machines.cpu is None


@pytest.mark.parametrize("text", ["", "H200", "8xH200", "0x8xH200", "8x0xH200", "8x8x", "axbxH200", "999999x8xH200"])
def test_other_letters_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="does not describe a cluster; write NODESxGPUSxNAME"):
        parse_cluster(text)


def test_an_unknown_gpu_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match=r"the GPU 'H300' is not known; known are A100, .*T4, .*GPU and CPU"):
        parse_cluster("1x8xH300")


@pytest.mark.parametrize(
    ("product", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA-H100", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", "NVIDIA L40"),  # another one than the L4
        ("NVIDIA GeForce GTX 1080", "NVIDIA GeForce GTX 1080"),
    ],
)
def test_products_are_found_by_their_short_names(product: str, name: str) -> None:
    assert short_name(product) == name


def test_gpus_are_found_in_the_files_of_the_driver(tmp_path: Path) -> None:
    assert gpu_names(str(tmp_path)) == []
    for number in range(2):
        folder = tmp_path / f"0000:0{number}:00.0"
        folder.mkdir()
        (folder / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   \t\t 17\n")
    assert gpu_names(str(tmp_path)) == ["NVIDIA H200"] * 2


def test_this_machine_has_a_cpu_with_a_name() -> None:
    machines = of_this_machine(3)
    assert machines.cpu == cpu_name() != "" and machines.capacity.total("CPU") == 3


def test_ray_states_the_gpus_of_a_cluster() -> None:
    nodes = ({"CPU": 8.0}, {"CPU": 96.0, "GPU": 8.0, "accelerator_type:H100": 1.0})
    assert of_cluster(Capacity(nodes), "Abacus").gpu == "H100"
    assert of_cluster(Capacity(nodes[:1])).gpu is None


def test_peaks_grow_with_fewer_bits() -> None:
    for gpu in known_gpus().values():
        assert 0 < gpu.tflops["fp32"] <= gpu.tflops["tf32"] <= gpu.tflops["bf16"] <= gpu.tflops["fp16"], gpu.name
