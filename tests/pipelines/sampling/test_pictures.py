"""Pictures of samples: the steps of decoding side by side and as an animation, masked tokens gray."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from enat.config import ENATConfig
from enat.images import to_uint8
from enat.model import ENAT
from enat.sampler_config import SamplerConfig
from enat.sampling.sampler import sample
from material.random_weights import randomized
from pipelines.sampling.pictures import MASKED_GRAY, animation, step_images, strip

SIZES = {"encoder_layers": 1, "decoder_layers": 1, "embed_dim": 32, "num_heads": 2, "grid_size": 4, "codebook_size": 32}


def test_steps_show_what_is_known_after_each_and_gray_where_nothing_is(vqgan):
    model = randomized(ENAT(ENATConfig(**SIZES)))
    codes, trajectory = sample(model, torch.arange(3), SamplerConfig(num_steps=4), seeds=range(3), return_trajectory=True)
    frames = step_images(vqgan, trajectory, codes, mask_id=32)
    assert frames.shape == (5, 3, 3, 16, 16) and (frames[0] == MASKED_GRAY).all()
    np.testing.assert_array_equal(frames[-1].numpy(), to_uint8(vqgan.decode(codes.view(3, 4, 4))).numpy())
    for step, tokens in enumerate([*trajectory, codes]):
        for image, position in ((0, 0), (1, 7), (2, 15)):
            row, column = divmod(position, 4)
            patch = frames[step, image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert bool((patch == MASKED_GRAY).all()) == bool(tokens[image, position] == 32)
    assert strip(frames).size == (4 * 18 + 2, 3 * 18 + 2) and strip(frames, with_start=True).size[0] == 5 * 18 + 2
    with Image.open(io.BytesIO(animation(frames, columns=2))) as gif:
        assert gif.n_frames == 5 and gif.size == (2 * 18 + 2, 2 * 18 + 2) and gif.info["loop"] == 0
        first = np.asarray(gif.convert("RGB"))
        assert (first[2:18, 2:18] == MASKED_GRAY).all(), "nothing is known before the first step"
        gif.seek(4)
        last = np.asarray(gif.convert("RGB")).astype(int)
        assert gif.info["duration"] == 2000
    grid = np.concatenate([frames[-1, 0].numpy(), frames[-1, 1].numpy()], axis=2).transpose(1, 2, 0).astype(int)
    shown = np.concatenate([last[2:18, 2:18], last[2:18, 20:36]], axis=1)
    assert abs(shown - grid).mean() < 12, "colours of a palette of 256"


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 0, 0), (158, 162, 160), (160, 160, 160)], ids=str)
def test_animation_shows_masked_tokens_gray_whatever_the_result(colour):
    result = torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).expand(1, 3, 16, 16)
    result = torch.where(
        torch.arange(16) < 8, result, torch.randint(256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    )
    frames = torch.stack([torch.full_like(result, MASKED_GRAY), result]).byte()
    with Image.open(io.BytesIO(animation(frames, columns=1))) as gif:
        assert (np.asarray(gif.convert("RGB"))[2:-2, 2:-2] == MASKED_GRAY).all()
        gif.seek(1)
        shown = np.asarray(gif.convert("RGB"))[2:-2, 2:10].astype(int)
        assert abs(shown - colour).max() <= 4, "the cells of Pillow's search for the nearest colour"
