"""Published results: values of the table, empty where unknown, and the runs that they are compared with."""

from __future__ import annotations

import pytest
import yaml

from pipelines.comparison.published import (
    DATASETS,
    PublishedResult,
    load_published,
    matching_dataset,
    published_for,
    read_published,
)

# A second copy from the papers and READMEs: name, dataset, FID.
FIDS = """
ENAT-L imagenet256 2.79 | ENAT-XL imagenet256 2.48 | ENAT-S imagenet256 4.97 | MaskGIT imagenet256 6.18 | AutoNAT-L imagenet256 2.68
MAR-L imagenet256 1.78 | MAR-H imagenet256 1.55 | VAR-d30 imagenet256 1.97 | TiTok-S128 imagenet256 1.97 | RAR-XXL imagenet256 1.48
Halton-MaskGIT-S imagenet256 6.40 | Halton-MaskGIT-B imagenet256 4.17 | DiT-XL/2 imagenet256 2.27 | U-ViT-H imagenet256 2.29
LDM-4 imagenet256 3.60 | StyleGAN-XL imagenet256 2.30 | SiT-XL imagenet256 2.06 | MDTv2 imagenet256 1.58 | ADM imagenet256 10.94
MAGE-B imagenet256 11.1 | MAGE-L imagenet256 9.10 | ENAT-S, attention of MAE imagenet256 5.03
ENAT-S, attention of CrossMAE imagenet256 6.31 | NAT, baseline imagenet256 6.54 | NAT, disentangled imagenet256 5.50
MaskGIT imagenet512 7.32 | DiT imagenet512 3.04 | U-ViT-L imagenet512 4.67 | U-ViT-H imagenet512 4.05
ENAT-B coco256 6.82 | U-ViT, 1000K training steps coco256 6.92 | U-ViT, 150K training steps coco256 10.02 | U-ViT-S coco256 5.95
U-ViT-S deep coco256 5.48
"""


def _whole() -> list[PublishedResult]:
    """Results without one-step decoding, which has a row per mask ratio."""
    return [result for result in load_published() if result.mask_ratio is None]


def test_one_step_decoding_is_as_the_paper_states_it() -> None:
    found = {(result.name, result.mask_ratio): result.fid for result in published_for("imagenet256-one-step")}
    ratios = (0.2, 0.4, 0.6, 0.8)
    stated = {"MaskGIT": (3.89, 8.23, 19.20, 48.78), "ENAT": (3.48, 6.74, 16.04, 45.51)}
    assert found == {(name, ratio): fid for name, fids in stated.items() for ratio, fid in zip(ratios, fids, strict=True)}
    assert matching_dataset("imagenet", 256, is_one_step=True) == "imagenet256-one-step"
    assert matching_dataset("imagenet", 512, is_one_step=True) is None


def test_every_stated_fid_is_in_the_table_and_no_other() -> None:
    expected = {}
    for entry in FIDS.replace("\n", "|").split("|"):
        if entry.strip():
            name, dataset, fid = entry.strip().rsplit(" ", 2)
            expected[name, dataset] = float(fid)
    assert {(result.name, result.dataset): result.fid for result in _whole() if result.fid is not None} == expected


def test_unverified_values_are_empty() -> None:
    without = {result.name: result for result in load_published() if result.fid is None}
    assert without.keys() == {"Muse", "simple diffusion"}
    assert all(result.tflops is None and result.params_millions is None and result.steps is None for result in without.values())


def test_sizes_and_steps_are_those_stated() -> None:
    known = {(result.name, result.params_millions) for result in load_published() if result.params_millions is not None}
    assert known == {
        ("ENAT-L", 574.3), ("ENAT-XL", 1040.7), ("ENAT-S", 98.1), ("MaskGIT", 227), ("AutoNAT-L", 194), ("DiT-XL/2", 675),
    }  # fmt: skip
    steps = {result.name: result.steps for result in published_for("imagenet256") if result.steps is not None}
    assert steps["MaskGIT"] == 8 and steps["DiT-XL/2"] == 250 and steps["Halton-MaskGIT-B"] == 32 and "MAR-L" not in steps


def test_a_derived_cost_is_marked_and_equals_the_cost_of_this_code() -> None:
    from enat.config import ENATConfig
    from enat.cost import generation_cost
    from enat.sampler_config import SamplerConfig
    from enat.tokenizer import VQGANConfig

    derived = {result.name: result for result in load_published() if "derived" in result.note}
    assert derived.keys() == {"ENAT-S", "ENAT-L", "ENAT-XL", "DiT-XL/2"}
    assert [result.name for result in load_published() if not result.has_decoder] == ["DiT-XL/2"]
    for name in ("ENAT-S", "ENAT-L", "ENAT-XL"):
        cost = generation_cost(ENATConfig.preset(name.lower()), SamplerConfig(guidance_scale=3.5), VQGANConfig())
        assert derived[name].tflops == pytest.approx(cost.total_macs / 1e12, rel=2e-3)
    assert derived["DiT-XL/2"].tflops == pytest.approx(119e-3 * 250 * 2)
    stated = {result.name for result in load_published() if result.tflops is not None} - derived.keys()
    assert stated == {"ENAT-B", "U-ViT, 1000K training steps"}


def test_the_ablations_have_the_costs_of_the_paper() -> None:
    notes = {result.name: result.note for result in published_for("imagenet256")}
    for name, stated in (("ENAT-S, attention of MAE", "24.5"), ("ENAT-S, attention of CrossMAE", "21.4"), ("ENAT-S", "22.6")):
        assert f"stated as {stated} GFLOPs" in notes[name]
    assert [result.label for result in load_published() if result.is_unconditional] == [
        "MAGE-B (unconditional)",
        "MAGE-L (unconditional)",
    ]


def test_every_row_has_a_source_and_no_row_occurs_twice() -> None:
    results = load_published()
    assert all(result.source for result in results)
    assert len({(result.name, result.dataset, result.mask_ratio) for result in results}) == len(results)
    assert sum(len(published_for(dataset)) for dataset in DATASETS) == len(results)


def test_published_numbers_match_whole_datasets_only() -> None:
    for title, resolution, expected in (
        ("imagenet", 256, "imagenet256"),
        ("ImageNet-1k", 512, "imagenet512"),
        ("imagenet512", 512, "imagenet512"),
        ("ILSVRC2012", 256, "imagenet256"),
        ("ILSVRC2012-imagenet_train", 256, "imagenet256"),
        ("coco2014", 256, "coco256"),
        ("MS-COCO", 256, "coco256"),
        ("coco2014", 512, None),
        ("imagenet", 128, None),
        ("imagenet", None, None),
        (None, 256, None),
        ("VIRTUAL_imagenet256_labeled.npz", 256, "imagenet256"),
        ("VIRTUAL_imagenet512.npz", 512, "imagenet512"),
        ("VIRTUAL_imagenet512.npz", 256, None),
        ("fid_stats_imagenet256_guided_diffusion.npz", 256, "imagenet256"),
        ("fid_stats_mscoco256_val.npz", 256, "coco256"),
        ("VIRTUAL_lsun_bedroom256.npz", 256, None),
        ("digits", 16, None),
        ("imagenet100", 256, None),
        ("imagenet-100", 256, None),
        ("tiny-imagenet", 256, None),
        ("imagenette", 256, None),
        ("imagenet-21k", 256, None),
        ("imagenet-sketch", 256, None),
        ("coconut", 256, None),
    ):
        assert matching_dataset(title, resolution) == expected, (title, resolution)


def test_a_row_with_a_mistake_is_refused_with_its_number() -> None:
    row = {"name": "a", "dataset": "imagenet256", "source": "s"}
    wrong: list[tuple[dict[str, object], str]] = [
        ({"fids": 2}, "fids"),
        ({"dataset": "mnist"}, "a has dataset 'mnist'"),
        ({"fid": -1}, "fid"),
        ({"fid": float("nan")}, "fid"),
        ({"tflops": "low"}, "tflops"),
        ({"steps": True}, "steps"),
        ({"mask_ratio": 0.2}, "mask_ratio is required for one-step decoding"),
        ({"dataset": "imagenet256-one-step"}, "mask_ratio is required for one-step decoding"),
        ({"has_decoder": 1}, "has_decoder"),
        ({"source": None}, "source"),
    ]
    for change, sentence in wrong:
        with pytest.raises(ValueError, match=rf"(?s)\n1\b.*{sentence}"):
            read_published(yaml.safe_dump([row, {**row, **change}]))
    for text in ("{}", "- 3"):
        with pytest.raises(ValueError, match=r"list|dictionary"):
            read_published(text)
