"""Texts of the site: docstrings as reStructuredText, the navigation from docs/index.md, schemas line by line."""

from __future__ import annotations

import re
from collections.abc import Collection


def wrapped(schema: str) -> str:
    """`tinysr::f(Tensor x, int n=1) -> Tensor` with every argument on a line of its own."""
    name, _, rest = schema.partition("(")
    arguments, _, result = rest.rpartition(") -> ")
    lines = "".join(f"    {argument},\n" for argument in re.split(r", (?![^\[]*\])", arguments))
    return f"{name}(\n{lines}) -> {result}"


def as_rst(lines: list[str]) -> list[str]:
    """A docstring as reStructuredText: code is literal, and nothing else is markup.

    An indented block after a line that ends with a colon and an empty line is an example.
    """
    result = []
    for index, line in enumerate(lines):
        pieces = re.split(r"(`[^`]+`)", line)
        pieces[::2] = [re.sub(r"[\\*|]|_\b", r"\\\g<0>", piece) for piece in pieces[::2]]
        pieces[1::2] = [f"`{piece}`" for piece in pieces[1::2]]
        example = line.endswith(":") and lines[index + 1 : index + 2] == [""] and "".join(lines[index + 2 : index + 3])
        result.append("".join(pieces) + (":" if example and example.startswith("    ") else ""))
    return result


def with_parameters(lines: list[str], names: Collection[str]) -> list[str]:
    """Docstring lines in which sentences such as "dtype: of the images to come." are fields, for arguments in `names`.

    A paragraph without such a sentence stays as it is; "Raises ..." ends the fields and becomes a paragraph.
    """
    if not names:
        return lines
    start = re.compile(rf"(?:^|(?<=[.;] ))(?=(?:{'|'.join(map(re.escape, names))}): |Raises )")
    result: list[str] = []
    for paragraph in "\n".join(lines).split("\n\n"):
        sentences = [sentence.strip() for sentence in start.split(" ".join(paragraph.split("\n"))) if sentence.strip()]
        if not any(sentence.partition(":")[0] in names for sentence in sentences) or paragraph.startswith(" "):
            result += [*paragraph.split("\n"), ""]
            continue
        fields = [sentence for sentence in sentences if sentence.partition(":")[0] in names]
        prose = [sentence for sentence in sentences if sentence not in fields]
        result += [line for sentence in prose if not sentence.startswith("Raises ") for line in (sentence, "")]
        result += [*(f":param {field}" for field in fields), ""]
        result += [line for sentence in prose if sentence.startswith("Raises ") for line in (sentence, "")]
    return result


def with_toctrees(index: str) -> str:
    """The text of docs/index.md, after each section a hidden toctree of the pages that its list links to."""
    sections = re.split(r"^(?=## )", index, flags=re.MULTILINE)
    for number, section in enumerate(sections[1:], start=1):
        title = section.splitlines()[0].removeprefix("## ")
        links = re.findall(r"^- \[([^\]]+)\]\(([^)]+)\.md\)", section, re.MULTILINE)
        entries = "".join(f"{name} <{target}>\n" for name, target in links)
        sections[number] += f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n{entries}```\n\n"
    return "".join(sections)
