"""What tells one checkpoint from another."""

from __future__ import annotations

import tarfile
from pathlib import Path

from llamas import MakeLlama, convert_quietly

from steerlm_nemo.checkpoint import identity as module
from steerlm_nemo.checkpoint.archive import extract_nemo, open_nemo


def identity(path: Path) -> str:
    with open_nemo(path) as nemo:
        return module.identity(nemo)


def test_it_is_the_same_however_the_checkpoint_is_packed(llama_nemo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unpacked"
    extract_nemo(llama_nemo, folder)
    with tarfile.open(tmp_path / "gzip.nemo", "w:gz") as archive:
        archive.add(folder, arcname=".")
    assert identity(llama_nemo) == identity(folder) == identity(tmp_path / "gzip.nemo")
    assert len(identity(llama_nemo)) == 16


def test_a_model_has_the_name_of_its_run_or_that_of_its_file(llama_nemo: Path, tmp_path: Path) -> None:
    config = extract_nemo(llama_nemo, tmp_path / "judge.nemo") / "model_config.yaml"
    with open_nemo(tmp_path / "judge.nemo") as nemo:
        assert module.name_of(nemo) == "judge"
    before = config.read_text()
    for provenance, name in (("{name: value}", "value"), ("{base: llama.nemo}", "judge"), ("[]", "judge")):
        config.write_text(f"{before}steerlm_provenance: {provenance}\n")
        with open_nemo(tmp_path / "judge.nemo") as nemo:
            assert module.name_of(nemo) == name


def test_other_weights_another_tokenizer_or_config_are_another_model(
    make_llama: MakeLlama, llama_nemo: Path, tmp_path: Path
) -> None:
    found = [identity(llama_nemo)]
    other = make_llama(rms_norm_eps=1e-6, initializer_range=0.02)  # another seed, too
    found.append(identity(convert_quietly(other, tmp_path / "other.nemo")))
    for number, (name, change) in enumerate(
        {"tokenizer.model": b"\0", "model_config.yaml": b"# \n", "model_weights/__0_0.distcp": b"\0"}.items()
    ):
        folder = tmp_path / str(number)
        extract_nemo(llama_nemo, folder)
        with (folder / name).open("ab") as file:
            file.write(change)
        found.append(identity(folder))
    assert len(set(found)) == len(found)


def test_large_members_are_told_apart_by_blocks_all_over_them(llama_nemo: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_WHOLE_BYTES", 2**14)
    folder = tmp_path / "unpacked"
    extract_nemo(llama_nemo, folder)
    weights = folder / "model_weights" / "__0_0.distcp"
    assert weights.stat().st_size > 2**14
    found = {identity(folder)}
    for place in (0, weights.stat().st_size - 1):
        with weights.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 1]))
        found.add(identity(folder))
    assert len(found) == 3
