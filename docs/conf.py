"""How Sphinx builds these pages: `make docs`. Nothing is downloaded, no notebook is executed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

project = "unlearn_peft"
author = "the authors of unlearn_peft"
copyright = "MIT licence"  # noqa: A001
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
root_doc = "index"
smartquotes = False  # options begin with two hyphens

myst_heading_anchors = 4  # headings are link targets, named as GitHub names them
nb_execution_mode = "off"  # a test executes the notebook

default_role = "literal"  # docstrings put code into single backticks
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = project
html_show_sphinx = False
html_copy_source = False


def setup(app):
    """Show a default that is made anew each time in a form that the parser of signatures takes."""

    def shown(app, what, name, of, options, signature, returns):
        return signature and signature.replace("<factory>", "..."), returns

    app.connect("autodoc-process-signature", shown)
