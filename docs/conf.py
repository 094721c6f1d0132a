"""The documentation site: sphinx-build -W docs site."""

from grain_ddp import __version__

project = "grain_ddp"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
autodoc_mock_imports = ["mpi4py"]  # the site is built without MPI

default_role = "py:obj"  # `name` in a docstring is a link where there is a page for it

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

napoleon_attr_annotations = False  # an attribute's type is in the signature above it

myst_heading_anchors = 3

html_theme = "furo"
html_title = f"grain_ddp {version}"
html_show_sphinx = html_show_copyright = False
