"""Published results: values of the table, empty where unknown, and the runs that they are compared with."""

from __future__ import annotations

import re

import pytest
import yaml

from pipelines.comparison.published import (
    DATASETS,
    SETS,
    PublishedResult,
    load_published,
    matching_dataset,
    published_for,
    read_published,
)

# A second copy from the papers and READMEs. Each line: reference, dataset, and the names with their FIDs.
FIDS = """
virtual imagenet256: ENAT-L 2.79, AutoNAT-L 2.68, TiTok-L-32 2.77, TiTok-B-64 2.48, TiTok-S-128 1.97
virtual imagenet256: MAR-B 2.31, MAR-L 1.78, MAR-H 1.55, LazyMAR-B 2.45, LazyMAR-L 1.93, LazyMAR-H 1.69
virtual imagenet256: Hi-MAR-B 1.93, Hi-MAR-L 1.66, Hi-MAR-H 1.52
virtual imagenet256: VAR-d16 3.55, VAR-d20 2.95, VAR-d24 2.33, VAR-d30 1.97, VAR-d30-re 1.80
virtual imagenet256: RAR-B 1.95, RAR-L 1.70, RAR-XL 1.50, RAR-XXL 1.48, ARPG-L 2.44, ARPG-XL 2.10, ARPG-XXL 1.94
virtual imagenet256: LlamaGen-B; 16 x 16 5.46, LlamaGen-L; 16 x 16 3.80, LlamaGen-L; 24 x 24 3.07, LlamaGen-XL; 24 x 24 2.62
virtual imagenet256: LlamaGen-XXL; 24 x 24 2.34, LlamaGen-3B; 24 x 24 2.18
virtual imagenet256: DiT-XL/2 2.27, SiT-XL 2.06, U-ViT-L 3.40, U-ViT-H 2.29, MDT-XL/2 1.79, MDTv2-XL/2 1.58
virtual imagenet256: ADM 10.94, ADM-G 4.59, ADM-G; ADM-U 3.94
train imagenet256: Halton-MaskGIT-T 10.2, Halton-MaskGIT-S 6.40, Halton-MaskGIT-B 4.17
train imagenet256: Halton-MaskGIT-S; 384 px 6.11, Halton-MaskGIT-B; 384 px 4.15, Halton-MaskGIT-L; 384 px 2.59
train imagenet256: MaskBit; 10 bits 1.68, MaskBit; 12 bits 1.65, MaskBit; 14 bits; 64 steps 1.62, MaskBit; 14 bits; 128 steps 1.56
train imagenet256: MaskBit; 14 bits; 256 steps 1.52, StyleGAN-XL; released weights 2.26
val imagenet256: MAGE-B 11.1, MAGE-L 9.10
unknown imagenet256: ENAT-XL 2.48, ENAT-S 4.97, ENAT-S; attention of MAE 5.03, ENAT-S; attention of CrossMAE 6.31
unknown imagenet256: NAT; baseline 6.54, NAT; disentangled 5.50, MaskGIT 6.18, MaskGIT; released weights 6.06
unknown imagenet256: MaskGIL-B 5.64, MaskGIL-L 4.01, MaskGIL-XL 3.90, MaskGIL-XXL 3.71
unknown imagenet256: Open-MAGVIT2-B 3.08, Open-MAGVIT2-L 2.51, Open-MAGVIT2-XL 2.33
unknown imagenet256: IBQ-B 2.88, IBQ-L 2.45, IBQ-XL 2.14, IBQ-XXL 2.05, LDM-4-G 3.60, StyleGAN-XL 2.30
unknown imagenet256: simple diffusion 2.77, simple diffusion; U-ViT-L 3.75, simple diffusion; U-Net 3.71
virtual imagenet512: VAR-d36 2.63, DiT-XL/2 3.04, SiT-XL 2.62, U-ViT-L 4.67, U-ViT-H 4.05, ADM-G 7.72, ADM-G; ADM-U 3.85
train imagenet512: StyleGAN-XL; released weights 2.42
unknown imagenet512: MaskGIT 7.32, simple diffusion; U-ViT-L 4.53, simple diffusion; U-Net 4.28
val coco256: U-ViT-S 5.95, U-ViT-S deep 5.48
unknown coco256: ENAT-B 6.82, U-ViT; 1000K training steps 6.92, U-ViT; 150K training steps 10.02, Muse 7.88
"""
# Name, steps, millions of parameters (0: unknown), IS and, where known, precision and recall, at 256 px.
SCORES = """
MaskGIT 8 227 182.1 0.80 0.51 | AutoNAT-L 8 194 278.8 | TiTok-S-128 64 287 281.8 | MAR-B 256 208 281.7 0.82 0.57
MAR-L 256 479 296.0 0.81 0.60 | MAR-H 256 943 303.7 0.81 0.62 | LazyMAR-B 64 208 281.3 | LazyMAR-L 64 479 297.4
LazyMAR-H 64 943 299.2
RAR-B 256 261 290.5 0.82 0.58 | RAR-L 256 461 299.5 0.81 0.60 | RAR-XL 256 955 306.9 0.80 0.62 | RAR-XXL 256 1500 326.0 0.80 0.63
Halton-MaskGIT-T 32 23 185 | Halton-MaskGIT-S 32 69 255 | Halton-MaskGIT-B 32 142 263 | Halton-MaskGIT-L, 384 px 32 480 281
ARPG-L 64 320 287 | ARPG-XL 64 719 331 | ARPG-XXL 64 1300 340 | DiT-XL/2 250 675 278.24 0.83 0.57 | SiT-XL 250 675 270.27 0.82 0.59
LDM-4-G 250 400 247.67 0.87 0.48 | MDT-XL/2 250 0 283.01 | MDTv2-XL/2 250 676 314.73 0.79 0.65 | U-ViT-H 50 501 263.9 0.82 0.57
LlamaGen-L, 16 x 16 256 343 248.3 0.83 0.51 | LlamaGen-3B, 24 x 24 576 3100 263.3 0.81 0.58 | MAGE-B 20 0 81.2
MaskBit, 14 bits, 256 steps 256 305 328.6
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


def test_every_stated_fid_is_in_the_table_with_its_reference_and_no_other() -> None:
    expected = {}
    for line in FIDS.strip().splitlines():
        (reference, dataset), entries = line.partition(": ")[0].split(), line.partition(": ")[2].split(", ")
        for name, fid in (entry.rsplit(" ", 1) for entry in entries):
            expected[name.replace(";", ","), dataset] = (reference, float(fid))
    found = {(result.name, result.dataset): (result.reference, result.fid) for result in _whole() if result.fid is not None}
    assert found == expected


def test_other_scores_are_those_stated() -> None:
    found = {result.name: result for result in published_for("imagenet256")}
    for entry in SCORES.replace("\n", "|").strip("|").split("|"):
        matched = re.fullmatch(r"(.+?) (\d+) (\d+) ([\d.]+)(?: ([\d.]+) ([\d.]+))?", entry.strip())
        assert matched is not None, entry
        name, steps, params, *scores = matched.groups()
        row = found[name]
        assert (row.steps, row.params_millions or 0) == (int(steps), int(params)), name
        assert [row.inception_score, row.precision, row.recall] == [score and float(score) for score in scores], name


def test_every_row_has_a_reference_stated_or_unknown() -> None:
    assert {result.reference for result in load_published()} == {"train", "val", "virtual", "unknown"}
    assert {result.reference for result in published_for("coco256")} == {"val", "unknown"}, "ADM's statistics are of ImageNet"
    row = {"name": "a", "dataset": "imagenet256", "source": "s"}
    changes: list[dict[str, object]] = [{}, {"reference": None}, {"reference": ""}, {"reference": "training images"}]
    for change in changes:
        with pytest.raises(ValueError, match="reference"):
            read_published(yaml.safe_dump([{**row, **change}]))


def test_rows_with_another_protocol_than_usual_are_known() -> None:
    whole = {(result.name, result.dataset): result for result in _whole()}
    assert {name for (name, _), result in whole.items() if result.is_guided is False} == {
        "ADM", "MaskGIT", "MAGE-B", "MAGE-L", "StyleGAN-XL", "StyleGAN-XL, released weights",
    }  # fmt: skip
    usual = {dataset: SETS[dataset].num_samples for dataset in DATASETS}
    assert [key for key, result in whole.items() if result.num_samples not in (None, usual[result.dataset])] == [
        ("ENAT-L", "imagenet512")
    ]
    assert whole["ENAT-L", "imagenet512"].num_samples == 5000


def test_unverified_values_are_empty() -> None:
    (without,) = (result for result in load_published() if result.fid is None)
    assert (without.name, without.dataset, without.tflops, without.params_millions) == ("ENAT-L", "imagenet512", None, None)


def test_a_cost_has_its_basis_and_equals_the_cost_of_this_code() -> None:
    from enat.config import ENATConfig
    from enat.cost import generation_cost
    from enat.sampler_config import SamplerConfig
    from enat.tokenizer import VQGANConfig

    costs = {(result.name, result.dataset): result for result in load_published() if result.tflops is not None}
    by_basis: dict[str | None, set[tuple[str, str]]] = {}
    for key, result in costs.items():
        by_basis.setdefault(result.cost_basis, set()).add(key)
    large = {(name, "imagenet256") for name in ("DiT-XL/2", "SiT-XL")} | {("DiT-XL/2", "imagenet512")}
    assert by_basis == {
        "measured": {(name, "imagenet256") for name in ("ENAT-S", "ENAT-L", "ENAT-XL")},
        "derived": {("AutoNAT-L", "imagenet256"), *large},
        "stated": {("ENAT-B", "coco256"), ("U-ViT, 1000K training steps", "coco256")},
    }
    assert {(result.name, result.dataset) for result in load_published() if not result.has_decoder} == large
    for name in ("ENAT-S", "ENAT-L", "ENAT-XL"):
        cost = generation_cost(ENATConfig.preset(name.lower()), SamplerConfig(guidance_scale=3.5), VQGANConfig())
        assert costs[name, "imagenet256"].tflops == pytest.approx(cost.total_macs / 1e12, rel=2e-3)
    decoder = 93.3e-3
    assert costs["AutoNAT-L", "imagenet256"].tflops == pytest.approx(8 * 2 * 52.0e-3 + decoder, rel=1e-3)
    for dataset, gmacs in (("imagenet256", 119), ("imagenet512", 525)):
        assert costs["DiT-XL/2", dataset].tflops == pytest.approx(gmacs * 1e-3 * 250 * 2)
    assert all(result.note for result in costs.values() if result.cost_basis == "derived"), "it says from what"


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
    row = {"name": "a", "dataset": "imagenet256", "source": "s", "reference": "unknown"}
    wrong: list[tuple[dict[str, object], str]] = [
        ({"fids": 2}, "fids"),
        ({"dataset": "mnist"}, "a has dataset 'mnist'"),
        ({"fid": -1}, "fid"),
        ({"fid": float("nan")}, "fid"),
        ({"tflops": "low"}, "tflops"),
        ({"tflops": 1.0}, "cost_basis is required with tflops"),
        ({"cost_basis": "derived"}, "cost_basis is required with tflops"),
        ({"tflops": 1.0, "cost_basis": "guessed"}, "cost_basis"),
        ({"precision": 83}, "precision"),
        ({"is_guided": "yes"}, "is_guided"),
        ({"num_samples": 5e4}, "num_samples"),
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
