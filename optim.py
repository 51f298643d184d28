"""One training loop for every stage, resumable after a kill, and its optimisers."""

import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from fast_alfworld.cli import UserError
from fast_alfworld.files import a_file, write_file
from utils import all_gather, rank, sum_gradients

SAVE_EVERY = 10.0  # seconds


def random_batches(rng, n, size, updates):
    """Numbers below n, each once in random order before any comes twice. -> (updates, size)"""
    laps = -(-updates * size // n)
    order = np.concatenate([rng.permutation(n) for _ in range(laps)])
    return order[:updates * size].reshape(updates, size)


def optimise(model, loss_of, updates, *, lr, state, name, weight_decay=0.01, watch=None):
    """Train for `updates` steps of loss_of(step) -> (loss, {metric: (sum, count)}). -> log

    The learning rate rises over the first 5 % of the updates, then falls linearly to 0. The loss
    must depend on the step and the weights alone: then a run that was killed and continued from the
    file `state` equals an undisturbed one. The log: means of the metrics over about 20 stretches,
    each with what watch() -> {metric: value} says at its end."""
    optimizers = optimizers_of(model, lr, weight_decay)
    step, log, sums = _load_state(state, model, optimizers)
    saved, stretch = time.monotonic(), max(1, -(-updates // 20))
    model.train()
    bar = tqdm(total=updates, initial=step, desc=name, unit="update", dynamic_ncols=True)
    while step < updates:
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = lr * min((step + 1) / max(1, 0.05 * updates), 1 - step / updates)
        model.zero_grad(set_to_none=True)
        loss, metrics = loss_of(step)
        if loss is not None:
            if not loss.isfinite():
                raise UserError(f"{name}: the loss is {loss.item()} at update {step}; "
                                "try a smaller learning rate")
            loss.backward()
        sum_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        for metric, pair in metrics.items():
            sums[metric] = sums.get(metric, 0.0) + np.array([float(x) for x in pair])
        bar.update()
        if step % stretch == 0 or step == updates:
            gathered = all_gather(sums)
            totals = {m: sum(s[m] for s in gathered if m in s) for m in sums}
            log.append({"step": step, **{m: float(total / n) for m, (total, n) in totals.items()
                                         if n}, **(watch() if watch else {})})
            sums = {}
            bar.set_postfix({k: f"{v:.3f}" for k, v in list(log[-1].items())[1:6]})
            model.train()
        if time.monotonic() - saved > SAVE_EVERY or step == updates:
            if rank() == 0:
                _save_state(state, model, optimizers, step, log, sums)
            saved = time.monotonic()
    bar.close()
    if not model.is_finite():
        raise UserError(f"{name}: the weights are not all finite numbers after update {step}; "
                        "try a smaller learning rate")
    model.eval()
    return log


def optimizers_of(model, lr, weight_decay):
    """Muon, its updates scaled to AdamW's size, for the layers' matrices; AdamW for the rest.

    In-context copying is learned in a fraction of AdamW's updates (docs/results.md)."""
    inner = {p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name}
    rest = [p for p in model.parameters() if p not in inner]
    matrices = [p for p in model.parameters() if p in inner]
    options = {"lr": lr, "weight_decay": weight_decay}
    muon = [torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options)] if inner else []
    return [*muon, torch.optim.AdamW(rest, betas=(0.9, 0.95), fused=True, **options)]


def _save_state(path, model, optimizers, step, log, sums):
    tensors = {}
    for name, p in model.named_parameters():
        tensors[f"weight {name}"] = p.detach().contiguous()
        for kind, x in (m for o in optimizers for m in o.state.get(p, {}).items()):
            tensors[f"{kind} {name}"] = x.contiguous()
    sums = {metric: pair.tolist() for metric, pair in sums.items()}
    progress = {"progress": json.dumps({"step": step, "log": log, "sums": sums})}
    write_file(path, lambda p: save_file(tensors, str(p), metadata=progress))


def _load_state(path, model, optimizers):
    """-> (step, log, sums) of an interrupted training, its weights and moments loaded."""
    if not Path(path).exists():
        return 0, [], {}
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    try:
        with safe_open(a_file(path), "pt") as f, torch.no_grad():
            progress = json.loads(f.metadata()["progress"])
            for full in f.keys():
                kind, name = full.split(" ", 1)
                p, x = parameters[name], f.get_tensor(full)
                if kind == "weight":
                    p.copy_(x)
                else:
                    owner[p].state[p][kind] = x.to(p.device)
    except Exception as error:  # of safetensors, JSON, or a missing name
        raise UserError(f"{path}: damaged ({error!r}); delete it, and the same command starts the "
                        "stage again") from error
    return progress["step"], progress["log"], {k: np.array(v) for k, v in progress["sums"].items()}
