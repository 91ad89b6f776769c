"""The package as a whole: its names, and what importing it brings along."""

import subprocess
import sys

import pytest

import enat
import enat.metrics

MACHINERY = {"ray", "deepspeed", "mlflow", "boto3", "omegaconf", "pyarrow", "pipelines"}
ONLY_ON_USE = {"torch_fidelity", "torchvision", "transformers"}
WITHOUT_TORCH = [
    "from enat.config import ENATConfig, MaskingConfig, TokenizerRecipe, VQGANConfig",
    "from enat import ENATConfig, SamplerConfig, VQGANConfig, generation_cost",
    "from enat.images import ImageError, center_crop, decode_image",
    "from enat.metrics.extractors import BUILT_IN, extractor_kinds",
]
ALL_MODULES = (
    "import importlib, pkgutil, enat; [importlib.import_module(m.name) for m in pkgutil.walk_packages(enat.__path__, 'enat.')]"
)


def imported(statements: str) -> set[str]:
    listing = f"{statements}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    answer = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True, timeout=120)
    assert answer.stderr == ""
    return set(answer.stdout.split())


def test_importing_the_method_imports_no_machinery():
    modules = imported(ALL_MODULES)
    assert {"enat", "torch"} <= modules
    assert modules.isdisjoint(MACHINERY | ONLY_ON_USE)


def test_configs_and_costs_need_no_torch():
    assert "torch" not in imported("\n".join(WITHOUT_TORCH))


@pytest.mark.parametrize("package", [enat, enat.metrics])
def test_public_names_are_loaded_on_first_use(package):
    assert {getattr(package, name).__name__ for name in package.__all__} == set(package.__all__)
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = package.nothing_of_this_name
