"""Speed of sampling, the gain of reuse and of the sampler's gathers over a straightforward loop, and the time for 50,000 samples
with their FID: ratios within one run.

    make bench                                        with the other benchmarks
    .venv/bin/python tests/benchmarks/sampling.py     alone: ENAT-S on all cores (about 6 minutes), ENAT-L in bf16 on a GPU
    .venv/bin/python tests/benchmarks/sampling.py --batch-size 1 --num-rounds 1       faster, less accurate

The compared samplers are in sampling_loops.py, the parts of 50,000 samples in samples_with_fid.py.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from common import in_process, run_script, show, where


@click.command()
@click.option("--preset", help="Size of the model. Default: enat-s on a CPU and enat-l on a GPU.")
@click.option("--batch-size", type=int, help="Images per pass. Default: 8 on a CPU and 256 on a GPU.")
@click.option("--num-rounds", default=2, help="Calls of each sampler. The fastest counts.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(preset: str | None, batch_size: int | None, num_rounds: int, as_json: bool) -> None:
    given: dict[str, Any] = {"preset": "enat-s", "batch_size": 8, "device": "cpu", "precision": "fp32"}
    if torch.cuda.is_available():
        given = {"preset": "enat-l", "batch_size": 256, "device": "cuda", "precision": "bf16"}
    given |= {name: value for name, value in (("preset", preset), ("batch_size", batch_size)) if value is not None}
    with tempfile.TemporaryDirectory(prefix="enat-bench-") as folder:
        figures = in_process(__file__, "samplers", Path(folder), given, num_rounds)
    device_name = {"gpu": torch.cuda.get_device_name()} if given["device"] == "cuda" else {}
    show("sampling", {**where(), **device_name, **given, **figures}, as_json)


def samplers(_: Path, given: dict[str, Any], num_rounds: int) -> dict[str, Any]:
    """All figures, on all cores or on a GPU, where samplers are also compiled and recorded as a CUDA graph."""
    import sampling_loops

    return sampling_loops.measure(given.pop("preset"), num_rounds=num_rounds, compiled=given["device"] == "cuda", **given)


if __name__ == "__main__":
    run_script(globals(), main)
