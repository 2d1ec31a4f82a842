"""The page about conversions: its tables are the code's."""

from __future__ import annotations

import re
from pathlib import Path

from physisforcing.core.config import compose
from physisforcing.worldmodel.convert import configs, find, pipeline
from physisforcing.worldmodel.convert.command import ConvertConfig
from physisforcing.worldmodel.convert.sources import PUBLISHED

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "convert.md").read_text(encoding="utf-8")


def test_checksums_and_kinds_are_those_of_the_code() -> None:
    assert dict(re.findall(r"^\| `(\S+)` \| `([0-9a-f]{64})` \|", PAGE, re.MULTILINE)) == PUBLISHED
    assert set(re.findall(r"^\| \S.*? \| `(\w+)`[^|]* \| ", PAGE, re.MULTILINE)) - {"kind"} == set(find.KINDS)


def test_shifts_and_boundaries_are_those_of_the_code() -> None:
    rows = {
        row.split("|")[1].strip().strip("[").split("]")[0]: row for row in PAGE.splitlines() if row.startswith("| [")
    }
    assert f"shift {pipeline.SHIFT}" in rows["Wan2.2-TI2V-5B"] and f"shift {pipeline.SHIFT}" in rows["PF_Wan"]
    assert f"boundary {pipeline.BOUNDARY_IMAGE}, shift {pipeline.SHIFT}" in rows["Wan2.2-I2V-A14B"]
    assert f"boundary {pipeline.BOUNDARY_TEXT}, shift {pipeline.SHIFT_TEXT_EXPERTS}" in rows["Wan2.2-T2V-A14B"]
    assert f"shift {pipeline.SHIFT_COSMOS}" in rows["PF_Cosmos"]


def test_settings_of_the_page_fit_the_command(tmp_path: Path) -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines():
        compose("convert", line.split()[2:], ConvertConfig).check()
    (words,) = re.findall(r"`(sha256=\S+)`", PAGE)
    for name, digest in PUBLISHED.items():
        told = words.replace("Wan2.1_VAE.pth:38071ab5...", f"{name}:{digest}")
        made = compose("convert", ["source=x", told], ConvertConfig)
        made.check()
        assert made.sha256 == {name: digest}
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "example.json").write_text(example)
    assert configs.read_jsonc(tmp_path / "example.json")["transformer"] == {"num_heads": 2, "model_type": "ti2v"}
