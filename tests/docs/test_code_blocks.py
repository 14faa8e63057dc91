"""The Python in the documents runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["README.md", "docs/embedding.md", "docs/experts.md"]
BLOCKS = [
    pytest.param(block, id=f"{name}-{number}")
    for name in DOCUMENTS
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    )
]


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block: str) -> None:
    names: dict[str, object] = {}
    exec(compile(block, "document", "exec"), names)
    if "out" in names:
        assert names["out"].shape == names["x"].shape


def test_documents_name_files_that_exist() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for path in re.findall(
            r"`((?:benchmarks|csrc|docs|examples|moe_a2a|tests)/[\w./-]+)`", document.read_text()
        ):
            assert (ROOT / path).exists(), f"{document.name} names {path}"
