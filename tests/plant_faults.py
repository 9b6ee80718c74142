"""Does the suite see anything? Plants one fault after another into a copy of the package and says which law objects.

    python tests/plant_faults.py                 # all faults, a table at the end (some minutes)
    python tests/plant_faults.py scale groups    # those whose names contain one of the words

A fault is a piece of source text and what replaces it; a text that is no longer there (or there twice) is reported as stale. A fault that no law
catches means that a law is missing. The table in tests/README.md is the output of this script.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Fault:
    what: str
    file: str
    old: str
    new: str
    look: str = ""  # where it could show: part of the tests' names (which law objects is not said)
    tests: str = "test_conformance.py"  # the file with these tests

    @property
    def where(self) -> str:
        """The pairs (method, case) that are run: a method's own file is looked at through that method."""
        if self.look:
            return self.look
        name = Path(self.file).stem
        return f"([{name}-linear or [{name}-conv2d_groups)" if self.file.startswith("methods/") else "([lora-linear or [ia3-linear)"


FAULTS = [
    # ---- in a method
    Fault(
        "scale forgotten in LoRA's fast path", "methods/low_rank/lora.py",
        "base.plus(x, B, self.s * base.apply(A, z))",
        "base.plus(x, B, base.apply(A, z))",
    ),
    Fault("scale twice in LoRA's definition", "methods/low_rank/lora.py", "return W + self.s * B @ A", "return W + self.s**2 * B @ A"),
    Fault("gradient cut: B detached in the fast path", "methods/low_rank/lora.py", "base.plus(x, B, self.s", "base.plus(x, B.detach() + 0 * B, self.s"),
    Fault("x rebound: the frozen path gets the dropped input", "methods/low_rank/lora.py", "y = base.plus(x, B,", "y = base.plus(z, B,"),
    Fault(
        "DoRA's norm along the wrong axis", "parts/lowrank.py",
        "torch.linalg.vector_norm(W, dim=1).square()",
        "torch.linalg.vector_norm(W, dim=0)[: len(W)].sum().square().expand(len(W))",
        "dora-linear",
    ),
    Fault(
        "DoRA's norm kept from an earlier step", "methods/low_rank/dora.py",
        "norm = lowrank.row_norms(W, self.A, self.B, self.s)",
        "norm = self.__dict__.setdefault('norm', lowrank.row_norms(W, self.A, self.B, self.s))",
    ),
    Fault("IA3 forgets the bias in its definition", "methods/scaling/ia3.py", "return self.l * b if", "return b if"),
    Fault(
        "OFT rotates the wrong way in its fast path", "methods/orthogonal/oft.py",
        "base(rotate_blocks(x, self.rotation()))",
        "base(rotate_blocks(x, self.rotation().mT))",
    ),
    Fault(
        "VeRA's projections drawn from the global generator", "methods/shared/vera.py",
        'generator=torch.Generator("cpu").manual_seed(seed), ',
        "",
        "vera-linear or another_process",
    ),
    Fault(
        "a sparse support drawn from the global generator", "parts/masks.py",
        'generator=torch.Generator("cpu").manual_seed(seed), ',
        "",
        "fourierft-linear or another_process",
    ),
    Fault(
        "Full forgets what lies below it", "methods/selective/full.py",
        "C if W is origin else C + (W - origin)",
        "C",
        "full-linear or lora-full-linear or ia3-full-linear",
    ),
    Fault(
        "a vector that never trains", "methods/shared/vera.py",
        "self.b = nn.Parameter(torch.zeros(base.n_out))",
        "self.b = nn.Parameter(torch.zeros(base.n_out))\n        self.unused = nn.Parameter(torch.zeros(base.n_out))",
    ),
    # ---- in what layer types say
    Fault(
        "stride lost in a convolution's low-rank product", "model/layers.py",
        "return self.affine(m, M.repeat(m.groups, 1) if m.groups > 1 else M, None, x)",
        "from unittest import mock\n        with mock.patch.object(m, 'stride', (1,) * len(m.stride)):\n            "
        "return self.affine(m, M.repeat(m.groups, 1) "
        "if m.groups > 1 else M, None, x)",
        "lora-conv2d_groups",
    ),
    Fault(
        "groups ignored in the canonical matrix", "model/layers.py",
        "W = raw.reshape(g, raw.shape[0] // g, raw.shape[1], k)\n        return W.transpose(1, 2)",
        "W = raw.reshape(raw.shape[0] // g, g, raw.shape[1], k).transpose(0, 1)\n        return W.transpose(1, 2)",
        "lora-conv_transpose2d",
    ),
    Fault(
        "a transposed delta on transposed convolutions", "model/layers.py",
        "out = W.reshape(g, rows, before.shape[0] // g, k).transpose(1, 2)",
        "out = W.reshape(g, before.shape[0] // g, rows, k)",
        "lora-conv_transpose2d",
    ),
    Fault(
        "the padding row trains", "model/layers.py",
        "pad = m.padding_idx if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) else None",
        "pad = None",
        "full-embedding_padding or lora-embedding_padding",
    ),
    Fault(
        "the padding row of the output is not put back", "model/layers.py",
        "return torch.where((x == m.padding_idx)[..., None], row.to(y.dtype), y)",
        "return y",
        "lora-embedding_padding",
    ),
    # ---- in attaching
    Fault(
        "double out_proj: a layer that is read is surrounded too", "host.py",
        "    if stack.read or not links.weights:",
        "    if not links.weights:",
        "lora-attention or lora-linear_own_forward",
    ),
    Fault(
        "out_proj of attention is surrounded, which nobody calls", "sites.py",
        "UNCALLING = (nn.MultiheadAttention, ",
        "UNCALLING = (nn.Bilinear, ",
        "lora-attention",
    ),
    Fault("a recurrent layer computes with its cached weights", "host.py", "if issubclass(cls, nn.RNNBase) and seen:", "if False:", "lora-lstm"),
    Fault(
        "the wrong expert", "host.py",
        "piece = pieces[site.expert]\n",
        "piece = pieces[site.expert - 1]\n",
        "lora-experts_one or lora-experts_eio",
    ),
    Fault(
        "the bias of other rows", "host.py",
        "rows = site.bias_part\n            W = method.bias(W) if rows is None else _with_rows(W, rows, method.bias(W[rows]))",
        "rows = site.bias_part\n            W = method.bias(W) if rows is None else _with_rows(W, rows, method.bias(W.flip(0)[rows]))",
        "ia3-fused",
    ),
    Fault("the tied end does not follow", "host.py", "stack.alias.setdefault(param, (site.host, site.param))", "pass", "lora-tied_share"),
    Fault(
        "the stack runs in reverse order", "host.py",
        "acting = [p for n in self.sites if n in names",
        "acting = [p for n in reversed(self.sites) if n in names",
        "ia3-lora-linear",
    ),
    Fault("the global generator is moved", "host.py", "torch.default_generator.set_state(self.state)", "pass"),
    Fault(
        "start values from Python's hash", "host.py",
        '    for byte in f"{seed}\\0{name}\\0{path}".encode():',
        '    h ^= abs(hash(path))\n    for byte in f"{seed}\\0{name}\\0{path}".encode():',
        "lora-linear or another_process",
    ),
    Fault(
        "start values that depend on the order of wrapping", "wrap.py",
        "def finish(method: Method, site: Site, dtype: torch.dtype) -> None:",
        "def finish(method: Method, site: Site, dtype: torch.dtype) -> None:\n    with torch.no_grad():\n        for p in method.parameters():\n            "
        "p.mul_(1 + 0.1 * len(stacks(site.host)))\n    _finish(method, site, dtype)\n\n\ndef _finish(method: Method, site: Site, dtype: torch.dtype) -> None:",
    ),
    Fault(
        "the base is not frozen", "wrap.py",
        "def freeze_base(model: nn.Module) -> None:",
        "def freeze_base(model: nn.Module) -> None:\n    return\n\n\ndef _freeze_base(model: nn.Module) -> None:",
    ),
    Fault(
        "the active set is not captured for checkpoint recomputation", "host.py",
        "return self._acted_at(node._sequence_nr())",
        "return self.links",
    ),
    Fault(
        "reentrant checkpointing loses gradients silently", "host.py",
        "        refuse_lost_gradients(self, stack)\n        if links.routed",
        "        if links.routed",
    ),
    Fault(
        "a copy keeps the original's class only", "host.py",
        "    made = adapted_class(cls, seen)\n    return made.__new__(made)",
        "    return cls.__new__(cls)",
    ),
    # ---- in switching and merging
    Fault(
        "disabled keeps what methods did to the bias", "host.py",
        "NOTHING if self.silent else self._links(self.active) if",
        "Links(tuple(p for p in self._links(self.active).weights if p[1].has_bias()), ()) if self.silent else self._links(self.active) if",
        "ia3-linear",
    ),
    Fault(
        "merge forgets the bias", "switch.py",
        "    params |= dict.fromkeys(s.bias for s, m in links if",
        "    {} | dict.fromkeys(s.bias for s, m in links if",
        "ia3-linear",
    ),
    Fault(
        "unmerge by subtraction", "switch.py",
        "            _rebind(host, stack, param, stack._buffers.pop(STASH + param))\n            _retie",
        "            change = host._parameters[param].data - stack._buffers.pop(STASH + param)\n            _rebind(host, stack, param, "
        "host._parameters[param].data - change)\n            _retie",
        "lora-linear or thousand_cycles",
    ),
    Fault(
        "merged in reverse order", "switch.py",
        "return [n for n in stack.order if n in {*stack.merged, *new} and n not in stack.lossy]",
        "return [n for n in reversed(stack.order) if n in {*stack.merged, *new} and n not in stack.lossy]",
        "ia3-lora-linear",
    ),
    Fault("unwrap leaves everything frozen", "switch.py", "p.requires_grad_(ledger.flags[join(path, n)])", "p.requires_grad_(False)"),
    Fault("unwrap leaves BatchNorm's statistics", "switch.py", "            b.data = old.data.clone()", "            pass", "full-batch_norm"),
    # ---- in precisions
    Fault(
        "a layer that is read sees the adapter's precision", "host.py",
        "return effective(host, param, weights).to(layers.outline(host, param).dtype)",
        "return effective(host, param, weights)",
        "lora-linear_own_forward",
    ),
    Fault(
        "the adapter takes the base's precision", "wrap.py",
        "return self.dtype or torch.promote_types(torch.float32, site.dtype)",
        "return self.dtype or site.dtype",
    ),
    # ---- in files
    Fault(
        "keys chosen by substring on save", "formats/native.py",
        "for k, t in saved_tensors(method).items():\n",
        "for k, t in ((k, t) for k, t in saved_tensors(method).items() if not any(c in prefix + k for c in ('weight', 'bias'))):\n",
        "lora-linear or keys_come_from_structure",
    ),
    Fault(
        "fingerprint skipped", "formats/native.py",
        '        if wrong:\n            raise LoadError(f"this is not the base',
        '        if False:\n            raise LoadError(f"this is not the base',
    ),
    Fault("checksums skipped", "formats/file.py", "or checksum(t) != crc", ""),
    Fault("the header's checksum skipped", "formats/file.py", "if meta.get(CRC) != ", "if False and meta.get(CRC) != "),
    Fault(
        "loaded into half precision", "formats/native.py",
        "dtype if dtype and value.is_floating_point() else value.dtype",
        "dtype if dtype and value.is_floating_point() else torch.float32 if value.is_floating_point() else value.dtype",
    ),
    # ---- in counts
    Fault("a wrong formula in a docstring", "methods/structured/lokr.py", "Trains: size(", "Trains: 1 + size("),
    Fault(
        "plan forgets what sites share", "wrap.py",
        "sum(r.trainable for r in rows) + extra",
        "max(0, sum(r.trainable for r in rows) + extra - len(rows))",
        "lora-two",
    ),
    # ---- in methods on activations
    Fault(
        "an adapter's residual is dropped", "methods/bottleneck/houlsby.py",
        "return h + bottleneck.branch(self, h, self.s, self.f, self.path)",
        "return bottleneck.branch(self, h, self.s, self.f, self.path)",
        "are_their_formula", "test_activations.py",
    ),
    Fault(
        "Pfeiffer's residual is taken behind the norm", "methods/bottleneck/pfeiffer.py",
        "u, self.change(outputs.hidden(out), u))",
        "u, self.change(outputs.hidden(out), outputs.hidden(out)))",
        "are_their_formula", "test_activations.py",
    ),
    Fault(
        "Pfeiffer's second normalisation is forgotten", "methods/bottleneck/pfeiffer.py",
        "        args, kwargs = outputs.swapped(args, kwargs, u, self.change(outputs.hidden(out), u))\n        return base(*args, **kwargs)",
        "        return outputs.replaced(out, self.change(outputs.hidden(out), u))",
        "are_their_formula", "test_activations.py",
    ),
    Fault("the adapter's own LayerNorm is left out", "parts/bottleneck.py", "if m.gamma is not None:", "if False:", "are_their_formula", "test_activations.py"),
    Fault(
        "the nonlinearity behind the way up", "parts/bottleneck.py",
        "F.linear(ACTIVATIONS[activation](F.linear(x, D, c)), E, e)",
        "ACTIVATIONS[activation](F.linear(F.linear(x, D, c), E, e))",
        "are_their_formula", "test_activations.py",
    ),
    Fault("a parallel adapter reads the residual beside it", "methods/bottleneck/parallel.py", "x = x[base.adds]", "x = x[0]", "parallel", "test_activations.py"),
    Fault(
        "LoReFT's rows are not orthonormal", "methods/hidden/loreft.py",
        "return torch.linalg.qr(self.V.mT.to(torch.promote_types(self.V.dtype, torch.float32))).Q.mT",
        "return self.V.to(torch.promote_types(self.V.dtype, torch.float32))",
        "orthonormal or loreft_is_its_formula", "test_activations.py",
    ),
    Fault(
        "LoReFT edits one token more", "core/token_positions.py",
        "head = real & (order <= first)",
        "head = real & (order <= first + 1)",
        "loreft", "test_activations.py",
    ),
    Fault(
        "LoReFT counts padding on the left", "core/token_positions.py",
        "return real[:, :T].expand(B, T)",
        "return torch.ones_like(real[:, :T].expand(B, T))",
        "loreft", "test_activations.py",
    ),
    Fault(
        "LoReFT edits every decoded token", "methods/hidden/loreft.py",
        "real if past == 0 else torch.zeros_like(real)",
        "real",
        "test_generation and loreft", "test_generation.py",
    ),
    # ---- in attention
    Fault(
        "a prefix is masked away", "parts/prefix.py",
        "value=True if mask.dtype == torch.bool else 0.0",
        'value=False if mask.dtype == torch.bool else float("-inf")',
        "attention_call", "test_attention_methods.py",
    ),
    Fault(
        "a prefix behind the tokens, its mask in front", "parts/prefix.py",
        "torch.cat([as_heads(K, k, path), k], -2), torch.cat([as_heads(V, v, path), v], -2)",
        "torch.cat([k, as_heads(K, k, path)], -2), torch.cat([v, as_heads(V, v, path)], -2)",
        "attention_call", "test_attention_methods.py",
    ),
    Fault("causality is lost beside a prefix", "parts/prefix.py", "device=q.device).tril()", "device=q.device)", "attention_call", "test_attention_methods.py"),
    Fault(
        "the prefix is given twice", "methods/attention/prefix_tuning.py",
        "functools.partial(prefix.in_front, K=K, V=V, path=base.path)",
        "functools.partial(prefix.in_front, K=torch.cat([K, K]), V=torch.cat([V, V]), path=base.path)",
        "filled_cache or on_torchs_attention", "test_attention_methods.py",
    ),
    Fault(
        "positions are not moved by the prefix", "methods/attention/prefix_tuning.py",
        "return shifted(base, self.n, args, kwargs)",
        "return shifted(base, 0, args, kwargs)",
        "filled_cache", "test_attention_methods.py",
    ),
    Fault(
        "the gate does not start at zero", "methods/attention/llama_adapter.py",
        "self.a = nn.Parameter(torch.zeros(1))",
        "self.a = nn.Parameter(torch.ones(1))",
        "[llama_adapter-attention_call",
    ),
    Fault(
        "the gate goes without its tanh", "methods/attention/llama_adapter.py",
        "return torch.tanh(self.a) if self.tanh else self.a",
        "return self.a",
        "gate_is_squashed", "test_attention_methods.py",
    ),
    # ---- in virtual tokens
    Fault(
        "tokens keep their positions behind a prompt", "parts/slots.py",
        "expand(given.shape[0], -1), given + self.n], 1)",
        "expand(given.shape[0], -1), given], 1)",
        "text_in_front or manual_concatenation", "test_prompts.py",
    ),
    Fault(
        "virtual tokens are masked", "virtual.py",
        '"mask": 0 if "padding" in name else 1}[role]',
        '"mask": 1 if "padding" in name else 0}[role]',
        "prompt_is_manual_concatenation and llama", "test_prompts.py",
    ),
    Fault("virtual tokens have a label", "virtual.py", '"labels": IGNORED', '"labels": 0', "labels_that_enter", "test_prompts.py"),
    Fault(
        "what a template's last virtual token predicts is lost", "virtual.py",
        "return slots.take(out, causal) if",
        "return slots.take(out) if",
        "prompt_is_manual_concatenation and llama", "test_prompts.py",
    ),
    Fault(
        "the mask beside a filled cache is not lengthened", "virtual.py",
        "            out[name] = around_cache(t, t.new_ones(1, prompt.n) if there is None else there)",
        "            out[name] = t",
        "test_generation and prompt_tuning", "test_generation.py",
    ),
    Fault(
        "a slot is off by one", "parts/slots.py",
        "torch.where(places >= 0, first[:, None] + places,",
        "torch.where(places >= 0, first[:, None] + places + 1,",
        "slots_are", "test_prompts.py",
    ),
    Fault("P-tuning's network is left out", "methods/prompt/p_tuning.py", "else self.f(self.P)", "else self.P", "network_is_the_papers", "test_prompts.py"),
    Fault(
        "virtual patches in front of the class token", "methods/prompt/vpt.py",
        "slots.among(old, P, self.at, d) if self.enters",
        "slots.among(old, P, 0, d) if self.enters",
        "vpt_is_manual", "test_prompts.py",
    ),
    # ---- in routing
    Fault(
        "rows come back in the order of their groups", "manage/route.py",
        "return whole.index_select(dim, _index(sorted(range(len(order)), key=order.__getitem__), whole))",
        "return whole",
        "law_13 and [lora-linear",
    ),
    Fault(
        "every row gets the first group's adapters", "manage/route.py",
        "Links((below, *links.weights), ()) if links.weights",
        "Links((below, *parts[0][0].weights), ()) if links.weights",
        "promise_38 or methods_mix", "test_route.py",
    ),
    Fault(
        "surrounded rows are swapped", "parts/outputs.py",
        "h = h.index_copy(0, at, f(",
        "h = h.index_copy(0, at.flip(0), f(",
        "rows_of_their_own", "test_activations.py",
    ),
    # ---- in mixtures
    Fault(
        "the k best gates do not sum to one", "parts/router.py",
        "g if k == 1 else g / g.sum(-1, keepdim=True)",
        "g",
        "mola_is_its_formula", "test_mixtures.py",
    ),
    Fault(
        "the load-balancing loss is zero", "methods/mixture/mola.py",
        "return self.balance * (loss +",
        "return 0 * (loss +",
        "penalty or balances", "test_mixtures.py",
    ),
    Fault(
        "X-LoRA's router reads a run with experts", "parts/router.py",
        "    for (c, how, rows), old in zip(parts, before, strict=True):\n",
        "    for c, how, rows in parts:\n        c.set(c(c.hidden.value, *how), rows)\n    with torch.no_grad():\n        run()\n"
        "    for (c, how, rows), old in zip(parts, before, strict=True):\n",
        "xlora_is_its_formula", "test_mixtures.py",
    ),
    Fault(
        "X-LoRA's gates of another layer", "parts/router.py",
        "return g[:, :, self.index[path]]",
        "return g[:, :, 0]",
        "xlora_is_its_formula", "test_mixtures.py",
    ),
    # ---- in the caches of a model that runs twice
    Fault("beams do not reorder X-LoRA's second cache", "core/paired_caches.py", '"reorder_cache", ', "", "test_generation and xlora", "test_mixtures.py"),
    Fault(
        "both runs of X-LoRA fill one cache", "core/paired_caches.py",
        "{key: twin(given[key], name)}",
        "{key: given[key]}",
        "test_generation and xlora", "test_mixtures.py",
    ),
    Fault("X-LoRA's second cache is not cut back", "core/paired_caches.py", '"crop", ', "", "in_step", "test_generation.py"),
    Fault("X-LoRA's second cache does not take its rows twice", "core/paired_caches.py", '"batch_repeat_interleave", ', "", "whose_rows_change", "test_mixtures.py"),
    Fault("X-LoRA's second cache keeps rows that are gone", "core/paired_caches.py", '"batch_select_indices", ', "", "whose_rows_change", "test_mixtures.py"),
    Fault("X-LoRA's second cache is not emptied", "core/paired_caches.py", ', "reset")', ")", "whose_rows_change", "test_mixtures.py"),
    Fault(
        "X-LoRA takes a cache that other adapters have filled", "core/paired_caches.py",
        "if held is None and not there:",
        "if held is None:",
        "in_step", "test_generation.py",
    ),
    Fault(
        "the caches that X-LoRA's runs have made do not find each other", "core/paired_caches.py",
        "            pair(cache, made[0], name)\n        return out",
        "            pass\n        return out",
        "in_step", "test_generation.py",
    ),
    Fault("two X-LoRAs share a second cache", "core/paired_caches.py", "twin(given[key], name)", 'twin(given[key], "")', "two_mixtures", "test_generation.py"),
    # ---- in packed weights
    Fault(
        "the scale of the block before", "quant/codes.py",
        "        return p.absmax[first:last]",
        "        return p.absmax.roll(1)[first:last]",
        "nearest_value or bit_for_bit", "test_quant.py",
    ),
    Fault(
        "the halves of a byte are swapped", "quant/codes.py",
        "torch.stack([byte >> 4, byte & 15], 1)",
        "torch.stack([byte & 15, byte >> 4], 1)",
        "nearest_value or bit_for_bit", "test_quant.py",
    ),
    Fault(
        "backward multiplies the way forward does", "quant/ops.py",
        "ctx.form, not ctx.transposed, *ctx.saved_tensors",
        "ctx.form, ctx.transposed, *ctx.saved_tensors",
        "test_gradients", "test_quant.py",
    ),
    Fault("autocast reaches into a product", "quant/ops.py", "if layers.autocasting(x.device):", "if False:", "under_autocast", "test_quant.py"),
    Fault(
        "a compiled backward multiplies the way forward does", "quant/ops.py",
        "*facts, not ctx.transposed)",
        "*facts, ctx.transposed)",
        "operator", "test_quant_compile.py",
    ),
    Fault("a compiler is told another shape", "quant/ops.py", "shape[transposed]", "shape[not transposed]", "operator", "test_quant_compile.py"),
    Fault(
        "an exported layer holds our operator", "quant/ops.py", "    if exporting():\n", "    if False:\n", "needs_no_peftlab", "test_quant_compile.py",
    ),
    Fault(
        "a compiled kernel rounds ties up", "quant/decode.cpp",
        "((bits + 0x7fff + ((bits >> 16) & 1)) & -0x10000)",
        "((bits + 0x8000) & -0x10000)",
        "same_bits", "test_quant_compile.py",
    ),
    Fault(
        "a compiled kernel takes the same half of a byte twice", "quant/decode.cpp",
        "look_up(here, byte >> 4), load(&first[j])",
        "look_up(here, byte), load(&first[j])",
        "compiled", "test_quant_compile.py",
    ),
    Fault("a compiled kernel rounds NaN away", "quant/decode.cpp", "if (round && !std::isfinite(top))", "if (false)", "not_finite", "test_quant_compile.py"),
    Fault("a compiled kernel takes the scale of other scales", "quant/decode.cpp", "nested[k / 256]", "nested[0]", "same_bits", "test_quant_compile.py"),
    Fault("a scale is rounded once, not twice", "quant/compiled.py", '"-ffp-contract=off", ', "", "same_bits", "test_quant_compile.py"),
    Fault(
        "a compiled product forgets to round the weight", "quant/compiled.py",
        "torch.bfloat16 in (form.dtype, form.cast, x.dtype)",
        "False",
        "one_token or serve_layers", "test_quant_compile.py",
    ),
    Fault("a compiled product has no bias", "quant/compiled.py", "None if bias is None else bias.to(x.dtype)", "None", "one_token", "test_quant_compile.py"),
    Fault(
        "wrong kernels are used all the same", "quant/compiled.py",
        "if not torch.equal(found, W) or not",
        "if not torch.equal(found, W) and not",
        "cannot_be_made", "test_quant_compile.py",
    ),
    Fault(
        "a product without a graph forgets that one is wanted", "quant/ops.py",
        "wanted = torch.is_grad_enabled() and any(",
        "wanted = False and any(",
        "gradients or torch_func", "test_quant.py",
    ),
    Fault(
        "memory that is put under a shown weight is lost", "quant/linear.py",
        "if f == Tensor.data.__set__ or",
        "if",
        "dense or resized", "test_quant.py",
    ),
    Fault(
        "a write to a part of a shown weight is lost", "quant/linear.py",
        "if _is_view(f) and isinstance(args[0], cls):",
        "if False:",
        "shows", "test_quant.py",
    ),
    Fault(
        "what is merged is rounded to codes unasked", "quant/merging.py",
        'if onto is None or onto.how != "requantized" or param',
        "if onto is None or param",
        "merged_and_back", "test_quant.py",
    ),
    # ---- in calibration
    Fault(
        "the inputs' mean stays in EVA's directions", "parts/lowrank.py",
        "    mean = X.mean(0)\n    if seen",
        "    mean = 0 * X.mean(0)\n    if seen",
        "eva_start or streamed", "test_lowrank.py",
    ),
    Fault(
        "the second batch is ignored", "parts/fromdata.py",
        "seen.total.add_(value)",
        "seen.total",
        "many_small_ones or mean_gradient", "test_calibrate.py",
    ),
    Fault(
        "one process's data alone", "parts/fromdata.py",
        "functools.reduce(torch.add, [s.total for s in states])",
        "states[0].total",
        "starts_from_data", "test_distributed.py",
    ),
]  # fmt: skip


SMALLEST = ("linear", "conv2d_groups", "embedding", "attention_call", "lm", "transformer")  # every method fits one of these


def narrow(cases: Path, fault: Fault) -> None:
    """Leave only the layers that are looked at in the copied zoo: collecting the whole matrix takes longer than running a part of it."""
    source = cases.read_text(encoding="utf8")
    mark = "\n# ---------------------------------------------------------------- the one row"
    assert source.count(mark) == 1
    kept = {*re.findall(r"-(\w+)", fault.where), *SMALLEST}
    cases.write_text(source.replace(mark, f"\nCASES = {{k: c for k, c in CASES.items() if k in {kept!r}}}\n{mark}"), encoding="utf8")


def run(fault: Fault) -> tuple[str, float]:
    """(the test that objected, seconds)."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("peftlab", "tests"):
            shutil.copytree(ROOT / part, Path(folder, part), ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        if fault.tests == "test_conformance.py":
            narrow(Path(folder, "tests", "cases.py"), fault)
        path = Path(folder, "peftlab", fault.file)
        source = path.read_text(encoding="utf8")
        if source.count(fault.old) != 1:
            return f"STALE: the text is there {source.count(fault.old)} times", 0.0
        path.write_text(source.replace(fault.old, fault.new), encoding="utf8")
        begun = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-m", "slow or not slow", "-k", fault.where]
        env = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([*command, f"tests/{fault.tests}"], cwd=folder, env=env, capture_output=True, text=True, check=False)
        took = time.monotonic() - begun
    if done.returncode == 0:
        return "NOT CAUGHT", took
    hit = re.search(r"^(?:FAILED|ERROR) \S+?::(?:test_)?(.+?)(?: - |$)", done.stdout, re.M)
    said = done.stdout.strip().splitlines()[-1:]
    return (hit.group(1) if hit else f"STALE: no test has run: {said}"), took


def main() -> int:
    sys.stdout.reconfigure(line_buffering=True)
    words = sys.argv[1:]
    chosen = [f for f in FAULTS if not words or any(w in f.what for w in words)]
    print("| fault | where | caught by |\n|---|---|---|")
    missed = 0
    for f in chosen:
        verdict, _ = run(f)
        missed += verdict.startswith(("NOT", "STALE"))
        print(f"| {f.what} | `{f.file}` | {verdict if verdict.startswith(('NOT', 'STALE')) else f'`{verdict}`'} |")
    return missed


if __name__ == "__main__":
    sys.exit(main())
