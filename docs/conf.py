"""The documentation site: Sphinx with furo and MyST; `make docs` builds it into build/docs.

The source folder is the whole checkout, so that a link between two pages, README.md and examples/ included, is the same
relative path on the site and on a code host.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "site")]

from tinysr_kernels._version import __version__  # noqa: E402  # after the path above

project = "tinysr_kernels"
author = "the tinysr_kernels authors"
copyright = author
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "tinysr_site"]
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/**.md", "examples/*.md"]
exclude_patterns = [".*", "**/.*", "build", "dist", "tests", "**/__pycache__"]
root_doc = "docs/index"
highlight_language = "text"
# Types of other packages have no pages here, and neither have type variables.
nitpick_ignore_regex = [(r"py:.*", r"(?!tinysr_kernels\b).*"), (r"py:class", r".*\.(Kind|M|Prompts)")]

myst_heading_anchors = 3

autodoc_member_order = "bysource"
add_module_names = False
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"tinysr_kernels {release}"
html_static_path = ["site/site.css"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "redirect.html"}
templates_path = ["site"]
html_copy_source = False
html_show_sourcelink = False
html_domain_indices = False
