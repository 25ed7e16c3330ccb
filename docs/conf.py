"""How the documentation is built: `sphinx-build -W docs build/docs` (`pip install -e ".[docs]"`)."""

import ast
import collections
import inspect
import os
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.domains.python import PyObject  # pyright: ignore[reportPrivateImportUsage]

# No page needs a device, and a TPU's library would look for one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

ROOT = Path(__file__).parents[1]
REFERENCE = Path(__file__).parent / "reference"

project = "coconut-jax"
author = "The coconut-jax authors"
html_title = "coconut-jax"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["coconut.css"]
html_show_copyright, html_show_sourcelink, html_copy_source = False, False, False
pygments_style, pygments_dark_style = "friendly", "monokai"
copybutton_prompt_text = "$ "

# A name in single backticks is one of ours, and becomes a link.
default_role = "py:obj"
add_module_names = False
python_maximum_signature_line_length = 88
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True  # The fields of a dataclass are described once, in its docstring.
napoleon_use_rtype = False
napoleon_attr_annotations = False  # The signature has the types; those with a star would be read as emphasis.


FIELD_OF_NAMED_TUPLE = type(vars(collections.namedtuple("Pair", ("field",)))["field"])
WRAPPED = ("coconut.latent.thoughts.think_implicitly",)
"""A `jax.custom_vjp` is no function to autodoc, and has to be named."""


def modules() -> dict[str, list[str]]:
    """The modules of each package that say what they are, private ones left out."""
    found: dict[str, list[str]] = {}
    for package in ("coconut", "pallas_kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            own = ".".join(parts[:-1])
            name = own if parts[-1] == "__init__" else ".".join(parts)
            if not any(part.startswith("_") for part in name.split(".")) and ast.get_docstring(
                ast.parse(path.read_text())
            ):
                found.setdefault(own, []).append(name)
    return found


def write_reference(*_: Any) -> None:
    """A page for each package, with all of its modules. Each build makes them; they are no part of the repository."""
    REFERENCE.mkdir(exist_ok=True)
    for package, names in modules().items():
        parts = [f"# {package}"]
        for name in names:
            title = "" if name == package else f"## {name.removeprefix(package + '.')}"
            directives = [f".. automodule:: {name}\n   :members:"]
            directives += [f".. autofunction:: {wrapped}" for wrapped in WRAPPED if wrapped.rpartition(".")[0] == name]
            parts.append("\n".join([title, "", "```{eval-rst}", "\n\n".join(directives), "```"]))
        path, text = REFERENCE / f"{package}.md", "\n\n".join(parts) + "\n"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def skip(app: Any, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Fields of named tuples stand in the docstring of their class; by themselves they say 'Alias for field number'."""
    del app, what, name, skipped, options
    return True if isinstance(obj, FIELD_OF_NAMED_TUPLE) or inspect.ismodule(obj) else None


def shorten(
    app: Any, what: str, name: str, obj: Any, options: Any, arguments: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Signatures name arrays as the source does."""
    del app, what, name, obj, options
    named = lambda part: part and part.replace("jaxlib._jax.Array", "Array")
    return named(arguments), named(returned)


OURS = re.compile(r"((?:coconut|pallas_kernels)\.[a-z][\w.]*\w)|([A-Z]\w*(?:Config|Options))")


def link_names(app: Any, tree: nodes.document) -> None:
    """Names of ours in pages are links, too: modules and what is in them by their full names, configs by their own."""
    del app
    for literal in list(tree.findall(nodes.literal)):
        found = OURS.fullmatch(literal.astext())
        if found and not isinstance(literal.parent, (pending_xref, nodes.reference, nodes.title)):
            link = pending_xref("", refdomain="py", reftype="obj", reftarget=found[0], refexplicit=False, refwarn=False)
            if found[2]:
                link["refspecific"] = True
            literal.replace_self(link)
            link += literal


def setup(app: Any) -> None:
    """Registers what is done beside Sphinx's own."""
    app.connect("builder-inited", write_reference)
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-signature", shorten)
    app.connect("doctree-read", link_names)
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
