"""The part `sft` of tools/curves.py: success of π_0 against the number of demonstrations."""

from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from candidates import score_states
from eval import evaluate_policy
from fast_alfworld import COMPLETE, GAMES, fingerprint, fit_prior, games_for, split_dev
from fast_alfworld.cli import UserError, a_seed, a_temperature, at_least_one, between
from fast_alfworld.files import read_json
from rollout import states_of
from run import Run
from sft import Sft, demonstrations, token_loss, train_sft, train_tokenizer, untrained
from tools.experiment import (common_flags, list_of, new_figure, parser_of, percent, save_figure,
                              span, write_table)
from train import DEV_EPISODES
from utils import mine, pick_device, save_model, set_up_torch


def sft(argv):
    """π_0 by SFT: success on dev by the number of demonstrations.

    --loss and the flags after it are ablations. Rows of several of them may share an --out: the
    table and the figure show them side by side. The policies stay in OUT/policies.
    """
    parser, add = parser_of(sft)
    add("--demos", "250,500,1000,2000,4000,10000", "demonstrations", type=list_of(at_least_one))
    add("--seeds", "0", "seeds of demonstrations, training and episodes", type=list_of(a_seed))
    add("--loss", "tokens", "over the vocabulary, or over the candidates",
        choices=("tokens", "candidates"))
    add("--joined-names", False, "a name and its number are one token", action="store_true")
    add("--mistakes", 0.0, "chance of a random action, masked from the loss (DART)",
        type=between(0, 1))
    add("--noise", 0.0, "chance of a random action that is learned", type=between(0, 1))
    add("--obs-weight", Sft.obs_weight, "weight of the world's answers", type=between(0, 10))
    add("--lr", Sft.lr, "learning rate", type=between(1e-12, 10))
    add("--batch", Sft.batch, "demonstrations an update", type=at_least_one)
    add("--epochs", Sft.epochs, "times that each demonstration is seen", type=at_least_one)
    add("--weight-decay", Sft.weight_decay, "weight decay", type=between(0, 10))
    add("--dim", 128, "width of the transformer, a multiple of 32", type=between(32, 8192, int))
    add("--layers", 4, "its layers", type=between(1, 100, int))
    add("--games", GAMES[0], "where games come from", choices=GAMES)
    add("--n-generated", COMPLETE["train"], "generated train games", type=at_least_one)
    add("--temperature", 0.3, "of the episodes", type=a_temperature)
    add("--max-steps", 30, "actions after which an episode is cut", type=at_least_one)
    add("--episodes-per-game", DEV_EPISODES, "episodes of each dev game", type=at_least_one)
    add("--out", "runs/sft-curve", "results", metavar="DIR")
    common_flags(add)
    args = parser.parse_args(argv)
    if args.dim % 32:
        raise UserError(f"--dim {args.dim}: must be a multiple of 32")
    set_up_torch(args.threads)
    train, dev = split_dev(games_for(args.games, args.data, "train", args.n_generated)[0])
    out, shared = Path(args.out), ("temperature", "max_steps", "episodes_per_game")
    run = Run(out, {name: getattr(args, name) for name in shared},
              {"train": fingerprint(train), "dev": fingerprint(dev)})
    ablations = {name: getattr(args, name) for name in (
        "loss", "joined_names", "mistakes", "noise", "obs_weight", "lr", "batch", "epochs",
        "weight_decay", "dim", "layers")}
    variant = ", ".join(name.replace("_", " ") + f" {value}" * (value is not True)
                        for name, value in ablations.items() if value != parser.get_default(name))
    games = train, dev, fit_prior(train), pick_device(args.device)
    for n, seed in ((n, seed) for seed in args.seeds for n in args.demos):
        name = f"{n}-{seed}" + f"-{variant.replace(', ', '-').replace(' ', '-')}" * bool(variant)
        record = run.once(f"rows/{name}", lambda state: {
            "variant": variant or "plain", "settings": ablations, "demos": n, "seed": seed,
            **train_and_play(args, games, n, seed, state, out / "policies" / name)})
        if record["settings"] != ablations:
            raise UserError(f"{out}/rows/{name}.json is of other settings: use another --out")
    rows = [read_json(file) for file in sorted((out / "rows").glob("*.json"))]
    found = defaultdict(list)
    for row in rows:
        found[row["variant"], row["demos"]].append(row)
    table = [{"variant": v, "demos": n, "seeds": [row["seed"] for row in some],
               "success": [row["success"] for row in some],
               "mean_actions": [row["mean_actions"] for row in some]}
              for (v, n), some in sorted(found.items(), key=lambda f: (f[0][0] != "plain", f[0]))]
    write_table(out, table, [
        "SFT", "demonstrations", "seeds", "success on dev", "range", "actions"], lambda r: [
            r["variant"], f"{r['demos']:,}", str(len(r["seeds"])), percent(np.mean(r["success"])),
            span((min(r["success"]), max(r["success"]))), f"{np.mean(r['mean_actions']):.1f}"])
    figure, (axis,) = new_figure(1, title=f"π_0 on dev ({len(dev)} games, cap {args.max_steps}, "
                                          f"temperature {args.temperature:g})")
    for variant in dict.fromkeys(r["variant"] for r in table):
        own = [r for r in table if r["variant"] == variant]
        x, mean = [r["demos"] for r in own], np.array([np.mean(r["success"]) for r in own])
        ends = np.array([[min(r["success"]), max(r["success"])] for r in own]).T
        axis.errorbar(x, mean, np.abs(ends - mean), marker="o", capsize=3, label=variant)
    axis.set(xscale="log", xlabel="demonstrations", ylabel="success")
    axis.legend()
    save_figure(figure, out / "figure.png")


def train_and_play(args, games, n, seed, state, folder):
    """π_0 of n demonstrations as train.py makes it, saved to a folder. -> its evaluation on dev"""
    train, dev, prior, device = games
    tokenizer = train_tokenizer(train, prior, seed, args.joined_names)
    policy = untrained(len(tokenizer), args.dim, args.layers, seed).to(device)
    shown = demonstrations(train, prior, tokenizer, n, seed=seed, max_steps=args.max_steps,
                           mistakes=args.mistakes, noise=args.noise)
    settings = Sft(lr=args.lr, batch=args.batch, epochs=args.epochs, obs_weight=args.obs_weight,
                   weight_decay=args.weight_decay)
    loss = token_loss if args.loss == "tokens" else partial(
        candidate_loss, games={game.id: game for game in train}, tokenizer=tokenizer)
    log = train_sft(policy, shown, settings, seed, state, loss)
    save_model(folder, policy, tokenizer)
    return {"log": log, **evaluate_policy(
        policy, tokenizer, dev, episodes_per_game=args.episodes_per_game, seed=seed,
        temperature=args.temperature, max_steps=args.max_steps, name=f"{n} demonstrations")}


def candidate_loss(policy, batch, settings, games, tokenizer):
    """In the place of `sft.token_loss`: −log π(a|s) over the candidates, at temperature 1."""
    states, picked, total, part = [], [], sum(int(w.sum()) for _, w in batch), mine(batch)
    for b, (t, trained) in enumerate(part):
        every = states_of(t, games[t.game], tokenizer, b)
        states += [every[k] for k in np.nonzero(trained)[0]]
        picked += t.choice[trained].tolist()
    if not states:
        return None, {}
    log_pi = score_states(policy, [t.ids for t, _ in part], states)
    loss = -log_pi[torch.arange(len(picked)), torch.tensor(picked)].sum() / total
    return loss, {"loss": (loss.detach() * total, len(picked))}
