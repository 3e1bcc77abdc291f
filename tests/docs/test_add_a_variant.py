"""The guide's variant, applied to a copy of the project: its own test command passes there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from docs_harness import ROOT

GUIDE = (ROOT / "docs" / "guides" / "add-a-variant.md").read_text(encoding="utf-8")
FILES = ("src/glassgpt/config/model.py", "src/glassgpt/model/attention.py", "src/glassgpt/model/gpt.py")
# The line before which a diff that only adds is inserted, by how the diff begins.
BEFORE = {
    "class ALiBi": "class NoBias(nn.Module):",
    '"alibi": lambda': '"none": lambda config: NoPositions(),',
    '"alibi": {': '"none": {"position": "none"},',
}
# The guide's answer to its second question about the config: as for rope.
AS_ROPE = {
    'self.position in ("rope", "none")': 'self.position in ("rope", "alibi", "none")',
    '(self.position == "rope" and': '(self.position in ("rope", "alibi") and',
}


def apply(diff: str, files: list[Path]) -> None:
    """Apply a diff of the guide to the one file that has its old lines, at their indentation."""
    old = "\n".join(line[1:] for line in diff.splitlines() if line[0] in " -")
    new = [line[1:] for line in diff.splitlines() if line[0] in " +"]
    if not old:
        old = next(line for begin, line in BEFORE.items() if new[0].startswith(begin))
        new += ["", "", old] if new[0].startswith("class") else [old]
    (path,) = [path for path in files if old in path.read_text(encoding="utf-8")]
    text = path.read_text(encoding="utf-8")
    (match,) = re.finditer(rf"^( *){re.escape(old)}$", text, re.M)
    added = "\n".join(f"{match[1]}{line}".rstrip() for line in new)
    path.write_text(text[: match.start()] + added + text[match.end() :], encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_variant_of_the_guide_passes_its_tests(tmp_path: Path) -> None:
    for name in ("src", "tests", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    files = [tmp_path / name for name in (*FILES, "tests/slot_harness.py")]
    for diff in re.findall(r"```diff\n(.*?)```", GUIDE, re.S):
        apply(diff, files)
    config = files[0].read_text(encoding="utf-8")
    for old, new in AS_ROPE.items():
        assert config.count(old) == 1
        config = config.replace(old, new)
    files[0].write_text(config, encoding="utf-8")
    (block,) = re.findall(r"```sh\n(.*?)```", GUIDE, re.S)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src"), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTEST_ADDOPTS": "-v -n 0 -p no:cacheprovider"}
    command = ["bash", "-e", "-c", block.replace(".venv/bin/python", shlex.quote(sys.executable))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "alibi" in done.stdout  # in the names of tests
