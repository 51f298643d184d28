"""One training loop for every stage, resumable after a kill, and its optimiser."""

import json
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from common import write_file
from model import AUTOCAST
from ranks import everyones, rank, sum_gradients


class Muon(torch.optim.Optimizer):
    """Momentum of which every direction counts alike (Jordan et al. 2024), scaled to the step length of AdamW (Liu et al. 2025).

    `torch.optim.Muon(…, adjust_lr_fn="match_rms_adamw")`, but in float32 on a CPU, where bfloat16 without hardware for it is ten times as slow
    (`python bench.py muon`), and with all matrices of one shape at once.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), some in shapes.items():
                buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in some]
                for buffer, p in zip(buffers, some):
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                ahead = torch.stack([p.grad.lerp(buffer, group["momentum"]) for buffer, p in zip(buffers, some)])  # Nesterov's
                for p, update in zip(some, orthogonalised(ahead)):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)


def orthogonalised(matrices, iterations=5):
    """Matrices (n, A, B) -> the same with their singular values at about one (0.7 … 1.2), by Newton-Schulz iterations."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(AUTOCAST.get(matrices.device.type, torch.float32))
    wide = x.size(1) <= x.size(2)
    x = x if wide else x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT  # (n, min(A, B), min(A, B))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


def optimisers(model, lr, weight_decay):
    """Muon for the matrices inside the layers, AdamW for the rest (embedding, norms, head), at one learning rate.

    In-context copying, the bottleneck of SFT here, is learned in about half the updates of AdamW alone (LOG.md).
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    known = set(map(id, matrices))
    rest = [p for p in model.parameters() if id(p) not in known]
    return Muon(matrices, lr, weight_decay), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)


def optimise(model, loss_of, steps, lr, state, name, *, warmup=0.05, clip=1.0, weight_decay=0.01, averaged=0.0, save_every=10.0, logs=20, watch=None):
    """Train for `steps` updates of loss_of(step) -> (scalar loss, or None to skip; {metric: (sum, count)}). -> log

    Learning rate: linear warm-up over the fraction `warmup`, then linearly down to a tenth of `lr`. The weights it ends with are the last ones, or
    their mean after each of the last updates, the fraction `averaged` of them (Polyak and Juditsky 1992): a policy wins two to five points more by it
    (LOG.md). `loss_of` must depend on nothing but the step and the weights: then a run killed and continued from the file `state` (written every
    `save_every` seconds, removed by the caller) equals an undisturbed one. The log holds means of the metrics over `logs` stretches, or a few less.
    With several ranks `loss_of` gives this rank's part of the loss. `watch`() -> {metric: value} is asked at the end of each stretch.
    """
    optimizers = optimisers(model, lr, weight_decay)
    mean, first = [p.detach().clone() for p in model.parameters()], int((1 - averaged) * steps)  # the mean is of the weights after that many updates
    step, log, sums = _load_state(state, model, optimizers, mean)
    sums = {} if rank() else sums
    saved = time.monotonic()
    stretch = max(1, -(-steps // logs))
    model.train()
    with tqdm(total=steps, initial=step, desc=name, unit="update", dynamic_ncols=True) as bar:
        while step < steps:
            for group in (g for o in optimizers for g in o.param_groups):
                group["lr"] = lr * min((step + 1) / max(1, warmup * steps), 1 - 0.9 * step / steps)
            model.zero_grad(set_to_none=True)
            loss, metrics = loss_of(step)
            if loss is not None:
                loss.backward()
            step += 1
            learned, save = sum_gradients(model, loss is not None, rank() == 0 and (time.monotonic() - saved > save_every or step == steps))
            if learned:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                for optimizer in optimizers:
                    optimizer.step()
            for m, p in zip(mean, model.parameters()):
                m.lerp_(p.detach(), 1 / max(1, step - first))
            bar.update()
            sums = _add_up([sums, metrics])
            if step % stretch == 0 or step == steps:
                log.append({"step": step, **{k: total / n for k, (total, n) in _add_up(everyones(sums)).items() if n}, **(watch() if watch else {})})
                sums = {}
                bar.set_postfix({k: f"{v:.3f}" for k, v in list(log[-1].items())[1:5]})
            if save:
                everything = _add_up(everyones(sums))
                sums = {}
                if rank() == 0:
                    sums = everything
                    _save_state(state, model, optimizers, mean, step, log, sums)
                saved = time.monotonic()
    with torch.no_grad():
        for m, p in zip(mean, model.parameters()):
            p.copy_(m)
    model.eval()
    return log


def _add_up(parts):
    """Dictionaries of (sum, count) -> one."""
    out = {}
    for part in parts:
        for k, (total, n) in part.items():
            before = out.get(k, (0.0, 0))
            out[k] = (before[0] + float(total), before[1] + float(n))
    return out


def _save_state(path, model, optimizers, mean, step, log, sums):
    tensors = {f"weight {name}": p.detach().contiguous() for name, p in model.named_parameters()}
    for m, (name, p) in zip(mean, model.named_parameters()):
        tensors[f"mean {name}"] = m
        for optimizer in optimizers:
            for k, v in optimizer.state.get(p, {}).items():
                tensors[f"{k} {name}"] = v.contiguous()
    metadata = {"progress": json.dumps({"step": step, "log": log, "sums": sums})}
    write_file(path, lambda temporary: save_file(tensors, str(temporary), metadata=metadata))


def _load_state(path, model, optimizers, mean):
    """-> (step, log, sums) of an interrupted training, its weights, their mean and moments loaded; (0, [], {}) without one."""
    if not Path(path).exists():
        return 0, [], {}
    with safe_open(str(path), "pt") as f, torch.no_grad():
        stored = {}
        for full in f.keys():
            kind, name = full.split(" ", 1)
            stored.setdefault(name, {})[kind] = f.get_tensor(full)
        progress = json.loads(f.metadata()["progress"])
        owner = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
        for m, (name, p) in zip(mean, model.named_parameters()):
            p.copy_(stored[name].pop("weight"))
            m.copy_(stored[name].pop("mean"))
            if stored[name]:
                owner[id(p)].state[p] = {k: v.to(p.device) for k, v in stored[name].items()}
    return progress["step"], progress["log"], {k: tuple(v) for k, v in progress["sums"].items()}
