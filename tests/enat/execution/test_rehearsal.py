"""What runs on GPUs, rehearsed without one: no tensor is on the CPU, and nothing waits for a value of the GPU."""

from __future__ import annotations

import pytest
import torch
from fake_cuda import OnGpuOnly, fake_gpu, moved
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from enat.config import DECODER_ATTENTIONS
from enat.metrics.classifier import ClassifierExtractor
from enat.metrics.inception import InceptionExtractor, random_inception_weights
from enat.model import ENAT, TextCondition, draw_dropout_mask
from enat.sampler_config import SamplerConfig
from enat.sampling.sampler import decode_steps
from enat.tokenizer import VQGAN, VQGANConfig
from enat.training.loss import objective
from enat.training.masking import MaskedCodes
from material.small_models import small_config

pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla:UserWarning")  # autocast then does nothing
TEXT = {"text_width": 24, "num_text_tokens": 5, "num_classes": 0}
SMALL_VQGAN = VQGANConfig.preset("vqgan-small")


def _condition(is_text: bool, num_images: int):
    if is_text:
        return TextCondition(torch.zeros(num_images, 5, 24), torch.zeros(num_images, 24))
    return torch.zeros(num_images, dtype=torch.int64)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ({}, {}),
        pytest.param({}, {"reveal_order": "halton", "remask_temperature": 0.0}, marks=pytest.mark.slow),
        pytest.param({"encoder_layers": 3}, {"guide_layers": 2, "guidance_schedule": "constant"}, marks=pytest.mark.slow),
        pytest.param({}, {"top_k": 5, "top_p": 0.9, "guidance_scales": (1.0, 1.0, 3.0, 3.0)}, marks=pytest.mark.slow),
        pytest.param({"reused_features": "all"}, {"reveal_order": "random", "remask_temperature": 0.0}, marks=pytest.mark.slow),
        (TEXT, {}),
        (
            {"encoder_layers": 0, "decoder_layers": 3, "decoder_attention": "full", "reuse": False},
            {"local_steps": 1, "local_start": 2, "guidance_schedule": "constant"},
        ),
        *(pytest.param({"decoder_attention": kind, "reuse": False}, {}, marks=pytest.mark.slow) for kind in DECODER_ATTENTIONS),
    ],
    ids=str,
)
def test_the_sampler(architecture, options):
    config = SamplerConfig(num_steps=4, **options)  # has steps of each kind
    with fake_gpu(), torch.no_grad():
        model = ENAT(small_config(**architecture)).eval()
        conditions, tokens = _condition(architecture is TEXT, 6), torch.zeros((3, 16), dtype=torch.int64)
        uniforms = torch.zeros(3, config.num_steps, 2, 16)
        rank = torch.zeros(16, dtype=torch.int64) if config.reveal_order == "halton" else None
        with OnGpuOnly() as gpu:
            states = decode_steps(model, conditions, tokens, uniforms, config, halton_rank=rank)
    assert len(states) == config.num_steps + 1 and len(gpu.names) > 100


@pytest.mark.parametrize("is_reuse", [False, True])
@pytest.mark.parametrize(
    "architecture",
    [{}, *(pytest.param(each, marks=pytest.mark.slow) for each in (TEXT, {"reused_features": "all"}, {"qk_norm": True}))],
    ids=str,
)
def test_a_training_step(architecture, is_reuse):
    """On tensors of torch's meta device, which have no values either."""
    with torch.device("meta"):
        model, teacher = ENAT(small_config(**architecture)).train(), ENAT(small_config(**architecture)).eval()
        codes = torch.zeros(4, 16, dtype=torch.int64)
        masked = MaskedCodes(codes, 9, codes if is_reuse else None, 12 if is_reuse else 0)
        condition, dropout_mask = _condition(architecture is TEXT, 4), draw_dropout_mask(model.config, 4, None, "meta")
        with OnGpuOnly("meta") as gpu:
            loss, _ = objective(model, teacher, codes, condition, masked, dropout_mask=dropout_mask)
            loss.backward()
    assert all(each.grad is None or each.grad.device.type == "meta" for each in model.parameters())
    assert sum("mm" in name for name in gpu.names) > 30


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_the_encoder(precision):
    with fake_gpu():
        vqgan = VQGAN(SMALL_VQGAN)
        images = torch.zeros(2, 3, 16, 16)
        with OnGpuOnly() as gpu:
            codes = vqgan.encode(images, precision)
    assert codes.shape == (2, 4, 4) and "aten.argmin.default" in gpu.names


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_the_decoder(precision):
    with fake_gpu():
        vqgan = VQGAN(SMALL_VQGAN)
        codes = torch.zeros(2, 4, 4, dtype=torch.int64)
        with OnGpuOnly():
            images = vqgan.decode(codes, precision)
    assert images.shape == (2, 3, 16, 16)


def test_the_classifier():
    with fake_gpu():
        extractor = ClassifierExtractor(10)
        images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
        with OnGpuOnly():
            assert extractor(images)["features"].shape == (2, 64)


def test_inception():
    extractor = InceptionExtractor(random_inception_weights())
    with fake_gpu() as mode:
        moved(extractor, mode)
        images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
        with OnGpuOnly():
            outputs = extractor(images)
    assert {name: value.shape[1] for name, value in outputs.items()} == dict(extractor.outputs)


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_the_image_encoders(kind):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

    from enat.metrics.image_encoders import ImageEncoder

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    if kind == "dinov2":
        network = Dinov2Model(Dinov2Config(**sizes))
    else:
        network = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, intermediate_size=64, projection_dim=16))
    extractor = ImageEncoder(kind, network)
    with fake_gpu() as mode:
        moved(extractor, mode)
        images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
        with OnGpuOnly():
            outputs = extractor(images)
    assert outputs["features"].shape == (2, extractor.outputs["features"])


# The rehearsal itself --------------------------------------------------------------------------------------------------------


def test_a_tensor_on_the_cpu_is_found():
    with fake_gpu(), OnGpuOnly(), pytest.raises(AssertionError, match=r"aten.arange.* has a tensor \(3,\) on the cpu"):
        torch.zeros(3)[torch.arange(3, device="cpu")]


@pytest.mark.parametrize(
    "wait", [lambda values: values.sum().item(), lambda values: bool((values > 0).any()), lambda values: values[values > 0]]
)
def test_waiting_for_a_value_is_found(wait):
    with fake_gpu(), OnGpuOnly(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        wait(torch.zeros(3))
