"""One file is one method: its docstring is its row in the registry, its name is the name that `wrap` takes."""
