"""Renders sections "Example:" of docstrings like "Examples:", as code."""

import griffe


class Examples(griffe.Extension):
    """Renames the section before the docstring is parsed."""

    def on_object(self, *, obj, **kwargs):
        """Changes the docstring of a function, class or attribute."""
        if obj.docstring:
            lines = obj.docstring.value.splitlines()
            same = ["Examples:" if x.strip() == "Example:" else x for x in lines]
            obj.docstring.value = "\n".join(same)
