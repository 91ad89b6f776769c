"""InceptionV3 of torch-fidelity, the network of published FIDs.

Shape legend: B images, H x W pixels.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_INCEPTION_LAYERS = ["2048", "logits_unbiased"]


class InceptionExtractor(nn.Module):
    """torch-fidelity's InceptionV3 of the original FID, with the outputs of ADM's evaluation.

    "features" 2048, after the last pooling. "logits" 1008, without the bias, as used by the Inception Score.
    "spatial" 2023, of ADM's sFID: the first 7 channels at 17 x 17 positions of the original graph's "mixed_6/conv". The graph
    counts its blocks from "mixed" (Mixed_5b), so mixed_6 is Mixed_6d, and its first convolution is the 1x1 branch, taken after the
    ReLU. Values are in the order row, column, channel, as in ADM's reference statistics (mu_s, sigma_s).

    `weights`: a state dict of torch-fidelity's network.
    """

    is_thread_safe = takes_float = True
    outputs: Mapping[str, int] = {"features": 2048, "spatial": 17 * 17 * 7, "logits": 1008}

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        with tempfile.TemporaryDirectory() as folder:
            # torch-fidelity opens its file with weights_only=False, so it gets a file written here.
            path = str(Path(folder) / "inception.pth")
            torch.save(dict(weights), path)
            try:
                self.network = FeatureExtractorInceptionV3("inception", _INCEPTION_LAYERS, feature_extractor_weights_path=path)
            except RuntimeError as error:  # what load_state_dict raises: several lines of names
                reason = " ".join(str(error).split())[:200]
                raise ValueError(f"the weights are not those of torch-fidelity's InceptionV3 ({reason})") from error
        # Permanent hooks, and storage for each thread: a hook of a single call would also see the images of other threads.
        self._tap = threading.local()
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        self.network.Conv2d_1a_3x3.register_forward_pre_hook(self._put_unrounded)

    def _keep(self, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        self._tap.output = output

    def _put_unrounded(self, _: nn.Module, pixels: tuple[Tensor]) -> tuple[Tensor]:
        """Replace what torch-fidelity's network, which takes only uint8, made of rounded images by the images before rounding,
        resized in the same way."""
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        images = self._tap.__dict__.pop("unrounded", None)
        if images is None:
            return pixels
        side = self.network.INPUT_IMAGE_SIZE
        return ((interpolate_bilinear_2d_like_tensorflow1x(images, size=(side, side), align_corners=False) - 128) / 128,)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if images.dtype != torch.uint8:
            self._tap.unrounded = images.to(torch.float32)
            images = images.to(torch.uint8)
        features, logits = self.network(images)
        spatial = self._tap.output[:, :7].permute(0, 2, 3, 1).flatten(1).float()
        del self._tap.output  # otherwise kept until the thread's next call
        return {"features": features, "spatial": spatial, "logits": logits}

    @classmethod
    def load(cls, path: Path) -> InceptionExtractor:
        """From a file of save."""
        return cls(load_file(path))

    def save(self, path: Path) -> None:
        save_file({name: tensor.cpu().contiguous() for name, tensor in self.network.state_dict().items()}, path)


class CleanInceptionExtractor(InceptionExtractor):
    """The same network on images that are resized as by clean-fid (Parmar et al. 2022): with antialiasing, by Pillow's bicubic
    filter on floats, one channel at a time. Scores of both ways of resizing are not comparable."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        side = self.network.INPUT_IMAGE_SIZE
        channels = images.float().cpu().numpy().reshape(-1, *images.shape[-2:])
        resized = [np.asarray(Image.fromarray(each).resize((side, side), Image.Resampling.BICUBIC)) for each in channels]
        pixels = torch.from_numpy(np.stack(resized)).clamp(0, 255).view(len(images), 3, side, side)
        return super().forward(pixels.to(images.device))  # its own resizing keeps images of this size


def published_inception_weights() -> dict[str, Tensor]:
    """The weights that torch-fidelity publishes, downloaded on first use into torch's hub cache.

    torch-fidelity's own download checks no hash and unpickles any object. This one checks the hash in the file's name and reads
    tensors only. Raises ValueError if the download fails.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    try:
        weights: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
            URL_INCEPTION_V3, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"InceptionV3's published weights cannot be downloaded ({error}); give a file of them as reference.weights"
        ) from error
    return weights


def random_inception_weights() -> dict[str, Tensor]:
    """Weights under which activations stay near 1 and images are told apart, to compare the network's arithmetic without the
    published ones. They are always the same."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *_: Any, **__: Any) -> None:
            """Without any: the class would download the published ones."""

    with tempfile.TemporaryDirectory() as folder:
        nothing = str(Path(folder) / "none.pth")
        torch.save({}, nothing)
        network = Untrained("inception", ["2048"], feature_extractor_weights_path=nothing)
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2, generator=generator)
            module.weight -= module.weight.mean(dim=1, keepdim=True)  # otherwise all images get about the same logits
        elif isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            nn.init.normal_(module.running_mean, 0, 0.1, generator=generator)
            nn.init.uniform_(module.running_var, 0.5, 1.5, generator=generator)
    return dict(network.state_dict())
