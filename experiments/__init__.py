"""One file per question; its docstring states the result obtained."""
