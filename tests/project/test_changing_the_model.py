"""The patches and the code of docs/changing-the-model.md, as they are written there."""

import os
import shutil
import subprocess
import sys

from conftest import REPOSITORY
from documents import blocks

SECTIONS = {
    "Add a fusion expert": "torch.Size([1, 5])",
    "Swap a router": "tensor(True)",
    "Add a tower": "torch.Size([1, 16, 20])",
}
SAVED = """
import tempfile
for routing in ("learned", "uniform"):
    model = SeraForReferringSegmentation(SeraConfig.tiny(vision_config={"model_type": "siglip_vision_model"}, routing=routing))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        _, info = SeraForReferringSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
from training.learning.tuning import apply_tuning
apply_tuning(model.train(), vision="full", text="full")
model(torch.randn(2, 3, 56, 56), torch.tensor([[998, 5, 999]] * 2), labels=torch.ones(2, 56, 56)).loss.backward()
assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
"""


def test_the_examples_work_alone_and_together(tmp_path):
    """Each patch fits the code; with all of them, each section's code says what it says there, and a model is saved and trained."""
    code = ""
    for number, (section, said) in enumerate(SECTIONS.items()):
        (patch,), (snippet,) = blocks(section, "diff"), blocks(section, "python")
        assert len(patch.splitlines()) < 40 and said in snippet
        (tmp_path / f"{number}.patch").write_text(patch)
        code += snippet
    for package in ("modeling_sera", "training"):
        shutil.copytree(
            REPOSITORY / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "configs")
        )
    # for git, the folder belongs to no repository
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    for options in (["--check"], []):
        for number in range(len(SECTIONS)):
            command = ["git", "apply", *options, f"{number}.patch"]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{list(SECTIONS)[number]}: {done.stderr}"
    environment |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code + SAVED]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line] == list(SECTIONS.values())
