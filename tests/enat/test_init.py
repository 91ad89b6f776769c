"""The package as a whole: what importing it brings along."""

import subprocess
import sys

MACHINERY = ["ray", "deepspeed", "mlflow", "boto3", "omegaconf", "pyarrow", "pipelines"]
LAZY = ["torch_fidelity", "torchvision"]  # only InceptionV3 needs them


def test_importing_the_method_imports_no_machinery():
    modules = [
        "checkpoint",
        "config",
        "cost",
        "images",
        "loss",
        "masking",
        "metrics.extractors",
        "metrics.moments",
        "model",
        "sampler",
        "schedule",
        "tokenizer",
    ]
    imports = ", ".join(f"enat.{name}" for name in [*modules, "tokenizer_training"])
    listing = f"import sys, {imports}; print(*{{name.split('.')[0] for name in sys.modules}})"
    answer = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True, timeout=120)
    imported = set(answer.stdout.split())
    assert {"enat", "torch"} <= imported
    assert imported.isdisjoint(MACHINERY + LAZY)
    assert answer.stderr == ""
