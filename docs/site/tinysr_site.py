"""What the documentation site adds to Sphinx: operators from the registry, plain docstrings, one list of pages.

- The directive `operators` lists every registered operator with its schema.
- A docstring of this project is prose with `code`, its arguments in sentences such as "dtype: of the weights."; as_rst
  and with_parameters make of it the reStructuredText that autodoc expects.
- The sections of docs/index.md list the pages as links; each list also becomes a part of the navigation, so that a new
  page is one line there.
"""

from __future__ import annotations

import inspect
from typing import Any

from docutils import nodes
from site_text import as_rst, with_parameters, with_toctrees, wrapped
from sphinx.util.docutils import SphinxDirective


def signatures() -> dict[str, str]:
    """Name of an operator -> its schema, one argument per line."""
    import torch

    import tinysr_kernels

    return {name: wrapped(str(getattr(torch.ops.tinysr, name).default._schema)) for name in tinysr_kernels.ops.REGISTRY}


class Operators(SphinxDirective):
    """A section per operator: its name, which can be linked to, and its schema."""

    def run(self) -> list[nodes.Node]:
        """The sections, by name."""
        sections: list[nodes.Node] = []
        for name, signature in sorted(signatures().items()):
            section = nodes.section(ids=[f"operator-{name.replace('_', '-')}"], names=[f"operator {name}"])
            section += nodes.title(name, name)
            section += nodes.literal_block(signature, signature, language="text")
            sections.append(section)
        return sections


def _docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    names = inspect.signature(obj).parameters if what in ("function", "method") else ()
    lines[:] = with_parameters(as_rst(lines), names)


def _source(app: Any, document: str, source: list[str]) -> None:
    if document == app.config.root_doc:
        source[0] = with_toctrees(source[0])


def setup(app: Any) -> dict[str, bool]:
    """Register the directive and both conversions."""
    app.add_directive("operators", Operators)
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("source-read", _source)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
