"""`check`: four proofs that every adapter of a model works."""

from __future__ import annotations

import torch
from torch import nn

from peftlab.inspect.check.merges import prove_merges
from peftlab.inspect.check.moves import prove_moves
from peftlab.inspect.check.outputs import output_distance
from peftlab.inspect.check.reach import prove_reached
from peftlab.inspect.check.report import CheckError, CheckReport
from peftlab.inspect.check.saves import prove_saves
from peftlab.inspect.check.trial import Trial
from peftlab.model.index import ensure_module
from peftlab.model.walk import unwrap_parallel


def check(model: nn.Module, /, *args, **kwargs) -> CheckReport:
    """Prove on one sample batch, `model(*args, **kwargs)`, that every active adapter works.

    Four proofs an adapter and site:

    * reached: each of its tensors gets a gradient from the loss, in the mode (training or eval) the model is in. The loss is the
      output's `.loss` where there is one, else the sum of squares of all floating outputs. A zero gradient counts (LoRA's A has
      one at the start), a missing one does not.
    * moves: a change of its tensors changes the output. All adapters are changed at once; an adapter whose gradient there is
      zero, or all where eval without gradients disagrees, is changed alone and the outputs compared.
    * saves: so changed, it goes through `save`, and `load` into a fresh copy of the base brings back its tensors and derived buffers
      bit for bit and the model's output, from a file that holds exactly the expected tensors.
    * merges: so changed and merged, the model gives the same output in eval mode (relative to its largest entry: 1e-9 in float64,
      1e-4 in float32, 5e-3 where TF32 may be used, 1e-2 in float16, 5e-2 in bfloat16), and unmerging gives every bit back.

    About ten forwards and two backwards, more only where something fails. Memory beyond training's: a copy of the adapters and of
    the buffers, and one of the adapted weights while they are merged. Compiled and DDP-wrapped models are looked into; run it
    before FSDP2 shards the model. Afterwards the model is as before: bits, flags, modes, `.grad`, buffers and random generators.

    Returns:
        CheckReport: `rows`, `ok`, and as its repr a table.

    Raises:
        CheckError: naming every adapter that failed and the remedy.
        ValueError: when there is nothing to check, or the model is merged, sharded or on the meta device.
    """
    root = unwrap_parallel(ensure_module(model))
    trial = Trial(root, args, kwargs)
    with torch.inference_mode(False), torch.enable_grad(), trial.fence:
        trial.noise = output_distance(trial.run(), trial.start())
        prove_reached(trial)
        with trial.perturbed():
            prove_moves(trial)
            prove_saves(trial)
            prove_merges(trial)
    found = CheckReport([s.row for s in trial.subjects], trial.notes)
    if not found.ok:
        raise CheckError(found)
    return found
