"""π_0: supervised fine-tuning on demonstrations of the scripted expert.

    python sft.py --demos 1000 --out runs/sft                       # train one π_0
    python sft.py --curve 250,500,1000,2000 --out runs/sft-curve    # success against the number of demonstrations

What a small model needs is many updates, not many demonstrations: `--demos` of them are told again and again until `--updates`
are done, each time with other instance numbers, because copying "the number that was seen" is what it finds hardest.

Before that come glances: single turns of the same demonstrations in which nothing but looking helps. Without them the question
"is the wanted thing in view?" is answered by what is usual, and it takes many times the updates to learn to look (LOG.md). With them come searches:
rooms gone through from place to place as listed, a step that is rare in whole episodes, and without which a policy may go where it has been.
"""

from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn import functional as F

from common import (RESUMED, Parser, UserError, a_seed, a_temperature, between, command_line, generator, key, pad, pick_device, read_json, save_model,
                    set_up_torch, whole_numbers, write_json)
from env import AlfworldEnv
from eval import evaluate_policy
from expert import Expert, demonstrate, fit_prior
from games import COMPLETE, game_flags, games_for, same_games, split_dev
from model import Config, Transformer
from names import shared_names
from optim import optimise
from ranks import mine, summed
from runs import settle_flags
from tellings import GLANCES, glances, searches, tellings
from tokenizer import PAD, Tokenizer, split_intro


def train_tokenizer(games, prior, seed, sample=1000):
    """Vocabulary from `sample` demonstrations with mistakes, and every base name with every number it has in any of the games."""
    counts, texts, env = {}, [], AlfworldEnv(30)
    for game in games:
        for name, n in game.counts.items():
            counts[name] = max(n, counts.get(name, 0))
    for number, i in enumerate(generator(seed, "tokenizer").permutation(len(games))[:sample]):
        rng = generator(seed, "tokenizer", number)
        demo = demonstrate(env, games[i], Expert(prior, rng), rng, mistakes=0.2)
        texts += split_intro(demo.observation)
        texts += [text for step in demo.steps for text in (step.action, step.observation)]
    return Tokenizer.train(texts, counts)


def sft_loss(logits, targets, weights, total=None):
    """Weighted cross-entropy of next tokens: logits (…, V), targets and weights (…); `total`: the weight of the whole batch. -> scalar"""
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return (loss * weights.flatten()).sum() / (weights.sum() if total is None else total)


def untrained(config, seed):
    """The transformer that π_0 starts from: random weights, named by the seed."""
    torch.manual_seed(key(f"policy {seed}"))
    return Transformer(config)


def train_sft(policy, tokenizer, games, prior, *, demos, updates, glanced, lr, batch, seed, state, mistakes, obs_weight, max_steps,
              searched=0, exchange=0.0, detours=0.0, sparse=0.0, steer=0.0, noise=0.0, weight_decay=0.01, own_names=False, name="SFT"):
    """Train on `glanced` updates of glances and of `searched` searches, then on `updates` of `batch` demonstrations,
    or more if there are more (`tellings`). -> log

    Unless `own_names`, a name's numbers share a part of their vectors meanwhile (names.py).
    """
    steps = glanced + max(updates, -(-demos // batch))
    device = policy.cos.device
    longest = policy.config.max_len + 1  # tokens; the last one is only predicted
    options = dict(demos=demos, seed=seed, mistakes=mistakes, max_steps=max_steps, noise=noise)

    def lessons_of(step):
        if step < glanced:
            looks = glances(games, prior, tokenizer, range(step * GLANCES, (step + 1) * GLANCES), **options)
            return looks + searches(games, tokenizer, range(step * searched, (step + 1) * searched), demos=demos, seed=seed)
        first = (step - glanced) * batch
        return tellings(games, prior, tokenizer, range(first, first + batch), obs_weight=obs_weight, exchange=exchange, detours=detours,
                        sparse=sparse, steer=steer, **options)

    def loss_of(step):
        episodes = [(ids[:longest], weights[:longest]) for ids, weights in lessons_of(step)]
        total = float(sum(weights[1:].sum() for _, weights in episodes))  # of the batch; this rank has a part of it
        episodes = mine(episodes)
        if not episodes:
            return None, {}
        ids = pad([e[0] for e in episodes], PAD).to(device)  # (B, S)
        weights = pad([e[1] for e in episodes], 0.0, torch.float32).to(device)
        lengths = torch.tensor([len(e[0]) - 1 for e in episodes], device=device)
        told = weights[:, 1:] > 0
        logits = policy.logits(policy.ragged(ids[:, :-1], lengths)[told])  # (tokens, V)
        targets, weights = ids[:, 1:][told], weights[:, 1:][told]
        loss = sft_loss(logits, targets, weights, total)
        right = (logits.argmax(-1) == targets)[weights == 1]
        return loss, {"loss": summed(loss.detach()), "accuracy": (right.sum(), right.numel())}

    with nullcontext() if own_names else shared_names(policy, tokenizer, seed):
        return optimise(policy, loss_of, steps, lr, state, name, weight_decay=weight_decay, averaged=0.5)


# --- command line ------------------------------------------------------------------------------------------------------

def main():
    parser = Parser(__doc__)
    parser.add_argument("--demos", type=int, default=400, help="demonstrations")
    parser.add_argument("--updates", type=int, default=1500, help="updates at least; demonstrations are told again with other numbers")
    parser.add_argument("--glances", type=int, default=400, help="updates before them on single turns of the demonstrations")
    parser.add_argument("--searches", type=int, default=60,
                        help="rooms of the demonstrations gone through in order, told in each of these updates too")
    parser.add_argument("--curve", type=whole_numbers, help="comma-separated numbers of demonstrations: train one policy for each", metavar="N,N,…")
    parser.add_argument("--out", default="runs/sft", help="folder to write to; policies already there are not trained again", metavar="DIR")
    game_flags(parser, "dev")
    parser.add_argument("--episodes-per-game", type=int, default=2, help="episodes a game")
    parser.add_argument("--temperature", type=a_temperature, metavar="X", default=0.3, help="sampling temperature of the evaluation")
    parser.add_argument("--max-steps", type=int, default=30, help="actions after which an episode is cut")
    parser.add_argument("--lr", type=between(1e-12, 10), metavar="X", default=2.5e-3, help="learning rate")
    parser.add_argument("--weight-decay", type=between(0, 10), metavar="X", default=0.5,
                        help="weight decay: the few demonstrations are told again and again, and would be learned by heart")
    parser.add_argument("--batch", type=int, default=16, help="demonstrations an update")
    parser.add_argument("--mistakes", type=between(0, 0.9), metavar="X", default=0.15, help="chance of a mistake at a step, shown but not taught")
    parser.add_argument("--exchange", type=between(0, 1), metavar="X", default=0.3,
                        help="share of the demonstrations in which the name of the wanted thing and another are exchanged throughout")
    parser.add_argument("--detours", type=between(0, 1), metavar="X", default=0.5,
                        help="share of the demonstrations told with a walk that leads nowhere, shown and not taught")
    parser.add_argument("--sparse", type=between(0, 1), metavar="X", default=0.7,
                        help="share of the demonstrations told in a room with less in it of what they do not need")
    parser.add_argument("--own-names", action="store_true",
                        help="no part of the embedding is shared among the numbers of a name, and of a number among names")
    parser.add_argument("--obs-weight", type=between(0, 10), metavar="X", default=0.3, help="weight of observation tokens in the loss")
    parser.add_argument("--seed", type=a_seed, default=0, help="names all randomness")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)", metavar="N")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    curve = args.curve or [args.demos]
    if min(*curve, args.updates, args.batch, args.episodes_per_game, args.max_steps) < 1 or min(args.glances, args.searches) < 0:
        raise UserError("--demos, --updates, --batch, --episodes-per-game and --max-steps must be at least 1, --glances and --searches at least 0")
    set_up_torch(args.threads)
    device = pick_device(args.device)
    everything, train_source = games_for(args.games, args.data, "train", COMPLETE["train"])
    train, _ = split_dev(everything)
    test, source = games_for(args.games, args.data, args.split, COMPLETE["train"] if args.split == "dev" else 200)
    prior, rows = fit_prior(train), []
    tokenizer = train_tokenizer(train, prior, args.seed)
    settle_flags(Path(args.out), {name: value for name, value in vars(args).items() if name not in ("demos", "curve", "device", "threads")})
    data = Path(args.out, "data.json")
    if data.exists() and not same_games(read_json(data)["train"], train_source):
        raise UserError(f"{args.out} has policies of other games ({read_json(data)['train']}; now {train_source}): another --out")
    write_json(data, {"train": train_source})
    for demos in curve:
        folder = Path(args.out, f"{demos}")
        if not (folder / "eval.json").exists():
            policy = untrained(Config(len(tokenizer)), args.seed).to(device)
            train_sft(policy, tokenizer, train, prior, demos=demos, updates=args.updates, glanced=args.glances, searched=args.searches, lr=args.lr,
                      batch=args.batch, seed=args.seed, mistakes=args.mistakes, obs_weight=args.obs_weight, max_steps=args.max_steps,
                      exchange=args.exchange, detours=args.detours, sparse=args.sparse, weight_decay=args.weight_decay, own_names=args.own_names,
                      state=folder / "state.safetensors", name=f"SFT {demos:,}")
            save_model(folder / "policy", policy, tokenizer)
            result = evaluate_policy(policy, tokenizer, test, episodes_per_game=args.episodes_per_game, temperature=args.temperature,
                                     max_steps=args.max_steps, seed=args.seed, name=f"{demos:,} demonstrations")
            write_json(folder / "eval.json", {"demos": demos, "split": args.split, "data": source, **result})
            (folder / "state.safetensors").unlink()
        rows.append(read_json(folder / "eval.json"))
    everything = sorted((read_json(file) for file in Path(args.out).glob("*/eval.json")), key=lambda r: r["demos"])
    write_json(Path(args.out, "curve.json"), [{k: r[k] for k in ("demos", "split", "success", "mean_actions", "inadmissible")} for r in everything])
    print(f"{source}, cap {args.max_steps}, temperature {args.temperature}, {args.episodes_per_game} episodes a game")
    print(f"{'demonstrations':>14}{'success':>10}{'actions':>10}{'inadmissible':>14}")
    for r in rows:
        print(f"{r['demos']:14,}{r['success']:10.1%}{r['mean_actions']:10.2f}{r['inadmissible']:14.1%}")


if __name__ == "__main__":
    command_line(main, RESUMED)
