"""Sphinx: ``sphinx-build -W -b html docs OUT``, with the dependency group "docs" and s2shadow installed."""

import os
import re
from importlib.metadata import version as installed_version

# docstrings are in the compiled modules; the stubs beside them have none
os.environ["SPHINX_AUTODOC_IGNORE_NATIVE_MODULE_TYPE_STUBS"] = "1"

project = "s2shadow"
author = copyright = "s2shadow contributors"
version = release = installed_version("s2shadow")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
keep_warnings = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"                      # compiled signatures have few; the stubs have them all
autodoc_default_options = {"members": True, "undoc-members": False}
python_use_unqualified_type_names = True
add_module_names = False

html_theme = "furo"
html_title = f"s2shadow {release}"
html_show_copyright = False
pygments_style = "friendly"


def without_self(app, what, name, thing, options, signature, returns):
    """Signatures that Cython embeds name ``self``."""
    return (re.sub(r"^\(self(, )?", "(", signature), returns) if signature else None


def setup(app):
    app.connect("autodoc-process-signature", without_self)
