"""Known weights are imported by their name, from the place of known.yaml or a file, and what is not known of them is stated."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from enat.checkpoint import load_vqgan
from enat.config import ENATConfig, VQGANConfig
from enat.tokenizer import VQGAN
from pipelines.artifacts.open import open_store
from pipelines.cli import main
from pipelines.sharing import known
from pipelines.storage.base import file_digest
from services.https_server import Page, https_server

ENTRY = """
tiny:
  kind: vqgan
  file: null
  page: https://example.org/tiny
  name: tiny.bin
  layout: open-muse
  preset: vqgan-small
  sha256: null
  licence: "as [its] publisher says"
  source: a test
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer in the layout of open-muse, as a torch file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vqgan = VQGAN(VQGANConfig.preset("vqgan-small"))
    names = {
        "codebook.weight": "quantize.embedding.weight",
        "upsample.conv": "upsample_conv",
        "mid.block_1": "mid.0",
        "mid.block_2": "mid.1",
    }
    tensors = {}
    for name, tensor in vqgan.state_dict().items():
        place = name
        for ours, theirs in names.items():
            place = place.replace(ours, theirs)
        tensors[place] = tensor
    path = tmp_path_factory.mktemp("tiny") / "tiny.bin"
    torch.save(tensors, path)
    return path


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def use(**changes: Any) -> None:
        found = known.read_known(ENTRY)
        monkeypatch.setattr(known, "load_known", lambda: {"tiny": dataclasses.replace(found["tiny"], **changes)})

    return use


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "cache"))

    def run(*arguments: object) -> tuple[int, str, str]:
        store = [] if "--help" in arguments else ["--store", str(tmp_path / "store")]
        monkeypatch.setattr(sys, "argv", ["enat", "import", *map(str, arguments), *store])
        try:
            main.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


# The list ------------------------------------------------------------------------------------------------------------------


def test_every_entry_names_an_architecture_and_a_place_and_invents_no_checksum() -> None:
    entries = known.load_known()
    assert {"enat-l-256", "enat-l-512", "vqgan-mage", "vqgan-maskgit"} <= set(entries)
    for entry in entries.values():
        (VQGANConfig if entry.kind == "vqgan" else ENATConfig).preset(entry.preset)
        assert entry.page and entry.licence and entry.source and entry.name
        assert entry.sha256 is None, "add the test of a file whose checksum is known"
    grid = VQGANConfig.preset("vqgan-512").grid_size
    assert "tokenizer.preset=vqgan-512" in entries["enat-l-512"].values("a.pth", "b.ckpt") and grid == 32
    assert entries["enat-l-256"].values("a.pth", "b.ckpt") == [
        "tokenizer.preset=vqgan-256", "tokenizer.weights=b.ckpt", "train.model.preset=enat-l", "train.weights=a.pth",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("kind: vqgan", "kind: gan"),
        ("file: null", "file: http://example.org/tiny"),
        ("sha256: null", "sha256: abc"),
        ("layout: open-muse", "layout: other"),
        ("kind: vqgan", "kind: enat"),
        ("kind: vqgan", "kind: enat\n  tokenizer: nothing"),
        ("source: a test", "source: a test\n  colour: red"),
    ],
)
def test_entries_that_are_not_valid_are_refused(old: str, new: str) -> None:
    assert known.read_known(ENTRY)
    with pytest.raises((ValidationError, ValueError)):
        known.read_known(ENTRY.replace(old, new))


# The command ---------------------------------------------------------------------------------------------------------------


def test_a_file_is_imported_and_its_checksum_said_to_be_unknown(ask: Any, entry: Any, tiny: Path, tmp_path: Path) -> None:
    entry()
    code, out, err = ask("tiny", tiny, "--json")
    assert code == 0
    digest = file_digest(tiny)
    assert f"tiny: not verified: the checksum of tiny is not known; this file has sha256:{digest}\n" in err
    assert "tiny: licence: as [its] publisher says\n" in err
    answer = json.loads(out)
    store = open_store(str(tmp_path / "store"))
    manifest = store.read_manifest("tokenizer", answer["key"])
    assert manifest is not None and answer["weights"] == f"sha256:{digest}"
    loaded, published = load_vqgan(store.fetch(manifest, "vqgan.safetensors")), torch.load(tiny, weights_only=True)
    assert torch.equal(loaded.decoder.mid.block_2.norm1.weight, published["decoder.mid.1.norm1.weight"])
    assert torch.equal(loaded.decoder.up[1].upsample["conv"].weight, published["decoder.up.1.upsample_conv.weight"])


def test_an_address_is_fetched_verified_and_imported(ask: Any, entry: Any, tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    with https_server(monkeypatch, tmp_path) as server:
        server.pages["/tiny.bin"] = Page(tiny.read_bytes())
        entry(file=f"{server.url}/tiny.bin", sha256=file_digest(tiny))
        code, out, err = ask("tiny", "--json")
        assert code == 0 and "tiny: verified: the file is tiny as published" in err
        assert json.loads(out)["weights"] == f"sha256:{file_digest(tiny)}"


def test_a_file_of_another_content_is_not_imported(ask: Any, entry: Any, tiny: Path, tmp_path: Path) -> None:
    entry(sha256="ab" * 32)
    code, out, err = ask("tiny", tiny)
    assert (code, out) == (2, "") and f"the file is not tiny: it has sha256:{file_digest(tiny)}, and sha256:abab" in err
    assert not (tmp_path / "store").exists()


def test_entries_of_browsers_need_a_file_and_generators_their_tokenizer(ask: Any) -> None:
    code, out, err = ask("enat-l-256")
    assert (code, out) == (2, "") and "download nnet_ema.pth from https://drive.google.com/" in err and err.count("\n") == 1
    code, _, err = ask("enat-l-256", "nnet_ema.pth")
    assert code == 2 and "enat-l-256 needs --vqgan, the file of its tokenizer vqgan-mage, from https://drive" in err
    code, _, err = ask("enat-x")
    assert code == 2 and "No such command 'enat-x'" in err
    code, _, err = ask("vqgan-mage", "nowhere.ckpt")
    assert code == 2 and "vqgan-mage: nowhere.ckpt is not a file" in err


def test_help_lists_known_weights_with_their_licence(ask: Any) -> None:
    code, out, _ = ask("--help")
    assert code == 0 and all(name in out for name in known.load_known())
    code, out, _ = ask("vqgan-maskgit", "--help")
    assert code == 0 and "apache-2.0" in " ".join(out.split()) and "--vqgan" not in out
