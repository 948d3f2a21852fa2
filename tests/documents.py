"""The code and the commands in the README and in docs/."""

import re

from conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
TEXTS = [README, *(path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "docs").glob("*.md")))]


def blocks(section: str, language: str) -> list[str]:
    """The fenced blocks of the one section of this name, up to the next heading."""
    heading = re.compile(rf"^##+ {section}\n(.*?)(?=^##+ |\Z)", flags=re.DOTALL | re.MULTILINE)
    (text,) = (found for document in TEXTS for found in heading.findall(document) if "```" in found)
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(section: str) -> list[str]:
    """The commands in the bash blocks of a section, one a line, without comments."""
    lines = [line for block in blocks(section, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#")]
